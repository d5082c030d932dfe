"""Linear systems in the array API; a backend overrides what its framework does better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .records import Array, Scalar


class LinearSystems:
    """Factorisations, and products with constant matrices."""

    xp: Any = None
    asarray: Any
    device: Any
    unit_rows: Any

    def factorize(self, A: Array) -> Callable[..., Array]:
        """`solve(b, transposed=False)` for `A x = b` or `A^T x = b`; `b` is one vector or a row for each.

        NaN where `A` is singular: nothing is raised, since nothing can be raised where values are traced.
        """

        def solve(b: Array, transposed: bool = False) -> Array:
            try:
                x = self.xp.linalg.solve(A.T if transposed else A, b if b.ndim == 1 else b.T)
            except Exception:  # the standard leaves open what a singular matrix raises
                return b * math.nan
            return x if b.ndim == 1 else x.T

        return solve

    def linear_solve(self, apply: Callable, transposed: Callable, b: Array, solver: Callable, back: Callable) -> Array:
        """`solver(apply, b)`; a backend whose AD runs through it says here that it solves a linear system, as
        `back(transposed, b)` does with the transpose."""
        del transposed, back
        return solver(apply, b)

    def weigh(self, mass: Any, z: Array, transposed: bool = False) -> Array:
        """`M z`, or `M^T z`, of a constant `Mass`, for one vector or a row for each."""
        M = self.asarray(mass.values, dtype=z.dtype, device=self.device(z))
        return z @ (M if transposed else M.T)

    def unweigh(self, mass: Any, z: Array, transposed: bool = False) -> Array:
        """`M^-1 z`, or `M^-T z`, likewise."""
        inverse = self.asarray(mass.inverse, dtype=z.dtype, device=self.device(z))
        return z @ (inverse if transposed else inverse.T)

    def factorize_banded(self, bands: Array, lower: int, upper: int) -> Callable[..., Array]:
        """`factorize` of a banded matrix: `bands` is `(lower + upper + 1, n)`, entry (i, j) in row `upper + i - j`."""
        from .banded import factorize

        return factorize(self, bands, lower, upper)

    def factorize_sparse(self, values: Any, pattern: Any) -> Callable[..., Array]:
        """`factorize` of the matrix with these entries of a pattern, as NumPy numbers; where `sparse_lu` holds."""
        raise NotImplementedError

    def shifted(self, J: Array, c: Scalar, M: Array | None = None) -> Array:
        """`M - c J`, the identity for M = None."""
        n = J.shape[0]
        return (self.unit_rows(n, n, 0, J) if M is None else M) - c * J
