"""Least squares along a chain: each unknown is tied to the next, so the normal equations are block tridiagonal.

    D_i y_i + U_i y_{i+1} + U_{i-1}^T y_{i-1} = r_i

is solved by block elimination in O(N n^3) operations (Golub, Van Loan, 4.5.1); the matrix is symmetric and positive
definite, so no block has to be exchanged.
"""

from __future__ import annotations

from typing import Any

from sensitivity.backend import Array


def tridiagonal(be: Any, D: Array, U: Array, r: Array) -> Array:
    """Solutions `(N, m, n)`, one row per right-hand side `r` `(N, m, n)`; `D` and `U` are `(N, n, n)`, `U[-1]` unused.
    """
    xp, n = be.xp, D.shape[-1]

    def eliminate(before: tuple, x: tuple) -> tuple[tuple, Array]:
        coupling, G, w = before
        D_i, U_i, r_i = x
        rows = be.factorize(D_i - G @ coupling)(xp.concat([U_i.T, r_i - w @ coupling]))
        return (U_i, rows[:n, :], rows[n:, :]), rows

    zero = 0.0 * D[0, ...]
    _, rows = be.scan(eliminate, (zero, zero, 0.0 * r[0, ...]), (D, U, r))
    rows = xp.flip(be.gathered(rows), axis=0)

    def substitute(after: Array, x: tuple) -> tuple[Array, Array]:
        y = x[0][n:, :] - after @ x[0][:n, :]
        return y, y

    _, y = be.scan(substitute, 0.0 * r[0, ...], (rows,))
    return xp.flip(be.gathered(y), axis=0)


def shortest(be: Any, C: Array, d: Array, R: Array, b: Array) -> Array:
    """Coefficients `a` `(K, m, M)` of

        min sum_k a_k^T C_k a_k / 2 + d_k^T a_k   subject to   a_{k+1} = R_k a_k + b_k,

    for `C`, `R` `(K, M, M)` and `m` rows of data `d`, `b` `(K, m, M)`; the last `R` and `b` tie nothing. The
    multipliers y of the K - 1 conditions solve a block tridiagonal system; a_k = C_k^-1 (R_k^T y_k - y_{k-1} - d_k).
    """
    xp = be.xp
    unit = be.unit_rows(C.shape[-1], C.shape[-1], 0, C)
    inverse = be.gathered(be.scan(lambda _, x: (0, be.factorize(x[0])(unit)), 0, (C,))[1])
    inverse = (inverse + _turned(xp, inverse)) / 2.0
    R, b = R[:-1, ...], b[:-1, ...]
    left = R @ inverse[:-1, ...]
    D = inverse[1:, ...] + left @ _turned(xp, R)
    # U_k = -C_{k+1}^-1 R_{k+1}^T, the transpose of `left` one further on
    U = xp.concat([-_turned(xp, left[1:, ...]), 0.0 * D[:1, ...]])
    r = d[:-1, ...] @ _turned(xp, left) - d[1:, ...] @ inverse[1:, ...] - b
    y = tridiagonal(be, D, U, r)
    none = 0.0 * d[:1, ...]
    return (xp.concat([y @ R, none]) - xp.concat([none, y]) - d) @ inverse


def _turned(xp: Any, A: Array) -> Array:
    return xp.permute_dims(A, (0, 2, 1))
