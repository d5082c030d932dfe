"""GMRES with restarts: linear systems by products alone.

Saad and Schultz 1986 (SIAM J. Sci. Stat. Comput. 7, 856), algorithm 4: the residual is least over the Krylov space of
the residual at the last restart. The basis is orthogonalised twice (classical Gram-Schmidt; twice is enough: Giraud,
Langou, Rozloznik and van den Eshof 2005), and one Givens rotation per product keeps the Hessenberg matrix triangular,
so that the norm of the residual is known at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .backend import Array, Scalar

RESTART = 40
CYCLES = 50


class Basis(NamedTuple):
    """One cycle: basis rows `V` (m+1, n), rotated Hessenberg columns as rows of `R` (m, m+1), all rotations `Q`
    (m+1, m+1), rotated right-hand side `g` (m+1), the number of columns `j`, and the norm of the residual."""

    V: Array
    R: Array
    Q: Array
    g: Array
    j: Any
    size: Scalar


class Cycle(NamedTuple):
    """Between restarts: solution, residual, its norm, and whether the last cycle gained less than a thousandth."""

    x: Array
    r: Array
    size: Scalar
    stalled: Any


def gmres(be: Any, apply: Callable[[Array], Array], b: Array, rtol: float) -> Array:
    """`x` with `|b - A x| <= rtol |b|`, or the best after `CYCLES` restarts: the caller checks the residual."""
    xp = be.xp
    n = b.shape[0]
    m = min(RESTART, n)
    root = math.sqrt(n)
    goal = rtol * root * be.rms(b)
    columns = be.vector([float(i) for i in range(m + 1)], b)

    def unit(j: Any) -> Array:
        return xp.astype(columns == j, b.dtype)

    def extend(s: Basis) -> tuple[Basis, None, Any]:
        e, e_next = unit(s.j), unit(s.j + 1)
        w = apply(e @ s.V)
        h = s.V @ w
        w = w - h @ s.V
        again = s.V @ w
        w, h = w - again @ s.V, h + again
        length = root * be.rms(w)
        # A direction of round-off alone says that the space is invariant: the system is solved in it.
        known = length > 1e2 * be.eps(b.dtype) * be.greatest(_norm(be, h), be.eps(b.dtype) * goal)
        length = be.choose(known, length, 0.0)
        V = s.V + xp.linalg.outer(e_next, _times(be, w, be.choose(known, 1.0 / be.choose(known, length, 1.0), 0.0)))
        column = s.Q @ (h + _times(be, e_next, length))
        above, below = be.dot(column, e), be.dot(column, e_next)
        radius = (above * above + below * below) ** 0.5
        safe = be.choose(radius > 0.0, radius, 1.0)
        c, d = be.choose(radius > 0.0, above / safe, 1.0), below / safe
        rows = e @ s.Q, e_next @ s.Q
        Q = (s.Q + xp.linalg.outer(e, _times(be, rows[0], c - 1.0) + _times(be, rows[1], d))
             + xp.linalg.outer(e_next, _times(be, rows[1], c - 1.0) - _times(be, rows[0], d)))
        column = column + _times(be, e, radius - above) - _times(be, e_next, below)
        g_j = be.dot(s.g, e)
        g = s.g + _times(be, e, (c - 1.0) * g_j) - _times(be, e_next, d * g_j)
        R = s.R + xp.linalg.outer(e[:m], column)
        size = be.choose(radius > 0.0, abs(d * g_j), s.size)
        return Basis(V, R, Q, g, be.choose(known & (radius > 0.0), s.j + 1, m + s.j + 1), size), None, False

    def cycle(s: Cycle) -> tuple[Cycle, None, Any]:
        first = unit(0)
        start = Basis(xp.linalg.outer(first, _times(be, s.r, 1.0 / s.size)), 0.0 * xp.linalg.outer(first[:m], first),
                      be.unit_rows(m + 1, m + 1, 0, b), _times(be, first, s.size), 0, s.size)
        end, _ = be.iterate(extend, start, lambda s: (s.j < m) & (s.size > goal), m)
        # Columns that were not made become unit columns with a zero on the right: their coefficients are zero.
        diagonal = xp.sum(xp.abs(end.R), axis=1)
        made = xp.astype(diagonal > 0.0, b.dtype)
        R = end.R[:, :m].T + (1.0 - made)[:, None] * be.unit_rows(m, m, 0, b)
        y = be.factorize(R)(end.g[:m] * made)
        x = s.x + y @ end.V[:m, :]
        r = b - apply(x)
        size = root * be.rms(r)
        return Cycle(x, r, size, size > 0.999 * s.size), None, False

    start = Cycle(0.0 * b, b, root * be.rms(b), False)
    end, _ = be.iterate(cycle, start, lambda s: (s.size > goal) & (s.stalled == False), CYCLES)  # noqa: E712
    return end.x


def _times(be: Any, x: Array, factor: Scalar) -> Array:
    """A vector times a scalar, in the vector's dtype."""
    return x * be.vector([factor], x)


def _norm(be: Any, x: Array) -> Scalar:
    """Euclidean norm as a scalar."""
    return math.sqrt(x.shape[0]) * be.rms(x)
