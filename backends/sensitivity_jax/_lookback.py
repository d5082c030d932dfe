"""Compiled twins of `sensitivity.lookback.Lookback`: buffers in the loop's state, read and written by index."""

import jax
import jax.numpy as jnp
from jax import lax

from sensitivity.backend import Record

from ._checkpoints import Rows as Output
from ._lanes import active, any_lane, select
from ._log import Log, OpenLog, Rows, append, scattered
from ._segments import Retaken, Segments, Sink
from ._typed import arrays, like


class JaxLookback:
    def truth(self, value):
        return jnp.asarray(value)

    def either(self, pred, a, b):
        return jax.tree.map(lambda x, y: jnp.where(pred, x, y), a(), b())

    def expected(self, ok, value, error):
        return jnp.where(ok, value, jnp.nan)

    def nearest(self, times, s):
        gaps = jnp.stack([jnp.abs(lax.stop_gradient(s) - t) for t in times])
        i = jnp.argmin(gaps)
        return i, gaps[i]

    def member(self, items, i):
        return items[0] if len(items) == 1 else jnp.stack(items)[i]

    def following(self, times, t):
        return jnp.minimum(jnp.searchsorted(times, t, side="right"), times.shape[0] - 1)

    def blank(self, times):
        return jnp.zeros_like(times)

    def add_at(self, values, i, x):
        return values.at[i].add(x)

    def unfold(self, step, state, running, limit, capacity, like_record, sink=None):
        state = arrays(state)
        if sink is not None:
            return self._unfold_into(sink, step, state, running, limit, capacity, arrays(like_record))

        def start():
            buffers = jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)), like_record)
            return jnp.int32(0), state, Log(Record(*buffers), jnp.zeros((capacity,), bool), jnp.int32(0), jnp.int32(0))

        def attempt(carry):
            i, s, log = carry
            on = running(s)
            new, record, keep = step(s, OpenLog(log, None))
            new = select(active(on), like(arrays(new), s), s)
            return i + 1, new, append(log, record, jnp.asarray(keep, bool) & on)

        def more(carry):
            i, s, log = carry
            return any_lane(running(s)) & (i < limit) & (log.count < capacity)

        _, state, log = self._while(more, attempt, start)
        return state, OpenLog(log, None)

    def _unfold_into(self, sink, step, state, running, limit, capacity, record):
        def attempt(carry):
            i, s, log = carry
            on = running(s) & ~log.short
            new, record, keep = step(s, log)
            new = select(on, like(arrays(new), s), s)
            return i + 1, new, sink.add(log, arrays(record), jnp.asarray(keep, bool) & on)

        def more(carry):
            i, s, log = carry
            return any_lane(running(s) & ~log.short & (log.count < capacity)) & (i < limit)

        _, state, log = self._while(more, attempt, lambda: (jnp.int32(0), state, sink.start(record)))
        return state, sink.result(log)

    def segments(self, room, stepper, saves, ts, u0, capacity):
        rows = Output(stepper.interpolate, "steps" if saves == "steps" else ts, u0, 1.0)
        return Sink(room.records, capacity, room.span, rows)

    def overfull(self, log):
        return log.short

    def retaking(self, kept, retake):
        return Retaken(kept, retake)

    def onward(self, body, state, log, like_record):
        opened, log = log, log.log
        state, example = arrays(state), arrays(like_record)

        def start():
            rows = jax.tree.map(lambda x: jnp.zeros((log.keep.shape[0], *x.shape), x.dtype), example)
            return jnp.int32(0), state, rows

        def ahead(carry):
            i, s, out = carry
            new, record = body(s, opened.record(i), OpenLog(log._replace(records=out), None))
            out = jax.tree.map(lambda b, x: lax.dynamic_update_index_in_dim(b, jnp.asarray(x, b.dtype), i, 0), out,
                               record)
            return i + 1, select(active(log.keep[i]), like(arrays(new), s), s), out

        _, state, buffers = self._while(lambda c: c[0] < log.count, ahead, start)
        return state, OpenLog(log._replace(records=buffers), None)

    def locate(self, log, t):
        if isinstance(log, Segments):
            return log.locate(t)
        return self._locate(log.log, jnp.reshape(t, (1,)), 1.0)[0]

    locate_end = locate

    def record(self, log, i):
        return log.record(i)

    def pending(self, log, extra=None):
        if isinstance(log, Retaken):
            return log.pending(extra)
        zeros = jax.tree.map(jnp.zeros_like, log.log.records)
        if extra is None:
            return zeros
        extra = scattered(extra, log.log.keep.shape[0]) if isinstance(extra, Rows) else extra
        return Record(extra.t, extra.h, extra.u, zeros.k if extra.k is None else extra.k)

    def deposit(self, pending, i, skip, contribution):
        del skip
        return jax.tree.map(lambda b, x: b.at[i].add(jnp.asarray(x, b.dtype)), pending, contribution())

    def collect(self, body, state, log, pending):
        if isinstance(log, Retaken):
            return log.collect(body, state, pending)
        state = arrays(state)

        def back(carry):
            i, s, ct = carry
            i = i - 1
            mine = Record(*(lax.dynamic_index_in_dim(b, i, 0, False) for b in ct))
            new = body(s, ct, log.record(i), mine, log)
            s, ct = select(active(log.log.keep[i]), like(arrays(new), (s, ct)), (s, ct))
            return i, s, ct

        return self._while(lambda c: c[0] > 0, back, lambda: (log.log.count, state, pending))[1]
