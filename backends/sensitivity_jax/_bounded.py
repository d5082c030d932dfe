"""Loops of a known length, which JAX differentiates itself."""

import jax
import jax.numpy as jnp
from jax import lax

from ._lanes import any_lane, select
from ._log import Log
from ._loops import JaxLoops
from ._typed import arrays, like, once


class BoundedLoops(JaxLoops):
    """Loops of a known length, which JAX can differentiate backwards; blocks of steps are skipped once done."""

    block = 64

    def iterate(self, step, state, running, limit, sink=None):
        assert sink is not None
        limit = min(limit, sink.capacity)
        state = arrays(state)
        traced = once(step, state)
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
