"""Logs of solves that look back, which keep stretches of their steps, compiled: `sensitivity.segments`' twins.

Records lie in a pool of slots, of which the last is a bin for what is not kept; a table says in which slot a step is.
The number by which loops know a step of such a log is its slot.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sensitivity.backend import Record

from ._checkpoints import Pulled, Rows
from ._typed import arrays, like


class Segments(NamedTuple):
    """`count` steps with times and sizes; `place` has the slot of each or -1, `step` what is in each slot or -1.

    `every`, `left` and `short` as in `sensitivity.segments.Segments`; `span` is how far steps look back.
    """

    t: Any
    h: Any
    place: Any
    step: Any
    u: Any
    k: Any
    count: Any
    used: Any
    every: Any
    left: Any
    short: Any
    span: Any
    rows: Any

    def record(self, slot):
        """The step in a slot."""
        n = jnp.maximum(self.step[slot], 0)
        load = lambda b: lax.dynamic_index_in_dim(b, slot, 0, False)  # noqa: E731
        return Record(self.t[n], self.h[n], load(self.u), load(self.k))

    def locate(self, t):
        """The slot of the last step that starts before a time."""
        return self.place[jnp.maximum(jnp.searchsorted(self.t, t) - 1, 0)]

    def reach(self, n):
        """The oldest step that step `n` may look at."""
        return jnp.maximum(jnp.searchsorted(self.t, self.t[n] - self.span) - 1, 0).astype(jnp.int32)

    def needed(self, i):
        """Whether a segment starts with step `i`, or the next one may look at it."""
        start = -(-i // self.every) * self.every
        return (start == i) | ((start < self.count) & (i >= self.reach(start)))

    def put(self, n, u, k, mine):
        """The same with step `n` in its slot or in a free one, if `mine`."""
        bin_ = self.step.shape[0] - 1
        slot = jnp.where(self.place[n] >= 0, self.place[n], jnp.argmin(self.step[:bin_]).astype(jnp.int32))
        slot = jnp.where(mine, slot, bin_)
        write = lambda b, x: lax.dynamic_update_index_in_dim(b, x.astype(b.dtype), slot, 0)  # noqa: E731
        new = mine & (self.place[n] < 0)
        return self._replace(place=self.place.at[n].set(jnp.where(mine, slot, self.place[n])),
                             step=self.step.at[slot].set(jnp.where(mine, n, -1)), u=write(self.u, u),
                             k=write(self.k, k), used=self.used + new.astype(jnp.int32))

    def drop(self, n, out):
        """The same without step `n`, if it is to go `out`."""
        slot = jnp.where(out, self.place[n], self.step.shape[0] - 1)
        return self._replace(place=self.place.at[n].set(jnp.where(out, -1, self.place[n])),
                             step=self.step.at[slot].set(-1), used=self.used - out.astype(jnp.int32))

    def full(self):
        return (self.used + jnp.minimum(self.every, self.count) >= self.step.shape[0]) & ~self.short

    def widened(self):
        """Segments twice as long."""
        log = self._replace(short=self.every >= self.count, every=2 * self.every)
        steps = log.step[:-1]
        out = (steps >= 0) & (steps < log.left) & ~log.needed(jnp.maximum(steps, 0))
        place = log.place.at[jnp.where(out, steps, log.place.shape[0])].set(-1, mode="drop")
        return log._replace(step=log.step.at[:-1].set(jnp.where(out, -1, steps)), place=place,
                            used=log.used - jnp.sum(out, dtype=jnp.int32))


class Sink(NamedTuple):
    """Makes a log with room for `records` of at most `capacity` steps; `rows` is the output."""

    records: int
    capacity: int
    span: Any
    rows: Rows

    def start(self, record):
        slots = min(self.records, self.capacity + 2)
        zeros = lambda x, *shape: jnp.zeros((*shape, *x.shape), x.dtype)  # noqa: E731
        none, one = jnp.int32(0), jnp.int32(1)
        return Segments(jnp.full(self.capacity, jnp.inf, record.t.dtype), zeros(record.h, self.capacity),
                        jnp.full(self.capacity, -1, jnp.int32), jnp.full(slots, -1, jnp.int32),
                        zeros(record.u, slots), zeros(record.k, slots), none, none, one, none, jnp.array(False),
                        jnp.asarray(self.span, record.t.dtype), self.rows.start(record, self.capacity))

    def add(self, log, record, mine):
        n = log.count
        mine = mine & (n < self.capacity) & ~log.short
        n = jnp.minimum(n, self.capacity - 1)
        log = log._replace(rows=self.rows.add(log.rows, n, record, mine),
                           t=log.t.at[n].set(jnp.where(mine, record.t, log.t[n]).astype(log.t.dtype)),
                           h=log.h.at[n].set(jnp.where(mine, record.h, log.h[n]).astype(log.h.dtype)),
                           count=log.count + mine.astype(jnp.int32)).put(n, record.u, record.k, mine)
        reach = jnp.where(mine, log.reach(n), 0)

        def left(log):
            return log.drop(log.left, ~log.needed(log.left))._replace(left=log.left + 1)

        log = lax.while_loop(lambda log: log.left < reach, left, log)
        return lax.while_loop(lambda log: log.full(), lambda log: log.widened(), log)

    def result(self, log):
        newest = log.record(jnp.maximum(log.place[jnp.maximum(log.count - 1, 0)], 0))
        return log._replace(rows=None), self.rows.result(log.rows, newest, log.count)


class Retaken:
    """A log of segments for a reverse pass; see `sensitivity.segments.Retaken`."""

    def __init__(self, kept, retake):
        self.kept, self.retake = kept, retake
        self.taken = self.iterations = self.ts_bar = None

    def collect(self, body, state, pending):
        bars, extra = pending
        state, kept, retake = arrays(state), self.kept, self.retake
        pulled = isinstance(extra, Pulled)
        output = extra.start(kept.record(jnp.maximum(kept.place[jnp.maximum(kept.count - 1, 0)], 0))) if pulled else ()

        def cotangent(n, record, bars, slot, output):
            ct = Record(*(lax.dynamic_index_in_dim(b, slot, 0, False) for b in bars))
            out = None
            if pulled:
                out, output = extra.at(n, record, output)
            elif extra is not None:
                out = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, n, 0, False), extra)
            if out is not None:
                ct = Record(ct.t + out.t, ct.h + out.h, ct.u + out.u, ct.k if out.k is None else ct.k + out.k)
            return ct, output

        def segment(carry):
            end, log, bars, taken, iterations, state, output = carry
            start = (end - 1) // log.every * log.every

            def missing(n, log):
                return (n < end) & (log.place[jnp.minimum(n, end - 1)] < 0)

            def again(carry):
                n, u, log, taken, iterations = carry
                u1, K, more = arrays(retake(log, log.t[n], log.h[n], u))
                log = log.put(n, u, K, log.place[n] < 0)
                return n + 1, u1.astype(u.dtype), log, taken + 1, iterations + more

            def going_on(carry):
                n, _, log, _, _ = carry
                return jnp.where(n == start, missing(n + 1, log), missing(n, log))

            u = log.u[log.place[start]]
            _, _, log, taken, iterations = lax.while_loop(going_on, again, (start, u, log, taken, iterations))

            def back(carry):
                n, step, place, bars, state, output = carry
                here = log._replace(step=step, place=place)
                slot = place[n]
                record = here.record(slot)
                ct, output = cotangent(n, record, bars, slot, output)
                state, bars = like(arrays(body(state, bars, record, ct, here)), (state, bars))
                bars = jax.tree.map(lambda b: b.at[slot].set(0.0), bars)
                return n - 1, step.at[slot].set(-1), place.at[n].set(-1), bars, state, output

            carry = (end - 1, log.step, log.place, bars, state, output)
            _, step, place, bars, state, output = lax.while_loop(lambda c: c[0] >= start, back, carry)
            return start, log._replace(step=step, place=place), bars, taken, iterations, state, output

        carry = (kept.count, kept, bars, jnp.int32(0), jnp.int32(0), state, output)
        *_, self.taken, self.iterations, state, output = lax.while_loop(lambda c: c[0] > 0, segment, carry)
        if pulled:
            self.ts_bar = jnp.zeros_like(output[1]).at[extra.order].set(output[1])
        return state

    def pending(self, extra):
        """Cotangents aligned with the slots, and those of the output."""
        u, k, n = self.kept.u, self.kept.k, self.kept.step.shape[0]
        none = jnp.zeros(n, self.kept.h.dtype)
        return Record(none, none, jnp.zeros_like(u), jnp.zeros_like(k)), extra

    def forwards(self, be, u0):
        """All steps, taken again, in a log that keeps them."""
        kept = self.kept

        def step(state, log):
            n, u = state
            t, h = kept.t[n], kept.h[n]
            u1, K, _ = self.retake(log, t, h, u)
            return (n + 1, u1), Record(t, h, u, K), True

        like_record = Record(kept.t[0], kept.h[0], u0, jnp.zeros_like(kept.k[0]))
        capacity = kept.t.shape[0]
        return be.unfold(step, (0, u0), lambda s: s[0] < kept.count, capacity, capacity, like_record)[1]
