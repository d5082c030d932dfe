"""Steps for differential-algebraic equations of index 1, `M u' = f` with a singular M.

Let the columns of V and W be bases of the null spaces of M and M^T, and `P = W W^T`. Then

* the start moves along V until `W^T f(t0, u) = 0` (consistent initial values, `M u0` is kept): Newton's iteration;
* the slope at a consistent state follows from the constraint differentiated in time (Hairer, Wanner II, eq. VI.1.7),

      (M + P f_u) k = f - P (f + f_t);

* the stages are those of `implicit.py` and `rosenbrock.py`; stiffly accurate methods end on the constraint.

By the implicit function theorem the cotangent `lam` of the consistent start goes to the given one, the parameters
and the time as `lam + f_u^T W q`, `f_p^T W q`, `f_t . W q`, with `(W^T f_u V)^T q = -V^T lam`; so the derivative with
respect to the guess of algebraic variables is zero. The same holds of any state that a cost looks at. The slope's
transpose needs the derivative of a pullback along `(1, k)`; it acts only where outputs between steps are asked of
algebraic variables inside the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from .backend import Array, Scalar
from .diagonal import Diagonal
from .implicit import CONVERGED, FAILED, MOST_EXACT, RUNNING, Implicit, Newton, Solving, relative, rounded
from .jacobian import Jacobian
from .mass import constraint_rows, matrix
from .matrices import Operator, dense, factorize, shifted
from .rosenbrock import Linear, Rosenbrock
from .stepper import Stepper

CORRECTIONS = 2


class Constraints(Solving):
    """What steppers with a singular mass matrix have in common: consistent starts and slopes."""

    algebraic = True
    corrections = CORRECTIONS
    mass: Any

    @property
    def matrices(self) -> int:  # type: ignore[override]
        return 0 if self.jac.free else 1

    def _factorized(self, J: Any, c: Scalar) -> Callable:
        A = shifted(self.be, J, c, self.mass.values)
        return self.mass.lift(self.be, factorize(self.be, A, self.jac.solver))

    def _weighed(self, z: Array) -> Array:
        return self.mass.weigh(self.be, z)

    def _weighed_back(self, z: Array) -> Array:
        return self.mass.weigh_back(self.be, z)

    # -- the start --------------------------------------------------------------------------------------------------

    def start(self, t: Any, u: Array) -> tuple[Array, Any]:
        be = self.be
        V, W = matrix(be, self.mass.right, u), matrix(be, self.mass.left, u)
        eps = be.eps(u.dtype)

        def correct(state: Newton) -> tuple[Newton, Any, Any]:
            U = u + V @ state.z
            dz = -inner(be, self.jac.near(t, U), V, W)(W.T @ self.rhs(t, U))
            scale = be.rms(u) + be.rms(U)
            size = be.rms(dz) / be.choose(scale > 0.0, scale, 1.0)
            rate = size / be.choose(state.size > 0.0, state.size, 1.0)
            status = be.choose(be.isfinite(size), rounded(be, size, rate, eps), FAILED)
            return Newton(state.z + dz, size, 1.0, state.count + 1, status), None, True

        zero = be.unit_rows(1, V.shape[1], 1, u)[0, :]
        end, _ = be.iterate(correct, Newton(zero, 0.0, 1.0, 0, RUNNING), lambda s: s.status == RUNNING, MOST_EXACT)
        return be.nan_where(end.status != CONVERGED, u + V @ end.z), end.count

    def corrected(self, t: Any, u: Array) -> Array:
        """Two corrections with one Jacobian, which cube an error of the algebraic variables."""
        V, W = matrix(self.be, self.mass.right, u), matrix(self.be, self.mass.left, u)
        solve = inner(self.be, self.jac.near(t, u), V, W)
        for _ in range(CORRECTIONS):
            u = u - V @ solve(W.T @ self.rhs(t, u))
        return u

    def _constraint(self, t: Any, u: Array) -> tuple[Array, Array, Any, Callable]:
        """V, W, `f_u`, and the solver with `W^T f_u V`."""
        V, W = matrix(self.be, self.mass.right, u), matrix(self.be, self.mass.left, u)
        J = self.jac.exact(t, u)
        return V, W, J, inner(self.be, J, V, W)

    def start_vjp(self, pull: Any, t: Any, u: Array, lam: Array) -> tuple[Array, tuple[Array, ...], Any]:
        V, W, _, solve = self._constraint(t, u)
        u_bar, theta_bar, t_bar = pull(t, u, W @ solve(-(V.T @ lam), transposed=True))
        lam = lam + u_bar
        return lam - V @ (V.T @ lam), theta_bar, t_bar  # which is orthogonal to V, but for rounding

    def start_jvp(self, push: Any, t: Any, u: Array, du: Array, dt: Array | None) -> Array:
        V, W, _, solve = self._constraint(t, u)
        return du - solve(push(t, u, du, dt)[1] @ W) @ V.T

    def costate(self, t: Any, u: Array, w: Array) -> Array:
        """The `lam` with `M^T lam = w` and `V^T f_u^T lam = 0`."""
        _, W, J, solve = self._constraint(t, u)
        lam = w @ matrix(self.be, self.mass.inverse, w)
        return lam - W @ solve(matrix(self.be, self.mass.right, w).T @ pulled(self.be, J, lam), transposed=True)

    # -- the index --------------------------------------------------------------------------------------------------

    def regularity(self, t: Any, u: Array) -> tuple[Scalar, Scalar, Scalar]:
        """`1 / |B^-1|` of `B = W^T f_u V` in Frobenius' norm, the same beside `|W^T f_u|`, and the sign of det B."""
        be, xp, W = self.be, self.be.xp, matrix(self.be, self.mass.left, u)
        rows = constraint_rows(be, self.jac.near(t, u), W)
        m, n = rows.shape
        size = math.sqrt(m * n) * be.rms(xp.reshape(rows, (-1,)))
        finite = be.isfinite(size)
        block = xp.where(xp.isfinite(rows), rows, xp.zeros_like(rows)) @ matrix(be, self.mass.right, u)
        reach = m * be.rms(xp.reshape(be.factorize(block)(be.unit_rows(m, m, 0, u)), (-1,)))
        invertible = be.isfinite(reach)
        least = be.choose(invertible, 1.0 / be.choose(invertible, reach, 1.0), 0.0)
        sign = 0.0 if be.is_complex(u) else be.scalar(xp.linalg.slogdet(block)[0])
        ratio = least / be.choose(size > 0.0, size, 1.0)
        return be.choose(finite, least, 1.0), be.choose(finite, ratio, 1.0), be.choose(finite, sign, 0.0)

    # -- the first slope --------------------------------------------------------------------------------------------

    def _regular(self, t: Any, u: Array, jac: Callable) -> Callable:
        """The solver with `M + P f_u`."""
        be, J, W = self.be, jac(t, u), matrix(self.be, self.mass.left, u)
        M = matrix(be, self.mass.values, u)
        if isinstance(J, Operator):
            return self.mass.lift(be, factorize(be, J._replace(
                apply=lambda v: M @ v + W @ (W.T @ J.apply(v)),
                transposed=lambda v: M.T @ v + J.transposed(W @ (W.T @ v)))))
        return self.mass.lift(be, be.factorize(M + W @ (W.T @ dense(be, J))))

    def derivative(self, t: Any, u: Array) -> Array:
        """By corrections with the derivative of `f` along `(1, k)`, so that the Jacobian need not be exact."""
        solve, f = self._regular(t, u, self.jac.near), self.rhs(t, u)
        constrained = partial(self.mass.constrained, self.be)
        k = solve(f - constrained(f))
        for _ in range(CORRECTIONS):
            (along,) = self.be.directional(partial(self._moved, t, u, k), relative(self.be, k, u))
            k = k - solve(self._weighed(k) - f + constrained(f + along))
        return k

    @property
    def derivative_cost(self) -> int:
        return 1 + CORRECTIONS * (1 if self.be.traced else 2)

    def starting(self, known: bool) -> tuple[Any, Any, Any]:
        slopes = self.evaluations(0, known) // self.derivative_cost
        return slopes * self.matrices, slopes * self.matrices, (1 + CORRECTIONS) * slopes

    def _moved(self, t: Any, u: Array, k: Array, e: Scalar) -> tuple[Array]:
        return (self.rhs(t + e, u + e * k),)


def inner(be: Any, J: Any, V: Array, W: Array) -> Callable:
    """The solver with `W^T J V`."""
    if isinstance(J, Operator):
        return factorize(be, J._replace(apply=lambda z: W.T @ J.apply(V @ z),
                                        transposed=lambda z: V.T @ J.transposed(W @ z)))
    solve: Callable = be.factorize(W.T @ dense(be, J) @ V)
    return solve


def pulled(be: Any, J: Any, lam: Array) -> Array:
    """`J^T lam`."""
    return J.transposed(lam) if isinstance(J, Operator) else dense(be, J).T @ lam


class Algebraic(Constraints, Implicit):
    """A stiffly accurate diagonally implicit method bound to a singular mass matrix and a right-hand side."""

    def __init__(self, be: Any, tab: Diagonal, rhs: Any, jac: Jacobian | None, mass: Any,
                 tolerance: Any = None) -> None:
        super().__init__(be, tab, rhs, jac, tolerance)
        self.mass = mass

    def within(self, rtol: Any, atol: Any, norm: Any) -> Stepper:
        return Algebraic(self.be, self.tab, self.rhs, self.jac, self.mass, (rtol, atol, norm))

    def first(self, t: Any, u: Array) -> Array | None:
        return self.derivative(t, u)

    def first_vjp(self, pull: Any, t: Any, u: Array, kappa: Array) -> tuple[Array, tuple[Array, ...], Any]:
        solve, k = self._regular(t, u, self.jac.exact), self.derivative(t, u)
        x = solve(kappa, transposed=True)
        y = self.mass.constrained(self.be, x)
        u_bar, theta_bar, t_bar = pull(t, u, x - y)

        def moved(e: Scalar) -> tuple:
            u_e, theta_e, t_e = pull(t + e, u + e * k, y)
            return u_e, *theta_e, t_e

        u_e, *theta_e, t_e = self.be.directional(moved, relative(self.be, k, u))
        return u_bar - u_e, tuple(a - b for a, b in zip(theta_bar, theta_e, strict=True)), t_bar - t_e

    def first_jvp(self, push: Any, t: Any, u: Array, du: Array, dt: Array | None) -> Array:
        solve, k = self._regular(t, u, self.jac.exact), self.derivative(t, u)
        df = push(t, u, du, dt)[1]
        (twice,) = self.be.directional(lambda e: (push(t + e, u + e * k, du, dt)[1],), relative(self.be, k, u))
        return solve(df - self.mass.constrained(self.be, df + twice))


class AlgebraicRosenbrock(Constraints, Rosenbrock):
    """A stiffly accurate Rosenbrock method bound to a singular mass matrix and a right-hand side."""

    def __init__(self, be: Any, tab: Linear, rhs: Any, jac: Jacobian | None, mass: Any) -> None:
        super().__init__(be, tab, rhs, jac)
        self.mass = mass
