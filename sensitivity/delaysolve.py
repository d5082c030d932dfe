"""The method of steps: one-step methods that look up their own past.

Break points. At t0 the solution has a jump or a kink; it returns, smoother by one order each time, at
`xi = t0 + sum_i n_i tau_i` (Bellen and Zennaro 2003, section 2.2). All of them up to order q + 1, as far as a method
of order q sees them, are mesh points. A stage looks at the piece of the past that the inside of its step points to,
so that on a break point each of the two steps that meet there sees its own side. No step is longer than a lag: what a
stage finds does not depend on its own step, and the Jacobian of implicit stages is `f_u` at a given past.

Mesh points move: between neighbouring break points `t_n = xi_j + theta_n (xi_{j+1} - xi_j)` with `theta_n` what step
control made it, a constant. So the break points are differentiable functions of t0, t1 and the lags.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from .algorithms.base import Aux, Outputs, Solved, save_times
from .backend import Array, Record, Scalar
from .delay import Past, StageField, stage_inputs
from .integrate import Run, Span, initial_step, span
from .integrate import State as LoopState
from .jacobian import Jacobian, differences
from .retcode import RetCode
from .stepper import Stepper
from .system import Inputs

# How much of a step, at either end, is not used when the pieces of the past are looked up.
TOWARDS = 1e-3


class Breaks(NamedTuple):
    """Break points in ascending order, from t0 to t1, their derivatives in (t0, t1, tau_1, ..., tau_k), one row each,
    and how near two of them count as one."""

    times: Any
    rows: Array
    near: Scalar


class Looked(NamedTuple):
    """What a stage found at one delayed time: whether it is history, else the step, the state and the slope there."""

    time: Scalar
    old: Any
    index: Any
    value: Array
    slope: Array


def break_points(run: Run, x: Inputs, tau: Any, s: Span) -> Breaks:
    """All points that the steps must hit."""
    be, xp, kind = run.be, run.be.xp, run.kind
    dtype, device = be.time_dtype(x.u0.dtype), be.device(x.u0)

    def array(v: Any) -> Array:
        return be.asarray(v, dtype=dtype, device=device)

    stops = run.tstops
    combos = [*kind.combinations, *[(0,) * kind.count] * len(stops)]
    starts = [1.0] * len(kind.combinations) + [0.0] * len(stops)
    t0, t1 = array(s.t0), array(s.t1)
    times = array(starts) * t0 + array([0.0] * len(kind.combinations) + list(stops)) + array(combos) @ array(tau)
    rows = array([[a, 0.0, *map(float, c)] for a, c in zip(starts, combos, strict=True)])
    eps = be.eps(dtype)
    near = be.greatest(max(1e-12, 16.0 * eps) * (s.t1 - s.t0), 32.0 * eps * be.greatest(abs(s.t0), abs(s.t1)))
    inside = times < t1 - near
    end = array([[0.0, 1.0, *[0.0] * kind.count]])
    times, rows = xp.where(inside, times, t1), xp.where(inside[:, None], rows, end)
    # Of break points that coincide, the one of the lowest order says how they move.
    rank = array([float(sum(c)) for c in combos])
    close = xp.abs(times[:, None] - times[None, :]) <= near
    chosen = xp.argmin(xp.where(close, rank[None, :], 0.0 * rank[None, :] + 1e9), axis=1)
    times, rows = xp.take(times, chosen, axis=0), xp.take(rows, chosen, axis=0)
    start = array([[1.0, 0.0, *[0.0] * kind.count]])
    times = xp.concat([xp.reshape(t0, (1,)), times, xp.reshape(t1, (1,))])
    rows = xp.concat([start, rows, end])
    order = xp.argsort(times)
    return Breaks(be.scalars(xp.take(times, order, axis=0)), xp.take(rows, order, axis=0), near)


class Inside(NamedTuple):
    """Two times near the ends of a step, between which all its stages look at the past: so each of the two steps that
    meet at a break point sees its own side."""

    low: Scalar
    high: Scalar

    def shifted(self, lag: Scalar) -> Inside:
        return Inside(self.low + lag, self.high + lag)


def inside(t: Scalar, h: Scalar) -> Inside:
    """A step from `t` to `t + h`, `h > 0`."""
    return Inside(t + TOWARDS * h, t + (1.0 - TOWARDS) * h)


def look(be: Any, interpolate: Callable, slope: Callable | None, log: Any, t: Scalar, step: Inside, lag: Scalar,
         t0: Scalar, like: Array) -> Looked:
    """The past of a stage at `t` of a step, one lag back."""
    s = t - lag
    inwards = be.least(be.greatest(t, step.low), step.high) - lag
    return found(be, interpolate, slope, log, s, inwards, inwards < t0, like)


def found(be: Any, interpolate: Callable, slope: Callable | None, log: Any, s: Scalar, inwards: Scalar, old: Any,
          like: Array) -> Looked:
    """The past at time `s` in the step that holds the time `inwards`, unless it is `old`."""
    def nothing() -> tuple[Any, Array, Array]:
        return be.least(0, 0), 0.0 * like, 0.0 * like

    def seek() -> tuple[Any, Array, Array]:
        index = be.locate(log, inwards)
        record = be.record(log, index)
        at = [be.choose(old, record.t, s)]
        value = interpolate(record, at)[0, :]
        return index, value, 0.0 * value if slope is None else slope(record, at)[0, :]

    return Looked(s, old, *be.either(old, nothing, seek))


def past_of(looked: list[Looked], far: Scalar, near: Scalar) -> Past:
    return Past(None, [v.time for v in looked], [v.value for v in looked], [v.slope for v in looked],
                [v.old for v in looked], far, near)


class Equation:
    """A delay equation as the step loop takes it."""

    def __init__(self, run: Run, x: Inputs, tau: Any, s: Span, breaks: Breaks) -> None:
        self.run, self.x, self.tau, self.span, self.breaks = run, x, tau, s, breaks
        self.count = run.kind.count
        self.u0, self.atol, self.norm = x.u0, x.atol, run.norm or run.be.rms
        self.first_step: Any = None
        be = run.be
        self.shortest = tau[0]
        for i in range(1, self.count):
            self.shortest = be.least(self.shortest, tau[i])
        self.far = s.t0 - self.shortest
        self.longest = tau[0]
        for i in range(1, self.count):
            self.longest = be.greatest(self.longest, tau[i])
        # A time that f asks for is t - lag, rounded as f does it.
        largest = be.greatest(be.greatest(abs(s.t0), abs(s.t1)), abs(self.far))
        self.near = 64.0 * run.kind.setting.eps * largest
        self.rhs = StageField.of(run).serve(be, x.theta, x.constants)
        # Output, costs and coefficients do not depend on the vector field.
        self.stepper = run.method.bind(be, self.first, True)

    @classmethod
    def of(cls, run: Run, x: Inputs, *more: Any) -> Self:
        """The equation of a run whose lags do not depend on the state."""
        s, tau = span(run.be, x.t0, x.t1), run.kind.tau(run.be, run, x)
        return cls(run, x, tau, s, break_points(run, x, tau, s), *more)

    def values(self, record: Record, ts: Any) -> Array:
        """The state inside a step."""
        return self.stepper.interpolate(record, ts)

    def looked(self, log: Any, step: Any, t: Any, u: Array, slope: Callable | None = None) -> list[Looked]:
        """The past of a stage of a step."""
        be = self.run.be
        now = be.scalar(t)
        return [look(be, self.values, slope, log, now, step, self.tau[i], self.span.t0, u) for i in range(self.count)]

    def derivative(self, log: Any, step: Any) -> Callable[[Any, Array], Array]:
        """`rhs(t, u)` for the stages of a step."""
        return lambda t, u: self.rhs(t, u, past_of(self.looked(log, step, t, u), self.far, self.near))

    def jacobian(self, log: Any, step: Any) -> Jacobian | None:
        """`f_u` in a step, for methods that solve equations."""
        run, be = self.run, self.run.be
        if not run.method.implicit or run.vjp is None:
            return None
        field = run.kind.as_field(run, StageField.of(run, moving=False))

        def exact(t: Any, u: Array) -> Array:
            past = past_of(self.looked(log, step, t, u, self.stepper.slope), self.far, be.scalar(math.inf))
            return run.vjp.jacobian(field, stage_inputs(be, self.x, u, past, moving=False))(t, u)

        if not be.opaque and "reverse" in be.modes:
            return Jacobian(exact, exact)
        return Jacobian(differences(be, self.derivative(log, step), run.method.exact_jacobian), exact)

    def bound(self, log: Any, step: Any) -> Stepper:
        """The method for a step, or in one that was taken."""
        return self.run.method.bind(self.run.be, self.derivative(log, step), True, self.jacobian(log, step))

    def attempt(self, log: Any, step: Any, t: Scalar, h: Scalar, u: Array) -> tuple[Array, Array, Any]:
        """A step with its stages, and how many iterations it took; its first slope is not that of the step before."""
        stepper = self.bound(log, step)
        if self.run.controller.adaptive:
            stepper = stepper.within(self.x.rtol, self.atol, self.norm)
        return stepper.attempt(t, h, u, stepper.first(self.run.be.time(t), u))

    def retake(self, log: Any, t: Scalar, h: Scalar, u: Array) -> tuple[Array, Array, Any]:
        """A step that was accepted, once more."""
        return self.attempt(log, inside(t, h), t, h, u)

    def first(self, t: Any, u: Array) -> Array:
        """`rhs` near the start, with the history in place of all delayed states."""
        be, k = self.run.be, self.count
        now, zeros = be.scalar(t), [0.0 * u] * k
        times = [now - self.tau[i] for i in range(k)]
        return self.rhs(t, u, Past(None, times, zeros, zeros, [be.truth(True)] * k, self.far, self.near))

    def enter(self, log: Any, t: Scalar, h: Scalar, u: Array) -> Array:
        """The state from which a step of size `h` starts at time `t`, where the last one ended with `u`."""
        del log, t, h
        return u

    def beside(self, t: Scalar, h: Scalar, evaluations: Any) -> Any:
        """How often `f` is evaluated in an attempt beside the `evaluations` of the right-hand side."""
        del t, h, evaluations
        return 0

    def evaluations(self, end: LoopState) -> Any:
        """How often `f` was evaluated: a step that was tried begins with a slope of its own."""
        attempts = end.accepted + end.rejected
        again = self.stepper.fsal * (attempts - 1)
        start = 0 if self.run.dt is not None or self.first_step is not None else 2
        return self.stepper.evaluations(attempts, True) + again + end.iterations + start

    def again(self, taken: Any, iterations: Any) -> tuple[Any, tuple[Any, Any, Any]]:
        """How often `f` is evaluated in steps that are taken again, and their algebra."""
        algebra = self.stepper.algebra(taken, iterations, self.run.controller.adaptive)
        return self.stepper.evaluations(1, True) * taken + iterations, algebra

    def algebra(self, end: LoopState) -> tuple[Any, Any, Any]:
        """Jacobians, factorisations and linear solves."""
        return self.stepper.algebra(end.accepted + end.rejected, end.iterations, self.run.controller.adaptive)


class State(Equation):
    """The state alone, along a log whose first `n` components it is."""

    def __init__(self, run: Run, x: Inputs, tau: Any, s: Span, breaks: Breaks) -> None:
        super().__init__(run, x, tau, s, breaks)
        self.n = x.u0.shape[0]

    def values(self, record: Record, ts: Any) -> Array:
        return self.stepper.interpolate(record, ts)[:, :self.n]

    def past_at(self, log: Any, t: Scalar, step: Inside, slopes: bool) -> tuple[Array, Past]:
        """The state at `t`, as seen inside a step, and what `f` needs to know of the past; `slopes` by `f`."""
        be = self.run.be
        record = be.record(log, be.locate(log, be.least(be.greatest(t, step.low), step.high)))
        u = self.values(record, [t])[0, :]
        looked = self.looked(log, step, t, u)
        if slopes:
            looked = [v._replace(slope=self.slope(log, v)) for v in looked]
        return u, past_of(looked, self.far, be.scalar(math.inf))

    def known(self, step: Inside) -> Any:
        """For how many lags a step looks at the solution, not at the history."""
        be = self.run.be
        return sum((be.choose(step.low - self.tau[i] < self.span.t0, 0, 1) for i in range(self.count)), 0)

    def slope(self, log: Any, found: Looked) -> Array:
        """`u'` at a delayed time after t0, by `f`."""
        be = self.run.be

        def of_f() -> Array:
            record = be.record(log, found.index)
            at = be.choose(found.old, record.t, found.time)
            return self.derivative(log, inside(record.t, record.h))(be.time(at), found.value[:self.n])

        return be.either(found.old, lambda: 0.0 * found.value[:self.n], of_f)

    def at_output(self, log: Any, t: Scalar) -> Array:
        """`u'` at an output; on a node, that of the step that ends there."""
        be = self.run.be
        record: Record = be.record(log, be.locate_end(log, t))
        return self.derivative(log, inside(record.t, record.h))(be.time(t), self.values(record, [t])[0, :])


def march(eq: Equation, sink: Any = None) -> tuple[LoopState, Any, Any]:
    """Integrate from t0 to t1; returns the last state, all accepted steps or what `sink` kept of them, and how often
    `f` was evaluated beside the right-hand side."""
    run, x, s, breaks, stepper, norm = eq.run, eq.x, eq.span, eq.breaks, eq.stepper, eq.norm
    be, controller = run.be, run.controller
    most = eq.shortest if run.dtmax is None else be.least(eq.shortest, run.dtmax)
    length, eps = s.t1 - s.t0, be.eps(be.time_dtype(x.u0.dtype))
    broken = int(RetCode.NewtonFailure if stepper.implicit else RetCode.NonFinite)
    h: Any = eq.first_step if run.dt is None else run.dt
    if h is None:
        start = Starting(eq.first, stepper.order)
        h = initial_step(run, start, s, eq.u0, eq.first(be.time(s.t0), eq.u0), x.rtol, eq.atol, norm)

    def advance(loop: tuple[LoopState, Any], log: Any) -> tuple[tuple[LoopState, Any], Record, Any]:
        state, more = loop
        target = breaks.times[be.following(breaks.times, state.t + breaks.near)]
        remaining = target - state.t
        wanted = be.least(abs(state.h), most)
        last = wanted * (1.0 + 1e-9) >= remaining
        h = be.choose(last, remaining, wanted)
        u0 = eq.enter(log, state.t, h, state.u)
        u1, K, spent = eq.attempt(log, inside(state.t, h), state.t, h, u0)
        more = more + eq.beside(state.t, h, stepper.evaluations(1, True) + spent)
        spent = state.iterations + spent
        record = Record(state.t, h, u0, K)
        if run.progress is not None:
            be.report(run.progress, (state.t - s.t0) / length, state.t)
        if not controller.adaptive:
            t = be.choose(last, target, state.t + h)
            return (state._replace(t=t, u=u1, accepted=state.accepted + 1, iterations=spent), more), record, True
        ratio = norm(be.scaled(stepper.error(state.t, h, u0, K), u0, u1, x.rtol, eq.atol))
        keep, factor, memory = controller.propose(be, ratio, state.memory, stepper.error_order)
        t = be.choose(keep, be.choose(last, target, state.t + h), state.t)
        h_next = be.choose(last & keep, be.greatest(wanted, h * factor), h * factor)
        tiny = 16.0 * eps * be.greatest(abs(t), eps * length) if run.dtmin is None else run.dtmin
        stuck = (h_next < tiny) & (t != s.t1)
        status = be.choose(stuck, be.choose(be.isfinite(ratio), int(RetCode.DtMin), broken), state.status)
        new = LoopState(t, h_next, be.choose(keep, u1, state.u), None, memory, ratio,
                        state.accepted + be.choose(keep, 1, 0), state.rejected + be.choose(keep, 0, 1), status,
                        iterations=spent)
        return (new, more), record, keep

    def running(loop: tuple[LoopState, Any]) -> Any:
        state, _ = loop
        return (state.t < s.t1) & (state.status == int(RetCode.Success))

    # A lag that is not a positive number could not be refused if it had no value when the solve was prepared.
    positive = be.isfinite(eq.shortest) & (eq.shortest > 0.0)
    status = be.choose(positive, int(RetCode.Success), int(RetCode.NonFinite))
    begin = LoopState(s.t0, h, eq.u0, None, controller.init(), 0.0, 0, 0, status)
    like = Record(s.t0, s.t0, eq.u0, be.xp.stack([0.0 * eq.u0] * stepper.stages))
    (end, more), log = be.unfold(advance, (begin, 0), running, run.max_steps, run.capacity, like, sink)
    if not controller.adaptive:
        bad = be.choose(be.isfinite(be.rms(end.u)), end.status, broken)
        end = end._replace(status=bad)
    short = (end.t < s.t1) & (end.status == int(RetCode.Success))
    why: Any = int(RetCode.MaxSteps)
    if sink is not None:
        why = be.choose(be.overfull(log[0]), int(RetCode.Memory), why)
    return end._replace(status=be.choose(short, why, end.status)), log, more


class Starting(Stepper):
    """What `initial_step` asks of a stepper."""

    def __init__(self, rhs: Callable, order: int) -> None:
        self.rhs, self.order = rhs, order


def solve_forward(run: Run, x: Inputs, room: Callable | None = None) -> tuple[Outputs, Aux, Solved]:
    """The forward solve of every algorithm; all accepted steps are kept, because later ones look at them, or what
    there is `room(equation)` for."""
    be = run.be
    eq = Equation.of(run, x)
    stepper = eq.stepper
    ts = None if run.saves in (None, "steps") else save_times(run, x, eq.span)
    rows = sink = None
    if room is not None:
        sink = be.segments(room(eq), stepper, run.saves, ts, x.u0, run.capacity)
    end, log, _ = march(eq, sink)
    if sink is not None:
        log, rows = log
    if run.saves is None:
        u, ts = end.u[None, :], [end.t]
    elif run.saves == "steps":
        u, ts = be.nodes(log, end.u, end.t) if sink is None else be.node_rows(rows, log, end.u, end.t)
    else:
        rows = be.sample(stepper.interpolate, log, ts, x.u0, 1.0) if sink is None else rows
        u = be.reached(rows, ts, end.t, 1.0)
    nodes = stages = mesh = None
    if run.dense:
        times, sizes, nodes, stages = be.stacked(log)
        mesh = (times, sizes)
    aux = Aux(ts, end.t, end.accepted, end.rejected, eq.evaluations(end), end.status, end.ratio, end.h, mesh, None,
              eq.algebra(end))
    return Outputs(u, nodes, stages), aux, Solved(x, log, end)
