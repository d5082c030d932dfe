"""Sensitivity algorithms for delay equations.

The discrete adjoint differentiates the computed solution: steps whose stages look up the dense output of earlier
steps, on a mesh that moves with the break points,

    t_n = xi_j + theta_n (xi_{j+1} - xi_j),   xi_j = t0 + sum_i n_i tau_i   (or t1),

with `theta_n`, the piece that each stage looks at, and the decisions of step control frozen. From the last step to
the first, for the stages i = s..1 of an explicit method and `rec` the cotangent that later look-ups and outputs left
with the step:

    w_i = h (b_i lam + sum_{j>i} a_ji Y_j) + rec.K_i,   (Y_i, vbar_i, pbar, tbar_i) = (f_u, f_v, f_p, f_t)^T w_i,
    vbar_i goes through the dense output of the step looked at, into that step's `rec`,
    hbar = sum_i b_i k_i . lam + sum_i Y_i . sum_j a_ij k_j + sum_i c_i tbar_i + rec.h,   tbar = sum_i tbar_i + rec.t,
    lam <- lam + sum_i Y_i + rec.u,

and `tbar`, `hbar` go through the mesh to t0, t1 and the lags. Implicit and Rosenbrock stages have the transposes that
they have for an ODE: a step never looks at itself, so that the matrix in their equations is `f_u` at a given past.
In a Rosenbrock step the derivative in time moves the times looked at too.

A lag enters `f` through the times at which it asks for the past, and the mesh through the break points; the second part
is what an adjoint on a frozen mesh loses. At a break point where the solution's derivative jumps it is
`lam . (f(xi-) - f(xi+)) dxi/dtau`, which no step size makes small.

References: Hairer, Norsett, Wanner I, II.17; Bellen and Zennaro 2003; Hager 2000 for the adjoint of the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

from ..backend import Array, Contribution, Record
from ..delay import LagField, stage_inputs
from ..delaysolve import Breaks, Equation, Looked, inside, past_of, solve_forward
from ..errors import TimesError, UnsupportedCombination
from ..integrate import Run, span
from ..stepper import Adjoint
from ..system import Inputs
from . import base, budget, discrete


@dataclass(frozen=True)
class RecursiveCheckpointAdjoint(discrete.RecursiveCheckpointAdjoint):
    """The discrete adjoint with a moving mesh; see the module."""

    events: ClassVar[bool] = False
    second_order: ClassVar[bool] = False

    def refuse(self, run: Run) -> None:
        if not self.budgeted:
            return
        if self.spill is not False:
            raise base.unsupported(f"{self.name}(spill={self.spill!r})", "a delay equation, whose steps look back at "
                                   "whole steps and not at states", 'RecursiveCheckpointAdjoint(memory="2GB")')
        if run.dense:
            raise base.unsupported(f"{self.name} with a budget", "dense=True, which keeps every step",
                                   "RecursiveCheckpointAdjoint(), or ask for the times with saveat=")
        if run.kind.dependent:
            raise base.unsupported(f"{self.name} with a budget", "lags that depend on the state: how far later steps "
                                   "look back is not known before", "RecursiveCheckpointAdjoint()")
        if run.be.traced and self.checkpoints is not None:
            raise base.unsupported(f"{self.name}(checkpoints={self.checkpoints}) of a delay equation",
                                   f"{run.be.name}, whose compiled loops have to know beforehand how many steps a lag "
                                   "is long", 'RecursiveCheckpointAdjoint(memory="200MB")')

    def room(self, eq: Equation) -> Any:
        """What a solve within a budget may keep."""
        return budget.room(eq.run, eq.x, eq.stepper, eq.longest, self.checkpoints, self.memory)

    def plain(self, run: Run, x: Inputs) -> tuple[base.Outputs, base.Aux]:
        out, aux, _ = solve_forward(run, x, self.room if self.budgeted else None)
        return out, aux

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, base.Solved]:
        if run.dense:
            raise base.unsupported(self.name, "derivatives of sol(t) of a delay equation, whose steps move",
                                   "the same, with the times in saveat=")
        refuse_ambiguous(run, x, wanted)
        return solve_forward(run, x, self.room if self.budgeted else None)

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be, kind = run.be, run.kind
        x, log, end, _ = residuals
        params = "theta" in wanted and bool(x.theta)
        timed = base.times_wanted(wanted) or (params and kind.moving)
        eq = Equation.of(run, x)
        breaks = eq.breaks
        log = be.retaking(log, eq.retake) if self.budgeted else log
        lam, extra, ts_bar = seeded(eq, log, ct)
        sweep = _Moving(eq, log, timed, params)
        theta = be.zeros(x.theta) if params else ()
        lam, theta, nodes_bar = be.collect(sweep.back, (lam, theta, be.blank(breaks.times)), log,
                                            be.pending(log, extra))
        nfe, algebra = 0, (0, 0, 0)
        if self.budgeted:
            taken, iterations, bars = be.recalled(log, extra)
            nfe, algebra = eq.again(taken, iterations)
            ts_bar = bars if ts_bar is None else ts_bar
        t0_bar = t1_bar = 0.0
        if timed:
            moved = be.vector(nodes_bar, breaks.rows) @ breaks.rows
            t0_bar, t1_bar = be.scalar(moved[0]), be.scalar(moved[1])
            if params and kind.moving:
                theta = be.add(theta, through_lags(run, x, moved[2:]))
            t0_bar, t1_bar = base.fold_times(run, ts_bar, t0_bar, t1_bar)
        return base.Cotangents(lam, theta, t0_bar, t1_bar, ts_bar, sweep.products(end.accepted), nfe, end.status,
                               algebra=algebra)

    def tangent(self, run: Run, residuals: base.Solved, d: base.Tangents) -> Array:
        from .delaytangent import tangent

        if self.budgeted:
            log = run.be.retaking(residuals.log, Equation.of(run, residuals.x).retake)
            residuals = residuals._replace(log=run.be.remade(log, residuals.x.u0))
        return tangent(run, residuals, d)


def seeded(eq: Equation, log: Any, ct: base.Outputs) -> tuple[Array, Any, Any]:
    """Cotangents of the outputs as those of the end state, what they are of the steps, and of the save times."""
    run, x, be = eq.run, eq.x, eq.run.be
    if run.saves is None:
        return ct.u[0, :], None, None
    if run.saves == "steps":
        extra, lam = be.nodes_vjp(log, ct.u)
        return lam, extra, None
    extra, ts_bar = be.sample_vjp(eq.stepper.interpolate_vjp(True), log, base.save_times(run, x, eq.span), ct.u, 1.0)
    return 0.0 * x.u0, extra, ts_bar


class Sweep:
    """One step of the reverse pass: the transpose of the method's step, with what its products say about the past
    left with the steps that were looked at."""

    def __init__(self, eq: Equation, log: Any, timed: bool, params: bool) -> None:
        self.eq, self.run, self.x, self.log = eq, eq.run, eq.x, log
        self.n, self.count = eq.x.u0.shape[0], eq.count
        self.timed, self.params = timed, params
        self.transpose = eq.stepper.interpolate_vjp(True)
        self.stages = eq.run.kind.products(eq.run, eq.x)[0]

    def through(self, record: Record, ct: Record, lam: Array, theta: tuple, pending: Any,
                step: Any) -> tuple[Adjoint, Any]:
        """Pull `lam` through a step that looks at the past by `step`, its time and size included; and `pending`. With
        `pending` None, parameters and past are left out."""
        be, stepper = self.run.be, self.eq.bound(self.log, step)
        still = pending is None
        pull = partial(self.pulled, step, still)
        add = (lambda total, *_: total) if still else partial(self.add, step)
        start = Adjoint(lam, be.nothing(lam) if stepper.fsal else None, (theta, pending), 0.0, 0.0)
        bar = stepper.vjp(pull, record, Contribution(ct.u, ct.k, ct.h, ct.t), True, self.timed, start, add)
        if bar.kappa is not None:
            t = be.time(record.t)
            u_bar, theta_bar, t_bar = pull(t, record.u, bar.kappa)
            bar = bar._replace(lam=bar.lam + u_bar, theta=add(bar.theta, theta_bar, t, record.u), t0=bar.t0 + t_bar)
        theta, pending = bar.theta
        return bar._replace(theta=theta), pending

    def pulled(self, step: Any, still: bool, t: Any, u: Array, w: Array) -> tuple[Array, tuple, Any]:
        """Pull `w` through `f` at one stage: cotangents of state, parameters and time, and of the steps looked at,
        four for each lag."""
        be, n, k = self.run.be, self.n, self.count
        looked = self.eq.looked(self.log, step, t, u, self.eq.stepper.slope)
        inputs = stage_inputs(be, self.x, u, past_of(looked, self.eq.far, be.scalar(math.inf)))
        pull = self.run.vjp.pullback(self.stages, inputs, time=self.timed, params=self.params and not still)
        z_bar, theta_bar, t_bar = pull(t, inputs.u0, be.padded(w, n * (1 + k)))
        if still:
            return z_bar[:n], (), t_bar
        left = [v for i, seen in enumerate(looked) for v in self.left(seen, z_bar[n * (i + 1):n * (i + 2)])]
        return z_bar[:n], (*theta_bar, *left), t_bar

    def left(self, seen: Looked, v_bar: Array) -> Record:
        """The cotangent of a step whose dense output was looked up, at a time that `f` accounts for."""
        be = self.run.be
        record = be.record(self.log, seen.index)

        def none() -> Record:
            return Record(0.0 * record.t, 0.0 * record.t, 0.0 * record.u, 0.0 * record.k)

        def some() -> Record:
            out, (t_bar,) = self.transpose(record, [be.choose(seen.old, record.t, seen.time)], v_bar[None, :])
            return Record(-t_bar, out.h, out.u, out.k)

        return be.either(seen.old, none, some)

    def add(self, step: Any, total: tuple, bar: tuple, t: Any, u: Array) -> tuple:
        """Sum up what `pulled` gave at `(t, u)`."""
        be, (theta, pending) = self.run.be, total
        m = len(theta)
        theta = be.add(theta, bar[:m])
        for i, seen in enumerate(self.eq.looked(self.log, step, t, u)):
            mine = Record(*bar[m + 4 * i:m + 4 * i + 4])
            pending = be.deposit(pending, seen.index, seen.old, lambda mine=mine: mine)
        return theta, pending

    def products(self, steps: Any) -> Any:
        """Products with the transposed derivatives of `f`; every step has a first slope of its own."""
        stepper = self.eq.stepper
        return stepper.products(steps, 0, self.n) + stepper.fsal * (steps - 1)


class _Moving(Sweep):
    """The sweep on a mesh that moves with the break points."""

    def back(self, state: tuple, pending: Any, record: Record, ct: Record, log: Any) -> tuple[tuple, Any]:
        self.log = log
        lam, theta, nodes_bar = state
        t, h, _, _ = record
        bar, pending = self.through(record, ct, lam, theta, pending, inside(t, h))
        if self.timed:
            nodes_bar = self.mesh(nodes_bar, t, h, bar.t0, bar.h)
        return (bar.lam, bar.theta, nodes_bar), pending

    def mesh(self, nodes_bar: Any, t: Any, h: Any, t_bar: Any, h_bar: Any) -> Any:
        """The cotangents of start and size of a step as cotangents of the break points around it."""
        be = self.run.be
        a, b, first, last = around(be, self.eq.breaks, t, h)
        start, end = t_bar - h_bar, h_bar
        nodes_bar = be.add_at(nodes_bar, a, (1.0 - first) * start + (1.0 - last) * end)
        return be.add_at(nodes_bar, b, first * start + last * end)


def around(be: Any, breaks: Breaks, t: Any, h: Any) -> tuple[Any, Any, Any, Any]:
    """Between which break points a step lies, and where in between it starts and ends."""
    times = breaks.times
    b = be.following(times, t + 0.5 * h)
    a = b - 1
    length = times[b] - times[a]
    return a, b, (t - times[a]) / length, (t + h - times[a]) / length


def through_lags(run: Run, x: Inputs, tau_bar: Array) -> tuple[Array, ...]:
    """Cotangents of the lags as cotangents of the parameters."""
    be, xp = run.be, run.be.xp
    lag_run = run.kind.as_field(run, LagField.of(run))
    tau_bar = xp.astype(tau_bar, x.u0.dtype)
    zero = 0.0 * tau_bar
    z = xp.concat([x.u0, zero])
    pull = run.vjp.pullback(lag_run, x._replace(u0=z), params=True)
    return pull(be.time(be.scalar(x.t0)), z, xp.concat([0.0 * x.u0, tau_bar]))[1]


def refuse_ambiguous(run: Run, x: Inputs, wanted: frozenset[str]) -> None:
    """Where u0 does not join the history, u has a kink at t0 + lag whose place is wanted: an output there, or two such
    places at once, have one-sided derivatives only."""
    be, kind = run.be, run.kind
    tau = be.concrete_times(kind.vector(be, run, x.u0, x.theta, x))
    t0, t1 = be.concrete(x.t0), be.concrete(x.t1)
    moved = ("theta" in wanted and kind.moving) or bool(wanted & {"t0", "saveat"})
    if tau is None or t0 is None or t1 is None or not moved:
        return
    p = run.field.p.join(be, x.theta[:run.field.p.count], x.constants)
    before = kind.before(be, run, t0, p)
    if before is None or be.rms(x.u0 - before) <= 1e-9 * (be.rms(x.u0) + be.rms(before)):
        return
    near = 1e-9 * (t1 - t0)
    ts = [t1] if run.saves in (None, "steps") else be.concrete_times(be.time_vector(base.save_times(
        run, x, span(be, x.t0, x.t1)), x.u0)) or []
    for i, lag in enumerate(tau):
        for t in ts:
            if abs(t - t0 - lag) <= near:
                raise TimesError(f"an output at t={t:.12g} lies exactly on the break point t0 + lags[{i}]",
                                 "u0 does not join the history, so the derivative with respect to the lag has two "
                                 "one-sided values there", "move this time a little, or start at history(t0, p)")
        for j in range(i):
            if abs(tau[j] - lag) <= near and kind.moving:
                raise UnsupportedCombination(f"lags[{j}] and lags[{i}] are both {lag:.12g}",
                                             "u0 does not join the history, and two break points that cross have "
                                             "one-sided derivatives only", "declare one lag, or start with two values")


def adapted(sensealg: Any, dependent: bool) -> Any:
    """The algorithm for delay equations that a name stands for; `dependent` tells that lags depend on the state.

    Raises
    ------
    UnsupportedCombination
        There is none.
    """
    from . import (
        delayadjoint,
        delayforward,
        delaystate,
        delaytangent,
        forward,
        forward_ad,
        gauss,
        interpolating,
        quadrature,
    )

    kinds: dict[type, Any] = {discrete.RecursiveCheckpointAdjoint: RecursiveCheckpointAdjoint,
                              interpolating.InterpolatingAdjoint: delayadjoint.InterpolatingAdjoint,
                              gauss.GaussAdjoint: delayadjoint.GaussAdjoint,
                              quadrature.QuadratureAdjoint: delayadjoint.QuadratureAdjoint,
                              forward_ad.ForwardADSensitivity: delaytangent.ForwardADSensitivity,
                              forward.ForwardSensitivity: delayforward.ForwardSensitivity}
    kind = kinds.get(type(sensealg))
    if kind is None:
        reasons = {
            "BacksolveAdjoint": "the past cannot be found again by solving backwards: that problem is ill-posed",
            "ReversibleAdjoint": "a reversible step remembers one state, a delay equation a whole interval",
        }
        raise UnsupportedCombination(f"{sensealg.name} does not go with a DDEProblem",
                                     reasons.get(sensealg.name, "it has no form for delay equations"),
                                     "sensealg=RecursiveCheckpointAdjoint(), which auto takes")
    if dependent and kind is not RecursiveCheckpointAdjoint:
        raise delaystate.refused(sensealg)
    if dependent:
        kind = delaystate.RecursiveCheckpointAdjoint
    return kind(**{f.name: getattr(sensealg, f.name) for f in fields(sensealg)})
