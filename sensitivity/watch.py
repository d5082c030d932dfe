"""Finding events inside the step loop.

After each step that error control accepts, the conditions are looked at along its dense output. Where one crosses
zero, the step is not kept; shorter steps from the same node follow until one ends on the event, so that the event is
a node of the mesh and its step an ordinary one. The first trial is the root on the dense output, the next ones are
chord steps with the slope of the condition there, safeguarded by a bracket; two or three trials suffice for a smooth
condition. Preset times are nodes from the start and need no trial.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .backend import Array, Record, Scalar
from .retcode import RetCode

SAMPLES = (2.0**-14, 1.0 / 64.0, 0.25, 0.5, 0.75, 1.0)
CHORD = 1e-3
BISECTIONS = 36


class Happened(NamedTuple):
    """One event: when, the state just before it, and which."""

    t: Scalar
    u: Array
    index: Any


class Watching(NamedTuple):
    """State of the search: the side of zero that each condition is on (0 while it is still on its own event), the
    event sought with a bracket of lengths from the node and the condition's slope, the step to go on with, and what
    has happened so far."""

    side: tuple[Scalar, ...]
    seeking: Any
    which: Any
    low: Scalar
    high: Scalar
    slope: Scalar
    resume: Scalar
    entries: Any
    count: Any
    ended: Any


class Watch:
    """The events of one solve, as the step loop needs them.

    `functions` offers `values(t, u)`, `after(i, t, u)`, `times()`, `watched()` and `events`.
    """

    def __init__(self, be: Any, stepper: Any, functions: Any, direction: Scalar, t1: Scalar,
                 limit: int, adaptive: bool) -> None:
        self.adaptive = adaptive
        self.be, self.stepper, self.functions = be, stepper, functions
        self.direction, self.limit = direction, limit
        self.events = functions.events
        self.preset = [(i, be.choose(direction * (t1 - t) > 0.0, t, t1 + direction)) for i, t in functions.times()]
        self.watched = functions.watched()
        self.signs = [self.events[i].direction for i in self.watched]

    def start(self, t: Scalar, u: Array) -> Watching:
        entries = self.be.ledger(Happened(t, u, 0), self.limit)
        return Watching(self._sides(self.functions.values(t, u)), False, 0, 0.0, 0.0, 1.0, 0.0, entries, 0, False)

    def target(self, t: Scalar, target: Scalar) -> Scalar:
        """The next preset time, if it comes before `target`."""
        be, d = self.be, self.direction
        for _, stop in self.preset:
            nearer = (d * (stop - t) > 0.0) & (d * (target - stop) > 0.0)
            target = be.choose(nearer, stop, target)
        return target

    def settle(self, old: Any, new: Any, record: Record, keep: Any) -> tuple[Any, Any]:
        """What becomes of an attempted step: `(state, keep)`; `old` and `new` are the states around it."""
        be, length = self.be, abs(record.h)
        w, entries = old.watch._replace(entries=None), old.watch.entries
        again, happened, which = False, False, 0
        if self.watched:
            refined = be.when(keep & w.seeking, lambda: self._refined(w, new, length), (w, 0.0, False))
            searched = be.when(keep & no(w.seeking), lambda: self._searched(w, record, length), (w, 0.0, False))
            after, trial, found = be.choose(w.seeking, refined, searched)
            happened, again = keep & w.seeking & found, keep & (w.seeking ^ found)
            which = after.which
            back = old._replace(h=self.direction * trial, rejected=old.rejected + 1, watch=after._replace(seeking=True))
            # Events may accumulate, so that the next one is no further away than this one was.
            resume = be.least(w.resume, 4.0 * length) if self.adaptive else w.resume
            resumed = new._replace(h=be.choose(happened, self.direction * resume, new.h))
            new = be.choose(again, back, resumed._replace(watch=after._replace(seeking=False)))
        else:
            new = new._replace(watch=w)
        landed = False
        for i, stop in self.preset:
            here = keep & no(again) & (new.t == stop)
            landed, which = landed | here, be.choose(here, i, which)
        new = new._replace(watch=new.watch._replace(entries=entries))
        return be.when(happened | landed, lambda: self._happen(new, which, happened), new), keep & no(again)

    def _refined(self, w: Watching, new: Any, length: Scalar) -> tuple[Watching, Scalar, Any]:
        """A trial step towards an event: `(watching, next length, whether this one ends on it)`."""
        be = self.be
        value, side = self._picked(self.functions.values(new.t, new.u), w.which), self._picked(w.side, w.which)
        beyond = value * side <= 0.0
        low, high = be.choose(beyond, w.low, length), be.choose(beyond, length, w.high)
        move = value / w.slope
        chord, middle = length - move, 0.5 * (low + high)
        trial = be.choose((chord > low) & (chord < high), chord, middle)
        tol = 4.0 * be.eps(be.time_dtype(new.u.dtype)) * be.greatest(abs(new.t), length)
        found = (abs(move) <= tol) | (high - low <= tol)
        return w._replace(low=low, high=high), trial, found

    def _searched(self, w: Watching, record: Record, length: Scalar) -> tuple[Watching, Scalar, Any]:
        """An ordinary step: `(watching, length of the first trial, whether an event lies inside)`."""
        be = self.be
        t, h = record.t, record.h
        times = [t + x * h for x in SAMPLES]

        def look(state: tuple, item: tuple) -> tuple[tuple, Any]:
            found, low, high, side = state
            x, time, row = item
            values = self.functions.values(time, row)
            hit = no(found) & self._crossed(side, values)
            low = be.choose(found | hit, low, x)
            high = be.choose(hit, x, high)
            moved = tuple(be.choose(v == 0.0, s, _sign(be, v, s)) for v, s in zip(values, side, strict=True))
            return (found | hit, low, high, be.choose(found | hit, side, moved)), 0

        start = (False, 0.0, 1.0, w.side)
        rows = self.stepper.interpolate(record, times)
        (found, low, high, side), _ = be.scan(look, start, (list(SAMPLES), times, rows))
        default = (w._replace(side=side), 0.0)
        located = be.when(found, lambda: self._located(w._replace(side=side), record, low, high, length), default)
        return (*located, found)

    def _located(self, w: Watching, record: Record, low: Scalar, high: Scalar,
                 length: Scalar) -> tuple[Watching, Scalar]:
        """The first event between two points of a step, on its dense output."""
        be = self.be
        t, h = record.t, record.h

        def values(x: Scalar) -> tuple[Scalar, ...]:
            time = t + x * h
            return self.functions.values(time, self.stepper.interpolate(record, [time])[0, :])

        def halve(state: tuple) -> tuple[tuple, Any, Any]:
            a, b = state
            middle = 0.5 * (a + b)
            hit = self._crossed(w.side, values(middle))
            return (be.choose(hit, a, middle), be.choose(hit, middle, b)), 0, True

        (_, root), _ = be.iterate(halve, (low, high), lambda s: s[1] > s[0], BISECTIONS)
        which: Any = 0
        at, ahead, behind = values(root), values(root + CHORD), values(root - CHORD)
        slope: Any = 1.0
        for k in reversed(range(len(at))):
            hit = self._crossed(w.side, at, only=k)
            which = be.choose(hit, self.watched[k], which)
            slope = be.choose(hit, (ahead[k] - behind[k]) / (2.0 * CHORD * length), slope)
        slope = be.choose(slope == 0.0, 1.0, slope)
        return w._replace(which=which, low=0.0 * length, high=high * length, slope=slope, resume=length), root * length

    def _happen(self, new: Any, which: Any, state_event: Any) -> Any:
        """The state after an event, with the event written down."""
        be, w = self.be, new.watch
        entries = be.enter(w.entries, Happened(new.t, new.u, which))
        u = self.functions.after(which, new.t, new.u)
        values, twice = self.functions.values(new.t, new.u), False
        for k, i in enumerate(self.watched):
            twice = twice | (state_event & (which != i) & self._crossed(w.side, values, only=k))
        side = list(self._sides(self.functions.values(new.t, u)))
        for k, i in enumerate(self.watched):
            side[k] = be.choose(state_event & (which == i), 0.0, side[k])
        ended: Any = False
        for i, event in enumerate(self.events):
            if event.terminal:
                ended = ended | (which == i)
        status = be.choose(w.count >= self.limit, int(RetCode.MaxEvents), new.status)
        status = be.choose(twice, int(RetCode.SimultaneousEvents), status)
        k_next = self.stepper.first(be.time(new.t), u)
        return new._replace(u=u, k=k_next, status=be.choose(ended, new.status, status),
                            watch=w._replace(side=tuple(side), entries=entries, count=w.count + 1, ended=ended))

    def _sides(self, values: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        return tuple(_sign(self.be, v, 0.0) for v in values)

    def _picked(self, values: tuple[Scalar, ...], which: Any) -> Scalar:
        out = values[0]
        for k, i in enumerate(self.watched[1:], 1):
            out = self.be.choose(which == i, values[k], out)
        return out

    def _crossed(self, side: tuple[Scalar, ...], values: tuple[Scalar, ...], only: int | None = None) -> Any:
        """Whether a condition, any or one of them, is no longer on its side of zero, in a direction that counts."""
        hit: Any = False
        for k, (s, v) in enumerate(zip(side, values, strict=True)):
            if only in (None, k):
                crossed = s * v < 0.0 if not self.signs[k] else (s * v < 0.0) & (s == -1.0 * self.signs[k])
                zero = (v == 0.0) & (s != 0.0) if not self.signs[k] else (v == 0.0) & (s == -1.0 * self.signs[k])
                hit = hit | crossed | zero
        return hit


def no(x: Any) -> Any:
    """The negation of a Python or array truth value."""
    return x ^ True


def _sign(be: Any, v: Scalar, otherwise: Scalar) -> Scalar:
    return be.choose(v > 0.0, 1.0, be.choose(v < 0.0, -1.0, otherwise))
