"""The method of steps: explicit Runge-Kutta steps that look up their own past.

Break points. At t0 the solution has a jump or a kink; it returns, smoother by one order each time, at
`xi = t0 + sum_i n_i tau_i` (Bellen and Zennaro 2003, section 2.2). All of them up to order q + 1, as far as a method
of order q sees them, are mesh points. A stage looks at the piece of the past that the middle of its step points to,
so that on a break point each of the two steps that meet there sees its own side.

Mesh points move: between neighbouring break points `t_n = xi_j + theta_n (xi_{j+1} - xi_j)` with `theta_n` what step
control made it, a constant. So the break points are differentiable functions of t0, t1 and the lags.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .algorithms.base import Aux, Outputs, Solved, save_times
from .backend import Array, Record, Scalar
from .delay import Past, StageField
from .explicit import Explicit, step
from .integrate import Run, Span, initial_step, span
from .integrate import State as LoopState
from .retcode import RetCode
from .stepper import Stepper
from .system import Inputs

# By how much of a step a delayed time is moved towards the middle of its step before its piece is looked up.
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


def look(be: Any, interpolate: Callable, slope: Callable | None, log: Any, t: Scalar, middle: Scalar, lag: Scalar,
         t0: Scalar, like: Array) -> Looked:
    """The past of a stage at `t`, in a step with this `middle`, one lag back."""
    s = t - lag
    inwards = s + TOWARDS * (middle - t)
    old = inwards < t0

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


def stepper_of(run: Run) -> Explicit:
    """The method with its dense output; the vector field comes with each step."""
    stepper = run.method.bind(run.be, None, True)
    assert isinstance(stepper, Explicit)
    return stepper


class Equation:
    """A delay equation as the step loop takes it."""

    def __init__(self, run: Run, x: Inputs, tau: Any, s: Span, breaks: Breaks) -> None:
        self.run, self.x, self.tau, self.span, self.breaks = run, x, tau, s, breaks
        self.stepper, self.count = stepper_of(run), run.kind.count
        self.u0, self.atol, self.norm = x.u0, x.atol, run.norm or run.be.rms
        self.first_step: Any = None
        be = run.be
        self.shortest = tau[0]
        for i in range(1, self.count):
            self.shortest = be.least(self.shortest, tau[i])
        self.far = s.t0 - self.shortest
        # A time that f asks for is t - lag, rounded as f does it.
        largest = be.greatest(be.greatest(abs(s.t0), abs(s.t1)), abs(self.far))
        self.near = 64.0 * run.kind.setting.eps * largest
        self.rhs = StageField.of(run).serve(be, x.theta, x.constants)

    def values(self, record: Record, ts: Any) -> Array:
        """The state inside a step."""
        return self.stepper.interpolate(record, ts)

    def derivative(self, log: Any, middle: Scalar) -> Callable[[Any, Array], Array]:
        """`rhs(t, u)` for the stages of a step with this middle."""
        be = self.run.be

        def at(t: Any, u: Array) -> Array:
            now = be.scalar(t)
            looked = [look(be, self.values, None, log, now, middle, self.tau[i], self.span.t0, u)
                      for i in range(self.count)]
            return self.rhs(t, u, past_of(looked, self.far, self.near))

        return at

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


class State(Equation):
    """The state alone, along a log whose first `n` components it is."""

    def __init__(self, run: Run, x: Inputs, tau: Any, s: Span, breaks: Breaks) -> None:
        super().__init__(run, x, tau, s, breaks)
        self.n = x.u0.shape[0]

    def values(self, record: Record, ts: Any) -> Array:
        return self.stepper.interpolate(record, ts)[:, :self.n]

    def past_at(self, log: Any, t: Scalar, middle: Scalar, slopes: bool) -> tuple[Array, Past]:
        """The state at `t`, on the side of `middle`, and what `f` needs to know of the past; `slopes` by `f`."""
        be = self.run.be
        record = be.record(log, be.locate(log, t + TOWARDS * (middle - t)))
        u = self.values(record, [t])[0, :]
        looked = [look(be, self.values, None, log, t, middle, self.tau[i], self.span.t0, u)
                  for i in range(self.count)]
        if slopes:
            looked = [v._replace(slope=self.slope(log, v)) for v in looked]
        return u, past_of(looked, self.far, be.scalar(math.inf))

    def slope(self, log: Any, found: Looked) -> Array:
        """`u'` at a delayed time after t0, by `f`."""
        be = self.run.be

        def of_f() -> Array:
            record = be.record(log, found.index)
            at = be.choose(found.old, record.t, found.time)
            return self.derivative(log, record.t + 0.5 * record.h)(be.time(at), found.value[:self.n])

        return be.either(found.old, lambda: 0.0 * found.value[:self.n], of_f)

    def at_output(self, log: Any, t: Scalar) -> Array:
        """`u'` at an output; on a node, that of the step that ends there."""
        be = self.run.be
        record: Record = be.record(log, be.locate_end(log, t))
        return self.derivative(log, record.t + 0.5 * record.h)(be.time(t), self.values(record, [t])[0, :])


def march(eq: Equation) -> tuple[LoopState, Any]:
    """Integrate from t0 to t1; returns the last state and all accepted steps."""
    run, x, s, breaks, stepper, norm = eq.run, eq.x, eq.span, eq.breaks, eq.stepper, eq.norm
    be, controller, tab = run.be, run.controller, stepper.tab
    most = eq.shortest if run.dtmax is None else be.least(eq.shortest, run.dtmax)
    length, eps = s.t1 - s.t0, be.eps(be.time_dtype(x.u0.dtype))
    h: Any = eq.first_step if run.dt is None else run.dt
    if h is None:
        start = Starting(eq.first, stepper.order)
        h = initial_step(run, start, s, eq.u0, eq.first(be.time(s.t0), eq.u0), x.rtol, eq.atol, norm)

    def advance(state: LoopState, log: Any) -> tuple[LoopState, Record, Any]:
        target = breaks.times[be.following(breaks.times, state.t + breaks.near)]
        remaining = target - state.t
        wanted = be.least(abs(state.h), most)
        last = wanted * (1.0 + 1e-9) >= remaining
        h = be.choose(last, remaining, wanted)
        u0 = eq.enter(log, state.t, h, state.u)
        u1, K = step(be, tab, eq.derivative(log, state.t + 0.5 * h), state.t, h, u0, None)
        record = Record(state.t, h, u0, K)
        if run.progress is not None:
            be.report(run.progress, (state.t - s.t0) / length, state.t)
        if not controller.adaptive:
            t = be.choose(last, target, state.t + h)
            return state._replace(t=t, u=u1, accepted=state.accepted + 1), record, True
        ratio = norm(be.scaled(stepper.error(state.t, h, u0, K), u0, u1, x.rtol, eq.atol))
        keep, factor, memory = controller.propose(be, ratio, state.memory, stepper.order)
        t = be.choose(keep, be.choose(last, target, state.t + h), state.t)
        h_next = be.choose(last & keep, be.greatest(wanted, h * factor), h * factor)
        tiny = 16.0 * eps * be.greatest(abs(t), eps * length) if run.dtmin is None else run.dtmin
        stuck = (h_next < tiny) & (t != s.t1)
        status = be.choose(stuck, be.choose(be.isfinite(ratio), int(RetCode.DtMin), int(RetCode.NonFinite)),
                           state.status)
        new = LoopState(t, h_next, be.choose(keep, u1, state.u), None, memory, ratio,
                    state.accepted + be.choose(keep, 1, 0), state.rejected + be.choose(keep, 0, 1), status)
        return new, record, keep

    def running(state: LoopState) -> Any:
        return (state.t < s.t1) & (state.status == int(RetCode.Success))

    # A lag that is not a positive number could not be refused if it had no value when the solve was prepared.
    positive = be.isfinite(eq.shortest) & (eq.shortest > 0.0)
    status = be.choose(positive, int(RetCode.Success), int(RetCode.NonFinite))
    begin = LoopState(s.t0, h, eq.u0, None, controller.init(), 0.0, 0, 0, status)
    like = Record(s.t0, s.t0, eq.u0, be.xp.stack([0.0 * eq.u0] * tab.stages))
    end, log = be.unfold(advance, begin, running, run.max_steps, run.capacity, like)
    if not controller.adaptive:
        bad = be.choose(be.isfinite(be.rms(end.u)), end.status, int(RetCode.NonFinite))
        end = end._replace(status=bad)
    short = (end.t < s.t1) & (end.status == int(RetCode.Success))
    return end._replace(status=be.choose(short, int(RetCode.MaxSteps), end.status)), log


class Starting(Stepper):
    """What `initial_step` asks of a stepper."""

    def __init__(self, rhs: Callable, order: int) -> None:
        self.rhs, self.order = rhs, order


def solve_forward(run: Run, x: Inputs) -> tuple[Outputs, Aux, Solved]:
    """The forward solve of every algorithm; all accepted steps are kept, because later ones look at them."""
    be = run.be
    s = span(be, x.t0, x.t1)
    tau = run.kind.tau(be, run, x)
    eq = Equation(run, x, tau, s, break_points(run, x, tau, s))
    end, log = march(eq)
    stepper = eq.stepper
    if run.saves == "steps":
        u, ts = be.nodes(log, end.u, end.t)
    elif run.saves is None:
        u, ts = end.u[None, :], [end.t]
    else:
        ts = save_times(run, x, s)
        u = be.reached(be.sample(stepper.interpolate, log, ts, x.u0, 1.0), ts, end.t, 1.0)
    nodes = stages = mesh = None
    if run.dense:
        times, sizes, nodes, stages = be.stacked(log)
        mesh = (times, sizes)
    attempts = end.accepted + end.rejected
    nfe = stepper.tab.stages * attempts + (0 if run.dt is not None else 2)
    aux = Aux(ts, end.t, end.accepted, end.rejected, nfe, end.status, end.ratio, end.h, mesh)
    return Outputs(u, nodes, stages), aux, Solved(x, log, end)
