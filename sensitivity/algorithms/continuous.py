"""The walk that the continuous adjoints share: the costate, from the last stop back to the start.

With `G = sum_i l_i(u(t_i))` and `lam(t)` the total derivative of G with respect to `u(t)`,

    lam' = -f_u(t, u, p)^T lam,   lam(t1+) = 0,   lam(t_i-) = lam(t_i+) + l_{i,u},
    dG/du0 = lam(t0),   dG/dp = mu(t0),   mu' = -f_p(t, u, p)^T lam,   mu(t1) = 0,
    dG/dt_i = l_{i,u} . u'(t_i),   dG/dt0 = -lam(t0) . u'(t0),   dG/dt1 = l_u . u'(t1) for an output at t1.

Stops are the save times, the checkpoints and `t0`, sorted from the last to the first. Between two of them, on one leg,
nothing jumps; there the algorithms differ, in where `u(t)` comes from and how the integral for `dG/dp` is made
(`ContinuousAdjoint.cross`). At a stop the state of the forward solve is known, and `lam` takes up the loss.

References: Cao, Li, Petzold, Serban 2003, SIAM J. Sci. Comput. 24, eq. (2.11); Serban, Hindmarsh 2005 for checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..backend import Array, Scalar
from ..control import PIController
from ..errors import InputError, TimesError, UnsupportedCombination
from ..integrate import Run, Span, span
from ..methods import Method
from ..system import Inputs
from . import base, consistent
from .frozen import frozen_tangent
from .points import budget, width
from .walk import Kept, Leg, Way, interpolated, least
from .walkevents import over_events

EQUALLY_SPACED = 10  # checkpoints when nobody said how many, and the only output is the end
MOST = 128  # checkpoints that a memory budget buys; more would cost more restarts than they save


@dataclass(frozen=True)
class ContinuousAdjoint(base.SensitivityAlgorithm):
    """Base of the continuous adjoints.

    Parameters
    ----------
    alg : method, optional
        Solves the adjoint equation; that of the forward solve if not given.
    rtol, atol : float, optional
        Tolerances of the backward solve; those of the forward solve if not given.
    """

    alg: Any = field(default=None, kw_only=True)
    rtol: float | None = field(default=None, kw_only=True)
    atol: float | None = field(default=None, kw_only=True)

    events: ClassVar[bool] = True
    restarts: ClassVar[bool] = True
    checkpointing: ClassVar[Any] = False
    checkpoints: ClassVar[Any] = None
    references: ClassVar[tuple[str, ...]] = ("cao2003",)

    def __post_init__(self) -> None:
        if self.alg is not None and not isinstance(self.alg, Method):
            raise InputError(f"alg={self.alg!r} is not a method", "it solves the adjoint equation", "alg=sa.Dopri5()")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value > 0.0 and math.isfinite(value)):
                raise InputError(f"{name}={value!r} is not a positive number",
                                 "it is the tolerance of the backward solve", f"{name}=1e-8")

    def refuse(self, run: Run) -> None:
        if run.dense and run.method.one_step:
            raise base.unsupported(self.name, "dense=True, whose cotangents lie at no save time",
                                   "RecursiveCheckpointAdjoint(), or ask for the times with saveat=")
        method = self.alg or run.method
        if missing := method.missing(run.be):
            raise UnsupportedCombination(f"{self.name}(alg={method!r}) cannot run here", missing, "alg=sa.Dopri5()")
        if run.mass is not None and not method.algebraic:
            raise UnsupportedCombination(f"{self.name}(alg={method.name}()) cannot use a singular mass matrix",
                                         "the costate has constraints as the state has", "alg=sa.Kvaerno5()")
        if run.controller.adaptive and not method.adaptive:
            raise UnsupportedCombination(f"{self.name}(alg={method.name}()) has no step size",
                                         "the method has no error estimate, and the forward solve no fixed dt",
                                         "alg=sa.Dopri5(), or controller=FixedStep() with dt=")

    # -- forward ------------------------------------------------------------------------------------------------

    @property
    def stores(self) -> bool:
        """Whether the forward solve keeps states at the stops only."""
        return bool(self.checkpointing is True or (self.checkpointing == "auto" and self.checkpoints is not None))

    def points(self, run: Run, x: Inputs, s: Span) -> Any:
        """Times of the checkpoints beside the save times."""
        be, given = run.be, self.checkpoints
        if isinstance(given, tuple):
            low, high = (be.concrete(v) for v in (s.t0, s.t1))
            for t in given:
                if low is not None and high is not None and not min(low, high) <= t <= max(low, high):
                    raise TimesError(f"checkpoints holds {t:g}, outside tspan=({low:g}, {high:g})",
                                     "no state is known there", "leave it out")
            return [be.scalar(t) for t in given]
        if given == "saveat" or (given is None and run.saves is not None):
            return []
        count = EQUALLY_SPACED if given is None else given
        if isinstance(given, str):
            row = x.u0.shape[0] * width(run, x.u0)
            count = min(int(budget(given) / (2 * row)), MOST)
            if count < 1:
                raise InputError(f"checkpoints={given!r} holds no state", f"one state has {row} bytes",
                                 f"checkpoints='{max(1, 4 * row // 1000)}kB'")
        return be.spread(s.t0, s.t1, [i / count for i in range(1, count)]) if count > 1 else []

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Kept]:
        del wanted
        be = run.be
        if run.dense:
            raise base.unsupported(self.name, "dense=True, whose cotangents lie at no save time",
                                   "RecursiveCheckpointAdjoint(), or ask for the times with saveat=")
        if not self.stores or run.saves == "steps":
            out, aux, solved = base.solve_forward(interpolated(run), x, keep=True)
            return out, aux, Kept(solved.x, None if self.stores else solved.log, solved.end, aux.ts, out.u)
        s = span(be, x.t0, x.t1)
        ts = [s.t1] if run.saves is None else base.save_times(run, x, s)
        points, k = self.points(run, x, s), len(ts)
        if not len(points):
            out, aux, solved = base.solve_forward(run, x, keep=False)
            return out, aux, Kept(solved.x, None, solved.end, ts, out.u)
        every = be.joined(ts, points)
        sampled = x._replace(saveat=be.time_vector(every, x.u0))
        out, aux, solved = base.solve_forward(base.replace(run, saves="ts"), sampled, keep=False)
        u = out.u
        if run.saves is None:
            u = be.xp.concat([solved.end.u[None, :], u[1:, :]])
            every = be.joined([solved.end.t], points)
        return (out._replace(u=u[:k, :]), aux._replace(ts=[solved.end.t] if run.saves is None else ts),
                Kept(solved.x._replace(saveat=x.saveat), None, solved.end, every, u))

    # -- reverse ------------------------------------------------------------------------------------------------

    def cross(self, way: Way, leg: Leg, t: Scalar, u: Array) -> Leg:
        """Carry `lam` and `mu` back from `leg.t` to the stop at `t`, whose state `u` is known."""
        raise NotImplementedError

    def reverse(self, run: Run, residuals: Kept, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        if run.saves == "steps" and base.times_wanted(wanted):
            raise base.unsupported(self.name, "derivatives in t0 and t1 of saveat='steps', whose times move with them",
                                   "RecursiveCheckpointAdjoint()")
        be, xp, kept = run.be, run.be.xp, residuals
        x, n = kept.x, kept.x.u0.shape[0]
        way = self._way(run, kept, wanted)
        s = span(be, x.t0, x.t1)
        if run.events:
            return over_events(self, run, kept, way, ct, wanted)
        size = sum(base.size_of(v) for v in x.theta) if way.params else 0
        mu, seen, jumps, matrices = be.padded(0.0 * x.u0[:0], size), ct.u, 0, 0
        if run.mass is not None:
            jumps, stepper = ct.u.shape[0], base.bound(run, x)
            matrices = jumps * stepper.matrices
            theta0 = be.zeros(x.theta) if way.params else ()
            theta0, seen, _ = consistent.pulled(be, stepper, way.pull(way.params), theta0, kept.ts[:jumps],
                                                kept.u[:jumps, :], ct.u)
            mu = way.flat(theta0, x.u0) if way.params else mu
        silent = [0.0 * kept.u[ct.u.shape[0]:, :], 0.0 * x.u0[None, :]]
        rows = xp.concat([xp.concat([seen, *silent]), xp.concat([kept.u, x.u0[None, :]])], axis=1)
        ts, rows = be.sort_down(be.joined(kept.ts, [s.t0]), rows, s.direction)
        first = s.direction * abs(kept.end.h if way.adjoint.dt is None else way.adjoint.dt)
        start = Leg(ts[0], rows[0][:n], mu, rows[0][n:], -first, s.direction * abs(kept.end.h), jumps, 0, 0, 0.0, 0.0,
                    (matrices, matrices, jumps))

        def segment(leg: Leg, stop: tuple) -> tuple[Leg, int]:
            t, row = stop
            goal = be.choose(leg.status == 0, t, leg.t)
            leg = self.cross(way, leg, goal, row[n:])
            return leg._replace(t=t, lam=leg.lam + row[:n]), 0

        leg, _ = be.scan(segment, start, (ts[1:], rows[1:]))
        theta = be.split(leg.mu, x.theta) if way.params else ()
        t0_bar, t1_bar, ts_bar, nfe = self.moved(run, kept, ct, leg.lam, wanted)
        return base.Cotangents(leg.lam, theta, t0_bar, t1_bar, ts_bar, leg.nvjp, leg.nfe + nfe, leg.status,
                               *self.measured(leg), leg.algebra)

    def measured(self, leg: Leg) -> tuple[Scalar | None, Scalar | None]:
        """How far the state integrated backwards was off, where an algorithm does that."""
        del leg
        return None, None

    def moved(self, run: Run, kept: Kept, ct: base.Outputs, lam: Array, wanted: frozenset[str]) -> tuple:
        """Cotangents of `t0`, `t1` and the save times, and how often `f` was evaluated for them."""
        if not base.times_wanted(wanted):
            return 0.0, 0.0, None, 0
        be, x, k = run.be, kept.x, ct.u.shape[0]
        s, stepper = span(be, x.t0, x.t1), base.bound(run, x)
        cost = stepper.derivative_cost

        def speed(t: Scalar, u: Array, bar: Array) -> Scalar:
            return be.dot(bar, stepper.derivative(be.time(t), u))

        t0_bar = -speed(s.t0, x.u0, lam)
        if run.saves is None:
            return t0_bar, speed(s.t1, kept.end.u, ct.u[0, :]), None, 2 * cost
        _, ts_bar = be.scan(lambda _, i: (0, speed(i[0], i[1], i[2])), 0, (kept.ts[:k], kept.u[:k, :], ct.u))
        return *base.fold_times(run, ts_bar, t0_bar, 0.0)[:2], ts_bar, (k + 1) * cost

    def _way(self, run: Run, kept: Kept, wanted: frozenset[str]) -> Way:
        """The settings of the backward solve: no stops, no progress, steps from the controller."""
        x, be = kept.x, run.be
        run = interpolated(run)
        method = self.alg or run.method
        controller = PIController() if method.adaptive and self.alg is not None else run.controller
        adjoint = base.replace(run, saves=None, dense=False, method=method, controller=controller, tstops=(),
                               dt=None if controller.adaptive else run.dt, progress=None, norm=None)
        rtol, atol = (least(be, v) if own is None else own for v, own in ((x.rtol, self.rtol), (x.atol, self.atol)))
        s = span(be, x.t0, x.t1)
        log = kept.log
        if log is not None:
            log = be.reopen(log, base.bound(run, x).restage)
        return Way(run, adjoint, x, log, s.direction, "theta" in wanted and bool(x.theta), rtol, atol)

    # -- tangents -----------------------------------------------------------------------------------------------

    def tangent(self, run: Run, residuals: Kept, d: base.Tangents) -> Array:
        """Tangents through the accepted steps; a solve that kept none of them is repeated."""
        if not run.method.one_step:
            raise base.unsupported(f"the forward mode of {self.name}", f"{run.method.name}, whose steps are not known",
                                   "ForwardSensitivity()")
        run = interpolated(run)
        solved = base.Solved(residuals.x, residuals.log, residuals.end, residuals.u)
        if solved.log is None:
            solved = base.solve_forward(run, residuals.x, keep=True)[2]
        return frozen_tangent(run, solved, d)
