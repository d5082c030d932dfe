"""Loops that look back at the steps they have taken, for frameworks that run eagerly.

A log that is being written may be read; reverse loops hand cotangents to any earlier step. The cotangent of a
`Record` is a `Record`. A tracing backend overrides every method with the compiled twin; results must be equal.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

from .records import Array, Record, Scalar
from .segments import Pending, Retaken, Room, Segments, cotangent, sink


class Lookback:
    """Loops that look back, and the choices by value that go with them."""

    xp: Any = None

    def truth(self, value: bool) -> Any:
        """A constant as the loops compare it."""
        return value

    def either(self, pred: Any, a: Callable[[], Any], b: Callable[[], Any]) -> Any:
        """`a()` where the scalar `pred` holds, else `b()`; a tracing backend evaluates both."""
        return a() if pred else b()

    def expected(self, ok: Any, value: Array, error: Callable[[], Exception]) -> Array:
        """`value` if `ok`; else raises, or NaN where nothing can be raised."""
        if not ok:
            raise error()
        return value

    def nearest(self, times: Sequence[Scalar], s: Any) -> tuple[Any, Scalar]:
        """Which of some times is nearest to `s`, and how far it is away."""
        value = self.scalar(getattr(s, "real", s))  # type: ignore[attr-defined]
        gaps = [abs(value - t) for t in times]
        gap = min(gaps)
        return gaps.index(gap), gap

    def member(self, items: Sequence[Any], i: Any) -> Any:
        """Item `i` of a list of scalars or of equal arrays."""
        return items[i]

    def following(self, times: Any, t: Scalar) -> Any:
        """Index of the first of ascending times that is later than `t`; the last one if there is none."""
        return min(bisect.bisect_right(times, t), len(times) - 1)

    def blank(self, times: Any) -> Any:
        """A zero for each time."""
        return [0.0] * len(times)

    def add_at(self, values: Any, i: Any, x: Scalar) -> Any:
        """Scalars with `x` added to number `i`; the ones given are not used afterwards."""
        values[i] = values[i] + x
        return values

    def unfold(self, step: Callable, state: Any, running: Callable, limit: int, capacity: int,
               like: Record, sink: Any = None) -> tuple[Any, Any]:
        """Run `state, record, keep = step(state, log)` while `running(state)`; `log` holds the records kept so far.

        At most `limit` attempts and `capacity` records; `like` shows what a record looks like. With a `sink` of
        `segments`, the log keeps what that has room for, the loop ends where this is too little, and what comes back
        in place of the log is `(kept, rows)`, as from `checkpoints`.
        """
        del like
        log = self.store(capacity) if sink is None else sink  # type: ignore[attr-defined]
        for _ in range(limit):
            if not running(state) or len(log) == capacity or self.overfull(log):
                break
            state, record, keep = step(state, log)
            if keep:
                log.add(record)
        return state, log if sink is None else sink.result()

    def segments(self, room: Room, stepper: Any, saves: Any, ts: Any, u0: Array, capacity: int) -> Any:
        """A sink for `unfold` that keeps the stretches of records that there is room for, and makes output `saves`."""
        return sink(self, room, stepper, saves, ts, u0, capacity)

    def overfull(self, log: Any) -> Any:
        """Whether a log has no room for what later steps look at."""
        return isinstance(log, Segments) and log.short

    def retaking(self, kept: Any, retake: Callable) -> Any:
        """What `segments` kept as a log for `collect`, which takes the steps that are missing again:
        `retake(log, t, h, u) -> (u1, K, iterations)`."""
        return Retaken(kept, retake)

    def onward(self, body: Callable, state: Any, log: Any, like: Record) -> tuple[Any, Any]:
        """Fold `state, new = body(state, record, news)` over a log, oldest record first; the `new` form a log, `news`,
        that `body` may read where the old one has the same step. `like` shows what a `new` looks like."""
        del like
        news = self.store(len(log))  # type: ignore[attr-defined]
        for record in log:
            state, new = body(state, record, news)
            news.add(new)
        return state, news

    def locate(self, log: Any, t: Scalar) -> Any:
        """Number of the step that holds time `t`; the first one for earlier times."""
        if isinstance(log, Retaken | Segments):
            return max(bisect.bisect_right(log.t, t) - 1, 0)
        return max(bisect.bisect_right(log, t, key=_start) - 1, 0)

    def locate_end(self, log: Any, t: Scalar) -> Any:
        """As `locate`; a time on a node belongs to the step that ends there."""
        return max(bisect.bisect_left(log, t, key=_start) - 1, 0)

    def record(self, log: Any, i: Any) -> Record:
        """Step `i` of a log."""
        return log[i]

    def pending(self, log: Any, extra: Any = None) -> Any:
        """Room for one cotangent per record, with the contributions `extra` (of `nodes_vjp`) in it."""
        if isinstance(log, Retaken):
            return Pending(extra)
        out: list[Record | None] = [None] * len(log)
        for n, c in enumerate(extra or ()):
            if c is not None:
                out[n] = cotangent(c, log[n])
        return out

    def deposit(self, pending: Any, i: Any, skip: Any, contribution: Callable[[], Record]) -> Any:
        """`contribution()` added to the cotangent of record `i`, unless `skip`, where it is zero."""
        if not skip:
            old, new = pending[i], contribution()
            pending[i] = new if old is None else Record(*(a + b for a, b in zip(old, new, strict=True)))
        return pending

    def collect(self, body: Callable, state: Any, log: Any, pending: Any) -> Any:
        """Fold `state, pending = body(state, pending, record, ct, log)` over a log, newest record first; the `log` that
        `body` gets has the records that this one may look at."""
        if isinstance(log, Retaken):
            return log.collect(body, state, pending)
        for n in reversed(range(len(log))):
            r = log[n]
            ct = cotangent(None, r) if pending[n] is None else pending[n]
            state, pending = body(state, pending, r, ct, log)
        return state


def _start(record: Record) -> float:
    return record.t
