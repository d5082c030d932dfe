"""Factors of matrices of NumPy numbers, by LAPACK and SuperLU through SciPy: `solve(b, transposed=False)` for one
vector, or a row for each; NaN where a matrix has no inverse. `solve.nbytes` says what the factors take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def lu(A: Any) -> Callable[..., Any]:
    """Of a dense matrix."""
    from scipy.linalg import lapack

    # LAPACK's matrices lie column by column: it gets the transpose, which is no copy.
    double = A.dtype == float
    factors, pivots, singular = (lapack.dgetrf if double else lapack.sgetrf)(A.T)
    getrs = lapack.dgetrs if double else lapack.sgetrs

    def solve(b: Any, transposed: bool = False) -> Any:
        return b * math.nan if singular else getrs(factors, pivots, b.T, trans=int(not transposed))[0].T

    solve.nbytes = factors.nbytes  # type: ignore[attr-defined]
    return solve


def band_lu(bands: Any, lower: int, upper: int) -> Callable[..., Any]:
    """Of a banded matrix, entry (i, j) in row `upper + i - j` of `bands`."""
    import numpy as np
    from scipy.linalg import lapack

    double = bands.dtype == float
    room = np.zeros((2 * lower + upper + 1, bands.shape[1]), dtype=bands.dtype, order="F")
    room[lower:] = bands
    factors, pivots, singular = (lapack.dgbtrf if double else lapack.sgbtrf)(room, lower, upper, overwrite_ab=1)
    gbtrs = lapack.dgbtrs if double else lapack.sgbtrs

    def solve(b: Any, transposed: bool = False) -> Any:
        return b * math.nan if singular else gbtrs(factors, lower, upper, b.T, pivots, trans=int(transposed))[0].T

    solve.nbytes = factors.nbytes  # type: ignore[attr-defined]
    return solve


def superlu(values: Any, pattern: Any) -> Callable[..., Any]:
    """Of a sparse matrix, by the entries of its pattern, whose order of elimination is found once for all of them.

    SuperLU's default supernodes and panels suit millions of entries; for a few thousand small ones are faster.
    """
    import numpy as np
    from scipy.sparse.linalg import splu

    plan = pattern.elimination
    options = {**plan.options, "permc_spec": "NATURAL", "relax": 2, "panel_size": 2}
    try:
        factors = splu(plan.matrix(np.asarray(values, dtype=float)), **options)
    except RuntimeError:  # exactly singular
        return lambda b, transposed=False: np.full(b.shape, np.nan)

    def solve(b: Any, transposed: bool = False) -> Any:
        right = np.ascontiguousarray(np.take(b, plan.order, axis=-1).T, dtype=float)
        x = np.take(factors.solve(right, "T" if transposed else "N"), plan.place, axis=0).T
        return x.astype(b.dtype, copy=False)

    solve.nbytes = 12 * (factors.nnz + pattern.size)  # type: ignore[attr-defined]
    solve.costly = True  # type: ignore[attr-defined]
    return solve
