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

from ..backend import Record
from ..errors import UnsupportedCombination
from ..integrate import Run, span
from ..stepper import Adjoint
from ..system import Inputs
from . import base
from .frozen import frozen_tangent
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
    second_order: ClassVar[bool] = True
    algebraic: ClassVar[bool] = True
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

        silent = be.silent_end(extra)
        if run.events:
            solved = residuals._replace(log=log)
            end_state, t1_bar, nvjp, status = sweep(run, x, stepper, solved, pull, ct, extra, state, params)
            nvjp = nvjp + (stepper.fsal and 1 - silent)
        else:
            end_state = be.replay(back, state, log, extra)
            t1_bar, nvjp, status = end_state.h, stepper.products(end.accepted, silent), end.status
        lam, kappa, theta, t0_bar, h_bar = end_state
        u0, _ = stepper.start(be.time(s.t0), x.u0)
        if kappa is not None:
            u_bar, theta_bar, t_bar = stepper.first_vjp(pull, be.time(s.t0), u0, kappa)
            lam, theta, t0_bar = lam + u_bar, be.add(theta, theta_bar), t0_bar + t_bar
        if stepper.algebraic:
            lam, theta_bar, t_bar = stepper.start_vjp(pull, be.time(s.t0), u0, lam)
            theta, t0_bar = be.add(theta, theta_bar), t0_bar + t_bar
        t0_bar, t1_bar = base.fold_times(run, ts_bar, t0_bar - h_bar, t1_bar) if time else (0.0, 0.0)
        return base.Cotangents(lam, theta, t0_bar, t1_bar, ts_bar, nvjp, 0, status)

    def tangent(self, run: Run, residuals: base.Solved, d: base.Tangents) -> Any:
        """Tangents through the frozen steps; their cost is one product per stage and direction."""
        return frozen_tangent(run, residuals, d)
