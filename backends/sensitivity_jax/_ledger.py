"""Events of a solve in buffers of fixed size, and the loops over them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._checkpoints import Recall
from ._typed import arrays, like


class Ledger(NamedTuple):
    """`count` entries are in use."""

    entries: Any
    count: Any


class LedgerLoops:
    """The part of the loops that events need."""

    def when(self, pred, then, otherwise):
        otherwise = arrays(otherwise)
        return lax.cond(jnp.asarray(pred, bool), lambda: like(arrays(then()), otherwise), lambda: otherwise)

    def branch(self, i, functions, *operands):
        shapes = [jax.eval_shape(lambda *x, f=f: arrays(f(*x)), *operands) for f in functions]
        kinds = jax.tree.map(lambda *x: jnp.result_type(*x), *shapes)

        def typed(f):
            return lambda *x: jax.tree.map(lambda v, kind: v.astype(kind), arrays(f(*x)), kinds)

        return lax.switch(i, [typed(f) for f in functions], *operands)

    def ledger(self, example, capacity):
        buffers = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), arrays(example))
        return Ledger(buffers, jnp.int32(0))

    def enter(self, ledger, entry):
        put = lambda b, x: lax.dynamic_update_index_in_dim(b, jnp.asarray(x, b.dtype), ledger.count, 0)  # noqa: E731
        return Ledger(jax.tree.map(put, ledger.entries, entry), ledger.count + 1)

    def entries(self, ledger, like, fill=jnp.nan):
        t, u, index = ledger.entries
        used = jnp.arange(t.shape[0]) < ledger.count
        return jnp.where(used, t, fill), jnp.where(used[:, None], u, fill), jnp.where(used, index, -1)

    def columns(self, ledger, example):
        return ledger.entries

    def entry(self, ledger, i):
        return jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, i, 0, False), ledger.entries)

    def moment(self, ledger, i):
        return jnp.where(i < ledger.count, self.entry(ledger, i).t, jnp.inf)

    def happened(self, ledger, t):
        here = (ledger.entries.t == t) & (jnp.arange(ledger.entries.t.shape[0]) < ledger.count)
        return jnp.where(jnp.any(here), jnp.argmax(here), -1).astype(jnp.int32)

    def within(self, times, index, t0):
        return jnp.where(index >= 0, times, t0)

    def capped(self, ts, end, direction):
        ts = jnp.asarray(ts)
        return jnp.where(direction * (ts - end) > 0.0, end, ts)

    def whole(self, x):
        return jnp.round(jnp.real(x)).astype(jnp.int32)

    def near(self, ts, t, distance):
        return jnp.any(jnp.abs(jnp.asarray(ts) - t) <= distance)

    def indices(self, values):
        return values

    def unwind(self, body, state, ledger, extra):
        state = arrays(state)

        def back(carry):
            i, s = carry
            i = i - 1
            entry, bars = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, i, 0, False), (ledger.entries, extra))
            return i, like(arrays(body(s, entry, bars, i == ledger.count - 1)), s)

        return lax.while_loop(lambda c: c[0] > 0, back, (ledger.count, state))[1]

    def newest(self, log, extra):
        return log.start(extra) if isinstance(log, Recall) else log.log.count

    def rewind(self, body, state, log, extra, position, more):
        if isinstance(log, Recall):
            return log.rewind(body, state, extra, position, more)
        opened, (log, _) = log, log
        state = arrays(state)

        def on(carry):
            i, s = carry
            return (i > 0) & more(s, log.records.t[jnp.maximum(i - 1, 0)])

        def back(carry):
            i, s = carry
            return i - 1, self._past(body, s, opened, extra, i - 1)

        position, state = lax.while_loop(on, back, (jnp.asarray(position, jnp.int32), state))
        return state, position
