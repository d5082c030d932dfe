"""LU factors of a banded matrix, block by block, with array operations alone.

A matrix with `l` diagonals below and `u` above the main one, cut into blocks of at least `max(l, u)` rows, is block
tridiagonal: blocks `D_i` on the diagonal, `U_i` in the last u rows and first u columns of the block above, `L_i` in the
first l rows and last l columns of the block below. Elimination (Golub, Van Loan 2013, section 4.5.1)

    S_1 = D_1,   S_i = D_i - L_i S_{i-1}^{-1} U_{i-1},
    y_i = b_i - L_i S_{i-1}^{-1} y_{i-1},   x_i = S_i^{-1} (y_i - U_i x_{i+1})

pivots inside the blocks only, which are therefore made larger than the band is wide. `A^T` has the blocks `S_i^T`,
`U^T` below and `L^T` above. The inverses of the `S_i` are kept: compiled loops multiply faster than they substitute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .backend import Array

BLOCK = 16


def factorize(be: Any, bands: Array, lower: int, upper: int) -> Callable[..., Array]:
    """`solve(b, transposed=False)` from diagonals `(l + u + 1, n)`, entry (i, j) in row `u + i - j`."""
    xp, n = be.xp, bands.shape[1]
    if not (lower and upper):
        zero = 0.0 * bands[:1, :]
        bands = xp.concat([zero] * (not upper) + [bands] + [zero] * (not lower), axis=0)
        lower, upper = lower or 1, upper or 1
    size = max(lower, upper, min(BLOCK, n))
    count = -(-n // size)
    diagonal, above, below = _blocks(be, bands, lower, upper, size, count)

    def eliminate(corner: Array, x: tuple) -> tuple[Array, Array]:
        D, U, L = x
        inverse = xp.linalg.inv(D - _corner(xp, L @ corner @ U, size))
        return inverse[size - lower:, size - upper:], inverse

    first = 0.0 * bands[:1, :1] + xp.zeros((lower, upper), dtype=bands.dtype, device=be.device(bands))
    # The block above block i is the one of block i - 1; the first has none.
    shifted_up = xp.concat([0.0 * above[:1, ...], above[:-1, ...]], axis=0)
    _, inverses = be.scan(eliminate, first, (diagonal, shifted_up, below))
    inverses = be.gathered(inverses)
    turned = xp.matrix_transpose(inverses)

    def solve(b: Array, transposed: bool = False) -> Array:
        rows = xp.reshape(b, (-1, n))
        if transposed:
            next_up = xp.concat([below[1:, ...], 0.0 * below[:1, ...]], axis=0)
            x = _solved(be, turned, xp.matrix_transpose(shifted_up), xp.matrix_transpose(next_up), rows, size)
        else:
            x = _solved(be, inverses, below, above, rows, size)
        return xp.reshape(x, b.shape)

    return solve


def _solved(be: Any, inverses: Array, below: Array, above: Array, b: Array, size: int) -> Array:
    """Forward elimination and back substitution for `(m, n)` right-hand sides."""
    xp, (m, n), count = be.xp, b.shape, inverses.shape[0]
    lower, upper = below.shape[1], above.shape[1]
    b = xp.concat([b, xp.zeros((m, count * size - n), dtype=b.dtype, device=be.device(b))], axis=1)
    blocks = xp.permute_dims(xp.reshape(b, (m, count, size)), (1, 0, 2))
    turned = xp.matrix_transpose(inverses)

    def forward(tail: Array, x: tuple) -> tuple[Array, Array]:
        b_i, L, inverse = x
        y = xp.concat([b_i[:, :lower] - tail @ L.T, b_i[:, lower:]], axis=1)
        return y @ inverse, y

    _, y = be.scan(forward, 0.0 * blocks[0, :, :lower], (blocks, below, turned[:, :, size - lower:]))
    y = be.gathered(y)
    own, handed = y @ turned, xp.matrix_transpose(above) @ turned[:, size - upper:, :]

    def backward(head: Array, x: tuple) -> tuple[Array, Array]:
        x_i = x[0] - head @ x[1]
        return x_i[:, :upper], x_i

    _, x = be.scan(backward, 0.0 * blocks[0, :, :upper], (xp.flip(own, axis=0), xp.flip(handed, axis=0)))
    x = xp.flip(be.gathered(x), axis=0)
    return xp.reshape(xp.permute_dims(x, (1, 0, 2)), (m, count * size))[:, :n]


def _corner(xp: Any, C: Array, size: int) -> Array:
    """A block with `C` in its first rows and columns."""
    rows, columns = C.shape
    wide = xp.concat([C, xp.zeros((rows, size - columns), dtype=C.dtype, device=getattr(C, "device", None))], axis=1)
    return xp.concat([wide, xp.zeros((size - rows, size), dtype=C.dtype, device=getattr(C, "device", None))], axis=0)


def _blocks(be: Any, bands: Array, lower: int, upper: int, size: int, count: int) -> tuple[Array, Array, Array]:
    """`D` (k, size, size), `U` (k, u, u) above the next and `L` (k, l, l) below the last block; rows after the n-th are
    those of the identity."""
    xp, n = be.xp, bands.shape[1]
    from .registry import registry

    np = registry().backend("numpy").xp
    flat = xp.concat([xp.reshape(bands, (-1,)), be.vector([0.0, 1.0], bands)])
    zero, one = bands.shape[0] * n, bands.shape[0] * n + 1
    starts = np.arange(count)[:, None, None] * size

    def at(i: Any, j: Any) -> Array:
        row = upper + i - j
        inside = (row >= 0) & (row <= lower + upper) & (i >= 0) & (j >= 0) & (i < n) & (j < n)
        index = np.where(inside, row * n + j, np.where((i == j) & (i >= n), one, zero))
        found = xp.take(flat, be.asarray(np.reshape(index, (-1,)), device=be.device(bands)))
        return xp.reshape(found, index.shape)

    def square(top: Any, left: Any, m: int) -> Array:
        return at(top + np.arange(m)[None, :, None], left + np.arange(m)[None, None, :])

    return (square(starts, starts, size), square(starts + size - upper, starts + size, upper),
            square(starts, starts - lower, lower))
