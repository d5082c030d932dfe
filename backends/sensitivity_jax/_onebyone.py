"""Output inside steps one time after the other, for loops that become one function.

Such a loop costs next to nothing for each round, and compiles faster than the kernels that gather steps, interpolate in
all of them and scatter what comes back.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ._checkpoints import Recall
from ._log import Rows
from ._marks import MarkLog
from ._native import native
from ._segments import Retaken
from ._typed import arrays


class OneByOne:
    """`sample` and `sample_vjp`; before `JaxLoops` in the order of bases."""

    def sample(self, interpolate, log, ts, u0, direction):
        def one(t):
            row = interpolate(_at(log, t, direction)[1], [t])[0]
            return jnp.where(log.log.count > 0, row, u0)

        return native(lambda: lax.map(one, jnp.asarray(ts)))

    def sample_vjp(self, transpose, log, ts, ct, direction):
        if isinstance(log, MarkLog | Recall | Retaken):
            return super().sample_vjp(transpose, log, ts, ct, direction)

        def one(x):
            t, row = x
            slot, record = _at(log, t, direction)
            out, (t_bar,) = transpose(record, [t], row[None, :])
            out = jax.tree.map(lambda x: jnp.where(log.log.count > 0, x, jnp.zeros_like(x)), arrays(out))
            return slot, out, jnp.asarray(t_bar, ts.dtype)

        slots, rows, ts_bar = native(lambda: lax.map(one, (ts, ct)))
        return self._placed(Rows(slots, rows), log), ts_bar


def _at(log, t, direction):
    """The slot and the record of the step that `t` lies in, the last that starts before it."""
    times = log.log.records.t

    def halve(ends):
        low, high = ends
        middle = lax.div(low + high, jnp.int32(2))
        before = direction * lax.dynamic_index_in_dim(times, middle, 0, False) < direction * t
        return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)

    start = jnp.int32(0), jnp.asarray(log.log.count, jnp.int32)
    slot = jnp.maximum(lax.while_loop(lambda ends: ends[0] < ends[1], halve, start)[0] - 1, 0)
    record = log.record(slot)
    return slot, record._replace(h=jnp.where(record.h == 0.0, 1.0, record.h).astype(record.h.dtype))
