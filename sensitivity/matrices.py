"""Matrices that implicit steps and steady states solve with: arrays, entries of a pattern, or SciPy's sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .backend import Array, Scalar
from .sparsity import Pattern


class Entries(NamedTuple):
    """A matrix that is zero outside a pattern, by the values of its entries there."""

    pattern: Pattern
    values: Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.size, self.pattern.size

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def device(self) -> Any:
        return getattr(self.values, "device", None)


def is_sparse(A: Any) -> bool:
    """Whether `A` is a SciPy sparse matrix."""
    return hasattr(A, "tocsc")


def entries_of(be: Any, pattern: Pattern, A: Array) -> Entries:
    """The entries of an array in the places of a pattern."""
    flat = be.xp.reshape(A, (-1,))
    return Entries(pattern, be.xp.take(flat, be.asarray(pattern.rows * pattern.size + pattern.columns,
                                                       device=be.device(A))))


def dense(be: Any, A: Any) -> Array:
    """Any matrix as an array."""
    if isinstance(A, Entries):
        return be.xp.reshape(_taken(be, A, A.pattern.in_square), A.shape)
    return be.asarray(A.toarray()) if is_sparse(A) else A


def transpose(be: Any, A: Any) -> Any:
    """`A^T`, in the structure of A."""
    if isinstance(A, Entries):
        turned = be.asarray(A.pattern.turned, device=be.device(A.values))
        return Entries(A.pattern.T, be.xp.take(A.values, turned))
    return A.T


def shifted(be: Any, J: Any, c: Scalar, M: Array | None = None, sigma: Scalar | None = None) -> Any:
    """`M - c J`, or `sigma M - c J`, the identity for M = None, in the structure of J."""
    if isinstance(J, Entries):
        unit = (be.asarray(J.pattern.diagonal, dtype=J.dtype, device=be.device(J.values)) if M is None
                else entries_of(be, J.pattern, M).values)
        return Entries(J.pattern, (unit if sigma is None else _times(be, unit, sigma)) - _times(be, J.values, c))
    if is_sparse(J):
        from scipy.sparse import csc_array, eye_array

        unit = eye_array(J.shape[0], format="csc", dtype=J.dtype) if M is None else csc_array(be.host(M))
        return (unit if sigma is None else sigma * unit) - c * csc_array(J)
    if sigma is not None:
        M = _times(be, be.unit_rows(J.shape[0], J.shape[0], 0, J) if M is None else M, sigma)
    return be.shifted(J, c, M)


def factorize(be: Any, A: Any) -> Callable[..., Array]:
    """`solve(b, transposed=False)` as `Backend.factorize`, by the structure of A."""
    if is_sparse(A):
        return be.factorize_sparse(A)
    if not isinstance(A, Entries):
        return be.factorize(A)
    pattern = A.pattern
    structure = pattern.structure(be)
    if structure == "sparse":
        return be.factorize_sparse(pattern.matrix(be.host(A.values)), pattern.symmetric)
    if structure is None:
        return be.factorize(dense(be, A))
    lower, upper = pattern.lower, pattern.upper
    bands = be.xp.reshape(_taken(be, A, pattern.in_band), (lower + upper + 1, pattern.size))
    solve = be.factorize_banded(bands, lower, upper)
    if pattern.order is None:
        return solve
    order, place = (be.asarray(v, device=be.device(A.values)) for v in (pattern.order, pattern.place))

    def reordered(b: Array, transposed: bool = False) -> Array:
        x = solve(be.xp.take(b, order, axis=b.ndim - 1), transposed=transposed)
        return be.xp.take(x, place, axis=b.ndim - 1)

    reordered.nbytes = getattr(solve, "nbytes", 0)  # type: ignore[attr-defined]
    return reordered


def _times(be: Any, A: Array, factor: Scalar) -> Array:
    """An array times a scalar, in the array's dtype."""
    return A * (be.xp.astype(factor, A.dtype) if be.is_array(factor) else factor)


def _taken(be: Any, A: Entries, index: Any) -> Array:
    """Entries by number, zero for the number after the last."""
    padded = be.xp.concat([A.values, 0.0 * A.values[:1]])
    return be.xp.take(padded, be.asarray(index, device=be.device(A.values)))
