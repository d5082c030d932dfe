"""Tangents through the accepted steps of a solve: the forward mode of every algorithm that keeps them.

Every node moves with the start of its segment, and the last step of a segment takes up what is left: the change of
`t1`, or of the event that ends it. There, with `du` the tangent of the step at unchanged size h,

    dh = -(c_u du + c_p dp + c_t dt) / (c_t + c_u Phi_h'),   du- = du + Phi_h' dh,   dt* = dt + dh,
    du+ = R_u du- + R_p dp + R_t dt*   (Kong et al. 2024, Proc. IEEE 112, eq. 8, for the step's own slope Phi_h').
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..backend import Array, Record
from ..events import EventFunctions, product_run
from ..integrate import Run, span
from ..stepper import Stepper, Tangent
from ..system import Inputs
from ..trust import trusted
from . import base, consistent


class Ahead(NamedTuple):
    """Tangents of the node and of its time, how many events lie behind, and the tangents of these."""

    node: Tangent
    dt: Array | None
    behind: Any
    events: Any


def frozen_tangent(run: Run, solved: base.Solved, d: base.Tangents) -> Any:
    """Push directions through the accepted steps of a solve: `(m, k, n)` at its outputs; with events, `Outputs`."""
    be, xp = run.be, run.be.xp
    (x, log, end, _), stepper = base.opened(run, solved)
    timed = run.saves not in (None, "steps")
    moving = bool(run.events) or not (d.t0 is None and d.t1 is None and d.saveat is None)
    zero: Array = d.u0[:, 0] * 0.0
    dt0, dt1 = (zero if d.t0 is None else d.t0), (zero if d.t1 is None else d.t1)
    push = run.vjp.pushforward(run, x, d.theta)
    s = span(be, x.t0, x.t1)
    u0, _ = stepper.start(be.time(s.t0), x.u0)
    if stepper.algebraic:
        d = d._replace(u0=stepper.start_jvp(push, be.time(s.t0), u0, d.u0, dt0 if moving else None))
    du0 = stepper.lift(d.u0)
    m, n = du0.shape
    slope0 = stepper.first_jvp(push, be.time(s.t0), u0, d.u0, dt0 if moving else None) if stepper.fsal else None
    jump = Jumps(run, x, stepper, push, d.theta) if run.events else None

    def ahead(state: Ahead, record: Record, last: Any) -> tuple[Ahead, Record]:
        node, dt, behind, events = state
        dh = be.choose(last, dt1 - dt, zero) if moving else None
        new, dK = stepper.jvp(push, record, dt, dh, node)
        after = Ahead(new, dt, behind, events)
        if jump is not None:
            t_event, slack = be.moment(end.watch.entries, behind), 8.0 * be.eps(be.time_dtype(x.u0.dtype))
            here = abs(record.t + record.h - t_event) <= slack * be.greatest(abs(record.t), abs(record.h))
            after, dK, dh = be.when(here, lambda: jump(state, record, end.watch.entries), (after, dK, dh))
        rows = [xp.reshape(node.u, (m * n,))] + ([dt, dh] if moving else [])
        stages = xp.reshape(dK, (stepper.stages, m * n))
        if moving:
            stages = xp.concat([stages, xp.zeros_like(stages[:, :1]) + 0.0 * xp.concat([dt, dh])[None, :]], axis=1)
        return after, Record(record.t, record.h, xp.concat(rows), stages)

    example = (zero, xp.reshape(du0, (m * n,)))
    start = Ahead(Tangent(du0, slope0), dt0 if moving else None, 0,
                  be.ledger(example, run.max_events) if run.events else None)
    state, tangents = be.follow(ahead, start, log)
    du = at_outputs(run, x, stepper, log, tangents, d, (dt0, dt1), moving) if timed else None
    if timed and stepper.algebraic:
        moves = save_time_tangents(run, d, dt0, dt1) if moving else None
        du = consistent.pushed(be, stepper, push, base.save_times(run, x, s), solved.u, du, moves)
    if run.saves is None:
        du = stepper.seen(state.node.u)[:, None, :]
    elif run.saves == "steps":
        flat = xp.concat([xp.reshape(state.node.u, (m * n,)), *([dt0, dt1] if moving else [])])
        rows = be.nodes(tangents, flat, end.t)[0][:, :m * n]
        du = stepper.seen(xp.permute_dims(xp.reshape(rows, (-1, m, n)), (1, 0, 2)))
    if not run.events:
        return du
    dt, du_event = be.columns(state.events, example)
    return base.Outputs(du, None, None, xp.permute_dims(dt, (1, 0)),
                        xp.permute_dims(xp.reshape(du_event, (-1, m, n)), (1, 0, 2)))


def at_outputs(run: Run, x: Inputs, stepper: Stepper, log: Any, tangents: Any, d: base.Tangents,
               ends: tuple[Array, Array], moving: bool) -> Array:
    """Tangents at the save times `(m, k, n)`: of the dense output, and of where in its step each time lies."""
    be, xp = run.be, run.be.xp
    du0 = stepper.lift(d.u0)
    m, n = du0.shape
    s = span(be, x.t0, x.t1)
    ts = base.save_times(run, x, s)
    first = [xp.reshape(du0, (m * n,))] + ([ends[0], 0.0 * ends[0]] if moving else [])
    rows = be.sample(stepper.interpolate, tangents, ts, xp.concat(first), s.direction)
    du = stepper.seen(xp.permute_dims(xp.reshape(rows[:, :m * n], (-1, m, n)), (1, 0, 2)))
    if not moving:
        return du
    start = xp.permute_dims(rows[:, m * n:m * n + m], (1, 0))
    size = xp.permute_dims(rows[:, m * n + m:], (1, 0))
    speed = be.sample(stepper.slope, log, ts, 0.0 * x.u0, s.direction)
    ds = save_time_tangents(run, d, *ends) - start

    def stretch(record: Record, ts: Any) -> Array:
        """Change of the output per change of its step's size."""
        theta = be.vector([(v - record.t) / record.h for v in ts], record.u)
        values, slopes = stepper.interpolate(record, ts), stepper.slope(record, ts)
        return (values - record.u[None, :]) / record.h - theta[:, None] * slopes

    change = be.sample(stretch, log, ts, 0.0 * x.u0, s.direction)
    return du + ds[:, :, None] * speed[None, :, :] + size[:, :, None] * change[None, :, :]


class EventTangents:
    """Pushforwards of conditions, `(t, u, du, dt) -> (m, 1)`, along one direction without parameters (`speeds`), and of
    affects, `(m, n)`."""

    def __init__(self, run: Run, x: Inputs, d_theta: tuple[Array, ...]) -> None:
        self.functions = functions = EventFunctions(run, x)
        still = tuple(0.0 * v[:1, ...] for v in d_theta)
        self.conditions, self.speeds, self.affects = [], [], []
        for i, (c, r) in enumerate(zip(functions.conditions, functions.affects, strict=True)):
            preset = _preset(functions, i, d_theta) if c is None else None
            self.conditions.append(preset or _pushforward(run, x, c, d_theta))
            self.speeds.append((lambda t, u, du, dt: -dt[:, None]) if c is None else _pushforward(run, x, c, still))
            self.affects.append((lambda t, u, du, dt: du) if r is None else _pushforward(run, x, r, d_theta))


class Jumps:
    """Tangents over a step that ends on an event, and over its affect."""

    def __init__(self, run: Run, x: Inputs, stepper: Stepper, push: Any, d_theta: tuple[Array, ...]) -> None:
        self.be, self.stepper, self.push = run.be, stepper, push
        self.tangents = EventTangents(run, x, d_theta)
        self.alone = run.vjp.pushforward(run, x, tuple(0.0 * v[:1, ...] for v in d_theta))

    def __call__(self, state: Ahead, record: Record, entries: Any) -> tuple[Ahead, Array, Array]:
        be, stepper = self.be, self.stepper
        node, dt, behind, events = state
        event = be.entry(entries, behind)
        t, xp = be.time(event.t), be.xp
        m, n = node.u.shape
        assert dt is not None
        none: Array = 0.0 * dt
        new, dK = stepper.jvp(self.push, record, dt, none, node)
        still = Tangent(0.0 * node.u[:1, :], None if node.k is None else 0.0 * node.k[:1, :])
        slope, slopes = stepper.jvp(self.alone, record, none[:1], none[:1] + 1.0, still)
        dc = be.branch(event.index, self.tangents.conditions, t, event.u, new.u, dt)[:, 0]
        cdot = be.branch(event.index, self.tangents.speeds, t, event.u, slope.u, none[:1] + 1.0)[0, 0]
        dh = -dc / cdot
        du, dt = new.u + dh[:, None] * slope.u, dt + dh
        after = be.branch(event.index, self.tangents.affects, t, event.u, du, dt)
        u = self.tangents.functions.after(event.index, event.t, event.u)
        k = None if node.k is None else self.push(t, u, after, dt)[1]
        events = be.enter(events, (dt, xp.reshape(du, (m * n,))))
        dK = dK + dh[None, :, None] * slopes
        return Ahead(Tangent(after, k), dt, behind + 1, events), dK, dh


def _pushforward(run: Run, x: Inputs, field: Any, d_theta: tuple[Array, ...]) -> Any:
    run = product_run(run, field)
    push = trusted(run, x, field.numbers or run.field.u.size).pushforward(run, x, d_theta)
    return lambda t, u, du, dt: push(t, u, du, dt)[1]


def _preset(functions: EventFunctions, i: int, d_theta: tuple[Array, ...]) -> Any:
    """The tangent of the condition t_d - t of preset event `i`."""
    run, x = functions.run, functions.x
    be, place = run.be, run.events[i].place
    times = None if place is not None else _pushforward(run, x, functions.moments[i], d_theta)

    def push(t: Any, u: Array, du: Array, dt: Array) -> Array:
        here = be.xp.astype(functions.preset(i) == be.scalar(t), u.dtype)
        out = -dt[:, None]
        if times is not None:
            out = out + (times(t, u, 0.0 * du, 0.0 * dt) @ here)[:, None]
        elif place[0] == "theta":
            out = out + (be.xp.astype(d_theta[place[1]], u.dtype) @ here)[:, None]
        return out

    return push


def save_time_tangents(run: Run, d: base.Tangents, dt0: Array, dt1: Array) -> Array:
    """Directions of the save times, `(m, k)`."""
    if isinstance(run.saves, int):
        w = run.be.vector(base.fractions(run.saves), d.u0)
        return dt0[:, None] * (1.0 - w)[None, :] + dt1[:, None] * w[None, :]
    return 0.0 * dt0[:, None] if d.saveat is None else d.saveat
