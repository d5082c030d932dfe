"""Small matrix recursions: the twins of those in `sensitivity.loops.Loops`, as compiled loops or written out.

A compiled loop over the stages traces the vector field once, and compiles fast. Where the field is a few elementwise
operations, what happens between two evaluations costs as much. A solve alone then sums in a loop of its own rather than
call a matrix product, and a network at one state has products with vectors only, which one native function may hold.
Under `vmap` a product with a small matrix becomes transposed copies, so that stages are written out there; their
transposes are not, because XLA would compute what they share again for each.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr

from sensitivity.backend import Loops

from ._native import SUMS
from ._typed import arrays, like


class Matrices(Loops):
    def recursion(self, a, base, scale, xs, row, carry, first=None):
        s, n = len(a), base.shape[-1]
        start = 0 if first is None else 1
        if s - start <= 2:
            return super().recursion(a, base, scale, xs, row, carry, first)
        square = jnp.asarray(_square(a), base.dtype)
        xs = jax.tree.map(lambda x: x, tuple(x if isinstance(x, jax.Array) else jnp.asarray(x) for x in xs))
        rows = jnp.zeros((s, n), base.dtype)
        if first is not None:
            rows = lax.dynamic_update_index_in_dim(rows, first, 0, 0)

        def body(i, state):
            carry, rows = state
            v = base if base.ndim == 1 else base[i]
            v = v + jnp.asarray(scale, base.dtype) * self._weighted(square[i], rows)
            new, out = row(carry, tuple(x[i] for x in xs), v)
            return like(arrays(new), carry), lax.dynamic_update_index_in_dim(rows, out.astype(rows.dtype), i, 0)

        return lax.fori_loop(start, s, body, (arrays(carry), rows))

    def combine(self, base, scale, weights, rows):
        w = jnp.asarray(np.array(weights), rows.dtype)
        out = jnp.asarray(scale, rows.dtype) * self._weighted(w, rows)
        return out if base is None else base + out

    def inputs(self, a, base, scale, rows):
        if len(a) == 1 and not any(a[0]):
            return base[None, :]
        out = self._weighted(jnp.asarray(_square(a), rows.dtype), rows)
        return base + jnp.asarray(scale, rows.dtype) * out

    @staticmethod
    def _weighted(weights, rows):
        return jnp.dot(weights, rows, precision="highest")

    def seeds(self, b, h, lam, rows, last):
        out = jnp.asarray(h, lam.dtype) * jnp.outer(jnp.asarray(np.array(b), lam.dtype), lam)
        if rows is not None:
            out = out + rows
        return out if last is None else jnp.concat([out[:-1], out[-1:] + last])

    def put(self, rows, i, row):
        return lax.dynamic_update_index_in_dim(rows, row.astype(rows.dtype), i, 0)

    def permuted(self, xs, order):
        return _reordered(jnp.asarray(xs), order)

    def permuted_rows(self, rows, order):
        return _reordered(rows, order)

    def poly(self, coefficients, x, like):
        x = self.vector(x, like)[:, None]
        columns = jnp.asarray(np.array(coefficients).T, like.dtype)
        out = columns[-1][None, :] + 0.0 * x
        for c in columns[-2::-1]:
            out = out * x + c
        return out


def _square(a):
    square = np.zeros((len(a), len(a)))
    for i, row in enumerate(a):
        square[i, : len(row)] = row
    return square


def _reordered(rows, order):
    """Rows in another order; XLA reverses faster than it gathers."""
    if order == tuple(range(order[0], order[0] - len(order), -1)):
        return lax.rev(rows[order[-1]:order[0] + 1], (0,))
    return rows[np.array(order)]


LIGHT = 64  # operations
HEAVY = {"dot_general", "conv_general_dilated", "while", "scan", "cond", "sort", "gather", "scatter", "fft",
         "custom_jvp_call", "custom_vjp_call", "pure_callback", "io_callback", "custom_linear_solve"}


def light(jaxpr):
    """Whether this is a few elementwise operations."""
    return _operations(jaxpr) <= LIGHT


def _operations(jaxpr):
    count = 0
    for eqn in jaxpr.eqns:
        inner = [p for p in eqn.params.values() if isinstance(p, ClosedJaxpr)]
        if eqn.primitive.name in HEAVY or (inner and eqn.primitive.name != "jit"):
            return LIGHT + 1
        count += sum(_operations(p.jaxpr) for p in inner) if inner else 1
    return count


class Summed(Matrices):
    """Recursions without matrix products; sums that native functions cannot make are written out."""

    @staticmethod
    def _weighted(weights, rows):
        if weights.size * rows.shape[1] > SUMS:
            return sum(weights[..., j, None] * row for j, row in enumerate(rows))
        return jnp.sum(weights[..., None] * rows, axis=-2)


class Rowwise(Matrices):
    """Recursions whose products have a vector for a factor."""

    def inputs(self, a, base, scale, rows):
        return lax.map(lambda w: base + jnp.asarray(scale, rows.dtype) * self._weighted(w, rows),
                       jnp.asarray(_square(a), rows.dtype))


class WrittenOut(Matrices):
    """Recursions without loops, but for their transposes."""

    def recursion(self, a, base, scale, xs, row, carry, first=None):
        if base.ndim == 2:
            return super().recursion(a, base, scale, xs, row, carry, first)
        return Loops.recursion(self, a, base, jnp.asarray(scale, base.dtype), xs, row, carry, first)

    def combine(self, base, scale, weights, rows):
        return Loops.combine(self, base, jnp.asarray(scale, rows.dtype), weights, rows)

    def inputs(self, a, base, scale, rows):
        return jnp.stack(Loops.inputs(self, a, base, scale, rows))
