"""Checks of arrays and scalars: who owns what, and what comes back."""

from __future__ import annotations

import itertools
import math

from ..registry import registry
from .harness import Harness, require


def check_ownership(h: Harness) -> None:
    """The backend recognises its own arrays and only those, and the registry finds it from their type."""
    be = h.be
    for x in (h.array([1.0, 2.0]), h.array(1.5), h.array([[1.0, 2.0, 3.0]])):
        require(be.is_array(x), f"{x!r} is not recognised as an array")
        require(registry().kind_of(x) == h.name, f"the registry gives {type(x)} to {registry().kind_of(x)!r}")
    for x in (1.0, 2, "text", None, [1.0, 2.0]):
        require(not be.is_array(x), f"{x!r} passes for an array")


def check_dtypes(h: Harness) -> None:
    """`is_float`, `is_complex`, `eps`, `real_dtype`, and dtypes that survive `asarray`, `zeros`, `vector`, `copy`."""
    be, xp = h.be, h.be.xp
    single, double = h.array([1.0, 2.0], xp.float32), h.array([1.0, 2.0])
    whole = be.asarray([1, 2], dtype=xp.int64)
    require(single.dtype == xp.float32, "asarray loses float32")
    require(be.is_float(single) and be.is_float(double) and not be.is_float(whole), "is_float is wrong")
    require(not be.is_complex(single), "is_complex is wrong for float32")
    require(1e-8 < be.eps(single.dtype) < 1e-6 and be.eps(double.dtype) < 1e-15, "eps is wrong")
    require(be.real_dtype(double.dtype) == xp.float64, "real_dtype is wrong")
    for x in (*be.zeros((single,)), be.vector([1.0, 2.0], single), be.copy(single), be.unit_rows(2, 2, 0, single)):
        require(x.dtype == xp.float32, f"{x!r} is not float32")
    if be.complex:
        z = be.asarray([1.0 + 2.0j], dtype=xp.complex128)
        require(be.is_float(z) and be.is_complex(z) and be.real_dtype(z.dtype) == xp.float64, "complex is wrong")


def check_copy(h: Harness) -> None:
    """A copy keeps its numbers when the original is overwritten, where arrays can be overwritten at all."""
    x = h.array([1.0, 2.0])
    y = h.be.copy(x)
    try:
        x[0] = 5.0
    except TypeError:  # arrays that cannot change need no copies
        pass
    h.close(y, [1.0, 2.0], 0.0, "copy")


def check_scalars(h: Harness) -> None:
    """Times go in and out unchanged; choices between scalars are right."""
    be = h.be
    t = be.scalar(h.array(0.1))
    require(be.concrete(t) == 0.1, "scalar changes a value")
    require(be.concrete_times(be.scalars(h.array([0.3, 0.1]))) == [0.3, 0.1], "scalars changes values or their order")
    require(be.concrete(be.least(t, 0.5)) == 0.1, "least")
    require(be.concrete(be.greatest(t, 0.5)) == 0.5, "greatest")
    require(bool(be.isfinite(t)) and not be.isfinite(t * math.nan) and not be.isfinite(t * math.inf), "isfinite")
    h.close(be.spread(be.scalar(h.array(1.0)), be.scalar(h.array(-2.0)), [0.0, 0.25, 1.0]), [1.0, 0.25, -2.0], 0.0,
            "spread")
    h.close(be.total(be.scalars(h.array([1.0, 2.0, 4.0]))), 7.0, 0.0, "total")
    h.close(be.total(be.scalars(h.array([1.0, 2.0, 4.0])), [3.0, 5.0, 0.5]), 15.0, 0.0, "weighted total")
    h.close(list(be.times(t, 0.5, (0.0, 0.25, 1.0))), [0.1, 0.225, 0.6], 1e-16, "times")
    h.close(be.time_vector(be.scalars(h.array([2.0, 1.0])), h.array([0.0])), [2.0, 1.0], 0.0, "time_vector")


def check_choose(h: Harness) -> None:
    """`choose` takes the first where the condition holds, for scalars, arrays and tuples of both."""
    be = h.be
    t = be.scalar(h.array(1.0))
    a, b = (h.array([1.0, 2.0]), t), (h.array([3.0, 5.0]), 7.0 * t)
    h.close(be.choose(t < 2.0, a, b), [1.0, 2.0, 1.0], 0.0, "choose with a true condition")
    h.close(be.choose(t > 2.0, a, b), [3.0, 5.0, 7.0], 0.0, "choose with a false condition")
    h.close(be.choose(t > 2.0, 1.0, 0.25), 0.25, 0.0, "choose between numbers")


def check_vectors(h: Harness) -> None:
    """`dot`, `rms`, `scaled`, `unit_rows`, `padded`, `split`, `add`, `nan_where` against plain formulas."""
    be = h.be
    a, b = h.array([1.0, -2.0, 4.0]), h.array([3.0, 0.5, 7.0])
    h.close(be.dot(a, b), 30.0, 1e-15, "dot")
    h.close(be.rms(a), math.sqrt(7.0), 1e-15, "rms")
    h.close(be.rms(a[:0]), 0.0, 0.0, "rms of nothing")
    h.close(be.scaled(a, b, -2.0 * b, 0.5, 0.25), [1 / 3.25, -2 / 0.75, 4 / 7.25], 1e-15, "scaled")
    h.close(be.scaled(a, b, b, 0.5, h.array([1.0, 2.0, 0.5])), [0.4, -2 / 2.25, 1.0], 1e-15, "scaled, atol a vector")
    h.close(be.unit_rows(4, 2, 1, a), [0, 0, 1, 0, 0, 1, 0, 0], 0.0, "unit_rows")
    h.close(be.unit_rows(1, 3, -2, a), [0, 0, 1], 0.0, "unit_rows with a negative start")
    h.close(be.unit_rows(2, 3, 2, a), [0] * 6, 0.0, "unit_rows beyond the end")
    h.close(be.padded(a, 5), [1.0, -2.0, 4.0, 0.0, 0.0], 0.0, "padded")
    h.close(be.padded(a, 3), [1.0, -2.0, 4.0], 0.0, "padded to its own size")
    like = (h.array([[0.0, 0.0]]), h.array(0.0))
    parts = be.split(b, like)
    require([tuple(v.shape) for v in parts] == [(1, 2), ()], "split gives other shapes")
    h.close(parts, [3.0, 0.5, 7.0], 0.0, "split")
    h.close(be.add((1.0 * a, h.array(2.0)), (b, h.array(0.5))), [4.0, -1.5, 11.0, 2.5], 0.0, "add")
    t = be.scalar(h.array(1.0))
    h.close(be.nan_where(t > 2.0, a), [1.0, -2.0, 4.0], 0.0, "nan_where leaves good values")
    require(all(math.isnan(v) for v in h.numbers(be.nan_where(t < 2.0, a))), "nan_where leaves bad values")


def check_banded_equations(h: Harness) -> None:
    """`factorize_banded` solves `A x = b` and `A^T x = b`, with diagonals as LAPACK stores them."""
    n, lower, upper = 40, 1, 2
    bands = [[4.0 * (k == upper) + math.cos(1.0 + 3 * k + 7 * j) for j in range(n)] for k in range(lower + upper + 1)]
    solve = h.be.factorize_banded(h.array(bands), lower, upper)
    x = [math.sin(1.0 + i) for i in range(n)]
    for transposed in (False, True):
        b = [0.0] * n
        for k, j in itertools.product(range(lower + upper + 1), range(n)):
            i = k - upper + j
            if 0 <= i < n:
                row, column = (j, i) if transposed else (i, j)
                b[row] += bands[k][j] * x[column]
        h.close(solve(h.array(b), transposed), x, 1e-13, f"a banded equation, transposed={transposed}")


def check_linear_equations(h: Harness) -> None:
    """`factorize` solves `A x = b` and `A^T x = b`, for one right-hand side and for one in each row."""
    be = h.be
    A = [[0.0, 2.0, 1.0], [1.0, -1.0, 0.5], [4.0, 0.25, -3.0]]
    x, y = [1.0, -2.0, 0.5], [0.25, 3.0, -1.0]
    solve = be.factorize(h.array(A))
    for transposed, M in ((False, A), (True, [list(column) for column in zip(*A, strict=True)])):
        right = [[sum(a * b for a, b in zip(row, v, strict=True)) for row in M] for v in (x, y)]
        h.close(solve(h.array(right[0]), transposed), x, 1e-14, f"one equation, transposed={transposed}")
        h.close(solve(h.array(right), transposed), [*x, *y], 1e-14, f"two equations, transposed={transposed}")
    J, c = h.array(A), be.scalar(h.array(0.5))
    h.close(be.shifted(J, c), [(i == j) - 0.5 * A[i][j] for i in range(3) for j in range(3)], 1e-15, "shifted")
    M = h.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    want = [-0.5 * A[i][j] + (i == j == 0) + 2.0 * ((i, j) == (2, 1)) for i in range(3) for j in range(3)]
    h.close(be.shifted(J, c, M), want, 1e-15, "shifted, with a matrix")
    h.close(be.put(h.array([[1.0, 2.0], [3.0, 5.0]]), 1, h.array([7.0, 11.0])), [1.0, 2.0, 7.0, 11.0], 0.0, "put")
    got = be.directional(lambda e: (h.array(x) * (2.0 + e), (1.0 + e) ** 2 * h.array(y)), be.scalar(h.array(1.0)))
    h.close(got[0], x, 1e-9, "directional, linear")
    h.close(got[1], [2.0 * v for v in y], 1e-9, "directional, quadratic")


def check_trees(h: Harness) -> None:
    """Pytrees come apart and together again, with every leaf in its place."""
    be = h.be
    tree = {"b": (h.array([1.0, 2.0]), [h.array(3.0)]), "a": h.array([[4.0]]), "n": None}
    leaves, structure = be.flatten(tree)
    require(len(leaves) == 3, f"{len(leaves)} leaves of 3")
    again = be.unflatten(structure, leaves)
    h.close(again["b"][0], [1.0, 2.0], 0.0, "b[0]")
    h.close(again["b"][1][0], 3.0, 0.0, "b[1][0]")
    h.close(again["a"], 4.0, 0.0, "a")
    require(again["n"] is None, "None is lost")
