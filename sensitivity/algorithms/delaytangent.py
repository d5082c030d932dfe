"""Forward mode of the discrete adjoint of delay equations: tangents through the computed steps.

Nodes move with the break points between which they lie, `dt_n = (1 - theta_n) dxi_j + theta_n dxi_{j+1}`, and a stage
sees the dense output of earlier steps move with their own nodes, sizes, states and stages:

    dv_i = d(dense output of the step looked at), at the time asked for,
    dk_i = f_u dU_i + sum_i f_{v_i} dv_i + f_p dp + f_t (dt_n + c_i dh_n),

where the time asked for, `t - tau_i(p)`, is a matter of `f`. The exact derivative of the computed solution, column by
column, and the transpose of the reverse pass in `delay.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..backend import Array, Record
from ..delay import LagField, stage_inputs
from ..delaysolve import Equation, Looked, inside, past_of, solve_forward
from ..integrate import Run
from ..stepper import Tangent
from ..system import Inputs
from . import base, delay, forward_ad
from .frozen import at_outputs


@dataclass(frozen=True)
class ForwardADSensitivity(forward_ad.ForwardADSensitivity):
    """Tangents through the computed steps of a delay equation; see the module."""

    events: ClassVar[bool] = False

    def plain(self, run: Run, x: Inputs) -> tuple[base.Outputs, base.Aux]:
        out, aux, _ = solve_forward(run, x)
        return out, aux

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, base.Solved]:
        delay.refuse_ambiguous(run, x, wanted)
        return solve_forward(run, x)

    def tangent(self, run: Run, residuals: base.Solved, d: base.Tangents) -> Array:
        return tangent(run, residuals, d)


def moves(run: Run, x: Inputs, d: base.Tangents) -> Array:
    """Tangents of (t0, t1, tau_1, ..., tau_k), `(m, 2 + k)`."""
    be, xp = run.be, run.be.xp
    n, m, k = x.u0.shape[0], d.u0.shape[0], run.kind.count
    in_lags = be.unit_rows(m, k, m, x.u0)
    if run.kind.moving and m:
        z = be.padded(x.u0, n + k)
        lags = run.kind.as_field(run, LagField.of(run))
        push = run.vjp.pushforward(lags, x._replace(u0=z), d.theta)
        in_lags = push(be.time(be.scalar(x.t0)), z, be.unit_rows(m, n + k, m, x.u0), None)[1][:, n:]
    zero = 0.0 * d.u0[:, :1]
    ends = [zero if v is None else zero + v[:, None] for v in (d.t0, d.t1)]
    return xp.concat([*ends, in_lags], axis=1)


def tangent(run: Run, residuals: base.Solved, d: base.Tangents) -> Array:
    """Push directions through the computed steps: `(m, k, n)` at the outputs."""
    be, xp = run.be, run.be.xp
    x, log, end, _ = residuals
    eq = Equation.of(run, x)
    ahead, t0 = _Ahead(eq, log, d, moves(run, x, d)), eq.span.t0
    m, n = d.u0.shape
    state, tangents = be.onward(ahead.step, d.u0, log, ahead.packed(t0, t0, d.u0, ahead.zeros, 0.0 * d.u0[:, 0]))
    if run.saves is None:
        return state[:, None, :]
    if run.saves == "steps":
        last = ahead.packed(t0, t0, state, ahead.zeros, 0.0 * state[:, 0]).u
        rows = be.nodes(tangents, last, end.t)[0][:, :m * n]
        return xp.permute_dims(xp.reshape(rows, (-1, m, n)), (1, 0, 2))
    return at_outputs(run, x, eq.stepper, log, tangents, d, (ahead.moves[:, 0], ahead.moves[:, 1]), True)


class _Ahead:
    """One step of the forward pass. What is recorded of its tangents has time and size of the step itself, so that its
    dense output is the tangent of that of the step, but for what its node and its size do."""

    def __init__(self, eq: Equation, log: Any, d: base.Tangents, moves: Array) -> None:
        self.eq, self.run, self.log, self.d, self.moves = eq, eq.run, log, d, moves
        self.m, self.n = d.u0.shape
        xp = eq.run.be.xp
        self.stages = eq.run.kind.products(eq.run, eq.x)[0]
        self.breaks = moves @ xp.astype(eq.breaks.rows, moves.dtype).T
        self.zeros = xp.stack([0.0 * d.u0] * eq.stepper.stages)

    def packed(self, t: Any, h: Any, du: Array, dK: Array, dt: Array, dh: Array | None = None) -> Record:
        """Tangents of a step as a record: each row is that of a state, of the node's time and of the size."""
        xp, m, n = self.run.be.xp, self.m, self.n
        rows = xp.concat([xp.reshape(du, (m * n,)), dt, dt if dh is None else dh])
        stages = xp.reshape(dK, (-1, m * n))
        return Record(t, h, rows, xp.concat([stages, xp.concat([0.0 * stages[:, :1]] * (2 * m), axis=1)], axis=1))

    def step(self, du: Array, record: Record, tangents: Any) -> tuple[Array, Record]:
        """Tangents after a step, and its record."""
        be, eq = self.run.be, self.eq
        t, h, u, _ = record
        a, b, first, last = delay.around(be, eq.breaks, t, h)
        dt = (1.0 - first) * self.breaks[:, a] + first * self.breaks[:, b]
        dh = (1.0 - last) * self.breaks[:, a] + last * self.breaks[:, b] - dt
        step = inside(t, h)
        stepper = eq.bound(self.log, step)

        def push(time: Any, v: Array, dv: Array, dt: Array) -> tuple[Array, Array]:
            return self.pushed(step, tangents, time, v, dv, dt)

        slope = push(be.time(t), u, du, dt)[1] if stepper.fsal else None
        new, dK = stepper.jvp(push, record, dt, dh, Tangent(du, slope))
        return new.u, self.packed(t, h, du, dK, dt, dh)

    def pushed(self, step: Any, tangents: Any, t: Any, u: Array, du: Array, dt: Array) -> tuple[Array, Array]:
        """`f` and its tangents at one stage."""
        be, xp, n, eq = self.run.be, self.run.be.xp, self.n, self.eq
        looked = eq.looked(self.log, step, t, u, eq.stepper.slope)
        inputs = stage_inputs(be, eq.x, u, past_of(looked, eq.far, be.scalar(math.inf)))
        push = self.run.vjp.pushforward(self.stages, inputs, self.d.theta)
        f, df = push(t, inputs.u0, xp.concat([du, *(self.seen(tangents, v) for v in looked)], axis=1), dt)
        return f[:n], df[:, :n]

    def seen(self, tangents: Any, found: Looked) -> Array:
        """Tangents of a delayed state, at a time that `f` accounts for."""
        be, xp, m, n = self.run.be, self.run.be.xp, self.m, self.n

        def moved() -> Array:
            record, own = (be.record(log, found.index) for log in (self.log, tangents))
            at = be.choose(found.old, record.t, found.time)
            row = self.eq.stepper.interpolate(own, [at])[0, :]
            du, dt, dh = xp.reshape(row[:m * n], (m, n)), row[m * n:m * n + m], row[m * n + m:]
            share = be.vector([(at - record.t) / record.h], record.u)
            stretch = (found.value - record.u) / be.vector([record.h], record.u) - share * found.slope
            return du - dt[:, None] * found.slope[None, :] + dh[:, None] * stretch[None, :]

        return be.either(found.old, lambda: 0.0 * self.d.u0, moved)
