"""Sensitivity algorithms for delay equations.

The discrete adjoint differentiates the computed solution: explicit Runge-Kutta steps whose stages look up the dense
output of earlier steps, on a mesh that moves with the break points,

    t_n = xi_j + theta_n (xi_{j+1} - xi_j),   xi_j = t0 + sum_i n_i tau_i   (or t1),

with `theta_n`, the piece that each stage looks at, and the decisions of step control frozen. From the last step to
the first, for stages i = s..1 and `rec` the cotangent that later look-ups and outputs left with the step:

    w_i = h (b_i lam + sum_{j>i} a_ji Y_j) + rec.K_i,   (Y_i, vbar_i, pbar, tbar_i) = (f_u, f_v, f_p, f_t)^T w_i,
    vbar_i goes through the dense output of the step looked at, into that step's `rec`,
    hbar = sum_i b_i k_i . lam + sum_i Y_i . sum_j a_ij k_j + sum_i c_i tbar_i + rec.h,   tbar = sum_i tbar_i + rec.t,
    lam <- lam + sum_i Y_i + rec.u,

and `tbar`, `hbar` go through the mesh to t0, t1 and the lags. A lag enters `f` through the times at which it asks for
the past, and the mesh through the break points; the second part is what an adjoint on a frozen mesh loses. At a break
point where the solution's derivative jumps it is `lam . (f(xi-) - f(xi+)) dxi/dtau`, which no step size makes small.

References: Hairer, Norsett, Wanner I, II.17; Bellen and Zennaro 2003; Hager 2000 for the adjoint of the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..backend import Array, Record
from ..delay import LagField, stage_inputs
from ..delaysolve import Breaks, Looked, break_points, look, past_of, solve_forward, stepper_of
from ..errors import TimesError, UnsupportedCombination
from ..explicit import transposed
from ..integrate import Run, Span, span
from ..system import Inputs
from . import base, discrete

REVERSE_ONLY = "the discrete adjoint of delay equations has a reverse mode only"


@dataclass(frozen=True)
class RecursiveCheckpointAdjoint(discrete.RecursiveCheckpointAdjoint):
    """The discrete adjoint with a moving mesh; see the module."""

    events: ClassVar[bool] = False
    second_order: ClassVar[bool] = False
    modes: ClassVar[frozenset[str]] = frozenset({"reverse"})

    def plain(self, run: Run, x: Inputs) -> tuple[base.Outputs, base.Aux]:
        out, aux, _ = solve_forward(run, x)
        return out, aux

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, base.Solved]:
        if run.dense:
            raise base.unsupported(self.name, "derivatives of sol(t) of a delay equation, whose steps move",
                                   "the same, with the times in saveat=")
        refuse_ambiguous(run, x, wanted)
        return solve_forward(run, x)

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be, kind = run.be, run.kind
        x, log, end = residuals
        s = span(be, x.t0, x.t1)
        tau = kind.tau(be, run, x)
        breaks = break_points(run, x, tau, s)
        params = "theta" in wanted and bool(x.theta)
        timed = base.times_wanted(wanted) or (params and kind.moving)
        lam, pending, ts_bar = seeded(run, x, log, ct)
        sweep = _Moving(run, x, log, breaks, s, tau, timed, params)
        theta = be.zeros(x.theta) if params else ()
        lam, theta, nodes_bar = be.collect(sweep.back, (lam, theta, be.blank(breaks.times)), log, pending)
        nvjp = end.accepted * sweep.stepper.tab.stages
        t0_bar = t1_bar = 0.0
        if timed:
            moved = be.vector(nodes_bar, breaks.rows) @ breaks.rows
            t0_bar, t1_bar = be.scalar(moved[0]), be.scalar(moved[1])
            if params and kind.moving:
                theta = be.add(theta, through_lags(run, x, moved[2:]))
            t0_bar, t1_bar = base.fold_times(run, ts_bar, t0_bar, t1_bar)
        return base.Cotangents(lam, theta, t0_bar, t1_bar, ts_bar, nvjp, 0, end.status)

    def tangent(self, run: Run, residuals: base.Solved, d: base.Tangents) -> Array:
        raise UnsupportedCombination("forward mode was asked for", REVERSE_ONLY,
                                     "sensealg=ForwardSensitivity(), or reverse mode: sa.gradient, jax.grad")


def seeded(run: Run, x: Inputs, log: Any, ct: base.Outputs) -> tuple[Array, Any, Any]:
    """Cotangents of the outputs as those of the end state, of the steps, and of the save times."""
    be = run.be
    if run.saves is None:
        return ct.u[0, :], be.pending(log), None
    if run.saves == "steps":
        extra, lam = be.nodes_vjp(log, ct.u)
        return lam, be.pending(log, extra), None
    transpose = stepper_of(run).interpolate_vjp(True)

    def put(pending: Any, item: tuple) -> tuple[Any, Any]:
        t, row = item
        index = be.locate_end(log, t)
        out, (t_bar,) = transpose(be.record(log, index), [t], row[None, :])
        return be.deposit(pending, index, False, lambda: Record(-t_bar, out.h, out.u, out.k)), t_bar

    pending, ts_bar = be.scan(put, be.pending(log), (base.save_times(run, x, span(be, x.t0, x.t1)), ct.u))
    return 0.0 * x.u0, pending, ts_bar


class Sweep:
    """One step of the reverse pass; `where` tells how its stages look at the past."""

    def __init__(self, run: Run, x: Inputs, log: Any, s: Span, tau: Any, timed: bool, params: bool) -> None:
        self.run, self.x, self.log, self.tau, self.n = run, x, log, tau, x.u0.shape[0]
        self.timed, self.params = timed, params
        self.stepper = stepper_of(run)
        self.transpose = self.stepper.interpolate_vjp(True)
        self.stages = run.kind.products(run, x)[0]
        self.order = tuple(range(self.stepper.tab.stages - 1, -1, -1))
        shortest = tau[0]
        for i in range(1, run.kind.count):
            shortest = run.be.least(shortest, tau[i])
        self.t0, self.far = s.t0, s.t0 - shortest

    def looked(self, time: Any, u: Array, where: Any) -> list[Looked]:
        """The past of one stage."""
        be = self.run.be
        interpolate, slope, now = self.stepper.interpolate, self.stepper.slope, be.scalar(time)
        return [look(be, interpolate, slope, self.log, now, where, self.tau[i], self.t0, u)
                for i in range(self.run.kind.count)]

    def through(self, record: Record, ct: Record, lam: Array, theta: tuple, pending: Any,
                where: Any) -> tuple[tuple, Array]:
        """Pull `lam` through a step: `(theta, pending, cotangents of its stages' times and of its size)` and of its
        start. With `pending` None, those of parameters and past are left out."""
        be, tab = self.run.be, self.stepper.tab
        t, h, u, K = record
        dry = pending is None

        def row(carry: tuple, item: tuple, w: Array) -> tuple[tuple, Array]:
            theta, pending, moved, stretched = carry
            time, c, v = item
            y, theta_bar, t_bar, pending = self.stage(time, v, w, where, pending, self.params and not dry)
            return (theta if dry else be.add(theta, theta_bar), pending, moved + t_bar, stretched + c * t_bar), y

        times, inputs = be.times(t, h, tab.c), be.inputs(tab.a, u, h, K)
        rows = be.permuted_rows(be.seeds(tab.b, h, lam, ct.k, None), self.order)
        xs = tuple(be.permuted(v, self.order) for v in (times, tab.c, inputs))
        (theta, pending, moved, h_bar), Y = be.recursion(
            transposed(tab, self.order), rows, h, xs, row, (theta, pending, 0.0, 0.0))
        if self.timed:
            moves = be.inputs(tab.a, 0.0 * u, 1.0, K)
            h_bar = be.dot(lam, be.combine(None, 1.0, tab.b, K)) + h_bar + ct.h
            for position, i in enumerate(self.order):
                h_bar = h_bar + be.dot(Y[position, :], moves[i])
        lam = lam + be.combine(ct.u, 1.0, (1.0,) * len(self.order), Y)
        return (theta, pending, moved, h_bar), lam

    def stage(self, time: Any, u: Array, w: Array, where: Any, pending: Any,
              params: bool) -> tuple[Array, tuple, Any, Any]:
        """Pull `w` through `f` at one stage: cotangents of state, parameters and time; those of the past are left with
        the steps looked at."""
        be, n, k = self.run.be, self.n, self.run.kind.count
        looked = self.looked(time, u, where)
        inputs = stage_inputs(be, self.x, u, past_of(looked, self.far, be.scalar(math.inf)))
        pull = self.run.vjp.pullback(self.stages, inputs, time=self.timed, params=params)
        z_bar, theta_bar, t_bar = pull(time, inputs.u0, be.padded(w, n * (1 + k)))
        if pending is not None:
            for i, found in enumerate(looked):
                v_bar = z_bar[n * (i + 1):n * (i + 2)]
                pending = be.deposit(pending, found.index, found.old,
                                     lambda found=found, v_bar=v_bar: self.left(found, v_bar))
        return z_bar[:n], theta_bar, t_bar, pending

    def left(self, found: Any, v_bar: Array) -> Record:
        """The cotangent of a step whose dense output was looked up, at a time that `f` accounts for."""
        record = self.run.be.record(self.log, found.index)
        at = self.run.be.choose(found.old, record.t, found.time)
        out, (t_bar,) = self.transpose(record, [at], v_bar[None, :])
        return Record(-t_bar, out.h, out.u, out.k)


class _Moving(Sweep):
    """The sweep on a mesh that moves with the break points."""

    def __init__(self, run: Run, x: Inputs, log: Any, breaks: Breaks, s: Span, tau: Any, timed: bool,
                 params: bool) -> None:
        super().__init__(run, x, log, s, tau, timed, params)
        self.breaks = breaks

    def back(self, state: tuple, pending: Any, record: Record, ct: Record) -> tuple[tuple, Any]:
        lam, theta, nodes_bar = state
        t, h, _, _ = record
        (theta, pending, moved, h_bar), lam = self.through(record, ct, lam, theta, pending, t + 0.5 * h)
        if self.timed:
            nodes_bar = self.mesh(nodes_bar, t, h, moved + ct.t, h_bar)
        return (lam, theta, nodes_bar), pending

    def mesh(self, nodes_bar: Any, t: Any, h: Any, t_bar: Any, h_bar: Any) -> Any:
        """The cotangents of start and size of a step as cotangents of the break points around it."""
        be, times = self.run.be, self.breaks.times
        b = be.following(times, t + 0.5 * h)
        a = b - 1
        length = times[b] - times[a]
        first, last = (t - times[a]) / length, (t + h - times[a]) / length
        start, end = t_bar - h_bar, h_bar
        nodes_bar = be.add_at(nodes_bar, a, (1.0 - first) * start + (1.0 - last) * end)
        return be.add_at(nodes_bar, b, first * start + last * end)


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
    from . import delayadjoint, delayforward, delaystate, forward, interpolating

    kinds: dict[type, Any] = {discrete.RecursiveCheckpointAdjoint: RecursiveCheckpointAdjoint,
                              interpolating.InterpolatingAdjoint: delayadjoint.InterpolatingAdjoint,
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
