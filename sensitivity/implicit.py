"""Diagonally implicit Runge-Kutta steps, their transposes and their tangents.

Stages (Hairer, Wanner II, IV.6), for `M u' = f` with a constant matrix M, here the identity (`algebraic.py` for more):

    M k_i = f(t + c_i h, U_i),   U_i = u + h sum_{j<i} a_ij k_j + h gamma k_i,   u1 = u + h sum_i b_i k_i.

For `z = h gamma k_i`, Newton's iteration solves `(M - h gamma J) dz = h gamma f(U_i) - M z`. With error control `J`
is `f_u` at the start of the step and one factorisation serves all its stages; the iteration ends when the error
of `z`, estimated from the rate theta of convergence by `theta / (1 - theta) |dz|`, is a hundredth of the error
tolerance (Hairer, Wanner II, eq. IV.8.10). Being a condition on `h k`, not on `k`, it asks for the same relative
accuracy of short steps and long ones. A fixed step cannot be made smaller, so there `J` is renewed at
every iterate, and the stage values are exact to round-off.

The transpose uses the implicit function theorem for each stage, with the exact `J_i` at the stage values, and no
Newton iteration (Hager 2000; Sandu 2006):

    (M - h gamma J_i)^T x_i = h (b_i lam + sum_{j>i} a_ji Y_j) + kbar_i,   Y_i = J_i^T x_i,
    lam <- lam + sum_i Y_i,   pbar += f_p^T x_i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .backend import Array, Contribution, Record, Scalar
from .diagonal import Diagonal
from .explicit import step_jvp, step_vjp
from .interpolate import interpolant, slope, transpose
from .jacobian import Jacobian, usable
from .matrices import factorize, shifted
from .stepper import Adjoint, Stepper, Tangent

KAPPA = 1e-2
MOST = 10
MOST_EXACT = 30
MOST_REFINED = 20
RUNNING, CONVERGED, FAILED = 0, 1, 2


class Newton(NamedTuple):
    """State of an iteration: the unknown, size of the last correction, error to correction, how many, how it stands."""

    z: Array
    size: Scalar
    trust: Scalar
    count: Any
    status: Any


class Refined(NamedTuple):
    """An answer, its residual, the size of that beside the terms it is the difference of, and the size before."""

    x: Array
    r: Array
    size: Scalar
    before: Scalar


class Solving(Stepper):
    """What the implicit methods have in common: linear equations with `M - c f_u`, M the identity unless said."""

    implicit = True
    jac: Jacobian

    def system(self, t: Any, u: Array, c: Scalar, exact: bool = False) -> Callable:
        """`solve(b, transposed=False)` with `M - c f_u(t, u)`, for one vector or a row for each.

        `exact` asks for the Jacobian as exact as it can be had, not one to steer an iteration.
        """
        if self.jac.system is not None:
            return self.jac.system(t, u, c)
        known = self.jac.undivided or self.jac
        return self._factorized((known.exact if exact else known.near)(t, u), c)

    def _factorized(self, J: Any, c: Scalar) -> Callable:
        whole = self.jac.undivided
        if whole is None:
            return factorize(self.be, shifted(self.be, J, c), self.jac.solver)
        return whole.mass.divided(
            self.be, factorize(self.be, shifted(self.be, J, c, whole.mass.values), self.jac.solver))

    def _weighed(self, z: Array) -> Array:
        """`M z`, for one vector or a row for each."""
        return z

    def _weighed_back(self, z: Array) -> Array:
        """`M^T z`."""
        return z


class Implicit(Solving):
    """A diagonally implicit Runge-Kutta method bound to a vector field."""

    def __init__(self, be: Any, tab: Diagonal, rhs: Any, jac: Jacobian | None, tolerance: Any = None) -> None:
        self.be, self.tab, self.rhs, self.tolerance = be, tab, rhs, tolerance
        self.jac = usable(be, rhs, jac)
        self.order, self.stages, self.fsal = tab.order, tab.stages, tab.fsal
        self._value, self._slope = interpolant(be, tab), slope(be, tab)

    @property
    def error_order(self) -> int:
        return self.tab.error_order

    def within(self, rtol: Any, atol: Any, norm: Any) -> Stepper:
        return Implicit(self.be, self.tab, self.rhs, self.jac, (rtol, atol, norm))

    # -- forward ----------------------------------------------------------------------------------------------------

    def step(self, t: Scalar, h: Scalar, u: Array, k: Array | None) -> tuple[Array, Array]:
        return self.attempt(t, h, u, k)[:2]

    def attempt(self, t: Scalar, h: Scalar, u: Array, k: Array | None) -> tuple[Array, Array, Any]:
        be, tab = self.be, self.tab
        n, hg = u.shape[0], h * tab.gamma
        solve = None
        if self.tolerance is not None:
            solve = self.system(be.time(t), u, hg)
        slopes = be.unit_rows(tab.stages, n, tab.stages, u)
        if k is not None:
            slopes = be.put(slopes, 0, k)
        eps = be.eps(u.dtype)
        guesses = be.asarray(tab.predictor, dtype=u.dtype, device=be.device(u))

        def row(carry: tuple, x: tuple, v: Array) -> tuple[tuple, Array]:
            slopes, trust, count = carry
            time_i, i, weights = x
            last = self._stage(time_i, u, v, hg * (weights @ slopes), hg, solve, trust)
            k_i = be.nan_where(last.status != CONVERGED, last.z / hg)
            trust = be.greatest(last.trust, eps) ** 0.8
            return (be.put(slopes, i, k_i), trust, count + last.count), k_i

        xs = (be.times(t, h, tab.c), tuple(range(tab.stages)), guesses)
        (_, _, count), K = be.recursion(tab.a, u, h, xs, row, (slopes, 1.0, 0), k)
        if getattr(solve, "costly", False):
            be.keep(K, solve)
        return be.combine(u, h, tab.b, K), K, count

    def _stage(self, t: Any, u: Array, base: Array, z: Array, hg: Scalar, solve: Callable | None,
               trust: Scalar) -> Newton:
        """Newton's iteration for one stage, from the guess `z`; `trust` is the estimate of the stage before."""
        be = self.be
        exact, eps = self.tolerance is None, be.eps(u.dtype)

        def correct(state: Newton) -> tuple[Newton, Any, Any]:
            U = base + state.z
            dz = (solve or self.system(t, U, hg))(hg * self.rhs(t, U) - self._weighed(state.z))
            size = self._size(dz, u, U)
            rate = be.choose(state.count == 0, 0.0, size / be.choose(state.size > 0.0, state.size, 1.0))
            slow = be.greatest(1.0 - rate, 1e-3)
            trusted = be.choose(state.count == 0, trust, rate / slow)
            status = rounded(be, size, rate, eps) if exact else self._tolerable(size, rate, trusted)
            status = be.choose(be.isfinite(size), status, FAILED)
            return Newton(state.z + dz, size, trusted, state.count + 1, status), None, True

        limit = MOST_EXACT if exact else MOST
        start = Newton(z, 0.0, trust, 0, RUNNING)
        return be.iterate(correct, start, lambda s: s.status == RUNNING, limit)[0]

    def _size(self, dz: Array, u: Array, U: Array) -> Scalar:
        """The size of a correction: in tolerances, or relative to the state."""
        be = self.be
        if self.tolerance is None:
            size = be.rms(u) + be.rms(U)
            return be.rms(dz) / be.choose(size > 0.0, size, 1.0)
        rtol, atol, norm = self.tolerance
        return norm(be.scaled(dz, u, U, rtol, atol))

    def _tolerable(self, size: Scalar, rate: Scalar, trusted: Scalar) -> Any:
        be = self.be
        return be.choose((trusted * size <= KAPPA) & (rate < 1.0), CONVERGED,
                         be.choose(rate >= 1.0, FAILED, RUNNING))

    def carry(self, K: Array) -> Array | None:
        return K[-1, :] if self.fsal else None

    def error(self, t: Scalar, h: Scalar, u: Array, K: Array) -> Array:
        return self.be.combine(None, h, self.tab.error, K)

    # -- dense output -----------------------------------------------------------------------------------------------

    def interpolate(self, record: Record, ts: Any) -> Array:
        return self._value(record, ts)

    def slope(self, record: Record, ts: Any) -> Array:
        return self._slope(record, ts)

    def interpolate_vjp(self, time: bool) -> Any:
        return transpose(self.be, self.tab, time)

    # -- derivatives ------------------------------------------------------------------------------------------------

    def _linear(self, t: Any, u: Array, h: Scalar) -> Callable:
        """The equation of one stage at its converged value."""
        return self.system(t, u, h * self.tab.gamma, exact=True)

    def vjp(self, pull: Any, record: Record, out: Contribution | None, last: Any, time: bool,
            state: Adjoint, add: Any = None) -> Adjoint:
        return step_vjp(self.be, self.tab, pull, record, out, last, time, state, self._transposed(record), add=add)

    def _transposed(self, record: Record) -> Callable:
        """The transposed equations of the stages. Where factors are costly those of the step serve all, kept or made
        anew, by iterative refinement (Wilkinson 1963) down to rounding; a stage that gets stuck has its own."""
        be, (t, h, u, K) = self.be, record
        back, first = self.jac.back, be.kept(K)
        if back is None or (first is None and not self.jac.costly):
            return self._linear
        first = first or self.system(be.time(t), u, h * self.tab.gamma, exact=True)

        def at(t_i: Any, u_i: Array, h: Scalar) -> Callable:
            c = h * self.tab.gamma

            def measured(v: Array, x: Array, before: Scalar) -> Refined:
                left, right = self._weighed_back(x), c * back(t_i, u_i, x)
                r = v - (left - right)
                scale = be.rms(v) + be.rms(left) + be.rms(right)
                return Refined(x, r, be.rms(r) / be.choose(scale > 0.0, scale, 1.0), before)

            def solve(v: Array, transposed: bool = True) -> Array:
                def improve(s: Refined) -> tuple[Refined, None, Any]:
                    return measured(v, s.x + first(s.r, transposed=True), s.size), None, False

                def anew(s: Refined) -> tuple[Refined, None, Any]:
                    return s._replace(x=self._linear(t_i, u_i, h)(v, transposed=True), size=0.0), None, False

                eps = be.eps(v.dtype)
                start = measured(v, first(v, transposed=True), 1.0)
                end, _ = be.iterate(improve, start, lambda s: (s.size > eps) & (s.size < 0.5 * s.before), MOST_REFINED)
                return be.iterate(anew, end, lambda s: (s.size <= 16.0 * eps) == False, 1)[0].x  # noqa: E712

            return solve

        return at

    def jvp(self, push: Any, record: Record, dt: Array | None, dh: Array | None,
            state: Tangent) -> tuple[Tangent, Array]:
        return step_jvp(self.be, self.tab, push, record, dt, dh, state, self._linear)

    # -- costs ------------------------------------------------------------------------------------------------------

    def evaluations(self, attempts: Any, known: bool) -> Any:
        """One for the first slope; Newton's iterations are counted as they happen."""
        del attempts
        return (int(self.fsal) + (0 if known else 2 - int(self.fsal))) * self.derivative_cost

    def products(self, steps: Any, silent: int, size: int) -> Any:
        return (self.stages - self.fsal) * steps + int(self.fsal)

    def algebra(self, attempts: Any, iterations: Any, adaptive: bool) -> tuple[Any, Any, Any]:
        made = 0 if self.jac.free else attempts if adaptive else iterations
        return made, made, iterations


def rounded(be: Any, size: Scalar, rate: Scalar, eps: float) -> Any:
    """How an iteration to round-off stands: quadratic convergence leaves the square of the last relative correction,
    and a small correction that no longer shrinks is round-off."""
    return be.choose((size <= eps**0.625) | ((size <= eps**0.4) & (rate >= 0.5)), CONVERGED, RUNNING)


def relative(be: Any, k: Array, u: Array) -> Scalar:
    """The size of a direction beside that of the state."""
    size = be.rms(u)
    return be.rms(k) / be.choose(size > 0.0, size, 1.0)
