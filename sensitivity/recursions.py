"""Sums over the rows of a tableau, for frameworks that run eagerly.

Stages, and their cotangents, are the rows of a matrix; the tableau's numbers weigh them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .records import Array, Scalar


class Recursions:
    """Triangular recursions and weighted sums; a tracing backend overrides them, with equal results."""

    xp: Any = None

    def vector(self, xs: Sequence[Scalar], like: Array) -> Array:
        """A vector of scalars with the dtype and device of `like`."""
        raise NotImplementedError

    def unrolled(self, a: Sequence, base: Array, scale: Scalar, xs: tuple[Sequence, ...], row: Callable,
                 carry: Any) -> tuple[Any, Array]:
        """`recursion` whose `carry` and `xs` may hold anything, functions too; a tracing backend writes it out."""
        return self.recursion(a, base, scale, xs, row, carry)

    def recursion(self, a: Sequence, base: Array, scale: Scalar, xs: tuple[Sequence, ...], row: Callable,
                  carry: Any, first: Array | None = None) -> tuple[Any, Array]:
        """Rows `X_i` of a triangular recursion: `carry, X_i = row(carry, x_i, base_i + scale sum_{j<i} a_ij X_j)`.

        `base` is one vector for all rows or one row each; with `first`, row 0 is given. Returns `(carry, X)`.
        """
        rows = [] if first is None else [first]
        for i in range(len(rows), len(a)):
            v = base if base.ndim == 1 else base[i, :]
            for a_ij, x in zip(a[i], rows, strict=True):
                if a_ij:
                    v = v + (scale * a_ij) * x
            carry, out = row(carry, tuple(x[i] for x in xs), v)
            rows.append(out)
        return carry, self.xp.stack(rows)

    def combine(self, base: Array | None, scale: Scalar, weights: Sequence, rows: Array) -> Array:
        """`base + scale * weights @ rows`."""
        out = base
        for i, w in enumerate(weights):
            if w:
                term = (scale * w) * rows[i, :]
                out = term if out is None else out + term
        return rows[0, :] * 0.0 if out is None else out

    def blended(self, base: Array, scale: Scalar, weights: Array, rows: Array) -> Array:
        """`base + scale * weights @ rows` for a matrix of weights: one vector for each of its rows."""
        return base[None, :] + self.vector([scale], base) * (weights @ rows)

    def blended_vjp(self, scale: Scalar, weights: Array, ct: Array) -> tuple[Array, Array]:
        """Pull `ct` back across `blended`: cotangents of `base` and of `rows`."""
        return self.xp.sum(ct, axis=0), self.vector([scale], ct) * (weights.T @ ct)

    def inputs(self, a: Sequence, base: Array, scale: Scalar, rows: Array) -> Sequence[Array]:
        """Vectors `base + scale sum_j a_ij rows_j`, one per row of the lower triangular `a`."""
        return [self.combine(base, scale, a_i, rows) if any(a_i) else base for a_i in a]

    def seeds(self, b: Sequence, h: Scalar, lam: Array, rows: Array | None, last: Array | None) -> Array:
        """Matrix with rows `h b_i lam + rows_i`, and `last` added to the last row."""
        out = [(h * b_i) * lam for b_i in b]
        if rows is not None:
            out = [x + rows[i, :] for i, x in enumerate(out)]
        if last is not None:
            out[-1] = out[-1] + last
        return self.xp.stack(out)

    def permuted(self, xs: Sequence, order: Sequence[int]) -> Sequence:
        return [xs[i] for i in order]

    def permuted_rows(self, rows: Array, order: Sequence[int]) -> Array:
        return self.xp.stack([rows[i, :] for i in order])

    def picked(self, rows: Array, order: Sequence[int]) -> Array:
        """Rows with these numbers, which ascend; a view where they follow each other."""
        first, end = order[0], order[-1] + 1
        if end - first == len(order):
            return rows[first:end, :]
        return self.xp.stack([rows[i, :] for i in order])

    def put(self, rows: Array, i: Any, row: Array) -> Array:
        """`rows` with row `i` replaced; may overwrite `rows`, which is not used afterwards."""
        rows[i, ...] = row
        return rows

    def poly(self, coefficients: Sequence, x: Sequence[Scalar], like: Array) -> Array:
        """Matrix with entries `p_j(x_i)`, `p_j(x) = sum_k coefficients[j][k] x^k`."""
        points = self.vector(x, like)[:, None]
        columns = [self.vector(c, like)[None, :] for c in zip(*coefficients, strict=True)]
        out = columns[-1]
        for c in columns[-2::-1]:
            out = out * points + c
        return out + 0.0 * points
