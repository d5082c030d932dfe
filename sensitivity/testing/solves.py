"""Whole solves and their gradients, against closed forms and against digits from 50-digit arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

from ..algorithms.base import SensitivityAlgorithm, Tangents
from ..algorithms.discrete import RecursiveCheckpointAdjoint
from ..control import FixedStep
from ..errors import SolveError, UnsupportedCombination
from ..methods import Dopri8, Tsit5
from ..prepare import prepare
from ..problems import ODEProblem
from ..retcode import RetCode
from ..solve import solve
from .harness import Harness, require

LV_VALUE = 44.757797332691967
LV_P = [-7.5558620739812872, -16.824915246867327, 5.11140385697990578, -37.335193444966730]
LV_U0 = [-7.4651778929941023, -1.93713346614898805]

K, U0, T0, T1 = [0.5, -0.25], [1.5, 0.75], 0.3, 2.1


@cache  # one `f`, so that backends compile it once
def lotka_volterra(h: Harness, dtype: Any = None) -> ODEProblem:
    """`x' = x (a - b y)`, `y' = -y (c - d x)`, in operators only, so that any AD sees through."""
    swap, sign = h.array([[0.0, 1.0], [1.0, 0.0]], dtype), h.array([1.0, -1.0], dtype)
    return ODEProblem(lambda t, u, p: sign * u * (p[0::2] - p[1::2] * (swap @ u)), h.array([1.0, 1.0], dtype),
                      (0.0, 10.0), h.array([1.5, 1.0, 3.0, 1.0], dtype))


def decay(h: Harness, t0: float = T0, t1: float = T1) -> ODEProblem:
    """`u' = -k t u`, with time in it, so that derivatives in time have more than one part."""
    return ODEProblem(_decay, h.array(U0), (h.array(t0), h.array(t1)), h.array(K))


def _decay(t: Any, u: Any, p: Any) -> Any:
    return -p * t * u


def decayed(t: float, t0: float = T0) -> list[float]:
    return [u * math.exp(-k * (t * t - t0 * t0) / 2) for u, k in zip(U0, K, strict=True)]


def serves(h: Harness, algorithm: SensitivityAlgorithm, solve_it: Any) -> Any:
    """What `solve_it()` gives, or None if the algorithm cannot work on this backend and refuses."""
    expected = h.refuses(algorithm)
    try:
        found = solve_it()
    except UnsupportedCombination:
        if expected:
            return None
        raise
    require(not expected, f"{algorithm.name} cannot work on {h.name}, but did not refuse")
    return found


# -- solutions --------------------------------------------------------------------------------------------------


def check_solution(h: Harness) -> None:
    """Closed form at unordered times, forwards and backwards, with dense output."""
    for t0, t1 in ((T0, T1), (T1, T0)):
        times = [1.0, t0, t1, 1.0, 1.7]
        sol = solve(decay(h, t0, t1), Dopri8(), saveat=h.array(times), rtol=1e-10, atol=1e-12, dense=True,
                    backend=h.name)
        require(sol.retcode == RetCode.Success, f"retcode {sol.retcode!r}")
        h.close(sol.t, times, 0.0, "sol.t")
        # The dense output of Dopri8 has order 5, the steps order 8.
        h.close(sol.u, [v for t in times for v in decayed(t, t0)], 1e-8, "sol.u")
        h.close(sol(h.array(1.2)), decayed(1.2, t0), 1e-8, "sol(t)")
        h.close(sol(h.array([1.2, 0.4])), decayed(1.2, t0) + decayed(0.4, t0), 1e-8, "sol([t, t])")


def check_no_time(h: Harness) -> None:
    """`t0 == t1`: the state is `u0`, nothing depends on `p`."""
    r = h.gradient(decay(h, 1.0, 1.0), Tsit5(), RecursiveCheckpointAdjoint(), h.array([[2.0, -3.0]]))
    h.close(r.solution.u, U0, 0.0, "sol.u")
    h.close(r.u0, [2.0, -3.0], 0.0, "u0")
    h.close(r.p, [0.0, 0.0], 0.0, "p")


def check_step_limit(h: Harness) -> None:
    """A limit that is too small is a status, raised or returned as asked, and never a silent end."""
    sol = solve(lotka_volterra(h), Tsit5(), max_steps=5, on_failure="return", backend=h.name)
    require(sol.retcode == RetCode.MaxSteps, f"retcode {sol.retcode!r}")
    require(0 < h.numbers(sol.stats.naccept)[0] <= 5, f"{sol.stats.naccept} steps with max_steps=5")
    try:
        solve(lotka_volterra(h), Tsit5(), max_steps=5, backend=h.name)
    except SolveError as e:
        require(e.retcode == RetCode.MaxSteps, f"retcode {e.retcode!r}")
        require(e.t is not None and 0.0 < e.t < 10.0, f"t={e.t!r}")
    else:
        raise AssertionError("no SolveError")
    sol = solve(lotka_volterra(h), Tsit5(), max_steps=5, on_failure="nan", backend=h.name)
    require(all(math.isnan(v) for v in h.numbers(sol.u)), "on_failure='nan' left numbers")


def check_evaluations(h: Harness) -> None:
    """`stats.nfe` follows from the number of attempts, and equals a counter in `f` where the backend calls `f`."""
    for method, controller, dt in ((Tsit5(), None, None), (Dopri8(), None, None), (Tsit5(), FixedStep(), 0.25)):
        calls = [0]
        prob = lotka_volterra(h)
        inner = prob.f

        def counted(t: Any, u: Any, p: Any, inner: Any = inner, calls: list = calls) -> Any:
            calls[0] += 1
            return inner(t, u, p)

        run, x = prepare(prob.remake(f=counted), method, rtol=1e-4, dt=dt, controller=controller, backend=h.name,
                         probe="off")
        calls[0] = 0
        with h.be.quiet():
            _, aux = RecursiveCheckpointAdjoint().plain(run, x)
        attempts = sum(h.numbers((aux.accepted, aux.rejected)))
        expected = (1 if dt else 2) + (run.stepper(prob.f).stages - 1) * attempts
        require(h.numbers(aux.nfe) == [expected], f"nfe {aux.nfe}, expected {expected} for {attempts} attempts")
        require(h.be.traced or calls[0] == expected, f"nfe {aux.nfe}, f was called {calls[0]} times")


def check_complex(h: Harness) -> None:
    """A complex state: `u' = i w u`."""
    if not h.be.complex:
        return
    u0 = h.array([1.0 + 0.5j, -2.0j], h.be.xp.complex128)
    sol = solve(ODEProblem(lambda t, u, p: (1j * p) * u, u0, (0.0, 1.5), h.array([1.0, -0.5])), Dopri8(), rtol=1e-10,
                atol=1e-12, backend=h.name)
    require(sol.u.dtype == h.be.xp.complex128, f"dtype {sol.u.dtype}")
    want = [(1.0 + 0.5j) * complex(math.cos(1.5), math.sin(1.5)), -2.0j * complex(math.cos(0.75), -math.sin(0.75))]
    h.close(h.be.xp.real(sol.u), [v.real for v in want], 1e-9, "real part")
    h.close(h.be.xp.imag(sol.u), [v.imag for v in want], 1e-9, "imaginary part")


# -- gradients --------------------------------------------------------------------------------------------------


def check_lotka_volterra(h: Harness, algorithm: SensitivityAlgorithm) -> None:
    """Gradient of the sum of all states at t = 1..10, in the state and the parameters."""
    ts = [float(t) for t in range(1, 11)]
    r = serves(h, algorithm, lambda: h.gradient(
        lotka_volterra(h), Dopri8(), algorithm, h.array([[1.0, 1.0]] * 10), saveat=h.array(ts), rtol=1e-9, atol=1e-9))
    if r is None:
        return
    # Measured errors of the built-in backends are below 2e-7; the adjoint error is a multiple of the tolerance.
    h.close(r.value, LV_VALUE, 1e-7, "value")
    h.close(r.p, LV_P, 1e-6, "p")
    h.close(r.u0, LV_U0, 1e-6, "u0")


def check_times(h: Harness, algorithm: SensitivityAlgorithm) -> None:
    """Gradients in `t0`, `t1` and unordered save times with repeats; forwards and backwards."""
    for t0, t1 in ((T0, T1), (T1, T0)):
        times = [1.0, t0, t1, 1.0, 1.7]
        w = [[1.0, -2.0], [0.5, 3.0], [-1.5, 2.5], [4.0, 0.25], [2.0, 1.0]]
        rows = list(zip(w, times, strict=True))
        options: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
        r = serves(h, algorithm, lambda t0=t0, t1=t1, times=times, w=w, options=options: h.gradient(
            decay(h, t0, t1), Tsit5(), algorithm, h.array(w), saveat=h.array(times),
            wrt=("u0", "p", "t0", "t1", "saveat"), **options))
        if r is None:
            return
        half = [(t * t - t0 * t0) / 2 for t in times]
        h.close(r.u0, [sum(a[m] * math.exp(-K[m] * x) for a, x in zip(w, half, strict=True)) for m in range(2)], 1e-7,
                "u0")
        h.close(r.p, [sum(-a[m] * x * decayed(t, t0)[m] for (a, t), x in zip(rows, half, strict=True))
                      for m in range(2)], 1e-7, "p")
        h.close(r.saveat, [_moved(a, t, t, t0) for a, t in rows], 1e-6, "saveat")
        h.close(r.t0, -sum(_moved(a, t, t0, t0) for a, t in rows), 1e-6, "t0")
        h.close(r.t1, 0.0, 1e-6, "t1")

        r = h.gradient(decay(h, t0, t1), Tsit5(), algorithm, h.array(w[:1]), wrt=("t0", "t1"), **options)
        h.close([*h.numbers(r.t0), *h.numbers(r.t1)], [-_moved(w[0], t1, t0, t0), _moved(w[0], t1, t1, t0)], 1e-7,
                "t0, t1 without saveat")
        require(r.u0 is None and r.p is None and r.saveat is None, "something came back that was not asked for")

        r = h.gradient(decay(h, t0, t1), Tsit5(), algorithm, h.array(w[:3]), saveat=3, wrt=("t0", "t1"), **options)
        ts, part = (t0, 0.5 * (t0 + t1), t1), (0.0, 0.5, 1.0)
        h.close(r.t0, sum((1.0 - c) * _moved(a, t, t, t0) - _moved(a, t, t0, t0)
                          for a, t, c in zip(w[:3], ts, part, strict=True)), 1e-6, "t0 with saveat=3")
        h.close(r.t1, sum(c * _moved(a, t, t, t0) for a, t, c in zip(w[:3], ts, part, strict=True)), 1e-6,
                "t1 with saveat=3")


def _moved(w: list[float], t: float, s: float, t0: float) -> float:
    """`w . u(t)` times the rate at time s: the derivative in t for s = t, minus that in t0 for s = t0."""
    return sum(-a * k * s * v for a, k, v in zip(w, K, decayed(t, t0), strict=True))


def check_tree(h: Harness, algorithm: SensitivityAlgorithm) -> None:
    """A dict for a state, with a matrix and a number in it; parameters in a tuple, with leaves that are no floats."""

    def f(t: Any, u: Any, p: Any) -> Any:
        (k, rates), *_ = p
        return {"x": -k * u["x"], "m": rates[:, None] * u["m"]}

    m0, rates, w = [[1.0, -2.0, 0.5], [3.0, 1.5, -1.0]], [0.5, -0.75], [[1.0, 2.0, -3.0], [0.5, 4.0, 1.0]]
    u0 = {"x": h.array(2.0), "m": h.array(m0)}
    p = ((h.array(0.25), h.array(rates)), "a word", h.be.asarray(7, dtype=h.be.xp.int64), None)
    weights = {"x": h.array([3.0]), "m": h.array([w])}
    r = serves(h, algorithm, lambda: h.gradient(ODEProblem(f, u0, (0.0, 1.2), p), Tsit5(), algorithm, weights,
                                                rtol=1e-10, atol=1e-12))
    if r is None:
        return
    grow = [math.exp(1.2 * v) for v in rates]
    require(tuple(r.solution.u["m"].shape) == (1, 2, 3), f"shape {tuple(r.solution.u['m'].shape)}")
    require(tuple(r.u0["m"].shape) == (2, 3) and tuple(r.u0["x"].shape) == (), "u0 has other shapes")
    h.close(r.u0["x"], 3.0 * math.exp(-0.3), 1e-8, "u0['x']")
    h.close(r.u0["m"], [w[i][j] * grow[i] for i in range(2) for j in range(3)], 1e-8, "u0['m']")
    h.close(r.p[0][0], -1.2 * 3.0 * 2.0 * math.exp(-0.3), 1e-8, "p[0][0]")
    h.close(r.p[0][1], [1.2 * grow[i] * sum(a * b for a, b in zip(w[i], m0[i], strict=True)) for i in range(2)], 1e-8,
            "p[0][1]")
    passed = h.numbers(r.p[2]) == [7.0] and r.p[1] == "a word" and r.p[3] is None
    require(passed, "leaves that are no floats did not pass through")


def check_single(h: Harness, algorithm: SensitivityAlgorithm) -> None:
    """float32 stays float32, in the state and in every gradient."""
    single = h.be.xp.float32
    # Undone in float32, a contracting solution is soon lost.
    end = 0.5 if algorithm.undoes else 2.0
    prob = lotka_volterra(h, single).remake(tspan=(0.0, end))
    weights = h.array([[1.0, 1.0]] * 2, single)
    saveat = h.array([0.5 * end, end])
    r = serves(h, algorithm, lambda: h.gradient(prob, Tsit5(), algorithm, weights, saveat=saveat, rtol=2e-5,
                                                atol=2e-5))
    if r is None:
        return
    for name, x in (("sol.u", r.solution.u), ("u0", r.u0), ("p", r.p)):
        require(x.dtype == single, f"{name} is {x.dtype}")
    double = h.gradient(lotka_volterra(h).remake(tspan=(0.0, end)), Tsit5(), algorithm, h.array([[1.0, 1.0]] * 2),
                        saveat=saveat, rtol=2e-5, atol=2e-5)
    # float32 round-off; where products are central differences of float32, four digits are left of them.
    tol = 3e-4 if "reverse" in h.be.modes else 1e-2
    h.close(r.p, h.numbers(double.p), tol, "p")
    h.close(r.u0, h.numbers(double.u0), tol, "u0")


def check_adjoint_identity(h: Harness, algorithm: SensitivityAlgorithm) -> None:
    """`<reverse(ct), d> == <ct, tangent(d)>` to round-off, for algorithms that are exact for the computed solution."""
    if not (algorithm.exact and algorithm.boundary):
        return
    wanted = frozenset({"u0", "theta", "t0", "t1", "saveat"})
    times = h.array([7.0, 0.5, 10.0, 0.0, 0.5])
    # At loose tolerances steps that can be undone are not stable here.
    options: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8} if algorithm.undoes else {"rtol": 1e-4, "atol": 1e-6}
    for saveat, k in ((None, 1), (times, 5), (4, 4)):
        alg, run, x = h.prepared(lotka_volterra(h), Tsit5(), replace(algorithm, vjp=h.vjp()), saveat=saveat, **options)
        with h.be.quiet():
            out, aux, residuals = alg.forward(run, x, wanted)
            require(h.numbers(aux.status) == [0.0], f"the solve ended with {aux.status!r}")
            require(out.u.shape[0] == k, f"{out.u.shape[0]} rows, expected {k}")
            ct = [[0.5 + i, -1.0 + 0.25 * i * i] for i in range(k)]
            bar = alg.reverse(run, residuals, out._replace(u=h.array(ct)), wanted)
            du, dp = [[0.3, -0.2], [0.1, 1.0]], [[0.1, -0.5, 0.7, 0.2], [1.0, 0.0, -0.25, 0.5]]
            dt0, dt1, ds = [0.4, -1.0], [0.7, 0.2], [[0.1 * i - 0.2, 0.3 - 0.1 * i] for i in range(5)]
            rows = h.array([[r[i] for r in ds] for i in range(2)]) if run.saves == "ts" else None
            d = Tangents(h.array(du), (h.array(dp),), h.array(dt0), h.array(dt1), rows)
            moved = alg.tangent(run, residuals, d)
        flat = h.numbers(moved)
        bars = h.numbers(bar.u0) + h.numbers(bar.theta) + h.numbers((bar.t0, bar.t1))
        if run.saves == "ts":
            bars += h.numbers(bar.saveat)
        for i in range(2):
            along = du[i] + dp[i] + [dt0[i], dt1[i]] + ([r[i] for r in ds] if run.saves == "ts" else [])
            left = sum(a * b for a, b in zip(bars, along, strict=True))
            outputs = flat[i * 2 * k:(i + 1) * 2 * k]
            right = sum(a * b for a, b in zip([v for r in ct for v in r], outputs, strict=True))
            # Products by central differences agree with each other to ten digits only.
            tol = 1e-11 if "reverse" in h.be.modes else 1e-6
            if algorithm.undoes:
                # As near as the states that it remade came to the initial one, which is known.
                (missed,) = h.numbers(bar.drift)
                require(missed < 1e-6, f"undone to the start, u0 is missed by {missed!r}")
                tol = max(tol, 10.0 * missed)
            scale = sum(abs(a * b) for a, b in zip(bars, along, strict=True))
            require(abs(left - right) <= tol * max(1.0, scale), f"{left!r} != {right!r}, saveat={saveat}, row {i}")


def check_budget(h: Harness) -> None:
    """With three states kept, the gradient that keeping every step gives; only steps are taken again for it."""
    ts, w = h.array([1.0, T0, T1, 1.0, 1.7]), h.array([[1.0, -2.0], [0.5, 3.0], [-1.5, 2.5], [4.0, 0.25], [2.0, 1.0]])
    names = ("u0", "p", "t0", "t1", "saveat")
    few, whole = (h.gradient(decay(h), Tsit5(), RecursiveCheckpointAdjoint(checkpoints=c), w, saveat=ts, wrt=names,
                             rtol=1e-8) for c in (3, None))
    for name in names:
        h.close(getattr(few, name), h.numbers(getattr(whole, name)), 1e-12, name)
    nfe, before = h.numbers((few.stats.nfe, whole.stats.nfe))
    require(nfe > before and (nfe - before) % 6 == 0, f"{nfe} evaluations, {before} with every step kept")


def check_attached(h: Harness, algorithm: SensitivityAlgorithm) -> None:
    """The framework's own AD through `solve` gives what `gradient` gives; nothing to do where there is no AD."""
    be, xp = h.be, h.be.xp
    prob, ts = lotka_volterra(h), h.array([1.0, 3.0, 2.0])
    if be.loss_vjp(lambda v: xp.sum(v * v), (prob.u0,)) is None:
        require(h.refuses(algorithm) or algorithm.boundary, f"{algorithm.name} needs AD, which the backend lacks")
        return
    algorithm = replace(algorithm, vjp=h.vjp())

    def loss(u0: Any, p: Any) -> Any:
        sol = solve(prob.remake(u0=u0, p=p), Tsit5(), saveat=ts, sensealg=algorithm, rtol=1e-8, atol=1e-8)
        return xp.sum(sol.u * h.array([[1.0, 2.0], [-1.0, 0.5], [3.0, 1.0]]))

    found = serves(h, algorithm, lambda: be.loss_vjp(loss, (prob.u0, prob.p)))
    require(found is not None, "the framework's AD does not see through solve")
    r = h.gradient(prob, Tsit5(), algorithm, h.array([[1.0, 2.0], [-1.0, 0.5], [3.0, 1.0]]), saveat=ts, rtol=1e-8,
                   atol=1e-8)
    # One algorithm by two doors. A compiled and an eager run may round differently; an algorithm that is not exact
    # may integrate more columns, with other steps, when it cannot know what will be asked for.
    tol = 1e-9 if algorithm.exact else 1e-6
    h.close(found[0], h.numbers(r.value), tol, "value")
    h.close(found[1], [*h.numbers(r.u0), *h.numbers(r.p)], tol, "u0, p")
