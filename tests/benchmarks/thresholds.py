"""Where the thresholds of `sensitivity/rules.py` and `sensitivity/recommend.py` come from: each is measured here.

    python tests/benchmarks/thresholds.py

Work is counted in evaluations of `f`, so that the numbers are the same on every machine, but for two lines in process
time: linear algebra and Newton's iteration cost too, and are why `STIFF` is more than the counts say. NumPy, a minute.
"""

from __future__ import annotations

import math
import sys
import time
import warnings

import numpy as np

import sensitivity as sa
from sensitivity import rules


def work(prob, alg, **options):
    """Evaluations of `f` that a solve makes, those inside Jacobians too."""
    calls = [0]

    def f(t, u, p):
        calls[0] += 1
        return prob.f(t, u, p)

    sa.solve(prob.remake(f=f), alg, probe="off", **options)
    return calls[0]


def seconds(prob, alg):
    """Process time of a solve, the least of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        sa.solve(prob, alg)
        times.append(time.process_time() - start)
    return min(times)


def crossing(first, second, low, high):
    """Where `first(x)` becomes more than `second(x)`, by bisection on a logarithmic scale."""
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if first(middle) > second(middle) else (middle, high)
    return math.sqrt(low * high)


def relaxing(n, rate):
    """`n` entries that follow a cosine, all at different rates up to `rate`."""
    rates = np.geomspace(1.0, rate, n)
    return sa.ODEProblem(lambda t, u, p: -rates * (u - math.cos(3.0 * t)), np.ones(n), (0.0, 1.0), None)


def stiff():
    """Decay times span from which Kvaerno5 takes less work than Tsit5."""
    found = {}
    for n in (2, 5, 10, 20, 40):
        found[n] = crossing(lambda d, n=n: work(relaxing(n, d), sa.Tsit5()),
                            lambda d, n=n: work(relaxing(n, d), sa.Kvaerno5()), 50.0, 1e6)
    slope, base = np.polyfit(list(found), list(found.values()), 1)
    yield "STIFF, STIFF_PER_ENTRY", f"{base:.0f} + {slope:.0f} n", f"{rules.STIFF:g} + {rules.STIFF_PER_ENTRY:g} n"
    for n, d in found.items():
        yield f"  n = {n}", f"{d:.0f}", f"{rules.stiff_from(n):g}"
    for n in (2, 10):
        at = crossing(lambda d, n=n: seconds(relaxing(n, d), sa.Tsit5()),
                      lambda d, n=n: seconds(relaxing(n, d), sa.Kvaerno5()), 50.0, 1e6)
        yield f"  n = {n}, in time", f"{at:.0f}", f"{rules.stiff_from(n):g}"


def trial():
    """Explicit steps until the first transient is over and stability holds them."""
    for rtol in (1e-4, 1e-6, 1e-8, 1e-10):
        prob = sa.ODEProblem(lambda t, u, p: -1e6 * (u - 1.0), np.array([0.0]), (0.0, 1.0), None)
        sol = sa.solve(prob.remake(tspan=(0.0, 1e-3)), sa.Tsit5(), rtol=rtol, atol=rtol, saveat="steps")
        held = np.diff(np.asarray(sol.t)) * 1e6 > 1.0
        steps = int(np.argmax(held)) + 1
        yield f"TRIAL, LONG_TRIAL: rtol {rtol:g}", str(steps), f"{rules.TRIAL}, {rules.LONG_TRIAL}"


def tight():
    """Tolerance from which Dopri8 takes less work than Tsit5."""
    def f(t, u, p):
        return np.array([1.5 * u[0] - u[0] * u[1], u[0] * u[1] - 3.0 * u[1]])

    prob = sa.ODEProblem(f, np.ones(2), (0.0, 10.0), None)
    at = crossing(lambda r: work(prob, sa.Tsit5(), rtol=1.0 / r, atol=1.0 / r),
                  lambda r: work(prob, sa.Dopri8(), rtol=1.0 / r, atol=1.0 / r), 1e3, 1e12)
    yield "TIGHT", f"{1.0 / at:.1e}", f"{rules.TIGHT:g}"


def lost():
    """Digits of contraction at which a solve that goes backwards has no gradient of 1e-3 left."""
    for dtype, bits in (("float64", 64), ("float32", 32)):
        def error(digits, dtype=dtype):
            rate = digits * math.log(10.0)
            linear = sa.ODEProblem(lambda t, u, p: -p * u, np.array([1.0], dtype), (0.0, 1.0), np.array(rate, dtype),
                                   vjp=lambda t, u, p, w: (-p * w, -np.sum(u * w)))
            tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == "float64" else {"rtol": 2e-5, "atol": 1e-7}
            r = sa.gradient(linear, sa.Tsit5(), lambda sol: sol.u[-1, 0], wrt="p", dloss=lambda s: np.ones_like(s.u),
                            sensealg=sa.BacksolveAdjoint(checkpointing=False), on_failure="return", **tolerance)
            exact = -math.exp(-rate)
            return abs(float(r.p) - exact) / abs(exact)

        at = next((d for d in np.arange(0.5, 16.0, 0.25) if not error(d) < 1e-3), 16.0)
        yield f"LOST, {bits} bits", f"{at:.2f}", f"{rules.LOST[bits]:g}"


def few(n=20):
    """Work of tangents through the steps over that of the transposed products, where products are differences and `u0`
    is fixed: less than one for any number of parameters. What bounds them is `n` numbers a column in every stage, and
    `FEW` is the published threshold (Ma et al. 2021)."""
    def gradient_work(m, sensealg, alg):
        shape = np.cos(np.outer(np.arange(n), np.arange(1, m + 1)))
        calls = [0]

        def f(t, u, p):
            calls[0] += 1
            return -u + shape @ p

        prob = sa.ODEProblem(f, np.zeros(n), (0.0, 1.0), np.ones(m))
        sa.gradient(prob, alg, lambda sol: sol.u.sum(), wrt="p", dloss=lambda sol: np.ones_like(sol.u),
                    sensealg=sensealg, probe="off")
        return calls[0]

    vjp = sa.FiniteDifferenceVJP()
    for m in (n // 2, n, 5 * n):
        tangents, transposed = (gradient_work(m, kind(vjp=vjp), sa.Tsit5()) for kind in (
            sa.ForwardADSensitivity, sa.RecursiveCheckpointAdjoint))
        yield f"FEW: ratio at n = {n}, {m} columns", f"{tangents / transposed:.2f}", f"{rules.FEW}"
    for m in (n // 2, n, 5 * n):
        forward, backward = (gradient_work(m, sensealg, sa.ScipySolver("RK45")) for sensealg in (
            sa.ForwardSensitivity(jvp=vjp), sa.GaussAdjoint(vjp=vjp)))
        yield f"  the same, stages hidden, {m} columns", f"{forward / backward:.2f}", f"min(n, {rules.FEW})"


def main():
    warnings.simplefilter("ignore", sa.SensitivityWarning)
    print(f"{'threshold':<36}{'measured':>16}{'in use':>16}")
    for measure in (stiff, trial, tight, lost, few):
        for name, measured, used in measure():
            print(f"{name:<36}{measured:>16}{used:>16}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
