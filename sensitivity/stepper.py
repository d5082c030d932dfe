"""A one-step method bound to a vector field: what the loops and the sensitivity algorithms need from it."""

from __future__ import annotations

from typing import Any, NamedTuple

from .backend import Array, Contribution, Record, Scalar


class Adjoint(NamedTuple):
    """State of a reverse sweep: cotangents of the node's state, of its slope, of the parameters, and of `t0`."""

    lam: Array
    kappa: Array | None
    theta: tuple[Array, ...]
    t0: Scalar
    h: Scalar


class Tangent(NamedTuple):
    """Tangents (one row per direction) of the node's state and of its slope."""

    u: Array
    k: Array | None


class Stepper:
    """A method bound to `rhs(t, u) -> du`; made by `Method.bind`, once per solve.

    Attributes
    ----------
    order : of the solution.
    stages : rows of the stage derivatives `K` in a record.
    fsal : whether the last stage is `f` at the end of the step, which the next step then starts from.
    one_step : whether steps can be made one at a time; else `march` makes them all.
    implicit : whether stages solve equations, so that a step may fail although `f` is finite.
    algebraic : whether the state has to satisfy constraints.
    corrections : how often `corrected` evaluates `f`.
    matrices : 1 where linear equations are solved with matrices, 0 where by products alone.
    """

    be: Any
    rhs: Any
    order: int
    stages: int
    fsal: bool = False
    one_step: bool = True
    implicit: bool = False
    algebraic: bool = False
    corrections: int = 0
    matrices: int = 1

    def march(self, run: Any, s: Any, u0: Array, rtol: Any, atol: Any, sink: Any, h: Scalar | None,
              limit: int) -> tuple[Any, Any]:
        """A whole span at once, for methods that choose their own steps (`one_step` is False); see `integrate`."""
        raise NotImplementedError

    def dilution(self, parts: Any) -> float:
        """What tolerances are to be multiplied with where the method's own norm mixes parts of these sizes."""
        del parts
        return 1.0

    @property
    def error_order(self) -> int:
        """p if the error estimate is O(h^p)."""
        return self.order

    def within(self, rtol: Any, atol: Any, norm: Any) -> Stepper:
        """The stepper that solves its equations to an error of the tolerances; without, to round-off."""
        del rtol, atol, norm
        return self

    def start(self, t: Any, u: Array) -> tuple[Array, Any]:
        """The consistent state next to a given one, and how many iterations it took to find."""
        del t
        return u, 0

    def start_vjp(self, pull: Any, t: Any, u: Array, lam: Array) -> tuple[Array, tuple[Array, ...], Any]:
        """Pull the cotangent of the consistent start `u` back to the given state, the parameters and `t`."""
        raise NotImplementedError

    def start_jvp(self, push: Any, t: Any, u: Array, du: Array, dt: Array | None) -> Array:
        """Tangents of the consistent start `u`."""
        raise NotImplementedError

    def corrected(self, t: Any, u: Array) -> Array:
        """A state between the steps, back on the constraints: dense output is less accurate in algebraic variables."""
        del t
        return u

    def costate(self, t: Any, u: Array, w: Array) -> Array:
        """The `lam` with `M^T lam = w` that the constraints of the adjoint equation allow."""
        raise NotImplementedError

    def derivative(self, t: Any, u: Array) -> Array:
        """`u'` at a state."""
        return self.rhs(t, u)

    @property
    def derivative_cost(self) -> int:
        """How often `derivative` evaluates `f`."""
        return 1

    def first(self, t: Any, u: Array) -> Array | None:
        """What the first step of a segment needs to know beforehand: `f(t, u)`, or None."""
        return self.rhs(t, u) if self.fsal else None

    def lift(self, u: Array) -> Array:
        """The vector that the steps carry, made of a state; linear. Most methods carry the state itself."""
        return u

    def lift_vjp(self, ct: Array) -> Array:
        """The transpose of `lift`."""
        return ct

    def seen(self, rows: Array) -> Array:
        """The states in what the steps carry, along the last axis; linear."""
        return rows

    def seen_vjp(self, ct: Array) -> Array:
        """The transpose of `seen`."""
        return ct

    def step(self, t: Scalar, h: Scalar, u: Array, k: Array | None) -> tuple[Array, Array]:
        """One step from `u` with the carried slope `k`: the new state and the stage derivatives `K` `(s, n)`."""
        raise NotImplementedError

    def attempt(self, t: Scalar, h: Scalar, u: Array, k: Array | None) -> tuple[Array, Array, Any]:
        """`step`, and how many iterations it took to solve its equations."""
        return (*self.step(t, h, u, k), 0)

    def first_vjp(self, pull: Any, t: Any, u: Array, kappa: Array) -> tuple[Array, tuple[Array, ...], Any]:
        """Pull the cotangent of `first` back to `u`, the parameters and `t`."""
        return pull(t, u, kappa)

    def first_jvp(self, push: Any, t: Any, u: Array, du: Array, dt: Array | None) -> Array:
        """Tangents of `first`."""
        return push(t, u, du, dt)[1]

    def carry(self, K: Array) -> Array | None:
        """The slope that the next step starts from."""
        return K[-1, :] if self.fsal else None

    def entry(self, record: Record) -> Array | None:
        """The slope that a recorded step started from."""
        return record.k[0, :] if self.fsal else None

    def retake(self, t: Scalar, h: Scalar, u: Array, k: Array | None) -> tuple[Array, Array, Any]:
        """`attempt`, once more, to be pulled back soon."""
        return self.attempt(t, h, u, k)

    def retaken(self, x: Any, dt: float | None, vector: int) -> int:
        """How many bytes a step taken again holds, for states of `vector` bytes; of the solve of `x` with step `dt`."""
        del x, dt
        return (self.stages + 1) * vector

    def error(self, t: Scalar, h: Scalar, u: Array, K: Array) -> Array:
        """The estimated error of a step; not finite where the step could not be computed."""
        raise NotImplementedError

    def restage(self, record: Record) -> Array:
        """The stages of a recorded step once more."""
        t, h, u, _ = record
        return self.step(t, h, u, self.first(self.be.time(t), u))[1]

    def interpolate(self, record: Record, ts: Any) -> Array:
        """Dense output of one step at several times: `(len(ts), n)`, of what the steps carry."""
        raise NotImplementedError

    def slope(self, record: Record, ts: Any) -> Array:
        """Derivative in time of the dense output of one step: `(len(ts), n)`."""
        raise NotImplementedError

    def interpolate_vjp(self, time: bool) -> Any:
        """Pullback of `interpolate`: `(record, ts, ct) -> (Contribution, ct of ts)`."""
        raise NotImplementedError

    def vjp(self, pull: Any, record: Record, out: Contribution | None, last: Any, time: bool,
            state: Adjoint, add: Any = None) -> Adjoint:
        """Pull cotangents across one step; `pull(t, u, ct) -> (ct_u, ct_theta, ct_t)`.

        With `time`, also the cotangents of `t0` (every node moves with it) and of the last step's size.
        `add(sum, ct_theta, t, u)` takes up what a product at `(t, u)` gave; without it, tuples of arrays are added.
        """
        raise NotImplementedError

    def jvp(self, push: Any, record: Record, dt: Array | None, dh: Array | None,
            state: Tangent) -> tuple[Tangent, Array]:
        """Push `m` tangents across one step; `push(t, u, du, dt) -> (f, df)`: the new state and `dK` `(s, m, n)`.

        `dt` and `dh`, shape `(m,)`, move the start of the step and change its size.
        """
        raise NotImplementedError

    def evaluations(self, attempts: Any, known: bool) -> Any:
        """How often `f` was evaluated in `attempts` steps, but for iterations; `known` tells that no first step size
        had to be found."""
        raise NotImplementedError

    def products(self, steps: Any, silent: int, size: int) -> Any:
        """Products with the transposed derivatives of `f`, for a state of this size, in the reverse sweep over `steps`
        steps; `silent` tells that no output needs the last stage of the newest."""
        del size
        return (self.stages - self.fsal) * steps + (self.fsal and 1 - silent)

    def algebra(self, attempts: Any, iterations: Any, adaptive: bool) -> tuple[Any, Any, Any]:
        """Jacobians, factorisations and linear solves."""
        del attempts, iterations, adaptive
        return 0, 0, 0

    def starting(self, known: bool) -> tuple[Any, Any, Any]:
        """The same for the slopes at the start; `known` as in `evaluations`."""
        del known
        return 0, 0, 0
