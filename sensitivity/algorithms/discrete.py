"""Discrete adjoint: the exact gradient of the computed solution, with the accepted steps frozen.

The forward pass keeps every accepted step `(t_n, h_n, u_n, K_n)`, or only some of the `u_n` (see `budget`). Reverse,
from the last step to the first,

    lam_n = (d u_{n+1} / d u_n)^T lam_{n+1} + cotangents of the outputs inside step n,
    pbar += (d u_{n+1} / d p)^T lam_{n+1},

with the products made stage by stage (`Stepper.vjp`). Step sizes are constants: no controller, no rejected
step is differentiated. Times move the mesh: every node moves with `t0`, and the last step takes up the change of
`t1`, so that `dG/dt0 = sum_n tbar_n - hbar_N`, `dG/dt1 = hbar_N` are exact for the computed solution as well.

References: Hager 2000; Sanz-Serna 2016 (SIAM Review 58); Zhuang et al. 2020 for frozen accepted steps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..backend import Record
from ..errors import InputError
from ..estimates import Effort, Work
from ..integrate import Run, span
from ..retcode import RetCode
from ..stepper import Adjoint
from ..system import Inputs
from . import base, budget, consistent
from .frozen import frozen_tangent
from .jumps import sweep


@dataclass(frozen=True)
class RecursiveCheckpointAdjoint(base.SensitivityAlgorithm):
    """Exact discrete adjoint, within a budget of memory.

    Parameters
    ----------
    checkpoints : int, optional
        How many states to keep; steps between them are taken again in the reverse pass. None, without `memory`, keeps
        every accepted step.
    memory : str or int, optional
        A budget such as "200MB" or "2GiB", or a number of bytes: every accepted step is kept while it fits, else
        states between blocks of steps, which take up to half of it. Not counted are 16 bytes for each step, the states
        before events, the output and the gradient itself. Of a delay equation, stretches of history are kept in place
        of states, see `sensitivity.segments`.
    spill : bool or path
        Put the states into a memory-mapped file, in this folder or in the system's own, which is deleted when nothing
        needs it any more; every step is then taken again once. For NumPy and PyTorch.
    vjp : VJP, optional

    Gives derivatives with respect to `u0`, `p`, `t0`, `t1` and `saveat`, in reverse and forward mode. Memory without
    a budget: the stages of every accepted step, `(s + 1) n` numbers each. With one, the gradient is the same, and
    accepted steps only are taken again, as they were, with the same Newton iterations: `sensitivity.checkpoint` says
    how many, `stats` counts their evaluations and factorisations. The states to keep are chosen as the solve goes on
    (Wang, Moin, Iaccarino 2009), or beforehand where the number of steps is known (Griewank, Walther 2000). Forward
    mode takes all steps once more and keeps them.

    Raises
    ------
    InputError
        `checkpoints` is no positive integer, `memory` no size or too little for one step, `spill` no folder, or
        several of them are given.
    UnsupportedCombination
        A budget with `dense=True` or a method that hides its steps; `spill` on a backend that compiles its loops. For
        a delay equation also `spill`, lags that depend on the state, and `checkpoints` on a backend that compiles its
        loops.

    References: Hager 2000, Numer. Math. 87; Sanz-Serna 2016, SIAM Rev. 58, section 3.
    """

    vjp: Any = field(default=None, kw_only=True)
    checkpoints: int | None = None
    memory: str | int | None = None
    spill: bool | str | os.PathLike = False

    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"stages"})
    events: ClassVar[bool] = True
    second_order: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"ode", "sde"})
    elsewhere: ClassVar[frozenset[str]] = frozenset({"dde"})
    algebraic: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("hager2000", "sanzserna2016", "griewank2000", "wang2009")

    def __post_init__(self) -> None:
        given = [f"{name}={v!r}" for name in ("checkpoints", "memory", "spill")
                 if (v := getattr(self, name)) is not None and v is not False]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are given together", "each says which states are kept",
                             f"{given[0]} alone")
        budget.slots(self.checkpoints)
        budget.size(self.memory)
        budget.folder(self.spill)

    @property
    def budgeted(self) -> bool:
        """Whether the reverse pass may have to take steps again."""
        return self.checkpoints is not None or self.memory is not None or self.spill is not False

    @property
    def interpolates(self) -> bool:
        return not self.budgeted

    def work(self, w: Work) -> Effort:
        effort = Effort(0, 0, w.N * w.s, w.stored)
        return effort.within(w) if self.budgeted else effort

    def refuse(self, run: Run) -> None:
        if self.budgeted and run.kind is not None and run.kind.name not in ("sde", "dde"):
            raise base.unsupported(f"{self.name} with a budget", "a problem that is not an ODEProblem or SDEProblem",
                                   "RecursiveCheckpointAdjoint()")
        if self.budgeted and not run.method.one_step:
            raise base.unsupported(f"{self.name} with a budget", f"{run.method.name}, which hides its steps",
                                   "GaussAdjoint(checkpoints=...)")
        if run.dense and self.budgeted:
            raise base.unsupported(f"{self.name} with a budget", "dense=True, which keeps every step",
                                   "RecursiveCheckpointAdjoint(), or ask for the times with saveat=")
        if run.be.traced and self.spill is not False:
            raise base.unsupported(f"{self.name}(spill={self.spill!r})", f"{run.be.name}, whose compiled loops write "
                                   "no files", 'RecursiveCheckpointAdjoint(memory="2GB")')

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, base.Solved]:
        del wanted
        if self.budgeted:
            return budget.forward(run, x, (self.checkpoints, self.memory, self.spill))
        return base.solve_forward(run, x, keep=True)

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be = run.be
        (x, log, end, _), stepper = budget.opened(run, residuals) if self.budgeted else base.opened(run, residuals)
        params = "theta" in wanted and bool(x.theta)
        time = base.times_wanted(wanted) or bool(run.events)
        s = span(be, x.t0, x.t1)
        pull = run.vjp.pullback(run, x, time=time, params=params)
        lam, extra, ts_bar = stepper.lift(0.0 * x.u0), None, None
        theta0, moves = be.zeros(x.theta) if params else (), None
        if run.saves is None:
            lam = stepper.seen_vjp(ct.u)[0, :]
        elif run.saves == "steps":
            extra, lam = be.nodes_vjp(log, stepper.seen_vjp(ct.u))
        else:
            ts, rows = base.save_times(run, x, s), ct.u
            if stepper.algebraic:
                theta0, rows, moves = consistent.pulled(be, stepper, pull, theta0, ts, residuals.u, rows)
            extra, ts_bar = be.sample_vjp(stepper.interpolate_vjp(time), log, ts, stepper.seen_vjp(rows), s.direction)
        if ct.nodes is not None:
            extra = be.stacked_vjp(log, ct.nodes, ct.stages, extra)
        state = Adjoint(lam, be.nothing(lam) if stepper.fsal else None, theta0, 0.0, 0.0)

        def back(state: Adjoint, record: Record, out: Any, last: Any) -> Adjoint:
            return stepper.vjp(pull, record, out, last, time, state)

        silent = be.silent_end(extra)
        if run.events:
            solved = residuals._replace(log=log)
            end_state, t1_bar, nvjp, status, position = sweep(run, x, stepper, solved, pull, ct, extra, state, params)
            nvjp = nvjp + stepper.products(0, silent, x.u0.shape[0])
        else:
            end_state, position = be.replay(back, state, log, extra), None
            t1_bar, nvjp, status = end_state.h, stepper.products(end.accepted, silent, x.u0.shape[0]), end.status
        lam, kappa, theta, t0_bar, h_bar = end_state
        nfe, algebra = be.restaged(log) * stepper.stages if not self.budgeted else 0, (0, 0, 0)
        if self.budgeted:
            taken, iterations, bars = be.recalled(log, extra, position)
            ts_bar = bars if ts_bar is None else ts_bar
            nfe, algebra = budget.repeated(run, stepper, taken, iterations)
        if moves is not None:
            _, ts_bar = be.scan(lambda _, x: (0, x[0] + x[1]), 0, (ts_bar, moves))
        u0, _ = stepper.start(be.time(s.t0), x.u0)
        if kappa is not None:
            u_bar, theta_bar, t_bar = stepper.first_vjp(pull, be.time(s.t0), u0, kappa)
            lam, theta, t0_bar = lam + u_bar, be.add(theta, theta_bar), t0_bar + t_bar
        if stepper.algebraic:
            lam, theta_bar, t_bar = stepper.start_vjp(pull, be.time(s.t0), u0, lam)
            theta, t0_bar = be.add(theta, theta_bar), t0_bar + t_bar
        if stepper.implicit:
            solved_all = be.isfinite(be.rms(lam)) | (be.isfinite(be.rms(ct.u[0, :])) == False)  # noqa: E712
            status = be.choose((status == int(RetCode.Success)) & (solved_all == False),  # noqa: E712
                               int(RetCode.NewtonFailure), status)
        lam = stepper.lift_vjp(lam)
        t0_bar, t1_bar = base.fold_times(run, ts_bar, t0_bar - h_bar, t1_bar) if time else (0.0, 0.0)
        return base.Cotangents(lam, theta, t0_bar, t1_bar, ts_bar, nvjp, nfe, status, algebra=algebra)

    def tangent(self, run: Run, residuals: base.Solved, d: base.Tangents) -> Any:
        """Tangents through the frozen steps; their cost is one product per stage and direction."""
        return frozen_tangent(run, budget.remade(run, residuals) if self.budgeted else residuals, d)
