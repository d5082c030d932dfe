"""Matrices that implicit steps and steady states solve with: arrays, entries of a pattern, or products alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .backend import Array, Scalar
from .krylov import gmres
from .sparsity import Pattern, entries_in


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


class Operator(NamedTuple):
    """A matrix known by its products with vectors; systems are solved to `rtol`, and `strict` ones are NaN if not.

    `precondition(c)` is a rough solver with `1 - c` times the matrix, `rough` one with the matrix itself.
    """

    apply: Callable[[Array], Array]
    transposed: Callable[[Array], Array]
    rtol: float
    strict: bool = False
    precondition: Callable | None = None
    rough: Callable | None = None


def is_sparse(A: Any) -> bool:
    """Whether `A` is a SciPy sparse matrix."""
    return hasattr(A, "tocsc")


def scattered(be: Any, A: Any, like: Array, mass: Any = None) -> Entries:
    """A SciPy matrix by its entries, with room for those of a `Mass`, in the dtype and on the device of `like`."""
    pattern, values = entries_in(A, mass)
    return Entries(pattern, be.asarray(values, dtype=like.dtype, device=be.device(like)))


def entries_of(be: Any, pattern: Pattern, A: Array) -> Entries:
    """The entries of an array in the places of a pattern."""
    flat = be.xp.reshape(A, (-1,))
    return Entries(pattern, be.xp.take(flat, be.asarray(pattern.rows * pattern.size + pattern.columns,
                                                       device=be.device(A))))


def dense(be: Any, A: Any) -> Array:
    """Any matrix as an array."""
    if isinstance(A, Entries):
        return be.xp.reshape(_taken(be, A, A.pattern.in_square), A.shape)
    return A


def transpose(be: Any, A: Any) -> Any:
    """`A^T`, in the structure of A."""
    if isinstance(A, Entries):
        turned = be.asarray(A.pattern.turned, device=be.device(A.values))
        return Entries(A.pattern.T, be.xp.take(A.values, turned))
    return A.T


def shifted(be: Any, J: Any, c: Scalar, M: Any = None, sigma: Scalar | None = None) -> Any:
    """`M - c J`, or `sigma M - c J`, in the structure of J; M are NumPy numbers, the identity for None."""
    if isinstance(J, Operator):
        assert sigma is None

        def weighed(v: Array, turned: bool) -> Array:
            if M is None:
                return v
            return be.asarray(M.T if turned else M, dtype=v.dtype, device=be.device(v)) @ v

        return J._replace(apply=lambda v: weighed(v, False) - _times(be, J.apply(v), c),
                          transposed=lambda v: weighed(v, True) - _times(be, J.transposed(v), c),
                          rough=None if J.precondition is None else J.precondition(c))
    if isinstance(J, Entries):
        unit = be.asarray(J.pattern.diagonal if M is None else M[J.pattern.rows, J.pattern.columns], dtype=J.dtype,
                          device=be.device(J.values))
        return Entries(J.pattern, (unit if sigma is None else _times(be, unit, sigma)) - _times(be, J.values, c))
    if M is not None:
        M = be.asarray(M, dtype=J.dtype, device=be.device(J))
    if sigma is not None:
        M = _times(be, be.unit_rows(J.shape[0], J.shape[0], 0, J) if M is None else M, sigma)
    return be.shifted(J, c, M)


def factorize(be: Any, A: Any, solver: Any = None) -> Callable[..., Array]:
    """`solve(b, transposed=False)` as `Backend.factorize`, by the structure of A, or by the user's `solver`."""
    if isinstance(A, Operator):
        return _krylov(be, A)
    if solver is not None:
        return _users(be, A, solver)
    if not isinstance(A, Entries):
        return be.factorize(A)
    pattern = A.pattern
    structure = pattern.structure(be)
    if structure == "sparse":
        return be.factorize_sparse(be.host(A.values), pattern)
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


def _krylov(be: Any, A: Operator) -> Callable[..., Array]:
    """By GMRES, on the right of a rough inverse if there is one."""
    def solver(turned: bool, apply: Callable, b: Array) -> Array:
        inverse = A.rough
        if inverse is None:
            return gmres(be, apply, b, A.rtol)

        def rough(v: Array) -> Array:
            return be.asarray(inverse(v, turned), dtype=b.dtype, device=be.device(b))

        return rough(gmres(be, lambda v: apply(rough(v)), b, A.rtol))

    def solve(b: Array, transposed: bool = False) -> Array:
        if b.ndim == 2:
            return be.xp.stack([solve(b[i, :], transposed) for i in range(b.shape[0])])
        first, second = (A.transposed, A.apply) if transposed else (A.apply, A.transposed)
        x = be.linear_solve(first, second, b, partial(solver, transposed), partial(solver, not transposed))
        return _unless(be, b - first(x), b, 100.0 * A.rtol, x) if A.strict else x

    return solve


def _users(be: Any, A: Any, solver: Any) -> Callable[..., Array]:
    """By the user's linear solver, whose answers are checked; it gets a SciPy matrix where the pattern is known and the
    backend has those, else an array."""
    if isinstance(A, Entries):
        A = A.pattern.matrix(be.host(A.values)) if be.sparse_lu else dense(be, A)
    inner, hosted = solver.factor(A), is_sparse(A)

    def solve(b: Array, transposed: bool = False) -> Array:
        if b.ndim == 2:
            return be.xp.stack([solve(b[i, :], transposed) for i in range(b.shape[0])])
        right, M = be.host(b) if hosted else b, A.T if transposed else A
        x = inner(right, transposed)
        left, x = (be.asarray(v, dtype=b.dtype, device=be.device(b)) for v in (M @ x, x))
        return _unless(be, b - left, b, be.eps(b.dtype) ** 0.4, x)

    return solve


def _unless(be: Any, residual: Array, b: Array, rtol: float, x: Array) -> Array:
    """`x`, NaN where the residual is too large."""
    return be.nan_where(be.choose(be.rms(residual) <= rtol * be.rms(b), 0, 1) > 0, x)


def _times(be: Any, A: Array, factor: Scalar) -> Array:
    """An array times a scalar, in the array's dtype."""
    return A * (be.xp.astype(factor, A.dtype) if be.is_array(factor) else factor)


def _taken(be: Any, A: Entries, index: Any) -> Array:
    """Entries by number, zero for the number after the last."""
    padded = be.xp.concat([A.values, 0.0 * A.values[:1]])
    return be.xp.take(padded, be.asarray(index, device=be.device(A.values)))
