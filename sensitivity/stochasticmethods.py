"""One-step methods for stochastic differential equations, as Runge-Kutta methods for a field that is driven by noise.

A step over `[t, t + h]` sees the increment `dW` and the space-time Levy area `H` of the path there. Its stages evaluate

    F_i(U) = delta_i f(t + c_i h, U) + g(t + c_i h, U) w_i + (g_u g)(t + c_i h, U) v,
    w_i = (alpha_i dW + beta_i H + gamma_i D) / h,   v = (dW^2 / h - 1) / 2,

where D is the increment over the first half of the step less that over the second, so that the formulas of
`explicit.py`, their transposes and their tangents serve with `h F_i` in place of `h f`. The last term belongs to
Milstein's method alone. Between the nodes, output is linear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from . import explicit, tableaus
from .backend import Array, Contribution, Record, Scalar
from .errors import UnsupportedCombination, undefined
from .explicit import Explicit
from .methods import Method
from .stepper import Adjoint, Stepper, Tangent
from .tableaus import Tableau


@dataclass(frozen=True)
class Scheme:
    """Coefficients: a tableau, and for every stage `delta`, `alpha`, `beta`, and `gamma` if the halves of steps are
    seen; `extra` are times of stages behind those of the tableau, `squares` asks for the term with `v`."""

    tableau: Tableau
    delta: tuple[float, ...]
    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    squares: bool = False
    gamma: tuple[float, ...] = ()
    extra: tuple[float, ...] = ()

    @property
    def times(self) -> tuple[float, ...]:
        """Where in the step the stages lie, those beside the tableau too."""
        return self.tableau.c[:len(self.delta) - len(self.extra)] + self.extra

    @classmethod
    def of(cls, tableau: Tableau, squares: bool = False) -> Scheme:
        """The scheme whose stages all see the whole increment."""
        s = tableau.stages
        return cls(tableau, (1.0,) * s, (1.0,) * s, (0.0,) * s, squares)


EULER = Scheme.of(tableaus.EULER)
MILSTEIN = Scheme.of(tableaus.EULER, squares=True)
HEUN = Scheme.of(replace(tableaus.HEUN, error=None, dense=((0.5,), (0.5,)), dense_order=1))

# Two steps of Heun's method over the halves of a step, and the two stages of one over the whole, for the estimate of
# the error; row 4 of the tableau is the place of that estimate among the stages.
HALVES = Scheme(
    Tableau(a=((), (0.5,), (0.25, 0.25), (0.25, 0.25, 0.5), ()), b=(0.25, 0.25, 0.25, 0.25, 0.0),
            c=(0.0, 0.5, 0.5, 1.0, 0.0), order=1, dense=((0.25,), (0.25,), (0.25,), (0.25,), (0.0,)), dense_order=1),
    delta=(1.0,) * 6, alpha=(1.0,) * 6, beta=(0.0,) * 6, gamma=(1.0, 1.0, -1.0, -1.0, 0.0, 0.0), extra=(0.0, 1.0))
MADE = Tableau(a=HALVES.tableau.a[:4], b=HALVES.tableau.b[:4], c=HALVES.tableau.c[:4], order=1)

# Foster, dos Reis, Strange 2023, "ShARK": U_1 = u + g H, U_2 = U_1 + 5/6 (h f(U_1) + g dW),
# u1 = u + h (2/5 f(U_1) + 3/5 f(U_2)) + g dW. Row 0 is g H / h alone. With w_1 = (dW + 3H) / h, w_2 = (dW - 2H) / h the
# sum of b_i g(t + c_i h) w_i h is g dW + g' h (dW/2 - H), the stochastic integral of a g that changes in time; row 2
# takes what w_1 adds to U_2 back.
SHARK = Scheme(
    Tableau(a=((), (1.0,), (-1.5, 5 / 6)), b=(0.0, 2 / 5, 3 / 5), c=(0.0, 0.0, 5 / 6), order=2,
            dense=((0.0,), (2 / 5,), (3 / 5,)), dense_order=1),
    delta=(0.0, 1.0, 1.0), alpha=(0.0, 1.0, 1.0), beta=(1.0, 3.0, -2.0))


class Driven(Explicit):
    """A `Scheme` bound to a driven field; `rhs.stages(scheme)` are the first arguments of its stages in every step."""

    def __init__(self, be: Any, scheme: Scheme, rhs: Any) -> None:
        super().__init__(be, scheme.tableau, rhs)
        self.drive = rhs.stages(scheme)

    def step(self, t: Scalar, h: Scalar, u: Array, k: Array | None) -> tuple[Array, Array]:
        return explicit.step(self.be, self.tab, self.rhs, t, h, u, k, self.drive(t, h))

    def vjp(self, pull: Any, record: Record, out: Contribution | None, last: Any, time: bool,
            state: Adjoint, add: Any = None) -> Adjoint:
        del add
        if time:
            raise UnsupportedCombination(*undefined("time"))
        return explicit.step_vjp(self.be, self.tab, pull, record, out, last, time, state,
                                 times=self.drive(record.t, record.h))

    def jvp(self, push: Any, record: Record, dt: Array | None, dh: Array | None,
            state: Tangent) -> tuple[Tangent, Array]:
        if dt is not None:
            raise UnsupportedCombination(*undefined("time"))
        return explicit.step_jvp(self.be, self.tab, push, record, dt, dh, state,
                                 times=self.drive(record.t, record.h))


class Halved(Driven):
    """Heun's method with error control: two half steps, and the difference to one whole step as the estimate.

    Of a record, the last row of the stages holds that difference, divided by the step size.
    """

    def __init__(self, be: Any, rhs: Any) -> None:
        super().__init__(be, HALVES, rhs)

    @property
    def error_order(self) -> float:  # type: ignore[override]
        """Of the error of a step on a path: 3/2 for noise that commutes."""
        return 1.0 if self.rhs.field.acts == "all" and not self.rhs.field.additive else 1.5

    def derivative(self, t: Any, u: Array) -> Array:
        """Drift and noise of size one, without signs, from which a first step size is guessed."""
        xp = self.be.xp
        f, g = self.rhs.parts(self.be, t, u)
        g = xp.abs(g)
        return xp.abs(f) + (xp.sum(g, axis=1) if g.ndim == 2 else g)

    def step(self, t: Scalar, h: Scalar, u: Array, k: Array | None) -> tuple[Array, Array]:
        be, xp, rows = self.be, self.be.xp, self.drive(t, h)
        u1, K = explicit.step(be, MADE, self.rhs, t, h, u, None, be.permuted(rows, (0, 1, 2, 3)))
        a = self.rhs(rows[4], u)
        b = self.rhs(rows[5], be.combine(u, h, (1.0,), a[None, :]))
        whole = be.combine(None, 1.0, (0.25, 0.25, 0.25, 0.25, -0.5, -0.5), xp.concat([K, a[None, :], b[None, :]]))
        return u1, xp.concat([K, whole[None, :]])

    def error(self, t: Scalar, h: Scalar, u: Array, K: Array) -> Array:
        return self.be.combine(None, h, (0.0, 0.0, 0.0, 0.0, 1.0), K)

    def vjp(self, pull: Any, record: Record, out: Contribution | None, last: Any, time: bool,
            state: Adjoint, add: Any = None) -> Adjoint:
        del add
        if time:
            raise UnsupportedCombination(*undefined("time"))
        be, rows = self.be, self.drive(record.t, record.h)
        if out is not None and out.k is not None:
            out = out._replace(k=out.k[:4, :])
        return explicit.step_vjp(be, MADE, pull, record._replace(k=record.k[:4, :]), out, last, time, state,
                                 times=be.permuted(rows, (0, 1, 2, 3)))

    def jvp(self, push: Any, record: Record, dt: Array | None, dh: Array | None,
            state: Tangent) -> tuple[Tangent, Array]:
        if dt is not None:
            raise UnsupportedCombination(*undefined("time"))
        be, rows = self.be, self.drive(record.t, record.h)
        new, dK = explicit.step_jvp(be, MADE, push, record._replace(k=record.k[:4, :]), dt, dh, state,
                                    times=be.permuted(rows, (0, 1, 2, 3)))
        return new, be.xp.concat([dK, 0.0 * dK[:1, :, :]])

    def evaluations(self, attempts: Any, known: bool) -> Any:
        return 6 * attempts + (0 if known else 2)

    def products(self, steps: Any, silent: int, size: int) -> Any:
        return 4 * steps


class Reversible(Driven):
    """Reversible Heun: the steps carry `(y, z)`, of which `y` is seen.

        z1 = 2y - z + h F(t, z),   y1 = y + h/2 (F(t, z) + F(t + h, z1))

    (Kidger, Foster, Li, Lyons 2021, algorithm 1). Drift and diffusion at `z1` serve the next step too, with its own
    increment, so they are carried as well: one evaluation for each step, and one at the start. Records hold the two
    stages, then drift and diffusion at both ends, in rows as long as `(y, z)`.
    """

    def lift(self, u: Array) -> Array:
        return self.be.xp.concat([u, u], axis=-1)

    def lift_vjp(self, ct: Array) -> Array:
        y, z = self._parts(ct)
        return y + z

    def seen(self, rows: Array) -> Array:
        return self._parts(rows)[0]

    def seen_vjp(self, ct: Array) -> Array:
        return self.be.xp.concat([ct, 0.0 * ct], axis=-1)

    def _parts(self, x: Array) -> tuple[Array, Array]:
        n = x.shape[-1] // 2
        return x[..., :n], x[..., n:]

    def _stages(self, a: Array, b: Array) -> Array:
        """Stages `(2, 2n)`: what moves y; nothing moves the unseen part between the nodes."""
        xp = self.be.xp
        return xp.stack([xp.concat([a, 0.0 * a], axis=-1), xp.concat([b, 0.0 * b], axis=-1)])

    def first(self, t: Any, u: Array) -> Array:
        return self._evaluated(t, self._parts(u)[1])

    def _evaluated(self, t: Any, z: Array) -> Array:
        """Drift and diffusion in rows of `2n` numbers, the last one filled up with zeros."""
        xp, n = self.be.xp, z.shape[0]
        f, g = self.rhs.parts(self.be, t, z)
        flat = xp.concat([f, xp.reshape(g, (-1,))])
        rows = -(-flat.shape[0] // (2 * n))
        return xp.reshape(self.be.padded(flat, 2 * n * rows), (rows, 2 * n))

    def _rate(self, argument: Array, k: Array) -> Array:
        """`F` for the increment in `argument`, from the rows of `_evaluated`."""
        flat, n = self.be.xp.reshape(k, (-1,)), k.shape[1] // 2
        return self.rhs.combined(argument, flat[:n], self.rhs.diffusion(flat, n))

    def carry(self, K: Array) -> Array:
        return K[2 + (K.shape[0] - 2) // 2:, :]

    def entry(self, record: Record) -> Array:
        return record.k[2:2 + (record.k.shape[0] - 2) // 2, :]

    def step(self, t: Scalar, h: Scalar, u: Array, k: Array | None) -> tuple[Array, Array]:
        assert k is not None
        xp = self.be.xp
        first, second = self._arguments(t, h)
        y, z = self._parts(u)
        a = self._rate(first, k)
        z1 = 2.0 * y - z + h * a
        k1 = self._evaluated(second[0], z1)
        b = self._rate(second, k1)
        return xp.concat([y + (0.5 * h) * (a + b), z1]), xp.concat([self._stages(a, b), k, k1])

    def _arguments(self, t: Scalar, h: Scalar) -> tuple[Any, Any]:
        rows = self.drive(t, h)
        return rows[0], rows[1]

    def interpolate(self, record: Record, ts: Any) -> Array:
        return super().interpolate(record._replace(k=record.k[:2, :]), ts)

    def slope(self, record: Record, ts: Any) -> Array:
        return super().slope(record._replace(k=record.k[:2, :]), ts)

    def interpolate_vjp(self, time: bool) -> Any:
        pull, xp = super().interpolate_vjp(time), self.be.xp

        def padded(record: Record, ts: Any, ct: Array) -> tuple[Contribution, Any]:
            out, bars = pull(record._replace(k=record.k[:2, :]), ts, ct)
            return out._replace(k=xp.concat([out.k, 0.0 * record.k[2:, :]])), bars

        return padded

    def evaluations(self, attempts: Any, known: bool) -> Any:
        return attempts + 1

    def vjp(self, pull: Any, record: Record, out: Contribution | None, last: Any, time: bool,
            state: Adjoint, add: Any = None) -> Adjoint:
        del add
        if time:
            raise UnsupportedCombination(*undefined("time"))
        be = self.be
        first, second = self._arguments(record.t, record.h)
        y, z = self._parts(record.u)
        h = record.h
        y_bar, z_bar = self._parts(state.lam)
        in_a = in_b = (0.5 * h) * y_bar
        if out is not None and out.k is not None:
            in_a, in_b = in_a + self._parts(out.k[0, :])[0], in_b + self._parts(out.k[1, :])[0]
        z1 = 2.0 * y - z + h * self._parts(record.k[0, :])[0]
        moved, theta_b, _ = pull(second, z1, in_b)
        z1_bar = z_bar + moved
        moved, theta_a, _ = pull(first, z, in_a + h * z1_bar)
        lam = be.xp.concat([y_bar + 2.0 * z1_bar, moved - z1_bar])
        if out is not None and out.u is not None:
            lam = lam + out.u
        return state._replace(lam=lam, theta=be.add(be.add(state.theta, theta_b), theta_a))

    def jvp(self, push: Any, record: Record, dt: Array | None, dh: Array | None,
            state: Tangent) -> tuple[Tangent, Array]:
        if dt is not None:
            raise UnsupportedCombination(*undefined("time"))
        first, second = self._arguments(record.t, record.h)
        y, z = self._parts(record.u)
        dy, dz = self._parts(state.u)
        h = record.h
        a, da = push(first, z, dz, None)
        dz1 = 2.0 * dy - dz + h * da
        _, db = push(second, 2.0 * y - z + h * a, dz1, None)
        du1 = self.be.xp.concat([dy + (0.5 * h) * (da + db), dz1], axis=1)
        return Tangent(du1, None), self._stages(da, db)


@dataclass(frozen=True)
class StochasticMethod(Method):
    """Base of the methods for `SDEProblem`; with fixed steps unless said otherwise.

    `interpretation` is the one whose solution a method finds, `noises` are the kinds of noise it is made for.
    """

    scheme: ClassVar[Scheme]
    interpretation: ClassVar[str]
    noises: ClassVar[tuple[str, ...]] = ("diagonal", "scalar", "additive", "general")

    @property
    def adaptive(self) -> bool:
        return False

    def bind(self, be: Any, rhs: Any, dense: bool, jac: Any = None, mass: Any = None) -> Stepper:
        return Driven(be, self.scheme, rhs)


class EulerMaruyama(StochasticMethod):
    """Euler and Maruyama: strong order 1/2, 1 for additive noise; weak order 1. Ito (Kloeden, Platen, 10.2)."""

    scheme = EULER
    interpretation = "ito"
    references = ("kloeden1992",)


class Milstein(StochasticMethod):
    """Milstein: strong order 1 for diagonal, scalar and commutative noise. Ito (Kloeden, Platen, 10.3).

    The derivative of g along itself comes from the framework's forward mode, m + 1 products a step for general noise.
    Diagonal noise means that entry i of g depends on entry i of u only; general noise has to commute,
    `(g_j)_u g_k = (g_k)_u g_j` for all columns of g.
    """

    scheme = MILSTEIN
    interpretation = "ito"
    references = ("kloeden1992",)


class StochasticHeun(StochasticMethod):
    """Heun: strong order 1 for commutative (diagonal, scalar, additive) noise, 1/2 for general noise. Stratonovich
    (Kloeden, Platen, 15.1; Rumelin 1982).

    With `controller=PIController()` the steps are adaptive: each is made in two halves, and compared with one whole
    step on the same path. A step that is rejected is tried again on the same path, smaller (Gaines, Lyons 1997).
    """

    scheme = HEUN
    interpretation = "stratonovich"
    references = ("rumelin1982", "gaines1997")

    @property
    def adaptive(self) -> bool:
        return True

    def bind(self, be: Any, rhs: Any, dense: bool, jac: Any = None, mass: Any = None) -> Stepper:
        return Halved(be, rhs) if rhs.field.free else Driven(be, self.scheme, rhs)


class ReversibleHeun(StochasticMethod):
    """Reversible Heun: strong order 1/2, 1 for additive noise. Stratonovich (Kidger, Foster, Li, Lyons 2021).

    Its steps can be undone exactly, for gradients without stored states. Stable only close to the imaginary axis: on
    `u' = -k u` the hidden half of the state grows.
    """

    scheme = HEUN
    interpretation = "stratonovich"
    references = ("kidger2021sde",)

    def bind(self, be: Any, rhs: Any, dense: bool, jac: Any = None, mass: Any = None) -> Stepper:
        return Reversible(be, self.scheme, rhs)


class ShARK(StochasticMethod):
    """Shifted additive-noise Runge-Kutta: strong order 3/2 for additive noise, with the space-time Levy area of the
    path (Foster, dos Reis, Strange 2023; here also for a g that changes in time)."""

    scheme = SHARK
    interpretation = "ito"
    noises = ("additive",)
    references = ("foster2023",)
