"""Compiled loops: the twins of `sensitivity.backend.Loops`.

A log is a set of fixed buffers with one slot for each accepted step. Under `vmap` a slot is used when any lane
accepts, and `keep` tells which lanes did.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from sensitivity.backend import Contribution, Loops, Record

from ._lanes import active, any_lane, select
from ._ledger import LedgerLoops
from ._typed import arrays, like

STAGE_NUMBERS = 2**20
STAGE_SLOTS = 512
MASKED_SAVES = 64


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

    def result(self, log):
        return self.be.sample(self.interpolate, OpenLog(log, self.stages), self.ts, self.u0, self.direction)


class JaxLoops(LedgerLoops, Loops):
    traced = True

    def choose(self, pred, a, b):
        return jax.tree.map(lambda x, y: jnp.where(pred, x, y), a, b)

    def least(self, a, b):
        return jnp.minimum(a, b)

    def greatest(self, a, b):
        return jnp.maximum(a, b)

    def isfinite(self, x):
        return jnp.isfinite(x)

    # -- loops ------------------------------------------------------------------------------------------------------

    def iterate(self, step, state, running, limit, sink=None):
        state = arrays(state)
        traced = _once(step, state)
        if sink is None:
            def body(carry):
                i, s = carry
                return i + 1, select(active(running(s)), like(traced(s)[0], s), s)

            _, state = self._while(lambda c: any_lane(running(c[1])) & (c[0] < limit), body, (jnp.int32(0), state))
            return state, None
        if isinstance(sink, Fold):
            return self._folded(traced, state, running, limit, sink)

        _, record, _ = traced.shapes
        room = Record(*(sink.capacity,) * 3, _room_for_stages(record.k, sink.capacity))
        buffers = jax.tree.map(lambda x, slots: jnp.zeros((slots, *x.shape), x.dtype), record, room)
        log = Log(buffers, jnp.zeros((sink.capacity,), bool), jnp.int32(0), jnp.int32(0))

        def record_step(carry):
            i, s, log = carry
            on = running(s)
            new, record, keep = traced(s)
            new = select(active(on), like(new, s), s)
            mine = keep & on
            return i + 1, new, _append(log, record, mine)

        def more(carry):
            i, s, log = carry
            return any_lane(running(s)) & (i < limit) & (log.count < sink.capacity)

        _, state, log = self._while(more, record_step, (jnp.int32(0), state, log))
        return state, sink.result(log)

    def _folded(self, traced, state, running, limit, sink):
        def fold_step(carry):
            i, s, total = carry
            on = running(s)
            new, record, keep = traced(s)
            mine = keep & on

            def add(total):
                return select(mine, like(arrays(sink.body(total, record)), total), total)

            total = lax.cond(any_lane(mine), add, lambda total: total, total)
            return i + 1, select(active(on), like(new, s), s), total

        carry = (jnp.int32(0), state, arrays(sink.state))
        _, state, total = self._while(lambda c: any_lane(running(c[1])) & (c[0] < limit), fold_step, carry)
        return state, total

    def _while(self, cond, body, carry):
        return lax.while_loop(cond, body, carry)

    def replay(self, body, state, log, extra=None):
        opened, (log, _) = log, log
        state = arrays(state)

        def back(carry):
            i, s = carry
            return i - 1, self._past(body, s, opened, extra, i - 1)

        return self._while(lambda c: c[0] > 0, back, (log.count, state))[1]

    def _past(self, body, state, opened, extra, i):
        """The state after the record in slot `i`, if this lane kept it."""
        log, _ = opened
        out = None
        if isinstance(extra, Rows):
            mask = extra.slot == i
            out = Contribution(*(_masked(mask, rows) for rows in extra.rows))
        elif extra is not None:
            out = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, i, 0, False), extra)
        new = body(state, opened.record(i), out, i == log.newest)
        return select(active(log.keep[i]), like(arrays(new), state), state)

    def follow(self, body, state, log):
        opened, (log, _) = log, log
        state = arrays(state)
        capacity = log.keep.shape[0]

        def advance(s, i):
            return body(s, opened.record(i), i == log.newest)

        shapes = jax.eval_shape(advance, state, jnp.int32(0))[1]
        buffers = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)

        def ahead(carry):
            i, s, out = carry
            new, record = advance(s, i)
            out = jax.tree.map(lambda b, x: lax.dynamic_update_index_in_dim(b, x.astype(b.dtype), i, 0), out, record)
            return i + 1, select(active(log.keep[i]), like(new, s), s), out

        _, state, buffers = self._while(lambda c: c[0] < log.count, ahead, (jnp.int32(0), state, buffers))
        return state, OpenLog(log._replace(records=buffers), None)

    def scan(self, body, state, xs):
        state = arrays(state)

        def step(s, x):
            new, y = body(s, x)
            return like(arrays(new), s), y

        return lax.scan(step, state, tuple(jnp.asarray(x) for x in xs))

    def gathered(self, rows):
        return rows

    def fold(self, body, state):
        return Fold(body, state)

    def joined(self, a, b):
        return jnp.concatenate([jnp.stack(v) if isinstance(v, list) else jnp.asarray(v) for v in (a, b)])

    def store(self, capacity):
        return Store(capacity)

    def sampler(self, interpolate, ts, u0, direction, capacity, stages):
        return Sampler(self, interpolate, ts, u0, direction, capacity, stages)

    def reopen(self, log, stages):
        return OpenLog(log, stages)

    # -- logs -------------------------------------------------------------------------------------------------------

    def _locate(self, log, ts, direction):
        """Slot of the step that each time lies in: the last that starts before it.

        Start times never decrease along the slots; where a lane rejected a step, the step that it kept later starts
        at the same time, and is found.
        """
        used = jnp.arange(log.keep.shape[0]) < log.count
        keys = jnp.where(used, direction * log.records.t, jnp.inf)
        slot = jnp.searchsorted(lax.stop_gradient(keys), lax.stop_gradient(direction * ts)) - 1
        return jnp.maximum(slot, 0)

    def lookup(self, interpolate, log, otherwise=None):
        opened, (log, _) = log, log
        direction = jnp.where(log.records.h[0] >= 0.0, 1.0, -1.0)

        def dense(t):
            slot = self._locate(log, jnp.reshape(t, (1,)), direction)
            record = jax.tree.map(lambda x: x[0], opened.records(slot))
            value = interpolate(record, [t])[0]
            return value if otherwise is None else jnp.where(log.count > 0, value, otherwise)

        return dense

    def place(self, log):
        log, _ = log
        direction = jnp.where(log.records.h[0] >= 0.0, 1.0, -1.0)
        return lambda t: self._locate(log, jnp.reshape(t, (1,)), direction)[0]

    def sample(self, interpolate, log, ts, u0, direction):
        opened, (log, _) = log, log
        ts = jnp.asarray(ts)
        records = opened.records(self._locate(log, ts, direction))
        rows = jax.vmap(lambda record, t: interpolate(record, [t])[0])(records, ts)
        return jnp.where(log.count > 0, rows, u0[None, :])

    def sample_vjp(self, transpose, log, ts, ct, direction):
        opened, (log, _) = log, log
        slots = self._locate(log, ts, direction)
        records = opened.records(slots)

        def one(record, t, row):
            out, (t_bar,) = transpose(record, [t], row[None, :])
            return arrays(out), jnp.asarray(t_bar, ts.dtype)

        rows, ts_bar = jax.vmap(one)(records, ts, ct)
        rows = jax.tree.map(lambda x: jnp.where(log.count > 0, x, jnp.zeros_like(x)), rows)
        if ts.shape[0] <= MASKED_SAVES:
            return Rows(slots, rows), ts_bar
        return _scattered(Rows(slots, rows), log.keep.shape[0]), ts_bar

    def nodes(self, log, end, t_end):
        log, _ = log
        order = jnp.argsort(~log.keep, stable=True)
        n = jnp.sum(log.keep)
        index = jnp.arange(log.keep.shape[0])
        u = jnp.roll(log.records.u[order], -1, axis=0)
        t = jnp.roll(log.records.t[order], -1)
        return jnp.where((index >= n - 1)[:, None], end, u), jnp.where(index >= n - 1, t_end, t)

    def nodes_vjp(self, log, ct):
        log, _ = log
        order = jnp.argsort(~log.keep, stable=True)
        n = jnp.sum(log.keep)
        index = jnp.arange(log.keep.shape[0])
        used = jnp.where((index < n - 1)[:, None], ct, 0.0)
        starts = jnp.zeros_like(ct).at[order].set(jnp.roll(used, 1, axis=0))
        none = jnp.zeros(ct.shape[0], log.records.h.dtype)
        return Contribution(starts, None, none, none), ct[jnp.maximum(n - 1, 0)]

    def stacked(self, log):
        opened, (log, _) = log, log
        order = jnp.argsort(~log.keep, stable=True)
        records = opened.records(order)
        return records.t, records.h, records.u, records.k

    def unstacked(self, times, sizes, u, k, count):
        index = jnp.arange(times.shape[0])
        return OpenLog(Log(Record(times, sizes, u, k), index < count, jnp.asarray(count, jnp.int32),
                           jnp.asarray(count - 1, jnp.int32)), None)

    def stacked_vjp(self, log, u, k, extra):
        log, _ = log
        capacity = log.keep.shape[0]
        order = jnp.argsort(~log.keep, stable=True)
        used = jnp.arange(capacity) < jnp.sum(log.keep)
        put = lambda x: jnp.zeros_like(x).at[order].set(  # noqa: E731
            jnp.where(jnp.reshape(used, (-1,) + (1,) * (x.ndim - 1)), x, 0.0))
        none = jnp.zeros(capacity, log.records.h.dtype)
        out = Contribution(put(u), put(k), none, none)
        if extra is None:
            return out
        old = _scattered(extra, capacity) if isinstance(extra, Rows) else extra
        return Contribution(old.u + out.u, out.k if old.k is None else old.k + out.k, old.h, old.t)

    def silent_end(self, extra):
        return 0

    def last_size(self, log):
        log, _ = log
        return jnp.where(log.count > 0, log.records.h[log.newest], 1.0)

    def trimmed(self, rows, ts, count):
        if not isinstance(count, jax.core.Tracer):
            return rows[: int(count)], ts[: int(count)]
        bad = jnp.arange(rows.shape[0]) >= count
        return jnp.where(bad[:, None], jnp.nan, rows), jnp.where(bad, jnp.nan, ts)

    # -- save times -------------------------------------------------------------------------------------------------

    def spread(self, t0, t1, fractions):
        w = jnp.asarray(fractions)
        return jnp.where(w == 0.0, t0, jnp.where(w == 1.0, t1, t0 + w * (t1 - t0)))

    def total(self, values, weights=None):
        return jnp.sum(values) if weights is None else jnp.dot(values, jnp.asarray(weights, values.dtype))

    def sort_down(self, ts, rows, direction):
        ts = jnp.stack(ts) if isinstance(ts, list) else ts
        order = jnp.argsort(-direction * ts)
        return ts[order], rows[order]

    def reached(self, rows, ts, t_end, direction):
        return jnp.where((direction * (ts - t_end) > 0.0)[:, None], jnp.nan, rows)

    def nothing(self, like):
        return jnp.zeros_like(like)

    # -- matrix recursions ------------------------------------------------------------------------------------------

    def recursion(self, a, base, scale, xs, row, carry, first=None):
        s, n = len(a), base.shape[-1]
        start = 0 if first is None else 1
        if s - start <= 2:
            return super().recursion(a, base, scale, xs, row, carry, first)
        square = np.zeros((s, s))
        for i, r in enumerate(a):
            square[i, : len(r)] = r
        square = jnp.asarray(square, base.dtype)
        xs = jax.tree.map(lambda x: x, tuple(x if isinstance(x, jax.Array) else jnp.asarray(x) for x in xs))
        rows = jnp.zeros((s, n), base.dtype)
        if first is not None:
            rows = lax.dynamic_update_index_in_dim(rows, first, 0, 0)

        def body(i, state):
            carry, rows = state
            v = base if base.ndim == 1 else base[i]
            v = v + jnp.asarray(scale, base.dtype) * jnp.dot(square[i], rows, precision="highest")
            new, out = row(carry, tuple(x[i] for x in xs), v)
            return like(arrays(new), carry), lax.dynamic_update_index_in_dim(rows, out.astype(rows.dtype), i, 0)

        return lax.fori_loop(start, s, body, (arrays(carry), rows))

    def combine(self, base, scale, weights, rows):
        w = jnp.asarray(np.array(weights), rows.dtype)
        out = jnp.asarray(scale, rows.dtype) * jnp.dot(w, rows, precision="highest")
        return out if base is None else base + out

    def inputs(self, a, base, scale, rows):
        if len(a) == 1 and not any(a[0]):
            return base[None, :]
        square = np.zeros((len(a), len(a)))
        for i, r in enumerate(a):
            square[i, : len(r)] = r
        out = jnp.dot(jnp.asarray(square, rows.dtype), rows, precision="highest")
        return base + jnp.asarray(scale, rows.dtype) * out

    def seeds(self, b, h, lam, rows, last):
        out = jnp.asarray(h, lam.dtype) * jnp.outer(jnp.asarray(np.array(b), lam.dtype), lam)
        if rows is not None:
            out = out + rows
        return out if last is None else jnp.concat([out[:-1], out[-1:] + last])

    def put(self, rows, i, row):
        return lax.dynamic_update_index_in_dim(rows, row.astype(rows.dtype), i, 0)

    def permuted(self, xs, order):
        return jnp.asarray(xs)[np.array(order)]

    def permuted_rows(self, rows, order):
        return rows[np.array(order)]

    def poly(self, coefficients, x, like):
        x = self.vector(x, like)[:, None]
        columns = jnp.asarray(np.array(coefficients).T, like.dtype)
        out = columns[-1][None, :] + 0.0 * x
        for c in columns[-2::-1]:
            out = out * x + c
        return out


class BoundedLoops(JaxLoops):
    """Loops of a known length, which JAX can differentiate backwards; blocks of steps are skipped once done."""

    block = 64

    def iterate(self, step, state, running, limit, sink=None):
        assert sink is not None
        limit = min(limit, sink.capacity)
        state = arrays(state)
        traced = _once(step, state)
        _, record, _ = traced.shapes

        def attempt(s, _):
            on = running(s)
            new, record, keep = traced(s)
            return select(on, like(new, s), s), (record, on & keep)

        def run_block(s):
            return lax.scan(attempt, s, None, length=self.block)

        def skip(s):
            zeros = jax.tree.map(lambda x: jnp.zeros((self.block, *x.shape), x.dtype), record)
            return s, (zeros, jnp.zeros((self.block,), bool))

        def outer(s, _):
            return lax.cond(any_lane(running(s)), run_block, skip, s)

        blocks = -(-limit // self.block)
        state, (records, keep) = lax.scan(outer, state, None, length=blocks)
        records, keep = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), (records, keep))
        index = jnp.arange(keep.shape[0])
        order = jnp.argsort(~keep, stable=True)
        records = jax.tree.map(lambda x: x[order], records)
        count = jnp.sum(keep, dtype=jnp.int32)
        return state, sink.result(Log(records, index < count, count, jnp.maximum(count - 1, 0)))


class _once:
    """A step function traced once; later calls evaluate its jaxpr."""

    def __init__(self, step, state):
        closed, self.shapes = jax.make_jaxpr(lambda s: _typed(step(s)), return_shape=True)(state)
        self.call = jaxpr_as_fun(closed)
        self.tree = jax.tree.structure(self.shapes)

    def __call__(self, state):
        return jax.tree.unflatten(self.tree, self.call(*jax.tree.leaves(state)))


def _typed(result):
    state, record, keep = result
    return arrays(state), arrays(record), jnp.asarray(keep, bool)


def _room_for_stages(k, capacity):
    """Slots that keep their stages: none where one stage is all there is, else as many as the budget allows.

    Buffers are filled before they are used, in every lane of a batch, so room for steps that few solves take is dear.
    """
    return 0 if k.shape[0] == 1 else min(capacity, STAGE_SLOTS, max(1, STAGE_NUMBERS // max(k.size, 1)))


def _append(log, record, mine):
    """Write a record at the next slot; the slot is taken when any lane keeps its record."""
    i = log.count
    put = lambda b, x: lax.dynamic_update_index_in_dim(b, x.astype(b.dtype), i, 0) if b.shape[0] else b  # noqa: E731
    records = jax.tree.map(put, log.records, record)
    taken = any_lane(mine)
    return Log(records, lax.dynamic_update_index_in_dim(log.keep, mine, i, 0), i + taken.astype(jnp.int32),
               jnp.where(mine, i, log.newest))


def _masked(mask, rows):
    weights = mask.astype(rows.dtype)
    return jnp.tensordot(weights, rows, axes=1, precision="highest")


def _scattered(extra, capacity):
    return Contribution(*(jnp.zeros((capacity, *x.shape[1:]), x.dtype).at[extra.slot].add(x) for x in extra.rows))
