"""Derivatives across events, for the discrete adjoint.

A state event ends a step of the mesh: the step's size h solves c(t_n + h, Phi_h(t_n, u_n, p), p) = 0, and
u+ = R(t*, u-, p) with t* = t_n + h, u- = Phi_h. Reverse, with `lam` the cotangent of u+, `tau` that of the start of the
segment behind the event (all its nodes move with t*), `u_bar`, `t_bar` those of the event's own outputs:

    lam1  = R_u^T lam + u_bar,     sigma = lam1 . Phi_h' + tau + R_t . lam + t_bar + (outputs inside the step),
    beta  = -sigma / cdot,         cdot  = c_t + c_u . Phi_h',
    lam_n = Phi_u^T (lam1 + beta c_u),     pbar += R_p^T lam + Phi_p^T (lam1 + beta c_u) + beta c_p,

which is the discrete form of the jump conditions (Serban and Recuero 2019, J. Comput. Nonlinear Dynam. 14, section 3;
Kong et al. 2024, Proc. IEEE 112, eq. 8) with the step's own slope Phi_h' in place of f-. A preset time t_d is the
condition t_d - t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..backend import Array, Scalar
from ..events import EventField, EventFunctions, product_run
from ..integrate import Run, span
from ..retcode import RetCode
from ..stepper import Adjoint, Stepper
from ..system import Inputs
from ..trust import trusted
from ..watch import no
from . import base

GRAZING = 1e-6
FLAT = 1e-12
APART = 1e-10


class Sweep(NamedTuple):
    """State of the sweep over segments: the adjoint, where in the log it is, the cotangent of `t1`, the number of
    products, and what is wrong."""

    adjoint: Adjoint
    position: Any
    t1: Scalar
    products: Any
    status: Any


def sweep(run: Run, x: Inputs, stepper: Stepper, solved: base.Solved, pull: Any, ct: base.Outputs, extra: Any,
          adjoint: Adjoint, params: bool) -> tuple[Adjoint, Scalar, Any, Any, Any]:
    """The reverse sweep through all segments: `(adjoint at t0, cotangent of t1, products, status, position)`."""
    be, log, watch = run.be, solved.log, solved.end.watch
    s = span(be, x.t0, x.t1)
    jump = _Jump(run, x, stepper, pull, params)

    def back(state: Adjoint, record: Any, out: Any, last: Any) -> Adjoint:
        return stepper.vjp(pull, record, out, last, True, state)

    def over(state: Sweep, event: Any, bars: Any, newest: Any) -> Sweep:
        def inside(_: Any, t: Scalar) -> Any:
            return s.direction * (t - event.t) >= 0.0

        right, position = be.rewind(back, state.adjoint, log, extra, state.position, inside)
        t1 = be.choose(newest, right.h, state.t1)
        right = right._replace(t0=right.t0 - be.choose(newest, right.h, 0.0))
        left, position, products, status = jump(right, event, bars, log, extra, position)
        status = be.choose(state.status != 0, state.status, status)
        return Sweep(left, position, t1, state.products + products, status)

    start = Sweep(adjoint, be.newest(log, extra), 0.0, 0, ambiguous(run, x, watch.entries))
    state = be.unwind(over, start, watch.entries, (ct.event_t, ct.event_u))
    first, position = be.rewind(back, state.adjoint, log, extra, state.position, lambda *_: True)
    none = watch.count == 0
    t1 = be.choose(none, first.h, state.t1)
    n = x.u0.shape[0]
    products = state.products + stepper.products(solved.end.accepted, 1, n) - stepper.products(0, 1, n)
    return first._replace(h=be.choose(none, first.h, 0.0)), t1, products, state.status, position


def ambiguous(run: Run, x: Inputs, entries: Any) -> Any:
    """Zero, or the code that says why the events of a solve leave its derivatives undefined: two at one time, or an
    output on one whose time moves."""
    be = run.be
    s = span(be, x.t0, x.t1)
    near = APART * abs(s.t1 - s.t0)
    saves = None if run.saves in (None, "steps") else base.save_times(run, x, s)

    def look(state: tuple, event: Any, _: Any, __: Any) -> tuple:
        behind, status = state
        status = be.choose(abs(behind - event.t) <= near, int(RetCode.SimultaneousEvents), status)
        if saves is not None:
            moving: Any = False
            for k, e in enumerate(run.events):
                if e.condition is not None:
                    moving = moving | (event.index == k)
            status = be.choose(moving & be.near(saves, event.t, near), int(RetCode.EventAtSaveTime), status)
        return event.t, status

    start = (s.t1 + s.direction * abs(s.t1 - s.t0), 0)
    return be.unwind(look, start, entries, None)[1]


class EventPulls:
    """Pullbacks `(t, u, ct) -> (ct_u, ct_theta, ct_t)` of conditions and affects."""

    def __init__(self, run: Run, x: Inputs, params: bool) -> None:
        self.functions = functions = EventFunctions(run, x)
        zeros = run.be.zeros(x.theta) if params else ()
        self.conditions: list[Callable] = []
        self.affects: list[Callable] = []
        for i, (c, r) in enumerate(zip(functions.conditions, functions.affects, strict=True)):
            self.conditions.append(_preset(functions, i, zeros) if c is None else _pullback(run, x, c, params))
            self.affects.append((lambda t, u, ct: (ct, zeros, 0.0)) if r is None else _pullback(run, x, r, params))


class _Jump:
    """The two steps of a jump: over the affect, and over the step that ends on the event."""

    def __init__(self, run: Run, x: Inputs, stepper: Stepper, pull: Any, params: bool) -> None:
        self.be, self.stepper, self.pull, self.events = run.be, stepper, pull, run.events
        self.pulls = EventPulls(run, x, params)

    def __call__(self, right: Adjoint, event: Any, bars: Any, log: Any, extra: Any,
                 position: Any) -> tuple[Adjoint, Any, Any, Any]:
        be, stepper, pull = self.be, self.stepper, self.pull
        lam, theta, tau = right.lam, right.theta, right.t0
        t = be.time(event.t)
        if right.kappa is not None:
            u_bar, theta_bar, t_bar = pull(t, self.pulls.functions.after(event.index, event.t, event.u), right.kappa)
            lam, theta, tau = lam + u_bar, be.add(theta, theta_bar), tau + t_bar
        u_bar, theta_bar, t_bar = be.branch(event.index, self.pulls.affects, t, event.u, lam)
        theta, tau, lam = be.add(theta, theta_bar), tau + t_bar + bars[0], u_bar + bars[1]
        c_u, c_theta, c_t = be.branch(event.index, self.pulls.conditions, t, event.u, be.vector([1.0], lam))
        sought = any(e.condition is not None for e in self.events)
        none, zeros = (be.nothing(lam) if stepper.fsal else None), be.zeros(theta)
        silent = stepper.fsal and none is None

        def last_step(state: tuple, record: Any, out: Any, _: Any) -> tuple:
            a = stepper.vjp(pull, record, out, True, True, Adjoint(lam, none, theta, 0.0, 0.0))
            b, made = Adjoint(0.0 * lam, none, zeros, 0.0, 0.0), -int(silent and (out is None or out.k is None))
            if sought:
                b = stepper.vjp(pull, record, None, True, True, Adjoint(c_u, none, be.zeros(theta), 0.0, 0.0))
                made += stepper.stages - stepper.fsal - int(silent)
            return a, b, be.scalar(be.xp.max(be.xp.abs(record.k))), made, True

        blank = Adjoint(0.0 * lam, none, zeros, 0.0, 0.0)
        (a, b, speed, made, _), position = be.rewind(
            last_step, (blank, blank, 0.0, 0, False), log, extra, position, lambda state, _: no(state[-1]))
        cdot = c_t + b.h
        flat = abs(cdot) <= GRAZING * (abs(c_t) + be.rms(c_u) * speed * c_u.shape[0])
        beta = -(a.h + tau) / be.choose(flat, 1.0, cdot)
        kappa = a.kappa if b.kappa is None else a.kappa + beta * b.kappa
        moved = tuple(be.xp.astype(beta * (v + w), v.dtype) for v, w in zip(b.theta, c_theta, strict=True))
        left = Adjoint(a.lam + beta * b.lam, kappa, be.add(a.theta, moved), a.t0 + beta * (b.t0 + c_t) + tau, 0.0)
        return left, position, made + int(right.kappa is not None), be.choose(flat, int(RetCode.GrazingEvent), 0)


class Limit(NamedTuple):
    """Left of an event: costate, what the parameters got, and whether all is well."""

    lam: Array
    theta: tuple[Array, ...]
    status: Any


def limit_jump(run: Run, pulls: EventPulls, rhs: Callable, event: Any, lam: Array, bars: tuple[Scalar, Array]) -> Limit:
    """The jump of a costate, for the equation and not for its steps (the formulas above with f- and f+ in place of
    Phi_h' and of the nodes that move):

        sigma = (R_u^T lam + u_bar) . f- + R_t . lam + t_bar - lam . f+,   beta = -sigma / (c_t + c_u . f-),
        lam-  = R_u^T lam + u_bar + beta c_u,   pbar += R_p^T lam + beta c_p;   without f+ where the solve ends.
    """
    be, (t_bar, u_bar) = run.be, bars
    t, u = be.time(event.t), event.u
    before, after = rhs(t, u), rhs(t, pulls.functions.after(event.index, t, u))
    on: Any = 1.0
    for k, e in enumerate(run.events):
        if e.terminal:
            on = be.choose(event.index == k, 0.0, on)
    back, theta, moved = be.branch(event.index, pulls.affects, t, u, lam)
    back = back + u_bar
    c_u, c_theta, c_t = be.branch(event.index, pulls.conditions, t, u, be.vector([1.0], lam))
    along = be.dot(c_u, before)
    cdot = c_t + along
    flat = abs(cdot) <= FLAT * (abs(c_t) + be.rms(c_u) * be.rms(before) * c_u.shape[0])
    beta = -(be.dot(back, before) + moved + t_bar - on * be.dot(lam, after)) / be.choose(flat, 1.0, cdot)
    theta = be.add(theta, tuple(be.xp.astype(beta * v, v.dtype) for v in c_theta))
    return Limit(back + beta * c_u, theta, be.choose(flat, int(RetCode.GrazingEvent), 0))


def _pullback(run: Run, x: Inputs, field: EventField, params: bool) -> Callable:
    run = product_run(run, field)
    return trusted(run, x, field.numbers or run.field.u.size).pullback(run, x, time=True, params=params)


def _preset(functions: EventFunctions, i: int, zeros: tuple[Array, ...]) -> Callable:
    """The pullback of the condition t_d - t of preset event `i`; which of its times, their values tell."""
    run, x = functions.run, functions.x
    be, place = run.be, run.events[i].place
    pull_times = None if place is not None else _pullback(run, x, functions.moments[i], bool(zeros))

    def pull(t: Any, u: Array, ct: Array) -> tuple[Array, tuple[Array, ...], Any]:
        theta, times = zeros, functions.preset(i)
        here = be.xp.astype(times == be.scalar(t), times.dtype)
        if pull_times is not None:
            theta = pull_times(t, u, be.xp.astype(here, u.dtype))[1]
        elif place[0] == "theta" and zeros:
            theta = (*zeros[:place[1]], here, *zeros[place[1] + 1:])
        return 0.0 * u, theta, -1.0

    return pull
