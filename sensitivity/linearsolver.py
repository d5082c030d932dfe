"""The option `linear_solver` of implicit methods, steady states and their adjoints: what it may be, and what fits."""

from __future__ import annotations

from typing import Any

from .errors import InputError, UnsupportedCombination
from .sparsity import Pattern

DENSE_LIMIT = 500
SOLVERS = (None, "dense", "sparse", "krylov")


def check_choice(owner: str, choice: Any) -> None:
    """Refuse a `linear_solver` that does not exist."""
    if callable(getattr(choice, "factor", None)):
        try:
            hash(choice)
        except TypeError as e:
            raise InputError(f"{owner}(linear_solver={type(choice).__name__}(...)) cannot be hashed",
                             "compiled solves are kept by their options", "a class without __eq__") from e
        return
    if not (choice is None or isinstance(choice, str)) or choice not in SOLVERS:
        raise InputError(f"{owner}(linear_solver={choice!r}) is none of the possible values",
                         "they are None, 'dense', 'sparse', 'krylov', or an object with factor(A) -> solve(b, "
                         "transposed)",
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
    if choice == "krylov" and mass is not None:
        raise UnsupportedCombination(f"{method.name}(linear_solver='krylov') does not go with a singular mass matrix",
                                     "constraints are solved for with matrices",
                                     "linear_solver='sparse' with jac_sparsity=, or 'dense'")
