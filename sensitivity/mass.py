"""Mass matrices: `M u' = f(t, u, p)` with a constant M.

A nonsingular M is taken to the right, `u' = M^-1 f`, in all but the linear systems of implicit methods, which keep the
structure of M and f_u: `(I - c M^-1 f_u)^-1 = (M - c f_u)^-1 M`. With a singular M this is a differential-algebraic
equation; it has index 1, and can be solved here, where `W^T f_u V` is regular, with the columns of V and W orthonormal
bases of the null spaces of M and M^T (Hairer, Wanner II, VI.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

from .backend import Array
from .errors import IndexTooHigh, InputError, UnsupportedCombination
from .matrices import Entries, Operator, dense, factorize, is_sparse
from .registry import registry
from .sparsity import pattern_of

LARGEST_CONDITION = 1e12
RANK = 1e-12
SMALL = 32


class Mass:
    """A mass matrix as NumPy numbers, known by its values.

    Attributes
    ----------
    values : M, `(n, n)`.
    diagonal : `(n,)`, of an M that has nothing else, or None.
    singular : whether M has no inverse.
    inverse : M^-1, of a nonsingular M; the pseudoinverse of a singular one.
    right, left : V and W, of a singular M.
    """

    def __init__(self, values: Any) -> None:
        xp = registry().backend("numpy").xp
        self.values = xp.asarray(values, dtype=xp.float64)
        self.key = (self.values.shape, self.values.tobytes())
        diagonal = xp.asarray(xp.linalg.diagonal(self.values), copy=True)
        self.diagonal = diagonal if xp.count_nonzero(self.values) == xp.count_nonzero(diagonal) else None
        self.singular = False
        try:
            self.inverse = xp.linalg.inv(self.values)
            condition = float(xp.linalg.matrix_norm(self.values) * xp.linalg.matrix_norm(self.inverse))
        except ValueError:  # LinAlgError of an exactly singular matrix
            condition = math.inf
        if not RANK * condition < 1.0:  # the product of Frobenius norms is no less than the ratio of singular values
            left, sizes, right = xp.linalg.svd(self.values)
            rank = int(xp.sum(sizes > RANK * xp.max(sizes)))
            self.singular = rank < self.values.shape[0]
            self.right, self.left = right[rank:, :].T, left[:, rank:]
            if self.singular:
                self.inverse = right[:rank, :].T @ (left[:, :rank] / sizes[:rank]).T

    @cached_property
    def transposed(self) -> Mass:
        """M^T."""
        return Mass(self.values.T)

    def beside_one(self) -> Any:
        """The values of the same matrix with one more equation, `q' = g`."""
        xp, n = registry().backend("numpy").xp, self.values.shape[0]
        out = xp.eye(n + 1)
        out[:n, :n] = self.values
        return out

    @cached_property
    def sparse(self) -> tuple[Any, Callable[..., Any]] | None:
        """M as a SciPy matrix and a solver with it for NumPy numbers, where most entries of a larger M are zero."""
        from scipy.sparse import csr_array

        n = self.values.shape[0]
        if n <= SMALL or 4 * int(registry().backend("numpy").xp.count_nonzero(self.values)) > n * n:
            return None
        pattern = pattern_of(self.values, n)
        assert pattern is not None
        solve = factorize(registry().backend("numpy"), Entries(pattern, self.values[pattern.rows, pattern.columns]))
        return csr_array(self.values), solve

    def weigh(self, be: Any, z: Array, transposed: bool = False) -> Array:
        """`M z`, or `M^T z`, for one vector or a row for each."""
        if self.diagonal is not None:
            return z * matrix(be, self.diagonal, z)
        return be.weigh(self, z, transposed)

    def weigh_back(self, be: Any, z: Array) -> Array:
        """`M^T z`."""
        return self.weigh(be, z, transposed=True)

    def unweigh(self, be: Any, z: Array, transposed: bool = False) -> Array:
        """`M^-1 z`, or `M^-T z`, of a nonsingular M."""
        if self.diagonal is not None:
            return z / matrix(be, self.diagonal, z)
        return be.unweigh(self, z, transposed)

    def constrained(self, be: Any, z: Array) -> Array:
        """`P z` with `P = W W^T`."""
        W = matrix(be, self.left, z)
        return (z @ W) @ W.T

    def lift(self, be: Any, solve: Callable[..., Array]) -> Callable[..., Array]:
        """A solver for vectors of M's size, for the vectors in use."""
        del be
        return solve

    def divide(self, be: Any, rhs: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Array]:
        """`M^-1 rhs`."""
        return lambda t, u: self.unweigh(be, rhs(t, u))

    def divided(self, be: Any, solve: Callable[..., Array]) -> Callable[..., Array]:
        """A solver with `I - c M^-1 f_u`, made of one with `M - c f_u`."""

        def quotient(b: Array, transposed: bool = False) -> Array:
            return self.weigh_back(be, solve(b, transposed=True)) if transposed else solve(self.weigh(be, b))

        quotient.nbytes = getattr(solve, "nbytes", 0)  # type: ignore[attr-defined]
        quotient.costly = getattr(solve, "costly", False)  # type: ignore[attr-defined]
        return quotient

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mass) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


class Blocks:
    """The matrix with a singular M once for each of `count` parts of a vector, and with ones for what follows them."""

    def __init__(self, mass: Mass, count: int = 1) -> None:
        self.mass, self.count = mass, count
        self.values, self.left, self.right = mass.values, mass.left, mass.right

    def _each(self, be: Any, z: Array, act: Callable[[Array], Array], rest: float) -> Array:
        xp, n, lead = be.xp, self.values.shape[0], tuple(z.shape[:-1])
        end = n * self.count
        parts = xp.reshape(act(xp.reshape(z[..., :end], (-1, n))), (*lead, end))
        return xp.concat([parts, rest * z[..., end:]], axis=-1)

    def weigh(self, be: Any, z: Array) -> Array:
        return self._each(be, z, lambda rows: self.mass.weigh(be, rows), 1.0)

    def weigh_back(self, be: Any, z: Array) -> Array:
        return self._each(be, z, lambda rows: self.mass.weigh_back(be, rows), 1.0)

    def constrained(self, be: Any, z: Array) -> Array:
        return self._each(be, z, lambda rows: self.mass.constrained(be, rows), 0.0)

    def lift(self, be: Any, solve: Callable[..., Array]) -> Callable[..., Array]:
        return lambda b, transposed=False: self._each(be, b, lambda rows: solve(rows, transposed), 1.0)


def matrix(be: Any, values: Any, like: Array) -> Array:
    """A matrix of NumPy numbers as an array like another."""
    return be.asarray(values, dtype=like.dtype, device=be.device(like))


def mass_of(prob: Any, method: Any, size: int) -> Mass | None:
    """The checked mass matrix of a problem.

    Raises
    ------
    InputError
        It is not a constant `(n, n)` matrix of finite numbers.
    UnsupportedCombination
        It is singular, and the method cannot solve for algebraic variables.
    """
    given = prob.mass_matrix
    if given is None:
        return None
    xp = registry().backend("numpy").xp
    try:
        values = xp.asarray(given.toarray() if hasattr(given, "toarray") else given, dtype=xp.float64)
    except Exception as e:  # tracers and tensors that require grad refuse, each in its own way
        raise InputError(f"mass_matrix is a {type(given).__name__} without constant values",
                         "derivatives with respect to the mass matrix are not available",
                         "a constant matrix; parameters go into f") from e
    if tuple(values.shape) != (size, size):
        raise InputError(f"mass_matrix has shape {tuple(values.shape)}, expected {(size, size)}",
                         "it multiplies the raveled state", "mass_matrix=np.diag([1.0, 1.0, 0.0])")
    if not bool(xp.all(xp.isfinite(values))):
        raise InputError("mass_matrix holds a value that is not finite", "it multiplies the derivative of the state",
                         "a matrix of finite numbers")
    mass = Mass(values)
    if mass.singular and not method.algebraic:
        cause = "it is explicit" if not method.implicit else "its last stage does not satisfy the constraints"
        raise UnsupportedCombination(f"{method.name} cannot use a singular mass matrix", cause,
                                     "Kvaerno5() or another of Kvaerno3(), ImplicitEuler(), Trapezoid()")
    return mass


def scaled_products(be: Any, mass: Mass, layout: Any, given: Any) -> Any:
    """The user's products, those of `M^-1 f`; those of f stay beside them."""

    def ravel(tree: Any) -> Array:
        return layout.ravel(be, be.flatten(tree)[0])

    def unravel(v: Array) -> Any:
        return be.unflatten(layout.structure, layout.unravel(be, v))

    def vjp(t: Any, u: Any, p: Any, lam: Any) -> Any:
        flat = ravel(lam)
        return given.vjp(t, u, p, unravel(mass.unweigh(be, flat, transposed=True)))

    def jvp(t: Any, u: Any, p: Any, du: Any, dp: Any) -> Any:
        flat = ravel(given.jvp(t, u, p, du, dp))
        return unravel(mass.unweigh(be, flat))

    def left(given_matrix: Callable) -> Callable:
        def scaled_matrix(t: Any, u: Any, p: Any) -> Array:
            out = given_matrix(t, u, p)
            out = be.asarray(out.toarray() if is_sparse(out) else out)
            return mass.unweigh(be, out.T).T
        return scaled_matrix

    made = {"vjp": vjp, "jvp": jvp, "jac": left(given.jac), "paramjac": left(given.paramjac)}
    scaled = {name: None if getattr(given, name) is None else g for name, g in made.items()}
    return type(given)(**scaled, undivided=given)


def constraint_rows(be: Any, J: Any, W: Array) -> Array:
    """`W^T J`, by a product for each constraint where J is known by its products."""
    if isinstance(J, Operator):
        return be.gathered(be.scan(lambda _, x: (0, J.transposed(x[0])), 0, (W.T,))[1])
    return W.T @ dense(be, J)


def check_index(be: Any, mass: Mass, jac: Callable[[Any, Array], Array], t: Any, u: Array) -> None:
    """Raise `IndexTooHigh` where the constraints do not determine the algebraic variables."""
    rows = be.concrete_matrix(constraint_rows(be, jac(t, u), matrix(be, mass.left, u)))
    if rows is None:
        return
    xp = registry().backend("numpy").xp
    if not bool(xp.all(xp.isfinite(rows))):
        return
    largest = float(xp.max(xp.linalg.svdvals(rows)))
    least = float(xp.min(xp.linalg.svdvals(rows @ mass.right)))
    condition = largest / least if least > 0.0 else math.inf
    if condition > LARGEST_CONDITION:
        raise IndexTooHigh(f"the constraints do not determine the algebraic variables (condition {condition:.1e})",
                           "the system has index 2 or more, or constraints that depend on each other",
                           "differentiate the constraints in time until the algebraic variables appear in them")
