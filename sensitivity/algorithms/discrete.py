"""Discrete adjoint: the exact gradient of the computed solution, with the accepted steps frozen.

The forward pass keeps every accepted step `(t_n, h_n, u_n, K_n)`. Reverse, from the last step to the first,

    lam_n = (d u_{n+1} / d u_n)^T lam_{n+1} + cotangents of the outputs inside step n,
    pbar += (d u_{n+1} / d p)^T lam_{n+1},

with the products made stage by stage (`Stepper.vjp`). Step sizes are constants: no controller, no rejected
step is differentiated. Times move the mesh: every node moves with `t0`, and the last step takes up the change of
`t1`, so that `dG/dt0 = sum_n tbar_n - hbar_N`, `dG/dt1 = hbar_N` are exact for the computed solution as well.

References: Hager 2000; Sanz-Serna 2016 (SIAM Review 58); Zhuang et al. 2020 for frozen accepted steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..backend import Array, Record
from ..errors import UnsupportedCombination
from ..integrate import Run, span
from ..stepper import Adjoint, Tangent
from ..system import Inputs
from . import base
from .jumps import sweep


@dataclass(frozen=True)
class RecursiveCheckpointAdjoint(base.SensitivityAlgorithm):
    """Exact discrete adjoint; stores all accepted steps.

    Parameters
    ----------
    checkpoints : None
        How many states to keep; None keeps every accepted step, the one schedule there is so far.
    memory : None
        A budget such as "2GB"; None sets none.
    vjp : VJP, optional

    Gives derivatives with respect to `u0`, `p`, `t0`, `t1` and `saveat`, in reverse and forward mode. Memory: the
    stages of every accepted step, `(s + 1) n` numbers each.

    References: Hager 2000, Numer. Math. 87; Sanz-Serna 2016, SIAM Rev. 58, section 3.
    """

    vjp: Any = field(default=None, kw_only=True)
    checkpoints: None = None
    memory: None = None

    exact: ClassVar[bool] = True
    events: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("hager2000", "sanzserna2016")

    def __post_init__(self) -> None:
        for name, given in (("checkpoints", self.checkpoints), ("memory", self.memory)):
            if given is not None:
                raise UnsupportedCombination(f"{name}={given!r} is not available for {self.name}",
                                             "every accepted step is kept; no schedule recomputes any so far",
                                             f"{name}=None, and saveat= or shorter spans where memory is short")

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, base.Solved]:
        del wanted
        return base.solve_forward(run, x, keep=True)

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be = run.be
        (x, log, end), stepper = base.opened(run, residuals)
        params = "theta" in wanted and bool(x.theta)
        time = base.times_wanted(wanted) or bool(run.events)
        s = span(be, x.t0, x.t1)
        pull = run.vjp.pullback(run, x, time=time, params=params)
        lam, extra, ts_bar = 0.0 * x.u0, None, None
        if run.saves is None:
            lam = ct.u[0, :]
        elif run.saves == "steps":
            extra, lam = be.nodes_vjp(log, ct.u)
        else:
            ts = base.save_times(run, x, s)
            extra, ts_bar = be.sample_vjp(stepper.interpolate_vjp(time), log, ts, ct.u, s.direction)
        if ct.nodes is not None:
            extra = be.stacked_vjp(log, ct.nodes, ct.stages, extra)
        state = Adjoint(lam, be.nothing(lam) if stepper.fsal else None, be.zeros(x.theta) if params else (), 0.0, 0.0)

        def back(state: Adjoint, record: Record, out: Any, last: Any) -> Adjoint:
            return stepper.vjp(pull, record, out, last, time, state)

        if run.events:
            solved = residuals._replace(log=log)
            end_state, t1_bar, nvjp, status = sweep(run, x, stepper, solved, pull, ct, extra, state, params)
        else:
            end_state = be.replay(back, state, log, extra)
            t1_bar, nvjp, status = end_state.h, end.accepted * (stepper.stages - stepper.fsal), end.status
        lam, kappa, theta, t0_bar, h_bar = end_state
        if kappa is not None:
            u_bar, theta_bar, t_bar = pull(be.time(s.t0), x.u0, kappa)
            lam, theta, t0_bar = lam + u_bar, be.add(theta, theta_bar), t0_bar + t_bar
            nvjp = nvjp + 1 - be.silent_end(extra)
        t0_bar, t1_bar = base.fold_times(run, ts_bar, t0_bar - h_bar, t1_bar) if time else (0.0, 0.0)
        return base.Cotangents(lam, theta, t0_bar, t1_bar, ts_bar, nvjp, 0, status)

    def tangent(self, run: Run, residuals: base.Solved, d: base.Tangents) -> Array:
        """Tangents through the frozen steps; their cost is one product per stage and direction."""
        return frozen_tangent(run, residuals, d)


def frozen_tangent(run: Run, solved: base.Solved, d: base.Tangents) -> Array:
    """Push directions through the accepted steps of a solve: `(m, k, n)` at its outputs."""
    be, xp = run.be, run.be.xp
    (x, log, end), stepper = base.opened(run, solved)
    m, n = d.u0.shape
    timed = run.saves not in (None, "steps")
    moving = not (d.t0 is None and d.t1 is None and d.saveat is None)
    zero = d.u0[:, 0] * 0.0
    dt0, dt1 = (zero if d.t0 is None else d.t0), (zero if d.t1 is None else d.t1)
    push = run.vjp.pushforward(run, x, d.theta)
    s = span(be, x.t0, x.t1)
    slope0 = push(be.time(s.t0), x.u0, d.u0, dt0 if moving else None)[1] if stepper.fsal else None

    def ahead(state: Tangent, record: Record, last: Any) -> tuple[Tangent, Record]:
        dh = be.choose(last, dt1 - dt0, zero) if moving else None
        new, dK = stepper.jvp(push, record, dt0 if moving else None, dh, state)
        kept = Record(record.t, record.h, xp.reshape(state.u, (m * n,)), xp.reshape(dK, (stepper.stages, m * n)))
        return new, kept

    state, tangents = be.follow(ahead, Tangent(d.u0, slope0), log)
    if run.saves is None:
        return state.u[:, None, :]
    if run.saves == "steps":
        du = be.nodes(tangents, xp.reshape(state.u, (m * n,)), end.t)[0]
        return xp.permute_dims(xp.reshape(du, (-1, m, n)), (1, 0, 2))
    ts = base.save_times(run, x, s)
    du0 = xp.reshape(d.u0, (m * n,))
    du = be.sample(stepper.interpolate, tangents, ts, du0, s.direction)
    du = xp.permute_dims(xp.reshape(du, (-1, m, n)), (1, 0, 2))
    if moving and timed:
        speed = be.sample(stepper.slope, log, ts, 0.0 * x.u0, s.direction)
        ds = save_time_tangents(run, d, dt0, dt1) - dt0[:, None]
        du = du + ds[:, :, None] * speed[None, :, :]
        t_last = end.t - be.last_size(log)
        values, slopes = stepper.interpolate, stepper.slope

        def stretch(record: Record, ts: Any) -> Array:
            """Change of the output per change of the last step's size."""
            inside = be.choose(record.t == t_last, 1.0, 0.0)
            theta = be.vector([(v - record.t) / record.h for v in ts], record.u)
            change = (values(record, ts) - record.u[None, :]) / record.h - theta[:, None] * slopes(record, ts)
            return inside * change

        change = be.sample(stretch, log, ts, 0.0 * x.u0, s.direction)
        du = du + (dt1 - dt0)[:, None, None] * change[None, :, :]
    return du


def save_time_tangents(run: Run, d: base.Tangents, dt0: Array, dt1: Array) -> Array:
    """Directions of the save times, `(m, k)`."""
    if isinstance(run.saves, int):
        w = run.be.vector(base.fractions(run.saves), d.u0)
        return dt0[:, None] * (1.0 - w)[None, :] + dt1[:, None] * w[None, :]
    return 0.0 * dt0[:, None] if d.saveat is None else d.saveat
