"""Logs that keep times and sizes of steps only, outputs taken while the loop runs, and their cotangents.

Save times are sorted, and a cursor passes over them: forwards in the step loop, backwards in the reverse loop. Nothing
but the rows that the user asked for has a size that grows with the steps or the save times.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sensitivity.backend import Mark

from ._lanes import any_lane


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MarkLog:
    """Times and sizes of the recorded steps, and the start state of every `every`-th one; as `Log` otherwise."""

    records: Mark
    keep: Any
    count: Any
    newest: Any
    every: int | None = None

    @property
    def log(self):
        return self

    def record(self, i):
        """The step in slot `i`."""
        t, h, u, _ = self.records
        load = lambda b, i: lax.dynamic_index_in_dim(b, i, 0, False)  # noqa: E731
        if self.every is None:
            return Mark(load(t, i), load(h, i), None, False)
        return Mark(load(t, i), load(h, i), load(u, i // self.every), i % self.every == 0)


class Taking(NamedTuple):
    """The rows to take at times `ts`, sorted along the direction of the solve; `order` says where each belongs."""

    interpolate: Any
    ts: Any
    keys: Any
    order: Any
    direction: Any
    first: Any

    def rows(self):
        return jnp.int32(0), jnp.broadcast_to(self.first, (self.ts.shape[0], *self.first.shape))

    def take(self, kept, record, mine):
        """Fill the rows of the times in one step."""
        end = self.direction * (record.t + record.h)
        count = self.ts.shape[0]

        def reached(at):
            return mine & (at < count) & (self.keys[jnp.minimum(at, count - 1)] <= end)

        def fill(carry):
            at, rows = carry
            i, on = jnp.minimum(at, count - 1), reached(at)
            row = self.interpolate(record, [self.ts[i]])[0].astype(rows.dtype)
            row = jnp.where(on, row, lax.dynamic_index_in_dim(rows, i, 0, False))
            return at + on, lax.dynamic_update_index_in_dim(rows, row, i, 0)

        return lax.while_loop(lambda c: any_lane(reached(c[0])), fill, kept)


class Kept(NamedTuple):
    """What `Marks` has collected."""

    log: MarkLog
    rows: Any

    @property
    def count(self):
        return self.log.count


class Marks(NamedTuple):
    """A sink: a `MarkLog`, and the rows taken on the way."""

    capacity: int
    every: int | None
    taking: Taking | None

    def start(self, record):
        empty = lambda x, slots: jnp.zeros((slots, *x.shape), x.dtype)  # noqa: E731
        u = None if self.every is None else empty(record.u, -(-self.capacity // self.every))
        log = MarkLog(Mark(empty(record.t, self.capacity), empty(record.h, self.capacity), u, None),
                      jnp.zeros((self.capacity,), bool), jnp.int32(0), jnp.int32(0), self.every)
        return Kept(log, None if self.taking is None else self.taking.rows())

    def add(self, kept, record, mine):
        log, rows = kept
        i, (t, h, u, _) = log.count, log.records
        put = lambda b, x, i: lax.dynamic_update_index_in_dim(b, x.astype(b.dtype), i, 0)  # noqa: E731
        if self.every is not None:
            # Between two stored states the place is written over with what it holds: no branch, one row.
            slot = i // self.every
            u = put(u, jnp.where(i % self.every == 0, record.u, lax.dynamic_index_in_dim(u, slot, 0, False)), slot)
        log = MarkLog(Mark(put(t, record.t, i), put(h, record.h, i), u, None), put(log.keep, mine, i),
                      i + any_lane(mine).astype(jnp.int32), jnp.where(mine, i, log.newest), self.every)
        return Kept(log, rows if rows is None else self.taking.take(rows, record, mine))

    def result(self, kept):
        log, rows = kept
        return log, None if rows is None else jnp.zeros_like(rows[1]).at[self.taking.order].set(rows[1])


class Pending(NamedTuple):
    """Cotangents `ct` of the rows at times `ts`, latest first, that wait for the step they belong to."""

    transpose: Any
    ts: Any
    ct: Any
    direction: Any
    t0: Any

    def inside(self, at, mark, mine):
        """What the times in one step contribute, and where the next step goes on."""
        count = self.ts.shape[0]

        def here(at):
            t = self.ts[jnp.minimum(at, count - 1)]
            return mine & (at < count) & ((self.direction * (t - mark.t) > 0.0) | (mark.t == self.t0))

        def one(at):
            i = jnp.minimum(at, count - 1)
            return self.transpose(mark, [self.ts[i]], self.ct[i][None, :])[0]

        def add(carry):
            at, out = carry
            on = here(at)
            return at + on, jax.tree.map(lambda a, b: a + jnp.where(on, b, 0).astype(a.dtype), out, one(at))

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, at))
        return lax.while_loop(lambda c: any_lane(here(c[0])), add, (at, nothing))
