"""Mass matrices: `M u' = f(t, u, p)` with a constant M.

A nonsingular M is taken to the right: `u' = M^-1 f`. With a singular M this is a differential-algebraic equation; it
has index 1, and can be solved here, where `W^T f_u V` is regular, with the columns of V and W orthonormal bases of the
null spaces of M and M^T (Hairer, Wanner II, VI.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

from .backend import Array
from .errors import IndexTooHigh, InputError, UnsupportedCombination
from .matrices import dense
from .registry import registry

LARGEST_CONDITION = 1e12
RANK = 1e-12


class Mass:
    """A mass matrix as NumPy numbers, known by its values.

    Attributes
    ----------
    values : M, `(n, n)`.
    singular : whether M has no inverse.
    inverse : M^-1, of a nonsingular M; the pseudoinverse of a singular one.
    right, left : V and W, of a singular M.
    """

    def __init__(self, values: Any) -> None:
        xp = registry().backend("numpy").xp
        self.values = xp.asarray(values, dtype=xp.float64)
        self.key = (self.values.shape, self.values.tobytes())
        left, sizes, right = xp.linalg.svd(self.values)
        rank = int(xp.sum(sizes > RANK * xp.max(sizes)))
        self.singular = rank < self.values.shape[0]
        self.inverse = xp.linalg.inv(self.values) if not self.singular else (
            right[:rank, :].T @ (left[:, :rank] / sizes[:rank]).T)
        self.right, self.left = right[rank:, :].T, left[:, rank:]

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

    def weigh(self, be: Any, z: Array) -> Array:
        """`M z`, for one vector or a row for each."""
        return z @ matrix(be, self.values, z).T

    def weigh_back(self, be: Any, z: Array) -> Array:
        """`M^T z`."""
        return z @ matrix(be, self.values, z)

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

        def slope(t: Any, u: Array) -> Array:
            return matrix(be, self.inverse, u) @ rhs(t, u)

        return slope

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
    """The user's products, those of `M^-1 f`."""

    def inverse(like: Any) -> Array:
        return be.asarray(mass.inverse, dtype=like.dtype, device=be.device(like))

    def ravel(tree: Any) -> Array:
        return layout.ravel(be, be.flatten(tree)[0])

    def unravel(v: Array) -> Any:
        return be.unflatten(layout.structure, layout.unravel(be, v))

    def vjp(t: Any, u: Any, p: Any, lam: Any) -> Any:
        flat = ravel(lam)
        return given.vjp(t, u, p, unravel(flat @ inverse(flat)))

    def jvp(t: Any, u: Any, p: Any, du: Any, dp: Any) -> Any:
        flat = ravel(given.jvp(t, u, p, du, dp))
        return unravel(inverse(flat) @ flat)

    def left(matrix: Callable) -> Callable:
        def scaled_matrix(t: Any, u: Any, p: Any) -> Array:
            out = matrix(t, u, p)
            return inverse(out) @ out
        return scaled_matrix

    made = {"vjp": vjp, "jvp": jvp, "jac": left(given.jac), "paramjac": left(given.paramjac)}
    return type(given)(**{name: None if getattr(given, name) is None else g for name, g in made.items()})


def check_index(be: Any, mass: Mass, jac: Callable[[Any, Array], Array], t: Any, u: Array) -> None:
    """Raise `IndexTooHigh` where the constraints do not determine the algebraic variables."""
    J = be.concrete_matrix(dense(be, jac(t, u)))
    if J is None:
        return
    xp = registry().backend("numpy").xp
    if not bool(xp.all(xp.isfinite(J))):
        return
    largest = float(xp.max(xp.linalg.svdvals(mass.left.T @ J)))
    least = float(xp.min(xp.linalg.svdvals(mass.left.T @ J @ mass.right)))
    condition = largest / least if least > 0.0 else math.inf
    if condition > LARGEST_CONDITION:
        raise IndexTooHigh(f"the constraints do not determine the algebraic variables (condition {condition:.1e})",
                           "the system has index 2 or more, or constraints that depend on each other",
                           "differentiate the constraints in time until the algebraic variables appear in them")
