"""Small matrix recursions as compiled loops: the twins of those in `sensitivity.loops.Loops`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sensitivity.backend import Loops

from ._typed import arrays, like


class Matrices(Loops):
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
