"""Narrow bands in array operations alone, all block rows at once: parallel cyclic reduction.

A band with at most m diagonals on either side is block tridiagonal, `A_i x_{i-1} + D_i x_i + C_i x_{i+1} = b_i`, with
blocks of m rows. One level subtracts the equations at distance s, times `F_i = A_i D_{i-s}^{-1}`, `G_i = C_i
D_{i+s}^{-1}`, from each, which then reaches to `2 s` (Hockney, Jesshope 1981, Parallel Computers, section 5.4.3):

    A_i <- -F_i A_{i-s},   D_i <- D_i - F_i C_{i-s} - G_i A_{i+s},   C_i <- -G_i C_{i+s},
    b_i <- b_i - F_i b_{i-s} - G_i b_{i+s}.

After `log2` of the number of blocks levels the blocks are alone. The transpose of a level is `b_i <- b_i -
F_{i+s}^T b_{i+s} - G_{i-s}^T b_{i-s}`. Rows are exchanged inside blocks only, which some matrices do not allow. So a
system whose answer is known is solved beside: until its residual is round-off, entry by entry, answers are refined
(Skeel 1980, Math. Comp. 35); where that does not help, the band is factorised column by column with partial pivoting
(Golub, Van Loan 2013, section 4.3.3).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._lanes import any_lane

SMALL = 8  # unknowns of full matrices
WIDEST, MOST = 3, 512  # diagonals on one side, and blocks, up to which all this is less work than inverses of blocks
SWEEPS = 4  # of refinement at most
ROUNDING = 32.0  # residuals in machine epsilons


def suited(n, lower, upper):
    """Whether a band of this size is small enough."""
    return max(lower, upper) <= WIDEST and n <= MOST * max(lower, upper, 1)


def factorize(bands, lower, upper):
    """`solve(b, transposed=False)` as `Backend.factorize_banded`, differentiable as the solution of a system."""
    n = bands.shape[1]
    bands = jnp.pad(bands, ((int(not upper), int(not lower)), (0, 0)))
    lower, upper = lower or 1, upper or 1
    system, bands = _blocks(bands, lower, upper), lax.stop_gradient(bands)
    still = lax.stop_gradient(system)
    reduced = _reduce(still)
    sweeps, fails = _probed(still, reduced)
    fails = any_lane(fails)
    pivoted = lax.cond(fails, lambda bands: _eliminate(bands, lower, upper),
                       lambda bands: _unused(bands, lower, upper), bands)

    def product(x, transposed):
        return _flat(_product(system, _rows(x, system.D), transposed), n)

    def answer(b, transposed):
        return lax.cond(fails, lambda b: _substitute(pivoted, b, transposed),
                        lambda b: _flat(_refined(reduced, still, _rows(b, still.D), sweeps, transposed), n), b)

    def solve(b, transposed=False):
        if b.ndim == 2:
            return jax.vmap(partial(solve, transposed=transposed))(b)
        return lax.custom_linear_solve(partial(product, transposed=transposed), b, lambda _, b: answer(b, transposed),
                                       lambda _, b: answer(b, not transposed))

    return solve


def pivoted(A):
    """`Backend.factorize` of a small matrix, as the band that it is: native functions cannot call LAPACK."""
    n = A.shape[0]
    reach = max(n - 1, 1)
    still = lax.stop_gradient(A)
    zero = jnp.zeros((), A.dtype)
    bands = jnp.stack([jnp.stack([still[d + j, j] if 0 <= d + j < n else zero for j in range(n)])
                       for d in range(-reach, reach + 1)])
    factors = _eliminate(bands, reach, reach)

    def solve(b, transposed=False):
        if b.ndim == 2:
            return jax.vmap(partial(solve, transposed=transposed))(b)
        M = A.T if transposed else A
        return lax.custom_linear_solve(lambda x: jnp.sum(M * x, axis=1), b,
                                       lambda _, b: _substitute(factors, b, transposed),
                                       lambda _, b: _substitute(factors, b, not transposed))

    return solve


# -- parallel cyclic reduction ----------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Blocks below, on and above the diagonal, `(m, m, count)`."""

    A: Any
    D: Any
    C: Any


class Reduced(NamedTuple):
    """Factors of all levels, `(levels, m, m, count)`, and the inverses of the blocks that remain."""

    F: Any
    G: Any
    inverse: Any


@partial(jax.jit, static_argnums=(1, 2))
def _blocks(bands, lower, upper):
    """The block rows of a band; those after the last row are the identity's."""
    m, n = max(lower, upper), bands.shape[1]
    count = -(-n // m)
    rows = np.arange(-upper, lower + 1)[:, None] + np.arange(n)
    bands = jnp.where((rows >= 0) & (rows < n), bands, np.zeros((), bands.dtype))
    rest = np.zeros((lower + upper + 1, count * m - n), bands.dtype)
    rest[upper] = 1.0
    columns = jnp.swapaxes(jnp.concatenate([bands, jnp.asarray(rest)], axis=1).reshape(-1, count, m), 1, 2)
    zero = jnp.zeros((count,), bands.dtype)

    def block(distance):
        """Entries `distance` blocks right of the diagonal, in the places of their columns."""
        places = [[upper + r - c - distance * m for c in range(m)] for r in range(m)]
        return jnp.stack([jnp.stack([columns[d, c] if 0 <= d <= lower + upper else zero for c, d in enumerate(row)])
                          for row in places])

    return Blocks(_shift(block(-1), 1)[0], block(0), _shift(block(1), 1)[1])


def _rows(b, like):
    """A vector as `(m, count)`."""
    m, _, count = like.shape
    return jnp.concatenate([b, jnp.zeros((m * count - b.shape[0],), b.dtype)]).reshape(count, m).T


def _flat(x, n):
    """`_rows` undone."""
    return x.T.reshape(-1)[:n]


def _shift(x, s):
    """`x_{i-s}` and `x_{i+s}` along the last axis, around the ends: what would be beyond them has factors of zero."""
    count, axis = x.shape[-1], x.ndim - 1
    twice = jnp.concatenate([x, x], axis=axis)
    return (lax.dynamic_slice_in_dim(twice, count - s, count, axis),
            lax.dynamic_slice_in_dim(twice, s, count, axis))


def _times(A, B):
    return sum(A[:, j, None] * B[None, j] for j in range(A.shape[1]))


def _apply(A, x, transposed=False):
    return sum((A[j] if transposed else A[:, j]) * x[j] for j in range(A.shape[1]))


def _inverse(D):
    """Inverses of many small matrices, with partial pivoting."""
    m = D.shape[0]
    if m == 1:
        return 1.0 / D
    unit = np.eye(m, dtype=D.dtype)[:, :, None] + np.zeros(D.shape[2], D.dtype)
    rows = list(jnp.concatenate([D, unit], axis=1))
    for j in range(m):
        for i in range(j + 1, m):
            larger = jnp.abs(rows[i][j]) > jnp.abs(rows[j][j])
            rows[j], rows[i] = jnp.where(larger, rows[i], rows[j]), jnp.where(larger, rows[j], rows[i])
        rows[j] = rows[j] * (1.0 / rows[j][j])
        rows = [row if i == j else row - row[j] * rows[j] for i, row in enumerate(rows)]
    return jnp.stack([row[m:] for row in rows])


def _distances(count):
    return np.array([2**k for k in range((count - 1).bit_length())], np.int32)


@jax.jit
def _reduce(system):
    def level(system, s):
        A, D, C = system
        inverse = _inverse(D)
        around = [_shift(x, s) for x in (inverse, *system)]
        (inverse_before, inverse_after), (A_before, A_after), _, (C_before, C_after) = around
        F, G = _times(A, inverse_before), _times(C, inverse_after)
        return Blocks(-_times(F, A_before), D - _times(F, C_before) - _times(G, A_after), -_times(G, C_after)), (F, G)

    last, (F, G) = lax.scan(level, system, jnp.asarray(_distances(system.D.shape[2])))
    return Reduced(F, G, _inverse(last.D))


def _direct(reduced, b, transposed):
    F, G, inverse = reduced
    distances = jnp.asarray(_distances(b.shape[1]))
    if not transposed:
        def level(b, x):
            s, F, G = x
            before, after = _shift(b, s)
            return b - _apply(F, before) - _apply(G, after), None

        return _apply(inverse, lax.scan(level, b, (distances, F, G))[0])

    def back(b, x):
        s, F, G = x
        before, after = _shift(jnp.stack([_apply(G, b, True), _apply(F, b, True)]), s)
        return b - before[0] - after[1], None

    return lax.scan(back, _apply(inverse, b, True), (distances, F, G), reverse=True)[0]


@partial(jax.jit, static_argnums=2)
def _product(system, x, transposed):
    A, D, C = system
    if not transposed:
        before, after = _shift(x, 1)
        return _apply(A, before) + _apply(D, x) + _apply(C, after)
    before, after = _shift(jnp.stack([_apply(C, x, True), _apply(A, x, True)]), 1)
    return _apply(D, x, True) + before[0] + after[1]


@partial(jax.jit, static_argnums=4)
def _refined(reduced, system, b, sweeps, transposed):
    def sweep(_, x):
        return x + _direct(reduced, b - _product(system, x, transposed), transposed)

    return lax.fori_loop(0, sweeps, sweep, _direct(reduced, b, transposed))


@jax.jit
def _probed(system, reduced):
    """How many refinements the answer to a known system needs, and whether they fail."""
    m, _, count = system.D.shape
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (m, count))
    b = _product(system, jnp.asarray(signs, system.D.dtype), False)
    sizes = Blocks(*map(jnp.abs, system))
    tolerance = ROUNDING * float(jnp.finfo(b.dtype).eps)

    def residual(x):
        r = b - _product(system, x, False)
        return r, jnp.all(jnp.abs(r) <= tolerance * (_product(sizes, jnp.abs(x), False) + jnp.abs(b)))

    def refine(state):
        k, x, r, _ = state
        x = x + _direct(reduced, r, False)
        return k + 1, x, *residual(x)

    x = _direct(reduced, b, False)
    k, _, _, good = lax.while_loop(lambda s: (s[0] < SWEEPS) & ~s[3], refine, (jnp.int32(0), x, *residual(x)))
    return k, ~good


# -- partial pivoting -------------------------------------------------------------------------------------------------


class Pivoted(NamedTuple):
    """For each column: the row exchanged, the multipliers of the rows below, and the row of U from the diagonal on."""

    place: Any
    factors: Any
    U: Any


def _unused(bands, lower, upper):
    n, dtype = bands.shape[1], bands.dtype
    return Pivoted(jnp.zeros((n,), jnp.int32), jnp.zeros((n, lower), dtype), jnp.zeros((n, lower + upper + 1), dtype))


@partial(jax.jit, static_argnums=(1, 2))
def _eliminate(bands, lower, upper):
    n, width = bands.shape[1], lower + upper + 1
    # Row i from column i - l on: one diagonal for each entry.
    wide = jnp.pad(bands, ((0, 0), (lower, lower + upper + 1)))
    rows = jnp.stack([wide[lower + upper - d, d:d + n + lower + 1] for d in range(width)], axis=1)
    rows = rows * (np.arange(n + lower + 1) < n)[:, None].astype(bands.dtype)
    start = jnp.stack([jnp.pad(rows[i, lower - i:], (0, lower - i)) for i in range(lower + 1)])

    def column(window, entering):
        size = jnp.abs(window[:, 0])
        place = jnp.min(jnp.where(size == jnp.max(size), np.arange(lower + 1, dtype=np.int32), np.int32(lower)))
        window = _exchange(window, place)
        factors = window[1:, 0] / window[0, 0]
        below = window[1:] - factors[:, None] * window[0]
        moved = jnp.concatenate([jnp.pad(below[:, 1:], ((0, 0), (0, 1))), entering[None]])
        return moved, Pivoted(place, factors, window[0])

    return lax.scan(column, start, rows[lower + 1:])[1]


def _exchange(rows, place):
    """The first row and another one in each other's place."""
    here = np.arange(rows.shape[0]).reshape(-1, *[1] * (rows.ndim - 1)) == place
    first, other = rows[0], jnp.sum(jnp.where(here, rows, jnp.zeros_like(rows)), axis=0)
    return jnp.concatenate([other[None], jnp.where(here, first, rows)[1:]])


@partial(jax.jit, static_argnums=2)
def _substitute(pivoted, b, transposed):
    n, lower = pivoted.factors.shape
    reach = pivoted.U.shape[1] - 1

    def forward(window, x):
        (place, factors, _), entering = x
        window = _exchange(window, place)
        return jnp.concatenate([window[1:] - factors * window[0], entering[None]]), window[0]

    def backward(known, x):
        (_, _, row), y = x
        x_j = (y - jnp.sum(row[1:] * known)) / row[0]
        return jnp.concatenate([x_j[None], known])[:reach], x_j

    def forward_turned(sums, x):
        (_, _, row), b_j = x
        z = (b_j - sums[0]) / row[0]
        return jnp.pad(sums[1:], (0, 1)) + jnp.pad(row[1:] * z, (0, 1)), z

    def backward_turned(window, x):
        (place, factors, _), z = x
        window = jnp.concatenate([(z - jnp.sum(factors * window))[None], window])
        window = _exchange(window, place)
        return window[:lower], window[lower]

    if not transposed:
        padded = jnp.pad(b, (0, lower + 1))
        _, y = lax.scan(forward, padded[:lower + 1], (pivoted, padded[lower + 1:]))
        return lax.scan(backward, jnp.zeros((reach,), b.dtype), (pivoted, y), reverse=True)[1]
    _, z = lax.scan(forward_turned, jnp.zeros((reach + 1,), b.dtype), (pivoted, b))
    first, x = lax.scan(backward_turned, jnp.zeros((lower,), b.dtype), (pivoted, z), reverse=True)
    return jnp.concatenate([first, x])[:n]
