"""Compiled loops: the twins of `sensitivity.backend.Loops`."""

import jax
import jax.numpy as jnp
from jax import lax

from sensitivity.backend import Contribution, Loops, Record

from ._checkpoints import Pulled, Recall, Recomputing
from ._lanes import active, any_lane, select
from ._ledger import LedgerLoops
from ._log import Fold, Log, OpenLog, Rows, Sampler, Store, masked, scattered
from ._marks import MarkLog, Marks, Pending, Taking
from ._matrices import Matrices
from ._segments import Retaken
from ._typed import arrays, like, once

MASKED_SAVES = 64


class JaxLoops(LedgerLoops, Recomputing, Matrices):
    traced = True
    keeps_stages = True

    def choose(self, pred, a, b):
        return jax.tree.map(lambda x, y: jnp.where(pred, x, y), a, b)

    def least(self, a, b):
        return jnp.minimum(a, b)

    def greatest(self, a, b):
        return jnp.maximum(a, b)

    def isfinite(self, x):
        return jnp.isfinite(x)

    def add(self, a, b):
        """The sums, chosen where something holds that always does, which only XLA does not know: a sum that is a loop's
        whole kernel, written over its first term, gets no vector instructions, and takes eight times longer."""
        always = lax.optimization_barrier(jnp.array(True))
        return tuple(jnp.where(always, x + y, x) for x, y in zip(a, b, strict=True))

    # -- loops ------------------------------------------------------------------------------------------------------

    def iterate(self, step, state, running, limit, sink=None):
        state = arrays(state)
        traced = once(step, state)
        if sink is None:
            def body(carry):
                i, s = carry
                return i + 1, select(active(running(s)), like(traced(s)[0], s), s)

            _, state = self._while(lambda c: any_lane(running(c[1])) & (c[0] < limit), body,
                                   lambda: (jnp.int32(0), state))
            return state, None
        if isinstance(sink, Fold):
            return self._folded(traced, state, running, limit, sink)

        _, record, _ = traced.shapes

        def start():
            return jnp.int32(0), state, sink.start(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), record))

        def record_step(carry):
            i, s, log = carry
            on = running(s)
            new, record, keep = traced(s)
            new = select(active(on), like(new, s), s)
            mine = keep & on
            return i + 1, new, sink.add(log, record, mine)

        def more(carry):
            i, s, log = carry
            return any_lane(running(s)) & (i < limit) & any_lane(log.count < sink.capacity)

        _, state, log = self._while(more, record_step, start)
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

        _, state, total = self._while(lambda c: any_lane(running(c[1])) & (c[0] < limit), fold_step,
                                      lambda: (jnp.int32(0), state, arrays(sink.state)))
        return state, total

    def _while(self, cond, body, start):
        """`lax.while_loop` from what `start()` makes."""
        return lax.while_loop(cond, body, start())

    def replay(self, body, state, log, extra=None):
        if isinstance(log, Recall):
            return log.replay(body, state, extra)
        opened, log = log, log.log
        state = arrays(state)

        def back(carry):
            i, s = carry
            return i - 1, self._past(body, s, opened, extra, i - 1)

        def back_pending(carry):
            i, (at, s) = carry
            i = i - 1
            mark, mine = opened.record(i), active(log.keep[i])
            at, out = extra.inside(at, mark, mine)
            return i, (at, select(mine, like(arrays(body(s, mark, out, i == log.newest)), s), s))

        if isinstance(extra, Pending):
            return self._while(lambda c: c[0] > 0, back_pending, lambda: (log.count, (jnp.int32(0), state)))[1][1]
        return self._while(lambda c: c[0] > 0, back, lambda: (log.count, state))[1]

    def _past(self, body, state, opened, extra, i):
        """The state after the record in slot `i`, if this lane kept it."""
        log = opened.log
        out = None
        if isinstance(extra, Rows):
            mask = extra.slot == i
            out = Contribution(*(masked(mask, rows) for rows in extra.rows))
        elif extra is not None:
            out = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, i, 0, False), extra)
        new = body(state, opened.record(i), out, i == log.newest)
        return select(active(log.keep[i]), like(arrays(new), state), state)

    def follow(self, body, state, log, sink=None):
        opened, log = log, log.log
        state = arrays(state)
        capacity = log.keep.shape[0]

        def advance(s, i):
            return body(s, opened.record(i), i == log.newest)

        shapes = jax.eval_shape(advance, state, jnp.int32(0))[1]
        if sink is not None:
            def onward(carry):
                i, s, kept = carry
                new, record = advance(s, i)
                return i + 1, select(active(log.keep[i]), like(new, s), s), sink.add(kept, record, log.keep[i])

            _, state, kept = self._while(lambda c: c[0] < log.count, onward,
                                         lambda: (jnp.int32(0), state, sink.start(shapes)))
            return state, sink.result(kept)

        def start():
            return jnp.int32(0), state, jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)

        def ahead(carry):
            i, s, out = carry
            new, record = advance(s, i)
            out = jax.tree.map(lambda b, x: lax.dynamic_update_index_in_dim(b, x.astype(b.dtype), i, 0), out, record)
            return i + 1, select(active(log.keep[i]), like(new, s), s), out

        _, state, buffers = self._while(lambda c: c[0] < log.count, ahead, start)
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
        return Store(capacity, self.keeps_stages)

    def sampler(self, interpolate, ts, u0, direction, capacity, stages):
        return Sampler(self, interpolate, ts, u0, direction, capacity, stages)

    def marks(self, capacity, every, interpolate=None, ts=None, first=None, s=None):
        if interpolate is None:
            return Marks(capacity, every, None)
        ts = jnp.asarray(ts)
        order = jnp.argsort(s.direction * ts)
        keys = s.direction * ts[order]
        # Round-off may leave a time at the end of the span behind the last node.
        slack = 8.0 * jnp.finfo(keys.dtype).eps * jnp.maximum(jnp.abs(s.t0), jnp.abs(s.t1))
        keys = jnp.minimum(keys, s.direction * s.t1 - slack)
        return Marks(capacity, every, Taking(interpolate, ts[order], keys, order, s.direction, first))

    def unrolled(self, a, base, scale, xs, row, carry):
        return Loops.recursion(self, a, base, jnp.asarray(scale, base.dtype), xs, row, carry)

    def reopen(self, log, stages):
        return OpenLog(log, stages)

    # -- logs -------------------------------------------------------------------------------------------------------

    def _locate(self, log, ts, direction):
        """Slot of the step that each time lies in: the last that starts before it.

        Start times never decrease along the slots; where a lane rejected a step, the step that it kept later starts
        at the same time, and is found.
        """
        return self._slots(log.records.t, log.count, ts, direction)

    def _slots(self, times, count, ts, direction):
        keys = jnp.where(jnp.arange(times.shape[0]) < count, direction * times, jnp.inf)
        slot = jnp.searchsorted(lax.stop_gradient(keys), lax.stop_gradient(direction * ts)) - 1
        return jnp.maximum(slot, 0)

    def lookup(self, interpolate, log, otherwise=None, between=None):
        opened, (log, _) = log, log
        direction = jnp.where(log.records.h[0] >= 0.0, 1.0, -1.0)
        first = last = None
        if between is not None:
            keys = jnp.where(jnp.arange(log.keep.shape[0]) < log.count, direction * log.records.t, jnp.inf)
            first = jnp.maximum(jnp.searchsorted(keys, direction * between[0], side="right") - 1, 0)
            last = jnp.maximum(jnp.searchsorted(keys, direction * between[1]) - 1, first)

        def dense(t):
            slot = self._locate(log, jnp.reshape(t, (1,)), direction)
            if between is not None:
                slot = jnp.clip(slot, first, last)
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
        if isinstance(log, MarkLog):
            order = jnp.argsort(-direction * ts)
            return Pending(transpose, ts[order], ct[order], direction, log.records.t[0]), None
        if isinstance(log, Recall | Retaken):
            return Pulled(transpose, ts, ct, self._slots(log.kept.t, log.kept.count, ts, direction)), None
        opened, (log, _) = log, log
        slots = self._locate(log, ts, direction)
        records = opened.records(slots)

        def one(record, t, row):
            out, (t_bar,) = transpose(record, [t], row[None, :])
            return arrays(out), jnp.asarray(t_bar, ts.dtype)

        rows, ts_bar = jax.vmap(one)(records, ts, ct)
        rows = jax.tree.map(lambda x: jnp.where(log.count > 0, x, jnp.zeros_like(x)), rows)
        return self._placed(Rows(slots, rows), opened), ts_bar

    def _placed(self, rows, log):
        """Contributions to steps as `replay` takes them."""
        return rows if rows.slot.shape[0] <= MASKED_SAVES else scattered(rows, log.log.keep.shape[0])

    def nodes(self, log, end, t_end):
        log = log.log
        order = jnp.argsort(~log.keep, stable=True)
        n = jnp.sum(log.keep)
        index = jnp.arange(log.keep.shape[0])
        u = jnp.roll(log.records.u[order], -1, axis=0)
        t = jnp.roll(log.records.t[order], -1)
        return jnp.where((index >= n - 1)[:, None], end, u), jnp.where(index >= n - 1, t_end, t)

    def nodes_vjp(self, log, ct):
        if isinstance(log, Recall | Retaken):
            return self._node_starts(log, ct)
        log = log.log
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
        old = scattered(extra, capacity) if isinstance(extra, Rows) else extra
        return Contribution(old.u + out.u, out.k if old.k is None else old.k + out.k, old.h, old.t)

    def restaged(self, log):
        keep, (room, stages, *_) = log.log.keep, log.log.records.k.shape
        if stages == 1 or room == keep.shape[0]:
            return 0
        return jnp.sum(keep[max(room - 1, 0):], dtype=jnp.int32)

    def silent_end(self, extra):
        return 0

    def last_size(self, log):
        log = log.log
        return jnp.where(log.count > 0, log.records.h[log.newest], 1.0)

    def trimmed(self, rows, ts, count):
        if not isinstance(count, jax.core.Tracer):
            return rows[: int(count)], ts[: int(count)]
        bad = jnp.arange(rows.shape[0]) >= count
        return jnp.where(bad[:, None], jnp.nan, rows), jnp.where(bad, jnp.nan, ts)

    # -- save times -------------------------------------------------------------------------------------------------

    def pick(self, rows, position):
        return lax.dynamic_index_in_dim(rows, jnp.round(position).astype(jnp.int32), 0, False)

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
        ts = jnp.stack(ts) if isinstance(ts, list) else ts
        return jnp.where((direction * (ts - t_end) > 0.0)[:, None], jnp.nan, rows)

    def nothing(self, like):
        return jnp.zeros_like(like)
