"""Events: what the user writes, and the functions of them that a solve needs.

A state event happens where a condition crosses zero, a preset one at a known time. There the state jumps,
`u+ = R(t*, u-, p)`. A parameter change is a jump too, of parameters that are carried as part of the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .arguments import instants
from .backend import Array, Scalar
from .errors import CapturedValueError, InputError, OutputError, TimesError
from .system import Field, Inputs, Layout, Partition, Products


@dataclass(frozen=True, eq=False)
class Event:
    """Something happens where `condition(t, u, p)` crosses zero.

    Parameters
    ----------
    condition : callable
        `condition(t, u, p)` returns a real scalar.
    affect : callable, optional
        `affect(t, u, p)` returns the state after the event, or `(u, p)` to change parameters too. Without it the
        event is recorded only.
    terminal : bool
        End the solve there.
    direction : {0, 1, -1}
        Count all crossings, those from negative to positive, or those from positive to negative.

    A condition that is zero at the start, or right after its own affect, counts from the side it then moves to. Two
    crossings within a quarter of a step can pass unseen; `dtmax` bounds the step.

    Raises
    ------
    InputError
        `condition` or `affect` is not callable, or `direction` is something else.
    """

    condition: Callable[..., Any]
    affect: Callable[..., Any] | None = None
    terminal: bool = False
    direction: int = 0

    def __post_init__(self) -> None:
        _callable("condition", self.condition, "sa.Event(lambda t, u, p: u[0])")
        if self.affect is not None:
            _callable("affect", self.affect, "sa.Event(condition, lambda t, u, p: -u)")
        if self.direction not in (-1, 0, 1):
            raise InputError(f"direction={self.direction!r} is none of the possible values",
                             "0 counts all crossings, 1 the rising ones, -1 the falling ones", "direction=0")


@dataclass(frozen=True, eq=False)
class PresetTimes:
    """Something happens at given times.

    Parameters
    ----------
    times : vector of times, or callable
        `times(p)` makes them functions of the parameters. Those outside the span, and at its end, do nothing.
    affect : callable
        `affect(t, u, p)` returns the state after the event, or `(u, p)`.

    An output at one of the times shows the state before the event; its derivative with respect to that time is the
    one-sided one.

    Raises
    ------
    InputError
        `affect` is not callable.
    """

    times: Any
    affect: Callable[..., Any]

    def __post_init__(self) -> None:
        _callable("affect", self.affect, "sa.PresetTimes([1.0, 2.0], lambda t, u, p: u + dose)")


def _callable(name: str, value: Any, fix: str) -> None:
    if not callable(value):
        raise InputError(f"{name} is {type(value).__name__}, which cannot be called",
                         "it is a function of time, state and parameters", fix)


@dataclass(frozen=True)
class Watched:
    """One event of a run, hashable: its functions, and where their arrays lie in the inputs.

    `condition`, `affect` and `times` (a function of `p`) are `(function, start, stop)`, the slice of `Inputs.theta`
    that each closes over; `place` is `(group, position)` of given preset times, `count` how many there are.
    """

    condition: tuple[Callable, int, int] | None
    affect: tuple[Callable, int, int] | None
    terminal: bool
    direction: int
    times: tuple[Callable, int, int] | None = None
    place: tuple[str, int] | None = None
    count: int = 0


def watched(be: Any, events: Any, field: Field, t: Any, u: Any, p: Any, theta: tuple[Array, ...],
            constants: tuple[Array, ...], like: Array, span: tuple[float | None, float | None],
            ) -> tuple[tuple[Watched, ...], tuple[Array, ...], tuple[Array, ...], bool]:
    """The events of a run, with `theta` and `constants` extended by what they need, and whether parameters change."""
    out, changes = [], False
    for i, event in enumerate(list(events) if isinstance(events, list | tuple) else [events]):
        if not isinstance(event, Event | PresetTimes):
            raise InputError(f"events[{i}] is {type(event).__name__}, not an event",
                             "an event has a condition or times", "events=[sa.Event(condition, affect)]")
        condition = affect = times = place = None
        number = 0
        if isinstance(event, Event):
            condition, theta = _hoisted(be, f"events[{i}].condition", event.condition, t, u, p, theta)
            shape = getattr(be.evaluate(event.condition, t, u, p), "shape", ())
            if tuple(shape) != ():
                raise OutputError(f"events[{i}].condition returned shape {tuple(shape)}, expected a scalar",
                                  "its sign tells when the event happens", "return one entry: lambda t, u, p: u[0]")
        elif callable(event.times):
            given = _OfParameters(event.times)
            number = len(be.flatten(be.evaluate(_Entries(be, given), t, u, p))[0])
            times, theta = _hoisted(be, f"events[{i}].times", given, t, u, p, theta)
        else:
            place, number, theta, constants = _placed(be, i, event.times, theta, constants, like, span)
        if event.affect is not None:
            changes |= _check_affect(be, i, event.affect, field, t, u, p)
            affect, theta = _hoisted(be, f"events[{i}].affect", event.affect, t, u, p, theta)
        terminal, direction = (event.terminal, event.direction) if isinstance(event, Event) else (False, 0)
        out.append(Watched(condition, affect, bool(terminal), direction, times, place, number))
    _distinct(be, out, theta, constants)
    return tuple(out), theta, constants, changes


def _hoisted(be: Any, name: str, function: Callable, t: Any, u: Any, p: Any,
             theta: tuple[Array, ...]) -> tuple[tuple[Callable, int, int], tuple[Array, ...]]:
    g, captured = be.hoist(function, t, u, p)
    if getattr(g, "live", ()):
        raise CapturedValueError(f"{name} closes over tensors that require gradients",
                                 "only f may do so", "pass these tensors through p")
    return (g, len(theta), len(theta) + len(captured)), (*theta, *captured)


def _check_affect(be: Any, i: int, affect: Callable, field: Field, t: Any, u: Any, p: Any) -> bool:
    """Whether an affect changes parameters; what it returns must look like `u`, or `(u, p)`."""
    out = be.evaluate(affect, t, u, p)
    changes = changes_parameters(out, u)
    parts = (("u0", out[0], u), ("p", out[1], p)) if changes else (("u0", out, u),)
    for name, given, expected in parts:
        found, wanted = ([tuple(getattr(v, "shape", ())) for v in be.flatten(x)[0]] for x in (given, expected))
        if found != wanted:
            raise OutputError(f"events[{i}].affect returned shapes {found}, {name} has {wanted}",
                              "it returns the state after the event", "return u, or (u, p)")
    if changes and not field.p.count:
        raise InputError(f"events[{i}].affect returns (u, p), but p holds no floating-point arrays",
                         "there is nothing to change", "return u")
    return changes


def changes_parameters(out: Any, u: Any) -> bool:
    """Whether an affect returned `(u, p)`; a state that is itself a tuple of two must be returned with `p`."""
    return isinstance(out, tuple) and len(out) == 2 and not (isinstance(u, tuple) and len(u) == 2 and not any(
        isinstance(v, tuple) for v in out))


@dataclass(frozen=True)
class _OfParameters:
    """Times as a function of parameters, called like a vector field."""

    times: Callable[[Any], Any]

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        return self.times(p)


@dataclass(frozen=True)
class _Entries:
    """A list of numbers, whether it comes as a vector or as a list."""

    be: Any
    times: Callable[..., Any]

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        out = self.times(t, u, p)
        return [out[j] for j in range(out.shape[0])] if self.be.is_array(out) else list(out)


def _placed(be: Any, i: int, times: Any, theta: tuple[Array, ...], constants: tuple[Array, ...], like: Array,
            span: tuple[float | None, float | None]) -> tuple[Any, int, tuple[Array, ...], tuple[Array, ...]]:
    ts = instants(be, f"events[{i}].times", times, like, "the event happens at them",
                  "sa.PresetTimes([1.0, 2.0], affect)")
    values = be.concrete_times(ts)
    if values is not None and span[0] in values:
        raise TimesError(f"events[{i}] has a time at the start of tspan, {span[0]:g}", "u0 is the state after it",
                         "apply the affect to u0")
    if values is None or getattr(times, "requires_grad", False):
        return ("theta", len(theta)), ts.shape[0], (*theta, ts), constants
    return ("constants", len(constants)), ts.shape[0], theta, (*constants, ts)


def _distinct(be: Any, events: list[Watched], theta: tuple[Array, ...], constants: tuple[Array, ...]) -> None:
    seen: set[float] = set()
    for e in events:
        if e.place is not None:
            group, at = e.place
            for t in be.concrete_times((theta if group == "theta" else constants)[at]) or ():
                if t in seen:
                    raise TimesError(f"two preset events happen at t={t:g}", "their order would decide the result",
                                     "merge their affects into one")
                seen.add(t)


@dataclass(frozen=True)
class EventField:
    """A condition, preset times or an affect in the form of a vector field, so that every VJP choice serves it too.

    `numbers` is how many it returns; 0 for a state.
    """

    function: tuple[Callable, int, int]
    u: Layout
    p: Partition
    numbers: int

    def argument(self, be: Any, t: Scalar) -> Any:
        """The first argument of the bound function at time `t`."""
        return be.time(t)

    def bind(self, be: Any, theta: tuple[Array, ...], constants: tuple[Array, ...]) -> Callable[[Any, Array], Array]:
        g, start, stop = self.function
        p, captured = self.p.join(be, theta[:self.p.count], constants), theta[start:stop]

        def value(t: Any, u: Array) -> Array:
            out = g(t, be.unflatten(self.u.structure, self.u.unravel(be, u)), p, *captured)
            if not self.numbers:
                return self.u.ravel(be, be.flatten(out)[0])
            if isinstance(out, list | tuple):
                out = be.xp.stack([v if be.is_array(v) else be.vector([v], u)[0] for v in out])
            return be.xp.reshape(out if be.is_array(out) else be.vector([out], u), (self.numbers,))

        return value


class EventFunctions:
    """The events of a run bound to its inputs, as functions of time and the flat state."""

    def __init__(self, run: Any, x: Inputs) -> None:
        self.run, self.x, self.events = run, x, run.events
        be, layout = run.be, run.field
        self.conditions = tuple(None if e.condition is None else EventField(e.condition, layout.u, layout.p, 1)
                                for e in self.events)
        self.affects = tuple(None if e.affect is None else EventField(e.affect, layout.u, layout.p, 0)
                             for e in self.events)
        self.moments = {i: EventField(e.times, layout.u, layout.p, e.count) for i, e in enumerate(self.events)
                        if e.times}
        self._c = [None if c is None else c.bind(be, x.theta, x.constants) for c in self.conditions]
        self._r = [None if r is None else r.bind(be, x.theta, x.constants) for r in self.affects]

    def watched(self) -> list[int]:
        """Events with a condition."""
        return [i for i, c in enumerate(self.conditions) if c is not None]

    def values(self, t: Scalar, u: Array) -> tuple[Scalar, ...]:
        """The conditions of the state events."""
        be = self.run.be
        return tuple(be.scalar(c(be.time(t), u)[0]) for c in self._c if c is not None)

    def times(self) -> list[tuple[int, Scalar]]:
        """Preset times, with the event that each belongs to."""
        out = []
        for i, e in enumerate(self.events):
            if e.count:
                ts = self.run.be.scalars(self.preset(i))
                out += [(i, ts[j]) for j in range(e.count)]
        return out

    def preset(self, i: int) -> Array:
        """The times of preset event `i` as an array."""
        x, e = self.x, self.events[i]
        if e.place is not None:
            return getattr(x, e.place[0])[e.place[1]]
        return self.moments[i].bind(self.run.be, x.theta, x.constants)(0.0, x.u0)

    def after(self, i: Any, t: Scalar, u: Array) -> Array:
        """The state after event `i`."""
        be = self.run.be
        options = [_same if r is None else r for r in self._r]
        return be.branch(i, options, be.time(t), u)


def _same(t: Any, u: Array) -> Array:
    return u


def product_run(run: Any, field: EventField) -> Any:
    """The run as a VJP choice takes it for a condition or an affect."""
    return replace(run, field=field, products=Products())


__all__ = ["Event", "EventField", "EventFunctions", "PresetTimes", "Watched", "changes_parameters", "product_run",
           "watched"]
