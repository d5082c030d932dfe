"""Logs of solves that look back, which keep stretches of their steps, for frameworks that run eagerly.

The steps are cut into segments of `every` steps each. Kept are the first step of every segment with all that a step
there may look back at, one `span` of time, and as much behind the newest step. While that is all of them, nothing is
left out; when there is no more room, segments become twice as long. The reverse pass goes from the newest segment to
the oldest, and takes the steps that a segment lacks again, from its first: each of them once. What it left with
steps that it looked at waits there, on at most one `span` of time.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .recompute import Nodes, Pulled
from .records import Array, Contribution, Record, Scalar


class Room(NamedTuple):
    """How much a log may keep: `records` in all, those of the longest segment included, or as many as `stretches`
    need; a step looks back at one `span` of time at most."""

    records: int | None
    stretches: int | None
    span: Scalar


class Segments:
    """A sink that keeps times and sizes of all steps, and stretches of records. `sampler` gets every record too."""

    def __init__(self, room: Room, sampler: Any) -> None:
        self.room, self.sampler = room, sampler
        self.t, self.h = array("d"), array("d")
        self.held: dict[int, Record] = {}
        self.every = 1
        self.left = 0  # the first step that the newest one cannot look at
        self.short = False

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, n: int) -> Record:
        return self.held[n]

    def add(self, record: Record) -> None:
        if self.sampler is not None:
            self.sampler.add(record)
        n = len(self.t)
        self.t.append(record.t)
        self.h.append(record.h)
        self.held[n] = record
        reach = self.reach(n)
        while self.left < reach:
            if not self.needed(self.left):
                del self.held[self.left]
            self.left += 1
        while self.full() and not self.short:
            self.short = self.every > n
            self.every *= 2
            for i in [i for i in self.held if i < self.left and not self.needed(i)]:
                del self.held[i]

    def reach(self, n: int) -> int:
        """The oldest step that step `n` may look at."""
        return max(bisect.bisect_left(self.t, self.t[n] - self.room.span) - 1, 0)

    def needed(self, i: int) -> bool:
        """Whether a segment starts with step `i`, or the next one may look at it."""
        start = -(-i // self.every) * self.every
        return start == i or (start < len(self.t) and i >= self.reach(start))

    def full(self) -> bool:
        n, (records, stretches, _) = len(self.t), self.room
        if records is None:
            return stretches is not None and -(-n // self.every) > stretches
        return len(self.held) + min(self.every, n) >= records

    def result(self) -> tuple[Segments, Any]:
        sampler, self.sampler = self.sampler, None
        return self, None if sampler is None else sampler.result()


class Pending(dict[int, Record]):
    """Cotangents that wait on steps, and those that `extra` has for them (of `sample_vjp` or `nodes_vjp`)."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def __missing__(self, n: int) -> None:
        return None

    def take(self, n: int, record: Record) -> Record:
        """The cotangent of step `n`, which leaves."""
        extra = self.extra
        out = extra.at(n, record) if isinstance(extra, Pulled) else None if extra is None else extra[n]
        mine = cotangent(out, record)
        waiting = self.pop(n, None)
        return mine if waiting is None else Record(*(a + b for a, b in zip(mine, waiting, strict=True)))


def cotangent(out: Contribution | None, record: Record) -> Record:
    """What an output adds to a step, as the cotangent of its record."""
    if out is None:
        return Record(0.0, 0.0, 0.0 * record.u, 0.0 * record.k)
    return Record(out.t, out.h, out.u, 0.0 * record.k if out.k is None else out.k)


class Retaken:
    """A log of segments for a reverse pass; `taken` steps were taken again, with so many `iterations`.

    `retake(log, t, h, u) -> (u1, K, iterations)` takes a step that looks back into `log`.
    """

    def __init__(self, kept: Segments, retake: Callable) -> None:
        self.kept, self.retake, self.t = kept, retake, kept.t
        self.again: dict[int, Record] = {}
        self.taken = self.iterations = 0

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, n: int) -> Record:
        return self.kept.held[n] if n in self.kept.held else self.again[n]

    def collect(self, body: Callable, state: Any, pending: Pending) -> Any:
        """As `Lookback.collect`."""
        end = len(self)
        while end > 0:
            start = (end - 1) // self.kept.every * self.kept.every
            self.fill(start, end)
            for n in reversed(range(start, end)):
                record = self[n]
                state, pending = body(state, pending, record, pending.take(n, record), self)
                self.again.pop(n, None)
            end = start
        return state

    def fill(self, start: int, end: int) -> None:
        """Take the steps again that are missing behind the first of a segment."""
        kept, gap = self.kept, start + 1
        while gap < end and gap not in kept.held:
            gap += 1
        u = kept.held[start].u
        for n in range(start, gap if gap > start + 1 else start):
            t, h = kept.t[n], kept.h[n]
            u1, K, iterations = self.retake(self, t, h, u)
            if n > start:
                self.again[n] = Record(t, h, u, K)
            u, self.taken, self.iterations = u1, self.taken + 1, self.iterations + iterations

    def forwards(self, u: Array) -> Iterator[Record]:
        """All steps, taken again from the first, which starts from `u`."""
        records: list[Record] = []
        for t, h in zip(self.kept.t, self.kept.h, strict=True):
            u1, K, _ = self.retake(records, t, h, u)
            records.append(Record(t, h, u, K))
            yield records[-1]
            u = u1


def sink(be: Any, room: Room, stepper: Any, saves: Any, ts: Any, u0: Array, capacity: int) -> Segments:
    """`Segments` with what makes the output `saves` of a solve that runs forwards."""
    if saves == "steps":
        return Segments(room, Nodes())
    if saves is None:
        return Segments(room, None)
    return Segments(room, be.sampler(stepper.interpolate, ts, u0, 1.0, capacity, stepper.restage))
