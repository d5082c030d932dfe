"""Rosenbrock steps: linearly implicit, no iteration; with their exact transposes and tangents.

With `J = f_u(t, u)` and the coefficients in the form that needs no product with J (Hairer, Wanner II, eq. IV.7.25),

    (M - gamma h J) k_i = gamma (f(t + c_i h, U_i) + M sum_{j<i} g_ij k_j + h d_i f_t(t, u)),
    U_i = u + h sum_{j<i} a_ij k_j,   u1 = u + h sum_i b_i k_i,

one factorisation for all stages. The transpose solves with it as well, and differentiates J, which is a function of
`u`, `p` and `t` (Sandu, Daescu, Carmichael 2003): from the last stage to the first

    (M - gamma h J)^T x_i = h b_i lam + sum_{j>i} (h a_ji Y_j + g_ji M^T w_j) + kbar_i,   w_i = gamma x_i,
    Y_i = f_u(U_i)^T w_i,   pbar += f_p(U_i)^T w_i,
    (lam, pbar) += h d/de (f_u, f_p)(t + e d_i, u + e k_i)^T w_i at e = 0,   lam <- lam + sum_i Y_i.

The last line is a product with second derivatives: forward mode over reverse mode on JAX, central differences of the
products elsewhere (ten digits). It is linear in `sum_i (d_i, k_i) w_i^T`, so with fewer entries of u than stages it is
taken along the columns of this matrix, one for each entry of u.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from .backend import Array, Contribution, Record, Scalar
from .explicit import adding, ones
from .implicit import Solving, relative
from .interpolate import interpolant, slope, transpose
from .jacobian import Jacobian, usable
from .registry import registry
from .stepper import Adjoint, Tangent
from .tableaus import Tableau


@dataclass(frozen=True)
class Linear(Tableau):
    """Coefficients of a Rosenbrock method.

    Attributes
    ----------
    g : rows of the strictly lower triangular matrix that multiplies earlier slopes.
    d : multiples of `h f_t`.
    gamma : the diagonal.
    error_order : p if the error estimate is O(h^p).
    """

    g: tuple[tuple[float, ...], ...] = ()
    d: tuple[float, ...] = ()
    gamma: float = 0.0
    error_order: int = 0

    @property
    def fsal(self) -> bool:
        return False

    @cached_property
    def full(self) -> Any:
        """`g` as a square matrix of NumPy numbers."""
        xp = registry().backend("numpy").xp
        return xp.asarray([(*row, *[0.0] * (self.stages - len(row))) for row in self.g])

    @cached_property
    def backward(self) -> tuple[tuple[float, ...], ...]:
        """`a^T` in the order of the reverse recursion."""
        order = range(self.stages - 1, -1, -1)
        return tuple(tuple(self.a[j][i] for j in order if j > i) for i in order)


def _rodas5p() -> Linear:
    a6 = (-7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256, 0.030198172008377946)
    b = (*a6, 1.0, 1.0, 1.0)
    h = (
        (25.948786856663858, -2.5579724845846235, 10.433815404888879, -2.3679251022685204, 0.524948541321073,
         1.1241088310450404, 0.4272876194431874, -0.17202221070155493),
        (-9.91568850695171, -0.9689944594115154, 3.0438037242978453, -24.495224566215796, 20.176138334709044,
         15.98066361424651, -6.789040303419874, -6.710236069923372),
        (11.419903575922262, 2.8879645146136994, 72.92137995996029, 80.12511834622643, -52.072871366152654,
         -59.78993625266729, -0.15582684282751913, 4.883087185713722),
    )
    return Linear(
        a=(
            (),
            (3.0,),
            (2.849394379747939, 0.45842242204463923),
            (-6.954028509809101, 2.489845061869568, -10.358996098473584),
            (2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641),
            a6,
            (*a6, 1.0),
            (*a6, 1.0, 1.0),
        ),
        g=(
            (),
            (-14.155112264123755,),
            (-17.97296035885952, -2.859693295451294),
            (147.12150275711716, -1.41221402718213, 71.68940251302358),
            (165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306),
            (24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125, -0.6610691825249471),
            (30.91273214028599, -3.1208243349937974, 77.79954646070892, 34.28646028294783, -19.097331116725623,
             -28.087943162872662),
            (37.80277123390563, -3.2571969029072276, 112.26918849496327, 66.9347231244047, -40.06618937091002,
             -54.66780262877968, -9.48861652309627),
        ),
        b=b,
        c=(0.0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1.0, 1.0, 1.0),
        d=(0.21193756319429014, -0.42387512638858027, -0.3384627126235924, 1.8046452872882734, 2.325825639765069,
           0.0, 0.0, 0.0),
        error=(0.0,) * 7 + (1.0,),
        # u(theta) = (1 - theta) u + theta u1 + theta (1 - theta) h sum_i (h_1i + theta h_2i + theta^2 h_3i) k_i
        dense=tuple((w + x, y - x, z - y, -z) for w, x, y, z in zip(b, *h, strict=True)),
        dense_order=4, order=5, error_order=5, gamma=0.21193756319429014,
    )


# Steinebach 2023, BIT 63, 27.
RODAS5P = _rodas5p()


class Rosenbrock(Solving):
    """A Rosenbrock method bound to a vector field."""

    def __init__(self, be: Any, tab: Linear, rhs: Any, jac: Jacobian | None) -> None:
        self.be, self.tab, self.rhs = be, tab, rhs
        self.jac = usable(be, rhs, jac)
        self.order, self.stages = tab.order, tab.stages
        self._value, self._slope = interpolant(be, tab), slope(be, tab)

    @property
    def error_order(self) -> int:
        return self.tab.error_order

    # -- forward ----------------------------------------------------------------------------------------------------

    def step(self, t: Scalar, h: Scalar, u: Array, k: Array | None) -> tuple[Array, Array]:
        be, tab, time = self.be, self.tab, self.be.time(t)
        solve = self.system(time, u, h * tab.gamma)
        (in_time,) = be.directional(lambda e: (self.rhs(time + e, u),), 1.0)

        def row(slopes: Array, x: tuple, v: Array) -> tuple[Array, Array]:
            time_i, i, forced, weights = x
            k_i = solve(tab.gamma * (self.rhs(time_i, v) + self._weighed(weights @ slopes) + forced))
            return be.put(slopes, i, k_i), k_i

        slopes = be.unit_rows(tab.stages, u.shape[0], tab.stages, u)
        number, _, weights = self._indexed(u)
        xs = (be.times(t, h, tab.c), number, be.seeds(tab.d, h, in_time, None, None), weights)
        _, K = be.recursion(tab.a, u, h, xs, row, slopes)
        be.keep(K, solve)
        return be.combine(u, h, tab.b, K), K

    def _indexed(self, like: Array) -> tuple:
        """What rows of the recursion need: their number, `d_i`, and the weights of the slopes."""
        be, tab = self.be, self.tab
        return tuple(range(tab.stages)), tab.d, be.asarray(tab.full, dtype=like.dtype, device=be.device(like))

    def carry(self, K: Array) -> Array | None:
        return None

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

    def _solver(self, t: Any, u: Array, h: Scalar, K: Array) -> Callable:
        """The factorisation of the step, from the step itself where it was kept."""
        return self.be.kept(K) or self.system(t, u, h * self.tab.gamma, exact=True)

    def vjp(self, pull: Any, record: Record, out: Contribution | None, last: Any, time: bool,
            state: Adjoint, add: Any = None) -> Adjoint:
        be, tab = self.be, self.tab
        t, h, u, K = record
        add = add or adding(be)
        start, order = be.time(t), tuple(range(tab.stages - 1, -1, -1))
        solve = self._solver(start, u, h, K)
        base = be.seeds(tab.b, h, state.lam, None if out is None else out.k, None)
        number, _, weights = self._indexed(u)

        def row(carry: tuple, x: tuple, v: Array) -> tuple[tuple, Array]:
            theta, moved, stretched, handed = carry
            time_i, u_i, i, column, *more = x
            w = tab.gamma * solve(v + self._weighed_back(column @ handed), transposed=True)
            y, theta_bar, t_bar = pull(time_i, u_i, w)
            theta = add(theta, theta_bar, time_i, u_i)
            if time:
                c_i, move_i, k_i, row_i = more
                moved = moved + t_bar
                bend = self._weighed(k_i / tab.gamma - row_i @ K) - self.rhs(time_i, u_i)
                stretched = stretched + c_i * t_bar + be.dot(y, move_i) + be.dot(w, bend) / h
            return (theta, moved, stretched, be.put(handed, i, w)), y

        zero = be.unit_rows(tab.stages, u.shape[0], tab.stages, u)
        xs = (*(be.permuted(x, order) for x in (be.times(t, h, tab.c), be.inputs(tab.a, u, h, K), number)),
              be.permuted_rows(weights.T, order))
        if time:
            moves = be.inputs(tab.a, 0.0 * u, 1.0, K)
            xs += (be.permuted(tab.c, order), be.permuted(moves, order))
            xs += (be.permuted_rows(K, order), be.permuted_rows(weights, order))
        (theta, moved, stretched, handed), Y = be.recursion(
            tab.backward, be.permuted_rows(base, order), h, xs, row, (state.theta, state.t0, 0.0, zero))
        lam, theta, moved = self._second(pull, start, h, u, K, handed, (state.lam, theta, moved), add)
        h_bar = state.h
        if time:
            change = be.dot(state.lam, be.combine(None, 1.0, tab.b, K)) + stretched
            if out is not None:
                change, moved = change + out.h, moved + out.t
            h_bar = be.choose(last, change, h_bar)
        lam = be.combine(lam, 1.0, ones(tab.stages), Y)
        if out is not None and out.u is not None:
            lam = lam + out.u
        return Adjoint(lam, None, theta, moved, h_bar)

    def _second(self, pull: Any, start: Any, h: Scalar, u: Array, K: Array, W: Array, state: tuple,
                add: Any) -> tuple:
        """`state`, the cotangents of u, of the parameters and of t, with `h sum_i d/de (f_u, f_p, f_t)^T w_i` added."""
        be, n = self.be, u.shape[0]
        d = be.vector(self.tab.d, u)
        if n < self.stages:
            d, K, W = W.T @ d, W.T @ K, be.unit_rows(n, n, 0, u)
        return be.bent(pull, start, u, (d, K, be.vector([h], u) * W), state, add)

    def jvp(self, push: Any, record: Record, dt: Array | None, dh: Array | None,
            state: Tangent) -> tuple[Tangent, Array]:
        be, tab, xp = self.be, self.tab, self.be.xp
        t, h, u, K = record
        m, n = state.u.shape
        start = be.time(t)
        solve = self._solver(start, u, h, K)
        number, d, weights = self._indexed(u)

        def bent(d_i: Any, k_i: Array, e: Scalar) -> tuple[Array]:
            return (push(start + e * d_i, u + e * k_i, state.u, dt)[1],)

        def row(carry: Array, x: tuple, v: Array) -> tuple[Array, Array]:
            time_i, c_i, u_i, move_i, k_i, i, d_i, row_i = x
            dv = xp.reshape(v, (m, n))
            dt_i = dt
            if dh is not None:
                dv = dv + dh[:, None] * move_i[None, :]
                dt_i = dt + c_i * dh
            _, df = push(time_i, u_i, dv, dt_i)
            (twice,) = be.directional(partial(bent, d_i, k_i), relative(be, k_i, u))
            right = df + h * twice + self._weighed(xp.reshape(row_i @ carry, (m, n)))
            if dh is not None:
                bend = self._weighed(k_i / tab.gamma - row_i @ K) - self.rhs(time_i, u_i)
                right = right + dh[:, None] * (bend / h)[None, :]
            dk = xp.reshape(solve(tab.gamma * right), (m * n,))
            return be.put(carry, i, dk), dk

        inputs, moves = be.inputs(tab.a, u, h, K), be.inputs(tab.a, 0.0 * u, 1.0, K)
        flat = xp.reshape(state.u, (m * n,))
        xs = (be.times(t, h, tab.c), tab.c, inputs, moves, K, number, d, weights)
        _, dK = be.recursion(tab.a, flat, h, xs, row, be.unit_rows(tab.stages, m * n, tab.stages, u))
        du1 = xp.reshape(be.combine(flat, h, tab.b, dK), (m, n))
        if dh is not None:
            du1 = du1 + dh[:, None] * be.combine(None, 1.0, tab.b, K)[None, :]
        return Tangent(du1, None), xp.reshape(dK, (tab.stages, m, n))

    # -- costs ------------------------------------------------------------------------------------------------------

    def evaluations(self, attempts: Any, known: bool) -> Any:
        return self.stages * attempts + (0 if known else 2 * self.derivative_cost)

    def products(self, steps: Any, silent: int, size: int) -> Any:
        """One at each stage, and those that the second derivative takes."""
        twice = (1 if self.be.traced else 2) * min(size, self.stages)
        return (self.stages + twice) * steps

    def algebra(self, attempts: Any, iterations: Any, adaptive: bool) -> tuple[Any, Any, Any]:
        made = 0 if self.jac.free else attempts
        return made, made, self.stages * attempts
