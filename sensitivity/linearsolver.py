"""The option `linear_solver` of implicit methods, steady states and their adjoints: what it may be, and what fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import InputError, UnsupportedCombination
from .sparsity import Pattern

DENSE_LIMIT = 500
SOLVERS = (None, "dense", "sparse", "krylov")


@dataclass(frozen=True)
class Krylov:
    """GMRES on products with `f_u`, preconditioned: the `linear_solver` of an implicit method.

    `A P y = b`, `x = P y` is solved for `A = I - c f_u` (`I - c M^-1 f_u` with a mass matrix, `M - c f_u` with a
    singular one) until the residual of `A x = b` itself is small enough, so that P changes how long that takes, and
    results to that tolerance only. The discrete adjoint solves `A^T P^T y = b` likewise.

    Parameters
    ----------
    preconditioner : callable
        `preconditioner(t, u, p, c)` returns `solve(b, transposed)`, which multiplies the vector b with a rough inverse
        of A, or with the transpose of that; linear in b. Called once for each matrix: at each step, and in the gradient
        at each stage. u and p are as `f` sees them, b is raveled as u is.

    Raises
    ------
    InputError
        The preconditioner is not callable.

    References: Saad 2003, Iterative Methods for Sparse Linear Systems, section 9.3.2.
    """

    preconditioner: Callable[..., Any]

    def __post_init__(self) -> None:
        if not callable(self.preconditioner):
            raise InputError(f"Krylov({self.preconditioner!r}) has no preconditioner",
                             "it is a function (t, u, p, c) that returns solve(b, transposed)",
                             "linear_solver='krylov' goes without")


def wants_products(choice: Any) -> bool:
    """Whether a `linear_solver` asks for products alone."""
    return isinstance(choice, Krylov) or (isinstance(choice, str) and choice == "krylov")


def check_choice(owner: str, choice: Any, steps: bool = False) -> None:
    """Refuse a `linear_solver` that does not exist, or that is for time steps only."""
    if isinstance(choice, Krylov):
        if not steps:
            raise UnsupportedCombination(f"{owner}(linear_solver=Krylov(...)) does not exist",
                                         "its preconditioner is for the matrices of time steps",
                                         "linear_solver='krylov', or an object with factor(A)")
        return
    if callable(getattr(choice, "factor", None)):
        try:
            hash(choice)
        except TypeError as e:
            raise InputError(f"{owner}(linear_solver={type(choice).__name__}(...)) cannot be hashed",
                             "compiled solves are kept by their options", "a class without __eq__") from e
        return
    if not (choice is None or isinstance(choice, str)) or choice not in SOLVERS:
        raise InputError(f"{owner}(linear_solver={choice!r}) is none of the possible values",
                         "they are None, 'dense', 'sparse', 'krylov', sa.Krylov(preconditioner), or an object "
                         "with factor(A) -> solve(b, transposed)",
                         f"{owner}() chooses by size and sparsity")


def refuse_choice(be: Any, owner: str, choice: Any, pattern: Pattern | None, sparse_jac: bool) -> None:
    """Refuse a `linear_solver` that a problem with this pattern, or a `jac` that may return SciPy matrices, cannot use.
    """
    if choice == "sparse" and pattern is not None and pattern.structure(be) is None and not sparse_jac:
        raise UnsupportedCombination(f"{owner}(linear_solver='sparse') is not available on {be.name} for this "
                                     "jac_sparsity", "there only narrow bands are factorised, and no reordering made "
                                     f"its band narrow: {pattern.lower} diagonals below the main one and "
                                     f"{pattern.upper} above",
                                     "linear_solver='krylov' or 'dense', or backend='numpy'")
    if choice == "sparse" and pattern is None and not sparse_jac:
        raise UnsupportedCombination(f"{owner}(linear_solver='sparse') needs to know where f_u is zero",
                                     "the problem has neither jac_sparsity nor a sparse jac",
                                     "jac_sparsity=pattern with the problem, or linear_solver='krylov'")


def fitting(be: Any, method: Any, pattern: Pattern | None, jac: bool, mass: Any) -> None:
    """Refuse an implicit method whose `linear_solver` the problem cannot use."""
    choice = method.linear_solver
    refuse_choice(be, method.name, choice, pattern, jac and be.sparse_lu)
