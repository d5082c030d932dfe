"""The discrete adjoint where lags depend on the state.

Nodes follow one another, `t_{n+1} = t_n + h_n`, with `h_n` constant but for the last step, which ends at t1, and for
steps that end on a break point, where `h_n` is the root of

    g = t_n + h_n - tau_i(t_n + h_n, u_{n+1}, p) - xi_parent = 0.

With `T` the cotangent of `t_{n+1}`, and `hbar(lam)` that of the size through the step when `u_{n+1}` has cotangent
`lam`, the root hands on what its size would get, `mu = -(hbar(lam) + T) / (hbar(-tau_u) + 1 - tau_t)`:

    lam <- lam - mu tau_u,   T <- T + mu (1 - tau_t),   pbar -= mu tau_p,   xi_parent's cotangent -= mu.

This is the saltation `lam . (f- - f+) (-alpha_u) / alpha'` of the continuous problem, for the computed solution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..backend import Array, Record
from ..delay import LagField
from ..delaystate import Dependent, Side, solve_dependent
from ..errors import UnsupportedCombination
from ..integrate import Run
from ..system import Inputs
from . import base, delay


@dataclass(frozen=True)
class RecursiveCheckpointAdjoint(delay.RecursiveCheckpointAdjoint):
    """The discrete adjoint with break points found on the way; see the module."""

    modes: ClassVar[frozenset[str]] = frozenset({"reverse"})

    def plain(self, run: Run, x: Inputs) -> tuple[base.Outputs, base.Aux]:
        out, aux, _ = solve_dependent(run, x)
        return out, aux

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, base.Solved]:
        if run.dense:
            raise base.unsupported(self.name, "derivatives of sol(t) of a delay equation, whose steps move",
                                   "the same, with the times in saveat=")
        return solve_dependent(run, x)

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be = run.be
        x, (log, crossings), end, _ = residuals
        params = "theta" in wanted and bool(x.theta)
        eq = Dependent(run, x)
        lam, extra, ts_bar = delay.seeded(eq, log, ct)
        sweep = _Sweep(eq, log, crossings, params)
        theta = be.zeros(x.theta) if params else ()
        lam, theta, t0_bar, t1_bar = be.collect(sweep.back, (lam, theta, 0.0, 0.0), log,
                                                be.pending(log, extra))
        t0_bar, t1_bar = base.fold_times(run, ts_bar, t0_bar, t1_bar)
        return base.Cotangents(lam, theta, t0_bar, t1_bar, ts_bar, sweep.products(end.accepted), 0,
                               end.status)


    def tangent(self, run: Run, residuals: base.Solved, d: base.Tangents) -> Array:
        raise reverse_only(self.name)


class _Sweep(delay.Sweep):
    """One step of the reverse pass."""

    eq: Dependent

    def __init__(self, eq: Dependent, log: Any, crossings: Any, params: bool) -> None:
        super().__init__(eq, log, True, params)
        self.crossings = crossings
        run, x = eq.run, eq.x
        lags = run.kind.as_field(run, LagField.of(run))
        self.lag_pull = run.vjp.pullback(lags, x._replace(u0=_roomy(run, x.u0, eq.count)), time=True, params=params)

    def back(self, state: tuple, pending: Any, record: Record, ct: Record, log: Any) -> tuple[tuple, Any]:
        del log
        be, eq, c = self.run.be, self.eq, self.crossings
        lam, theta, later, t1_bar = state
        t, h, u, K = record
        sides = eq.sides(c, t, u)
        end = t + h
        u1 = eq.stepper.interpolate(record, [end])[0, :]
        for i in range(eq.count):
            n, m = eq.passed(c, t, i), eq.passed(c, end, i)
            landed = be.scalar(m) > be.scalar(n)

            def plain(lam: Array = lam, theta: Any = theta, later: Any = later) -> tuple:
                return lam, theta, later, 0.0 * end

            def rooted(i: int = i, lam: Array = lam, theta: Any = theta, later: Any = later) -> tuple:
                weights = be.unit_rows(1, self.n + eq.count, -(self.n + i), u)[0, :]
                z_bar, tau_p, tau_t = self.lag_pull(be.time(end), _roomy(self.run, u1, eq.count), -weights)
                lam_g = z_bar[:self.n]
                slope = self.size_only(record, lam_g, 0.0 * ct.k, sides) + 1.0 + tau_t
                mu = -(self.size_only(record, lam, ct.k, sides) + ct.h + later) / slope
                moved = tuple(be.xp.astype(mu * v, v.dtype) for v in tau_p)
                return lam + mu * lam_g, be.add(theta, moved), later + mu * (1.0 + tau_t), mu

            lam, theta, later, mu = be.either(landed, rooted, plain)
            parent = be.locate(self.log, sides[i].high + eq.close)
            pending = be.deposit(pending, parent, landed == be.truth(False),
                                 lambda mu=mu: Record(-mu, 0.0, 0.0 * u, 0.0 * K))
        bar, pending = self.through(record, ct, lam, theta, pending, sides)
        last = end >= eq.span.t1 - eq.close
        h_bar = be.choose(last, bar.h + later, 0.0 * bar.h)
        return (bar.lam, bar.theta, bar.t0 + later - h_bar, t1_bar + h_bar), pending

    def size_only(self, record: Record, lam: Array, k_bar: Array, sides: list[Side]) -> Any:
        """The cotangent of a step's size, with the past at rest."""
        be = self.run.be
        zero = Record(0.0, 0.0, 0.0 * record.u, k_bar)
        return self.through(record, zero, lam, (), None, sides)[0].h + 0.0 * be.dot(lam, lam)


def _roomy(run: Run, u: Array, count: int) -> Array:
    """`u` with room for the lags behind it."""
    return run.be.padded(u, u.shape[0] + count)


def reverse_only(name: str) -> UnsupportedCombination:
    return UnsupportedCombination(f"{name} has no forward mode where lags depend on the state",
                                  "break points that are roots are followed backwards only",
                                  "reverse mode: sa.gradient, jax.grad, backward()")


def refused(sensealg: Any) -> UnsupportedCombination:
    return UnsupportedCombination(f"{sensealg.name} does not go with lags that depend on the state",
                                  "the equations of the derivatives have advanced arguments that are not known before",
                                  "sensealg=RecursiveCheckpointAdjoint(), which auto takes")
