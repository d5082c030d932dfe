"""The step loop: attempt, accept or reject, record, resize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .backend import Array, Record, Scalar
from .methods import Method
from .retcode import RetCode
from .stepper import Stepper
from .system import Field, Products
from .watch import no


@dataclass(frozen=True)
class Run:
    """What is fixed for one solve and known before it starts; hashable, so that compiled solves can be reused.

    `saves` is None (the end), an int (equally spaced), "steps", or "ts" (times given in the inputs). `kind` holds
    what only one kind of problem has; None for an ODE. `carried` are the shapes of parameters that events change,
    `mass` is a singular mass matrix or None, `sparsity` the pattern of the Jacobian.
    """

    be: Any
    backend: str
    field: Field
    method: Method
    controller: Any
    vjp: Any
    products: Products
    saves: Any
    dense: bool
    dt: float | None
    dtmin: float | None
    dtmax: float | None
    tstops: tuple[float, ...]
    max_steps: int
    capacity: int
    norm: Callable[[Array], Any] | None
    progress: Callable[..., Any] | None
    interpolated: bool = False
    kind: Any = None
    events: tuple[Any, ...] = ()
    max_events: int = 0
    carried: tuple[tuple[int, ...], ...] = ()
    mass: Any = None
    sparsity: Any = None

    @property
    def inside(self) -> bool:
        """Whether outputs are wanted inside the steps of the forward solve."""
        return self.dense or self.interpolated or bool(self.events) or self.saves not in (None, "steps")

    def stepper(self, rhs: Callable, jac: Any = None) -> Stepper:
        """The method of the forward solve, bound to `rhs`."""
        if self.mass is not None:
            return self.method.bind(self.be, rhs, self.inside, jac, self.mass)
        return self.method.bind(self.be, rhs, self.inside, jac)


class State(NamedTuple):
    """Loop state; `k` is `f(t, u)` for first-same-as-last methods, `ratio` the last error norm in tolerances, `watch`
    what the search for events remembers."""

    t: Scalar
    h: Scalar
    u: Array
    k: Array | None
    memory: Scalar
    ratio: Scalar
    accepted: Any
    rejected: Any
    status: Any
    watch: Any = None
    iterations: Any = 0


class Span(NamedTuple):
    """Start, end and direction of one integration; `shift` moves them for differentiation (see `DirectAdjoint`)."""

    t0: Scalar
    t1: Scalar
    direction: Scalar
    shift: tuple[Any, Any] | None = None


def span(be: Any, t0: Any, t1: Any) -> Span:
    t0, t1 = be.scalar(t0), be.scalar(t1)
    return Span(t0, t1, be.choose(t1 >= t0, 1.0, -1.0))


def initial_step(run: Run, stepper: Stepper, s: Span, u: Array, k: Array, rtol: Any, atol: Any,
                 norm: Callable) -> Scalar:
    """Starting step size (Hairer, Norsett, Wanner I, II.4); one evaluation of `f` beyond `k = f(t0, u)`."""
    be = run.be
    d0, d1 = norm(be.scaled(u, u, u, rtol, atol)), norm(be.scaled(k, u, u, rtol, atol))
    small = be.least(d0, d1) < 1e-5
    h0 = be.choose(small, 1e-6, 0.01 * d0 / be.choose(small, 1.0, d1))
    h0 = be.least(h0, abs(s.t1 - s.t0))
    h = s.direction * h0
    slope = stepper.derivative(be.time(s.t0 + h), be.combine(u, h, (1.0,), k[None, :]))
    d2 = norm(be.scaled(slope - k, u, u, rtol, atol)) / be.choose(h0 > 0.0, h0, 1.0)
    top = be.greatest(d1, d2)
    flat = top <= 1e-15
    power = 1.0 / (stepper.order + 1)
    h1 = be.choose(flat, be.greatest(1e-6, h0 * 1e-3), (0.01 / be.choose(flat, 1.0, top)) ** power)
    # A non-finite slope at the trial point says that the trial was too long, not how long a step may be.
    h1 = be.choose(be.isfinite(d2), be.least(100.0 * h0, h1), 1e-3 * h0)
    # Nor does a slope at the start that is not finite; the first step then fails and says so.
    h1 = be.choose(be.isfinite(h1), h1, 1e-3 * abs(s.t1 - s.t0))
    return s.direction * h1


def controlled(run: Run, stepper: Stepper, rtol: Any, atol: Any, norm: Callable | None = None) -> Stepper:
    """The method as the step loop takes its steps: it solves its equations as well as errors are controlled."""
    if not run.controller.adaptive:
        return stepper
    return stepper.within(rtol, atol, norm or run.norm or run.be.rms)


def integrate(run: Run, stepper: Stepper, s: Span, u0: Array, rtol: Any, atol: Any, *, sink: Any = None,
              norm: Callable | None = None, h: Scalar | None = None, limit: int | None = None,
              watch: Any = None, guard: Callable[[Array, Array], Any] | None = None) -> tuple[State, Any]:
    """Integrate over the span `s` with a bound method; returns the last state and what `sink` collected.

    `h` is a first step size to try; without it (and without `run.dt`) one is chosen. `watch` looks for events;
    `guard(u0, u1)` is the status of an accepted step, for methods that must not go on from any state.
    """
    be, controller = run.be, run.controller
    if not stepper.one_step:
        return stepper.march(run, s, u0, rtol, atol, sink, h, limit or run.max_steps)
    norm = norm or run.norm or be.rms
    k0 = stepper.first(be.time(s.t0 if s.shift is None else s.t0 + s.shift[0]), u0)
    if h is None:
        if run.dt is not None:
            h = s.direction * run.dt
        else:
            slope = stepper.derivative(be.time(s.t0), u0) if k0 is None else k0
            h = initial_step(run, stepper, s, u0, slope, rtol, atol, norm)
    stepper = controlled(run, stepper, rtol, atol, norm)
    steps = Steps(run, stepper, s, rtol, atol, norm, be.eps(be.time_dtype(u0.dtype)), watch, guard)
    start = State(s.t0, h, u0, k0, controller.init(), 0.0, 0, 0, int(RetCode.Success),
                  None if watch is None else watch.start(s.t0, u0))
    end, result = be.iterate(steps, start, steps.running, limit or run.max_steps, sink)
    if not controller.adaptive:
        end = end._replace(status=be.choose(be.isfinite(be.rms(end.u)), end.status, steps.broken))
    short = (end.t != s.t1) & (end.status == int(RetCode.Success))
    if watch is not None:
        short = short & no(end.watch.ended)
    return end._replace(status=be.choose(short, int(RetCode.MaxSteps), end.status)), result


class Steps:
    """One attempt after the other: `steps(state) -> (state, record, keep)`, as long as `steps.running(state)`.

    Made of its arguments only, so that a backend may take the same steps with numbers of its own.
    """

    def __init__(self, run: Run, stepper: Stepper, s: Span, rtol: Any, atol: Any, norm: Callable,
                 eps: float, watch: Any = None, guard: Callable | None = None) -> None:
        self.run, self.stepper, self.span, self.rtol, self.atol, self.norm = run, stepper, s, rtol, atol, norm
        self.eps, self.watch, self.guard = eps, watch, guard
        self.broken = int(RetCode.NewtonFailure if stepper.implicit else RetCode.NonFinite)
        self.length = abs(s.t1 - s.t0)
        self.delta = None if s.shift is None else s.shift[1] - s.shift[0]

    def __call__(self, state: State) -> tuple[State, Record, Any]:
        run, stepper, s, watch = self.run, self.stepper, self.span, self.watch
        be, controller = run.be, run.controller
        target = s.t1
        for stop in reversed(run.tstops):
            target = be.choose(s.direction * (stop - state.t) > 0.0, stop, target)
        if watch is not None:
            target = watch.target(state.t, target)
        remaining = target - state.t
        wanted = abs(state.h) if run.dtmax is None else be.least(abs(state.h), run.dtmax)
        last = wanted * (1.0 + 1e-9) >= abs(remaining)
        if watch is not None:
            last = last & no(state.watch.seeking)
        h = be.choose(last, remaining, s.direction * wanted)
        t_f, h_f = state.t, h
        if s.shift is not None:
            t_f, h_f = _shifted(be, s, state.t, h, last & (target == s.t1), self.delta)
        u1, K, spent = stepper.attempt(t_f, h_f, state.u, state.k)
        record = Record(t_f, h_f, state.u, K)
        if not controller.adaptive:
            t = be.choose(last, target, state.t + h)
            self._tell(t)
            new = State(t, state.h, u1, stepper.carry(K), state.memory, state.ratio, state.accepted + 1, state.rejected,
                        self._guarded(state, u1, True, state.status), iterations=state.iterations + spent)
            if stepper.algebraic:  # what failed there is asked of the last state that there was
                found = be.isfinite(be.rms(u1))
                t, u = be.choose(found, (t, u1), (state.t, state.u))
                new = new._replace(t=t, u=u, status=be.choose(found, new.status, self.broken))
                return self._watched(state, new, record, found)
            return self._watched(state, new, record, True)
        ratio = self.norm(be.scaled(stepper.error(t_f, h_f, state.u, K), state.u, u1, self.rtol, self.atol))
        keep, factor, memory = controller.propose(be, ratio, state.memory, stepper.error_order)
        t = be.choose(keep, be.choose(last, target, state.t + h), state.t)
        h_next = be.choose(last & keep, s.direction * be.greatest(wanted, abs(h) * factor), h * factor)
        tiny = 16.0 * self.eps * be.greatest(abs(t), self.eps * self.length) if run.dtmin is None else run.dtmin
        stuck = (abs(h_next) < tiny) & (t != s.t1)
        status = be.choose(stuck, be.choose(be.isfinite(ratio), int(RetCode.DtMin), self.broken), state.status)
        self._tell(t)
        u, k_next = be.choose(keep, (u1, stepper.carry(K)), (state.u, state.k))
        new = State(t, h_next, u, k_next, memory, ratio, state.accepted + be.choose(keep, 1, 0),
                    state.rejected + be.choose(keep, 0, 1), self._guarded(state, u1, keep, status),
                    iterations=state.iterations + spent)
        return self._watched(state, new, record, keep)

    def running(self, state: State) -> Any:
        on = (state.t != self.span.t1) & (state.status == int(RetCode.Success))
        return on if self.watch is None else on & no(state.watch.ended)

    def _tell(self, t: Scalar) -> None:
        if self.run.progress is not None:
            be = self.run.be
            fraction = abs(t - self.span.t0) / be.choose(self.length > 0.0, self.length, 1.0)
            be.report(self.run.progress, fraction, t)

    def _guarded(self, state: State, u1: Array, keep: Any, status: Any) -> Any:
        if self.guard is None:
            return status
        be = self.run.be
        return be.choose(keep, be.greatest(status, self.guard(state.u, u1)), status)

    def _watched(self, state: State, new: State, record: Record, keep: Any) -> tuple[State, Record, Any]:
        if self.watch is not None:
            new, keep = self.watch.settle(state, new, record, keep)
        return new, record, keep


def _shifted(be: Any, s: Span, t: Scalar, h: Scalar, last: Any, delta: Any) -> tuple[Any, Any]:
    """Times that carry derivatives: every node moves with `t0`, the last step also with `t1`."""
    assert s.shift is not None
    return t + s.shift[0], h + be.choose(last, delta, 0.0 * delta)


def evaluations(run: Run, stepper: Stepper, end: State, started: bool = False) -> Any:
    """How often `f` was evaluated: by the formula, which the tests compare with a counter."""
    return stepper.evaluations(end.accepted + end.rejected, started or run.dt is not None) + end.iterations


def algebra(run: Run, stepper: Stepper, end: State, started: bool = False) -> tuple[Any, Any, Any]:
    """How many Jacobians, factorisations and linear solves there were."""
    steps = stepper.algebra(end.accepted + end.rejected, end.iterations, run.controller.adaptive)
    slopes = stepper.starting(started or run.dt is not None)
    return steps[0] + slopes[0], steps[1] + slopes[1], steps[2] + slopes[2]
