"""Lags that depend on the state: the method of steps with break points found on the way.

The deviating arguments are `alpha_i(t) = t - tau_i(t, u(t), p)`. A break point is where one of them reaches an earlier
break point (its parent), the first of which is t0:

    g(h) = alpha_i(t_n + h) - xi_parent = 0,   with the state at the end of the step itself in alpha_i.

A step that goes beyond is taken again with the size that a bracketed secant method gives, until `g` is zero up to
rounding.
All stages of a step look between the same two break points of the past.

Reference: Bellen and Zennaro 2003, section 2.2 and chapter 4; Paul 1992 for tracking.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .algorithms.base import Aux, Outputs, Solved, save_times
from .backend import Array, Record, Scalar
from .delay import Past
from .delaysolve import Breaks, Equation, Looked, Starting, found
from .errors import UnsupportedCombination
from .integrate import Run, State, initial_step, span
from .retcode import RetCode
from .system import Inputs

# Room for break points that others come from; later ones are crossed like any other point.
PARENTS = 64


class Crossings(NamedTuple):
    """Break points that later ones may come from, their orders and their number, and when each lag reached each."""

    times: Array
    orders: Array
    count: Array
    reached: Array


class Walk(NamedTuple):
    """Loop state; `low` and `high` are step sizes before and beyond a break point, with `g` there, and `end` says
    which of them is newer (-1, 1)."""

    t: Scalar
    h: Scalar
    u: Array
    memory: Scalar
    ratio: Scalar
    accepted: Any
    rejected: Any
    status: Any
    low: Scalar
    g_low: Scalar
    high: Scalar
    g_high: Scalar
    end: Scalar
    crossings: Crossings
    iterations: Any = 0


class Side(NamedTuple):
    """Between which break points a lag looks during a step; `old`: before t0."""

    low: Scalar
    high: Scalar
    old: Any


class Dependent(Equation):
    """A delay equation with state-dependent lags as its step loop takes it."""

    def __init__(self, run: Run, x: Inputs) -> None:
        be = run.be
        s = span(be, x.t0, x.t1)
        eps = be.eps(be.time_dtype(x.u0.dtype))
        close = be.greatest(1e3 * eps * (s.t1 - s.t0), 32.0 * eps * be.greatest(abs(s.t0), abs(s.t1)))
        super().__init__(run, x, run.kind.tau(be, run, x), s, Breaks([], x.u0, close))
        self.close = close
        self.lags = run.kind.bound(be, run, x)

    def arguments(self, t: Scalar, u: Array) -> list[Scalar]:
        """The deviating arguments."""
        tau = self.run.be.scalars(self.lags(self.run.be.time(t), u))
        return [t - tau[i] for i in range(self.count)]

    def none_yet(self) -> Crossings:
        be, s, k = self.run.be, self.span, self.count
        inf = be.asarray([float("inf")] * PARENTS, dtype=be.time_dtype(self.x.u0.dtype), device=be.device(self.x.u0))
        times = be.xp.where(self._slots(inf) == 0, be.asarray(s.t0, dtype=inf.dtype), inf)
        return Crossings(times, be.xp.zeros_like(inf), be.asarray(1, dtype=be.xp.int64 if not be.traced else None),
                         be.xp.stack([inf] * k))

    def _slots(self, like: Array) -> Array:
        return self.run.be.xp.arange(PARENTS, device=self.run.be.device(like))

    def passed(self, c: Crossings, t: Scalar, i: int) -> Array:
        """How many break points lag `i` has reached at time `t`; so many is the number of the next one."""
        return self.run.be.xp.sum(self.run.be.xp.astype(c.reached[i, :] <= t + self.close, c.count.dtype))

    def sides(self, c: Crossings, t: Scalar, u: Array) -> list[Side]:
        """Where each lag looks in a step from `u` at `t`. A method that asks for derivatives at the start of its step
        gets those of the piece ahead."""
        be, now = self.run.be, self.arguments(t, u)
        out = []
        for i in range(self.count):
            n = self.passed(c, t, i)
            before = be.scalar(c.times[be.xp.maximum(n - 1, 0 * n)])
            low = be.greatest(before, now[i]) if self.run.method.exact_jacobian else before
            out.append(Side(low, be.scalar(c.times[n]), be.scalar(n) < 0.5))
        return out

    def looked(self, log: Any, step: Any, t: Any, u: Array, slope: Callable | None = None) -> list[Looked]:
        """The past of a stage of a step, whose lags look at these `Side`s."""
        be, out = self.run.be, []
        for side, s in zip(step, self.arguments(be.scalar(t), u), strict=True):
            inwards = be.least(be.greatest(s, side.low + self.close), side.high - self.close)
            out.append(found(be, self.values, slope, log, s, inwards, side.old, u))
        return out

    def first(self, t: Any, u: Array) -> Array:
        be, zeros = self.run.be, [0.0 * u] * self.count
        times = self.arguments(be.scalar(t), u)
        return self.rhs(t, u, Past(None, times, zeros, zeros, [be.truth(True)] * self.count, self.far, self.near))


def walk(eq: Dependent) -> tuple[State, Any, Crossings]:
    """Integrate from t0 to t1; returns the last state, all accepted steps and the break points."""
    run, x, s, stepper, norm = eq.run, eq.x, eq.span, eq.stepper, eq.norm
    be, xp, controller = run.be, run.be.xp, run.controller
    length, eps = s.t1 - s.t0, be.eps(be.time_dtype(x.u0.dtype))
    seen = stepper.order
    broken = int(RetCode.NewtonFailure if stepper.implicit else RetCode.NonFinite)
    h: Any = run.dt
    if h is None:
        h = initial_step(run, Starting(eq.first, stepper.order), s, eq.u0, eq.first(be.time(s.t0), eq.u0), x.rtol,
                         eq.atol, norm)

    def advance(w: Walk, log: Any) -> tuple[Walk, Record, Any]:
        sides = eq.sides(w.crossings, w.t, w.u)
        now = eq.arguments(w.t, w.u)
        shortest = w.t - now[0]
        for a in now[1:]:
            shortest = be.least(shortest, w.t - a)
        remaining = s.t1 - w.t
        most = shortest if run.dtmax is None else be.least(shortest, run.dtmax)
        searching = w.high > 0.0
        wanted = be.choose(searching, w.h, be.least(w.h, most))
        last = wanted * (1.0 + 1e-9) >= remaining
        h = be.choose(last, remaining, wanted)
        u1, K, spent = eq.attempt(log, sides, w.t, h, w.u)
        record = Record(w.t, h, w.u, K)
        t1 = be.choose(last, s.t1, w.t + h)
        ends = eq.arguments(t1, u1)
        # Which lag is farthest beyond its next break point, and how far.
        g, g_now, which = ends[0] - sides[0].high, now[0] - sides[0].high, 0 * be.least(0, 0)
        for i in range(1, eq.count):
            here = ends[i] - sides[i].high
            farther = here > g
            g_now, which = be.choose(farther, (now[i] - sides[i].high, i), (g_now, which))
            g = be.choose(farther, here, g)
        forwards, overlap = be.truth(True), be.truth(False)
        for a, b, side in zip(now, ends, sides, strict=True):
            forwards = forwards & (side.old | (b > side.low - 1e6 * eq.close))
            overlap = overlap | (b > w.t + eq.close)
            del a
        u1 = be.expected(forwards | overlap, u1, _turning)
        ratio = w.ratio
        good, factor, memory = be.truth(True), 1.0, w.memory
        if controller.adaptive:
            ratio = norm(be.scaled(stepper.error(w.t, h, w.u, K), w.u, u1, x.rtol, eq.atol))
            good, factor, memory = controller.propose(be, ratio, w.memory, stepper.error_order)
        good = good & (overlap == be.truth(False))
        beyond = good & (g > 0.0) & (abs(g) > eq.close)
        # A search ends where no smaller bracket can be had.
        narrow = searching & (abs(w.high - w.low) <= 4.0 * eps * be.greatest(abs(w.t), length))
        landed = good & ((abs(g) <= eq.close) | (narrow & (beyond == be.truth(False))))
        short = good & searching & (landed == be.truth(False)) & (beyond == be.truth(False))
        keep = good & (beyond == be.truth(False)) & (short == be.truth(False))
        low, g_low = be.choose(short, (h, g), be.choose(searching, (w.low, w.g_low), (0.0, g_now)))
        high, g_high = be.choose(beyond, (h, g), (w.high, w.g_high))
        # Illinois: an end that stays twice counts half.
        g_low = be.choose(beyond & (w.end > 0.5), 0.5 * g_low, g_low)
        g_high = be.choose(short & (w.end < -0.5), 0.5 * g_high, g_high)
        newer = be.choose(beyond, 1.0, be.choose(short, -1.0, 0.0))
        open_ = beyond | short
        gap = be.choose(open_, g_high - g_low, 1.0)
        again: Any = be.choose(good, be.greatest(wanted, h * factor), h * be.least(factor, 1.0))
        if not controller.adaptive:
            again = run.dt
        secant = low - g_low * (high - low) / be.choose(gap > 0.0, gap, 1.0)
        h_next = be.choose(open_, secant, be.choose(overlap, 0.5 * h, again))
        high = be.choose(open_, high, 0.0)
        tiny = 16.0 * eps * be.greatest(abs(w.t), eps * length) if run.dtmin is None else run.dtmin
        stuck = (h_next < tiny) & (t1 < s.t1)
        status = be.choose(stuck, be.choose(be.isfinite(ratio), int(RetCode.DtMin), broken), w.status)
        t, u = be.choose(keep, (t1, u1), (w.t, w.u))
        c = _landed(eq, w.crossings, landed, which, w.t, t1, seen)
        if run.progress is not None:
            be.report(run.progress, (w.t - s.t0) / length, w.t)
        return Walk(t, h_next, u, memory, ratio, w.accepted + be.choose(keep, 1, 0),
                    w.rejected + be.choose(keep, 0, 1), status, low, g_low, high, g_high, newer, c,
                    w.iterations + spent), record, keep

    def running(w: Walk) -> Any:
        return (w.t < s.t1) & (w.status == int(RetCode.Success))

    positive = be.isfinite(eq.shortest) & (eq.shortest > 0.0)
    status = be.choose(positive, int(RetCode.Success), int(RetCode.NonFinite))
    begin = Walk(s.t0, h, eq.u0, controller.init(), 0.0, 0, 0, status, 0.0, 0.0, 0.0, 0.0, 0.0, eq.none_yet())
    like = Record(s.t0, s.t0, eq.u0, xp.stack([0.0 * eq.u0] * stepper.stages))
    end, log = be.unfold(advance, begin, running, run.max_steps, run.capacity, like)
    finite = be.isfinite(be.rms(end.u))
    status = be.choose(finite, end.status, broken)
    status = be.choose((end.t < s.t1) & (status == int(RetCode.Success)), int(RetCode.MaxSteps), status)
    last = State(end.t, end.h, end.u, None, end.memory, end.ratio, end.accepted, end.rejected, status,
                 iterations=end.iterations)
    return last, log, end.crossings


def _landed(eq: Dependent, c: Crossings, landed: Any, which: Any, t: Scalar, end: Scalar, seen: int) -> Crossings:
    """The break points after a step from `t` to `end` on which lag `which` reached its next one, if it `landed`."""
    be, xp = eq.run.be, eq.run.be.xp
    numbers = [eq.passed(c, t, i) for i in range(eq.count)]
    slots = eq._slots(c.times)
    rows, order = [], 0.0 * c.orders[0]
    for i in range(eq.count):
        mine = landed & (which == i)
        here = slots == numbers[i]
        rows.append(be.choose(mine, xp.where(here, 0.0 * c.times[0] + end, c.reached[i, :]), c.reached[i, :]))
        order = be.choose(mine, c.orders[numbers[i]] + 1.0, order)
    more = landed & (be.scalar(order) < seen + 0.5) & (be.scalar(c.count) < PARENTS - 1)
    new = slots == c.count
    times = be.choose(more, xp.where(new, 0.0 * c.times[0] + end, c.times), c.times)
    orders = be.choose(more, xp.where(new, order + 0.0 * c.orders, c.orders), c.orders)
    return Crossings(times, orders, be.choose(more, c.count + 1, c.count), xp.stack(rows))


def _turning() -> UnsupportedCombination:
    return UnsupportedCombination("a deviating argument t - lag turned back across a break point",
                                  "break points are followed where t - lag(t, u, p) increases along the solution",
                                  "a lag that grows more slowly than time")


def solve_dependent(run: Run, x: Inputs) -> tuple[Outputs, Aux, Solved]:
    """The forward solve; all accepted steps are kept."""
    be = run.be
    eq = Dependent(run, x)
    end, log, crossings = walk(eq)
    if run.saves == "steps":
        u, ts = be.nodes(log, end.u, end.t)
    elif run.saves is None:
        u, ts = end.u[None, :], [end.t]
    else:
        ts = save_times(run, x, eq.span)
        u = be.reached(be.sample(eq.stepper.interpolate, log, ts, x.u0, 1.0), ts, end.t, 1.0)
    nodes = stages = mesh = None
    if run.dense:
        times, sizes, nodes, stages = be.stacked(log)
        mesh = (times, sizes)
    aux = Aux(ts, end.t, end.accepted, end.rejected, eq.evaluations(end), end.status, end.ratio, end.h, mesh, None,
              eq.algebra(end))
    return Outputs(u, nodes, stages), aux, Solved(x, (log, crossings), end)
