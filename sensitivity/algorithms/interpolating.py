"""Interpolating adjoint: integrate the costate backwards along the dense forward solution.

With `G = sum_i l_i(u(t_i))` and `lam` the total derivative of G with respect to `u(t)`,

    lam' = -f_u(t, u(t), p)^T lam,   mu' = -f_p(t, u(t), p)^T lam,   lam(t1+) = 0, mu(t1) = 0,
    lam(t_i-) = lam(t_i+) + l_{i,u},   dG/du0 = lam(t0),   dG/dp = mu(t0),
    dG/dt_i = l_{i,u} . f(t_i),   dG/dt0 = -lam(t0) . f(t0, u0),   dG/dt1 = l_u . f(t1) if an output sits at t1.

`u(t)` comes from the forward solve's dense output, so the error is that of the two solves and of the interpolant.
Reference: Cao, Li, Petzold, Serban 2003, SIAM J. Sci. Comput. 24, eq. (2.11); Rackauckas et al. 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..backend import Array
from ..errors import InputError
from ..integrate import Run, evaluations, integrate, span
from ..system import Inputs
from . import base
from .frozen import frozen_tangent


@dataclass(frozen=True)
class InterpolatingAdjoint(base.SensitivityAlgorithm):
    """Continuous adjoint along the dense forward solution.

    Parameters
    ----------
    vjp : VJP, optional
    checkpointing : "auto" or False
    checkpoints : None
        The forward solution is kept dense.
    rtol, atol : float, optional
        Tolerances of the backward solve; those of the forward solve if not given.
    """

    checkpointing: Any = "auto"
    checkpoints: None = None
    rtol: float | None = None
    atol: float | None = None

    second_order: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("cao2003", "rackauckas2020")

    def __post_init__(self) -> None:
        for name, given, allowed in (("checkpointing", self.checkpointing, ("auto", False)),
                                     ("checkpoints", self.checkpoints, (None,))):
            if not any(given is v or given == v for v in allowed if isinstance(given, type(v))):
                raise InputError(f"{name}={given!r} is not available for InterpolatingAdjoint",
                                 "the forward solution is kept dense", f"{name}={allowed[0]!r}")

    def refuse(self, run: Run) -> None:
        if run.dense:
            raise base.unsupported(self.name, "dense=True, whose cotangents lie at no save time",
                                   "RecursiveCheckpointAdjoint(), or ask for the times with saveat=")

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, base.Solved]:
        del wanted
        return base.solve_forward(_dense(run), x, keep=True)

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be, xp = run.be, run.be.xp
        if run.saves == "steps" and base.times_wanted(wanted):
            raise base.unsupported(self.name, "derivatives in t0 and t1 of saveat='steps', whose times move with them",
                                   "RecursiveCheckpointAdjoint()")
        run = _dense(run)
        (x, log, end), ahead = base.opened(run, residuals)
        n = x.u0.shape[0]
        params = "theta" in wanted and bool(x.theta)
        s = span(be, x.t0, x.t1)
        u_of = be.lookup(ahead.interpolate, log)
        pull = run.vjp.pullback(run, x, params=params)

        def augmented(t: Any, z: Array) -> Array:
            lam_bar, theta_bar, _ = pull(t, u_of(be.scalar(t)), z[:n])
            parts = [lam_bar, *(xp.astype(xp.reshape(v, (-1,)), z.dtype) for v in theta_bar)]
            return -(xp.concat(parts) if len(parts) > 1 else parts[0])

        stepper = run.method.bind(be, augmented, False)
        tolerances = (x.rtol if self.rtol is None else self.rtol, x.atol if self.atol is None else self.atol)
        size = n + (sum(base.size_of(v) for v in x.theta) if params else 0)
        norm = _worst_part(be, n) if size > n else be.rms
        adjoint = _backwards(run)

        if run.saves is None:
            ts: Any = [end.t]
        elif run.saves == "steps":
            ts = be.nodes(log, end.u, end.t)[1]
        else:
            ts = base.save_times(run, x, s)
        ts_sorted, ct_sorted = be.sort_down(ts, ct.u, s.direction)

        def segment(state: tuple, item: tuple) -> tuple[tuple, Any]:
            t, z, h, accepted, rejected, status = state
            t_next, ct_next = item
            leg = span(be, t, t_next)._replace(direction=-s.direction)
            last, _ = integrate(adjoint, stepper, leg, z, *tolerances, norm=norm, h=h)
            z = last.u + be.padded(ct_next, size)
            return (t_next, z, last.h, accepted + last.accepted, rejected + last.rejected,
                    be.greatest(status, last.status)), 0

        first = abs(be.last_size(log)) if adjoint.dt is None else adjoint.dt
        state = (ts_sorted[0], be.padded(ct_sorted[0], size), -s.direction * first, 0, 0, 0)
        state, _ = be.scan(segment, state, (ts_sorted[1:], ct_sorted[1:]))
        (_, z, _, accepted, rejected, status), _ = segment(state, (s.t0, 0.0 * x.u0))
        total = end._replace(accepted=accepted, rejected=rejected)
        nvjp = evaluations(adjoint, stepper, total, started=True) + (len(ts_sorted) - 1) * stepper.fsal
        lam = z[:n]
        theta = be.split(z[n:], x.theta) if params else ()
        t0_bar = t1_bar = 0.0
        ts_bar = None
        nfe = 0
        if base.times_wanted(wanted):
            rhs = run.field.bind(be, x.theta, x.constants)
            t0_bar = -be.dot(lam, rhs(be.time(s.t0), x.u0))
            nfe = 1
            if run.saves is None:
                t1_bar, nfe = be.dot(ct.u[0, :], rhs(be.time(s.t1), end.u)), 2
            elif run.saves != "steps":
                _, ts_bar = be.scan(lambda _, i: (0, be.dot(i[1], rhs(be.time(i[0]), u_of(i[0])))), 0, (ts, ct.u))
                t0_bar, t1_bar = base.fold_times(run, ts_bar, t0_bar, t1_bar)
        return base.Cotangents(lam, theta, t0_bar, t1_bar, ts_bar, nvjp, nfe, status)

    def tangent(self, run: Run, residuals: base.Solved, d: base.Tangents) -> Array:
        """Tangents through the accepted steps."""
        return frozen_tangent(_dense(run), residuals, d)


def _dense(run: Run) -> Run:
    """The same run with a dense-output tableau."""
    return base.replace(run, interpolated=True)


def _backwards(run: Run) -> Run:
    """Settings of the backward solve: no stops, no progress, steps from the controller."""
    dt = None if run.controller.adaptive else run.dt
    return base.replace(run, saves=None, dense=False, dt=dt, tstops=(), progress=None, norm=None)


def _worst_part(be: Any, n: int) -> Callable[[Array], Any]:
    """The larger of two norms, so that many parameters do not dilute the costate's error."""
    return lambda e: be.greatest(be.rms(e[:n]), be.rms(e[n:]))

