"""Where a Jacobian is zero, and which of its columns can share one product.

Columns that have no row in common get one colour; one direction per colour gives the whole matrix (Curtis, Powell and
Reid 1974, J. Inst. Maths Applics 13, 117; the greedy colouring is that of Coleman and More 1983).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .errors import InputError


@dataclass(frozen=True, eq=False)
class Pattern:
    """The entries of an `(n, n)` matrix that may differ from zero, as a SciPy array; `given` says that the user's `jac`
    returns such matrices itself."""

    matrix: Any
    given: bool = False

    @classmethod
    def of(cls, given: Any, n: int) -> Pattern:
        """From a SciPy sparse matrix or anything that NumPy makes a matrix of.

        Raises
        ------
        InputError
            It is no `(n, n)` matrix.
        """
        from scipy.sparse import csc_array, issparse

        matrix = csc_array(given if issparse(given) else _array(given))
        if matrix.shape != (n, n):
            raise InputError(f"jac_sparsity has shape {tuple(matrix.shape)}, the state has {n} entries",
                             "row i, column j says whether f_i depends on u_j", f"an array of shape {(n, n)}")
        matrix = csc_array(matrix, dtype=bool)
        matrix.eliminate_zeros()
        return cls(matrix)

    @cached_property
    def colour(self) -> Any:
        """The colour of every column."""
        import numpy as np

        columns, rows = self.matrix, self.matrix.tocsr()
        colour = np.full(columns.shape[0], -1)
        for j in range(columns.shape[0]):
            taken = set()
            for i in columns.indices[columns.indptr[j]:columns.indptr[j + 1]]:
                taken.update(colour[rows.indices[rows.indptr[i]:rows.indptr[i + 1]]].tolist())
            c = 0
            while c in taken:
                c += 1
            colour[j] = c
        return colour

    @property
    def colours(self) -> int:
        return int(self.colour.max()) + 1

    @cached_property
    def seeds(self) -> Any:
        """One direction per colour: `(colours, n)`."""
        import numpy as np

        return (self.colour[None, :] == np.arange(self.colours)[:, None]).astype(float)

    def expand(self, products: Any) -> Any:
        """The matrix from its products with `seeds`, `(colours, n)`."""
        from scipy.sparse import coo_array

        rows, columns = self.matrix.nonzero()
        return coo_array((products[self.colour[columns], rows], (rows, columns)), shape=self.matrix.shape)


def _array(given: Any) -> Any:
    """A dense pattern as a NumPy matrix."""
    import numpy as np

    try:
        matrix = np.asarray(given)
    except (TypeError, ValueError) as e:
        raise InputError(f"jac_sparsity is a {type(given).__name__}, which is no matrix", "it says where f_u is zero",
                         "a SciPy sparse matrix, or a boolean array of shape (n, n)") from e
    if matrix.ndim != 2:
        raise InputError(f"jac_sparsity has {matrix.ndim} axes, expected 2", "it says where f_u is zero",
                         "a SciPy sparse matrix, or a boolean array of shape (n, n)")
    return matrix


def splu(J: Any, sigma: float, dtype: Any) -> Callable[..., Any]:
    """As `Backend.factorize`, of `sigma I - J` by SuperLU."""
    import numpy as np
    from scipy.sparse import csc_array, eye_array
    from scipy.sparse.linalg import splu as superlu

    A = csc_array(sigma * eye_array(J.shape[0], format="csc", dtype=dtype) - csc_array(J, dtype=dtype))
    try:
        solve = superlu(A).solve
    except RuntimeError:  # exactly singular
        return lambda b, transposed=False: b * np.nan
    return lambda b, transposed=False: solve(np.ascontiguousarray(b.T), "T" if transposed else "N").T
