"""Products with derivatives of `f`, against exact answers and against each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..algorithms.discrete import RecursiveCheckpointAdjoint
from ..errors import UnsupportedCombination
from ..methods import Tsit5
from ..prepare import prepare
from ..problems import ODEProblem
from ..solve import solve
from ..uservjp import UserVJP
from ..vjp import VJP, FiniteDifferenceVJP
from .harness import Harness, matvec, require, transposed

# f = W z^2 + s t u + t^2 c, z = V u; three states, ten parameters in three leaves of different shapes.
W = [[0.5, -1.0], [2.0, 0.25], [-0.75, 1.5]]
V = [[1.0, 0.5, -0.25], [-0.5, 2.0, 0.75]]
S, C, T = 0.7, [1.0, -2.0, 0.5], 0.6
U = [0.4, -0.3, 0.9]
CT = [1.0, -0.5, 2.0]
DU = [[1.0, 0.25, -0.5], [0.0, 2.0, 1.0]]
DW = [[[0.1, 0.2], [0.3, -0.4], [0.5, 0.6]], [[1.0, 0.0], [-1.0, 2.0], [0.5, 0.5]]]
DV = [[[0.3, 0.1, -0.2], [0.5, 0.4, 0.6]], [[-1.0, 0.5, 0.0], [0.25, 0.0, 1.0]]]
DS, DT = [2.0, -1.0], [0.5, 3.0]


def problem(h: Harness) -> ODEProblem:
    c = h.array(C)

    def f(t: Any, u: Any, p: Any) -> Any:
        z = p["V"] @ u
        return p["W"] @ (z * z) + p["s"] * t * u + t * t * c

    def vjp(t: Any, u: Any, p: Any, lam: Any) -> Any:
        z = p["V"] @ u
        y = 2.0 * z * (lam @ p["W"])
        return (y @ p["V"] + p["s"] * t * lam,
                {"V": y[:, None] * u[None, :], "W": lam[:, None] * (z * z)[None, :], "s": t * h.be.xp.sum(lam * u)})

    return ODEProblem(f, h.array(U), (T, 1.0), {"V": h.array(V), "W": h.array(W), "s": h.array(S)}, vjp=vjp)


def exact_pullback() -> tuple[list[float], list[float], float]:
    """`(f_u^T ct, [V, W, s] parts of f_p^T ct, f_t . ct)`."""
    z = matvec(V, U)
    y = [2.0 * a * b for a, b in zip(z, matvec(transposed(W), CT), strict=True)]
    u_bar = [a + S * T * b for a, b in zip(matvec(transposed(V), y), CT, strict=True)]
    p_bar = [a * b for a in y for b in U] + [a * b * b for a in CT for b in z]
    p_bar.append(T * sum(a * b for a, b in zip(CT, U, strict=True)))
    t_bar = sum(w * (S * u + 2.0 * T * c) for w, u, c in zip(CT, U, C, strict=True))
    return u_bar, p_bar, t_bar


def exact_pushforward(i: int) -> list[float]:
    z = matvec(V, U)
    dz = [a + b for a, b in zip(matvec(V, DU[i]), matvec(DV[i], U), strict=True)]
    out = matvec(W, [2.0 * a * b for a, b in zip(z, dz, strict=True)])
    out = [a + b for a, b in zip(out, matvec(DW[i], [a * a for a in z]), strict=True)]
    return [a + S * T * du + DS[i] * T * u + DT[i] * (S * u + 2.0 * T * c)
            for a, du, u, c in zip(out, DU[i], U, C, strict=True)]


def value() -> list[float]:
    return [a + S * T * u + T * T * c
            for a, u, c in zip(matvec(W, [v * v for v in matvec(V, U)]), U, C, strict=True)]


def tolerance(vjp: VJP, time: bool) -> float:
    """Round-off for exact products; central differences of float64 keep about ten digits, `UserVJP` uses them in t."""
    return 1e-8 if isinstance(vjp, FiniteDifferenceVJP) or (time and isinstance(vjp, UserVJP)) else 1e-13


def bound(h: Harness, vjp: VJP) -> tuple[Any, Any] | None:
    """Run and inputs with this choice, or None where the backend cannot serve it and says so before any work."""
    prob = problem(h)
    run, x = prepare(prob, Tsit5(), backend=h.name)
    if not vjp.missing(run):
        return replace(run, vjp=vjp), x
    try:
        solve(prob, Tsit5(), sensealg=RecursiveCheckpointAdjoint(vjp=vjp), backend=h.name)
    except UnsupportedCombination:
        return None
    raise AssertionError(f"{vjp.name} cannot serve here, but solve did not refuse it")


def check_pullback(h: Harness, vjp: VJP) -> None:
    """Transposed products are exact in state, parameters and time; what is not wanted is left out."""
    if (found := bound(h, vjp)) is None:
        return
    run, x = found
    u_bar, p_bar, t_bar = exact_pullback()
    t, u, ct = h.be.time(h.be.scalar(h.array(T))), h.array(U), h.array(CT)
    for time in (False, True):
        for params in (False, True):
            tol = tolerance(vjp, time)
            got = vjp.pullback(run, x, time=time, params=params)(t, u, ct)
            h.close(got[0], u_bar, tolerance(vjp, False), f"f_u^T ct, time={time}, params={params}")
            require(len(got[1]) == (3 if params else 0), f"{len(got[1])} parameter parts, params={params}")
            if params:
                require([tuple(v.shape) for v in got[1]] == [(2, 3), (3, 2), ()], "parameter parts have other shapes")
                h.close(got[1], p_bar, tolerance(vjp, False), f"f_p^T ct, time={time}")
            if time:
                h.close(got[2], t_bar, tol, f"f_t . ct, params={params}")


def check_pushforward(h: Harness, vjp: VJP) -> None:
    """Products along two directions at once are exact, with and without a direction in time."""
    if (found := bound(h, vjp)) is None:
        return
    run, x = found
    t, u = h.be.time(h.be.scalar(h.array(T))), h.array(U)
    push = vjp.pushforward(run, x, (h.array(DV), h.array(DW), h.array(DS)))
    for time in (False, True):
        f, df = push(t, u, h.array(DU), h.array(DT) if time else None)
        h.close(f, value(), 1e-14, "f")
        still = [DT[i] * (S * U[m] + 2.0 * T * C[m]) * (not time) for i in range(2) for m in range(3)]
        want = [v - w for v, w in zip(exact_pushforward(0) + exact_pushforward(1), still, strict=True)]
        h.close(df, want, tolerance(vjp, time), f"df, time={time}")


def check_transposition(h: Harness, vjp: VJP) -> None:
    """`<pullback(ct), d> == <ct, pushforward(d)>`."""
    if (found := bound(h, vjp)) is None:
        return
    run, x = found
    t, u, ct = h.be.time(h.be.scalar(h.array(T))), h.array(U), h.array(CT)
    u_bar, theta_bar, t_bar = vjp.pullback(run, x, time=True)(t, u, ct)
    _, df = vjp.pushforward(run, x, (h.array(DV), h.array(DW), h.array(DS)))(t, u, h.array(DU), h.array(DT))
    bars = h.numbers(u_bar) + h.numbers(theta_bar) + h.numbers(t_bar)
    for i in range(2):
        d = DU[i] + [v for r in DV[i] for v in r] + [v for r in DW[i] for v in r] + [DS[i], DT[i]]
        left = sum(a * b for a, b in zip(bars, d, strict=True))
        right = sum(a * b for a, b in zip(CT, h.numbers(df[i, :]), strict=True))
        require(abs(left - right) <= tolerance(vjp, True) * max(1.0, abs(right)), f"{left!r} != {right!r}, row {i}")
