"""Sparse matrices of SciPy: factorised by SuperLU, with an ordering that fits the pattern."""

import numpy as np
from scipy.sparse import csc_array, eye_array, issparse
from scipy.sparse.linalg import splu

__all__ = ["assembled", "factorize", "issparse", "shifted"]


def assembled(rows, columns, values, n):
    return csc_array((values, (rows, columns)), shape=(n, n))


def shifted(J, c, M):
    """`M - c J`, the identity for M = None."""
    J = csc_array(J)
    return (eye_array(J.shape[0], format="csc", dtype=J.dtype) if M is None else csc_array(M)) - c * J


def factorize(A):
    """`solve(b, transposed=False)`; a matrix that has no inverse gives NaN."""
    n = A.shape[0]
    same = A.astype(bool)
    symmetric = (same != same.T).nnz == 0
    options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.01, "options": {"SymmetricMode": True}}
    try:
        lu = splu(A.astype(float), **(options if symmetric else {}))
    except RuntimeError:  # exactly singular
        return lambda b, transposed=False: np.full(b.shape, np.nan)

    def solve(b, transposed=False):
        x = lu.solve(np.ascontiguousarray(b.T, dtype=float), "T" if transposed else "N").T
        return x.astype(b.dtype, copy=False)

    solve.nbytes = 12 * (lu.nnz + n)
    return solve
