"""Jacobians of the systems that adjoints and tangents put together, for methods that solve by themselves.

A solver from elsewhere takes one matrix for the whole of its state, factorises it itself, and corrects the errors of
it by Newton's iteration. Every system here is block triangular, with `f_u` or `-f_u^T` on the diagonal and zero for
what is only integrated:

    costate and integral              -f_u^T | 0
    state and tangents                 f_u | f_u | ... | f_u,  below the first the derivatives of `f_u S + f_p` in u
    state, costate and integral        f_u | -f_u^T | 0,       likewise of `-f_u^T lam` and `-f_p^T lam`

What depends on the state nonlinearly comes from differences in the `n` entries of the state, not in those of the whole.
How an integral depends on the costate is left out: that is nilpotent, and costs the iteration a round, not a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..backend import Array
from ..integrate import Run
from ..jacobian import differences, given
from ..matrices import is_sparse
from ..sparsity import by_rows, pattern_of
from ..system import Inputs

SPARSE = 100  # unknowns beyond which SuperLU is faster than LAPACK on blocks of 20, measured


class FieldMatrix(NamedTuple):
    """`f_u` as a matrix, `at(t, u)`, and how many products with `f_u^T` one takes."""

    at: Callable[[Any, Array], Any]
    products: int


def field_matrix(run: Run, x: Inputs) -> FieldMatrix:
    """The user's Jacobian, or the products in the colours of the pattern, or row by row."""
    be, user, n = run.be, given(run, x), run.field.u.size
    if user is not None and user.near is not None:
        return FieldMatrix(user.near, 0)
    pattern = None if user is None else pattern_of(user.sparsity, n)
    if pattern is None:
        return FieldMatrix(run.vjp.jacobian(run, x), n)
    pull = run.vjp.pullback(run, x, params=False)

    def pulls(t: Any, u: Array, rows: Array) -> Array:
        return be.gathered(be.scan(lambda _, row: (0, pull(t, u, row[0])[0]), 0, (rows,))[1])

    entries = by_rows(be, pattern, pulls) if run.vjp.transposes else run.vjp.entries(run, x, pattern)
    colours = pattern.row_colours if run.vjp.transposes else pattern.column_colours
    return FieldMatrix(lambda t, u: pattern.matrix(be.host(entries(t, u))), int(colours.max()) + 1)


def first_columns(be: Any, rhs: Callable[[Any, Array], Array], n: int) -> Callable[[Any, Array], Array]:
    """Derivatives of a right-hand side in the first `n` entries, by `n + 1` evaluations: errors do not matter here."""
    return lambda t, z: differences(be, lambda t, u: rhs(t, be.xp.concat([u, z[n:]])))(t, z[:n])


def triangular(be: Any, first: Any, blocks: Sequence[Any], size: int, like: Array) -> Any:
    """The matrix of this size with these first columns, square blocks on the diagonal after them, and zeros behind."""
    if size > SPARSE or any(is_sparse(block) for block in (first, *blocks)):
        from scipy.sparse import block_diag, csc_array, hstack, vstack

        rows, n = first.shape
        done = n + sum(block.shape[0] for block in blocks)
        rest = block_diag((*blocks, csc_array((size - done, size - done))))
        return hstack([vstack([first, csc_array((size - rows, n))]), vstack([csc_array((n, size - n)), rest])], "csc")
    out = be.unit_rows(size, size, size, like)
    end = first.shape[1]
    out[:first.shape[0], :end] = first
    for block in blocks:
        start, end = end, end + block.shape[0]
        out[start:end, start:end] = block
    return out
