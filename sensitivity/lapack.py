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


def superlu(A: Any, symmetric: bool | None = None) -> Callable[..., Any]:
    """Of a SciPy sparse matrix, with an ordering that fits whether its pattern is `symmetric`."""
    import numpy as np
    from scipy.sparse import csc_array
    from scipy.sparse.linalg import splu

    A = csc_array(A, dtype=float)
    if symmetric is None:
        same = A.astype(bool)
        symmetric = (same != same.T).nnz == 0
    options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.01, "options": {"SymmetricMode": True}}
    try:
        factors = splu(A, **(options if symmetric else {}))
    except RuntimeError:  # exactly singular
        return lambda b, transposed=False: np.full(b.shape, np.nan)

    def solve(b: Any, transposed: bool = False) -> Any:
        x = factors.solve(np.ascontiguousarray(b.T, dtype=float), "T" if transposed else "N").T
        return x.astype(b.dtype, copy=False)

    solve.nbytes = 12 * (factors.nnz + A.shape[0])  # type: ignore[attr-defined]
    solve.costly = True  # type: ignore[attr-defined]
    return solve
