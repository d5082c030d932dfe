"""Recorded steps in buffers of fixed size.

A log has one slot for each accepted step. Under `vmap` a slot is used when any lane accepts, and `keep` tells which
lanes did.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sensitivity.backend import Contribution, Record

from ._lanes import any_lane

STAGE_NUMBERS = 2**20
STAGE_SLOTS = 512


class Log(NamedTuple):
    """Recorded steps; `count` slots are used, `newest` is the last slot that this lane kept."""

    records: Record
    keep: Any
    count: Any
    newest: Any


class OpenLog(NamedTuple):
    """A log with a function that remakes stages which were too big to keep.

    Only the first slots may have room for stages; then the last of these is overwritten by all later records.
    """

    log: Log
    stages: Any

    def record(self, i):
        """The record in slot `i`."""
        log, _ = self
        t, h, u = (lax.dynamic_index_in_dim(b, i, 0, False) for b in log.records[:3])
        record, k = Record(t, h, u, None), log.records.k
        if k.shape[0] == 0:
            return record._replace(k=self.stages(record))
        load = lambda i: lax.dynamic_index_in_dim(k, i, 0, False)  # noqa: E731
        if k.shape[0] == log.keep.shape[0]:
            return record._replace(k=load(i))
        return record._replace(k=lax.cond(i < k.shape[0] - 1, load, lambda i: self.stages(record).astype(k.dtype), i))

    def records(self, slots):
        """Several records, for one evaluation each; unused slots get a harmless size."""
        log, _ = self
        t, h, u = (b[slots] for b in log.records[:3])
        records = Record(t, jnp.where(h == 0.0, 1.0, h).astype(h.dtype), u, None)
        k = log.records.k
        if k.shape[0] == 0:
            return records._replace(k=jax.vmap(self.stages)(records))
        if k.shape[0] == log.keep.shape[0]:
            return records._replace(k=k[slots])
        remake = lambda _: jax.vmap(self.stages)(records).astype(k.dtype)  # noqa: E731
        return records._replace(k=lax.cond(jnp.all(slots < k.shape[0] - 1), lambda s: k[s], remake, slots))


class Rows(NamedTuple):
    """Contributions of the save times, one row each, with the slot that each belongs to."""

    slot: Any
    rows: Contribution


class Store(NamedTuple):
    capacity: int
    keeps_stages: bool

    def start(self, record):
        """An empty log for records of these shapes."""
        return empty(record, self.capacity, self.keeps_stages)

    def add(self, log, record, mine):
        return append(log, record, mine)

    def result(self, log):
        return log


class Fold(NamedTuple):
    body: Any
    state: Any


class Sampler(NamedTuple):
    be: Any
    interpolate: Any
    ts: Any
    u0: Any
    direction: Any
    capacity: int
    stages: Any

    def start(self, record):
        return empty(record, self.capacity, self.be.keeps_stages)

    def add(self, log, record, mine):
        return append(log, record, mine)

    def result(self, log):
        return self.be.sample(self.interpolate, OpenLog(log, self.stages), self.ts, self.u0, self.direction)


def room_for_stages(k, capacity):
    """Slots that keep their stages: none where one stage is all there is, else as many as the budget allows.

    Buffers are filled before they are used, in every lane of a batch, so room for steps that few solves take is dear.
    """
    return 0 if k.shape[0] == 1 else min(capacity, STAGE_SLOTS, max(1, STAGE_NUMBERS // max(k.size, 1)))


def empty(record, capacity, keeps_stages):
    """A log without records, with room for `capacity` of them."""
    room = Record(*(capacity,) * 3, room_for_stages(record.k, capacity) if keeps_stages else 0)
    buffers = jax.tree.map(lambda x, slots: jnp.zeros((slots, *x.shape), x.dtype), record, room)
    return Log(buffers, jnp.zeros((capacity,), bool), jnp.int32(0), jnp.int32(0))


def append(log, record, mine):
    """Write a record at the next slot; the slot is taken when any lane keeps its record."""
    i = log.count
    put = lambda b, x: lax.dynamic_update_index_in_dim(b, x.astype(b.dtype), i, 0) if b.shape[0] else b  # noqa: E731
    records = jax.tree.map(put, log.records, record)
    taken = any_lane(mine)
    return Log(records, lax.dynamic_update_index_in_dim(log.keep, mine, i, 0), i + taken.astype(jnp.int32),
               jnp.where(mine, i, log.newest))


def masked(mask, rows):
    weights = mask.astype(rows.dtype)
    return jnp.tensordot(weights, rows, axes=1, precision="highest")


def scattered(extra, capacity):
    return Contribution(*(jnp.zeros((capacity, *x.shape[1:]), x.dtype).at[extra.slot].add(x) for x in extra.rows))
