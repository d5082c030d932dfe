"""What a framework must provide, and what it gets for free.

A backend owns arrays, loops and derivatives of callables; algorithms own steps and formulas. `Loops` says what a
vector and a scalar are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from . import tree as _tree
from .directional import Directional
from .errors import UnsupportedCombination
from .linearsystems import LinearSystems
from .lookback import Lookback
from .loops import Loops
from .records import Array, Contribution, Mark, Record, Scalar

__all__ = ["Array", "Backend", "Contribution", "Loops", "Mark", "Record", "Scalar", "Tree", "Unbatched"]

Tree = Any


class Unbatched(UnsupportedCombination):
    """`Backend.rows` cannot evaluate a function for all rows at once."""


class Backend(Lookback, LinearSystems, Directional):
    """One array framework.

    Required: `name`, `modes`, `xp`, `is_array`; `custom_ad` when the framework has its own AD;
    `vjp` if `"reverse" in modes`, `jvp` if `"forward" in modes`. Everything else has a default that uses the
    array API only.

    Attributes
    ----------
    name : how users name it, `solve(..., backend=name)`.
    modes : subset of `{"reverse", "forward"}`: derivatives of a callable that the framework offers.
    complex : whether complex numbers flow through (needed by `ComplexStepVJP`).
    opaque : whether a user function may leave the AD without an error, so that products are checked by value.
    sparse_lu : whether Jacobians may be SciPy sparse matrices, and `factorize_sparse` is there.
    batches : whether `rows` evaluates a function for all rows at once.
    attaches : whether `attach` attaches anything, so that any solve may be differentiated later.
    compiles : whether `ReverseVJP(compile=True)` changes anything, where `uncompiled` has no objection.
    how_to_get_ad : what to say when AD is missing but could be installed.
    holds_numpy : whether its arrays are NumPy's own, which SciPy takes.
    namespace, array_call, copy_call : how users write the namespace, a new array and a copying method, for hints.
    """

    name: str
    modes: frozenset[str] = frozenset()
    opaque = False
    holds_numpy = False
    attaches = False
    batches = False
    compiles = False
    sparse_lu = False
    complex = True
    how_to_get_ad = ""
    namespace, array_call, copy_call = "xp", "xp.asarray", "copy"
    xp: Any = None

    # -- arrays -----------------------------------------------------------------------------------------------

    def bound(self, like: Array) -> Backend:
        """The backend for states with the dtype and device of `like`; times that `f` receives have them too."""
        del like
        return self

    def suited(self, rhs: Callable, t: Any, u: Array) -> Backend:
        """The backend for steps of `rhs(t, u)`: this one, or its like with loops that suit the vector field better."""
        del rhs, t, u
        return self

    def flatten(self, tree: Tree) -> tuple[list[Any], Any]:
        return _tree.flatten(tree)

    def unflatten(self, structure: Any, leaves: Sequence[Any]) -> Tree:
        return _tree.unflatten(structure, leaves)

    def asarray(self, x: Any, dtype: Any = None, device: Any = None) -> Array:
        return self.xp.asarray(x, dtype=dtype, device=device)

    def default_float(self) -> Any:
        return self.xp.float64

    def time_dtype(self, dtype: Any) -> Any:
        """Dtype in which times are kept beside states of `dtype`."""
        del dtype
        return self.default_float()

    def is_array(self, x: Any) -> bool:
        """Whether `x` is an array of this framework."""
        raise NotImplementedError

    def is_float(self, x: Any) -> bool:
        """Whether an array holds real or complex floating-point numbers."""
        return bool(self.xp.isdtype(x.dtype, ("real floating", "complex floating")))

    def is_complex(self, x: Any) -> bool:
        return bool(self.xp.isdtype(x.dtype, "complex floating"))

    def eps(self, dtype: Any) -> float:
        return float(self.xp.finfo(dtype).eps)

    def device(self, x: Array) -> Any:
        return getattr(x, "device", None)

    def scalar(self, x: Any) -> Scalar:
        """A time as the loops use it: a Python float here, a 0-d array on tracing backends."""
        return float(x)

    def scalars(self, ts: Any) -> Any:
        """Many times: a list of floats here, a vector on tracing backends."""
        return [float(t) for t in ts]

    def concrete(self, x: Any) -> float | None:
        """The value of a scalar if it is known now, else None."""
        return float(x)

    def concrete_times(self, ts: Any) -> list[float] | None:
        """The values of many times if they are known now, else None."""
        return [float(t) for t in ts]

    def time_vector(self, ts: Any, like: Array) -> Array:
        """Times as an array for the user."""
        return self.xp.asarray(ts, dtype=self.time_dtype(like.dtype), device=self.device(like))

    def real_dtype(self, dtype: Any) -> Any:
        """The real dtype of the same precision."""
        return self.xp.finfo(dtype).dtype

    def times(self, t: Scalar, h: Scalar, c: Sequence[float]) -> Sequence[Any]:
        """Times `t + c h` as the user's `f` receives them."""
        return [self.time(t + c_i * h) for c_i in c]

    def time(self, t: Scalar) -> Any:
        """One time as the user's `f` receives it."""
        return self.xp.asarray(t)

    def vector(self, xs: Sequence[Scalar], like: Array) -> Array:
        """A vector of scalars with the dtype and device of `like`."""
        return self.xp.asarray(xs, dtype=like.dtype, device=self.device(like))

    def unit_rows(self, m: int, n: int, start: int, like: Array) -> Array:
        """Matrix `(m, n)` with a one at `(start + j, j)` where that row exists, else zeros."""
        return self.xp.asarray(self.xp.eye(m, n, k=-start, dtype=like.dtype), device=self.device(like))

    def dot(self, a: Array, b: Array) -> Scalar:
        return self.scalar(self.xp.sum(a * b))

    def rms(self, x: Array) -> Scalar:
        """Root mean square as a scalar."""
        magnitude = self.xp.abs(x)
        return self.scalar(self.xp.sqrt(self.xp.mean(magnitude * magnitude))) if x.shape[0] else 0.0

    def scaled(self, e: Array, u0: Array, u1: Array, rtol: Any, atol: Any) -> Array:
        """`e / (atol + rtol max(|u0|, |u1|))`, the error measured in tolerances."""
        xp = self.xp
        return e / (atol + rtol * xp.maximum(xp.abs(u0), xp.abs(u1)))

    def zeros(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(self.xp.zeros_like(x) for x in arrays)

    def add(self, a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        """Sum of two tuples of arrays; `a` is not used afterwards, so it may be overwritten."""
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def nan_where(self, bad: Any, x: Array) -> Array:
        """`x`, or NaN everywhere (its derivatives too) if the scalar `bad` holds."""
        return x * math.nan if bad else x

    # -- ensembles and processes ------------------------------------------------------------------------------

    def members(self, one: Callable, rows: list[Array]) -> Any:
        """`one(i, [row_i of each array])`, solutions or gradients, for every i; as one, with the members in front.

        A tracing backend may call `one(None, rows)` once for all.
        """
        from .ensemble import stacked

        return stacked(self, [one(i, [x[i, ...] for x in rows]) for i in range(rows[0].shape[0])])

    def rows(self, f: Callable[[list[Array]], list[Array]], arrays: list[Array]) -> list[Array]:
        """`f([row_i of each array])` for every i, each of its results stacked; or `Unbatched` where `batches` holds."""
        results = [f([x[i, ...] for x in arrays]) for i in range(arrays[0].shape[0])]
        return [self.xp.stack(column) for column in zip(*results, strict=True)]

    def host(self, x: Array) -> Any:
        """Values as a NumPy array, if they can be had; else `x`."""
        return x

    def setup(self) -> Any:
        """Settings of the framework that results depend on, in a form that pickles; `restore` puts them in force."""
        return None

    def restore(self, setup: Any) -> None:
        """Put the settings of another process in force."""

    def allow_float64(self) -> None:
        """Let arrays be float64, where a framework has to be told."""

    # -- random numbers ---------------------------------------------------------------------------------------

    def word(self) -> Any:
        """An integer dtype that holds 32-bit words, either exactly or with room for their sums."""
        return self.xp.int64

    def counters(self, n: int, like: Array) -> Array:
        """The words 0, 1, ..., n - 1 on the device of `like`."""
        return self.xp.arange(n, dtype=self.word(), device=self.device(like))

    def threefry(self, k0: Array, k1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
        """The Threefry-2x32 generator; see `threefry.threefry`."""
        from .threefry import threefry

        return threefry(k0, k1, x0, x1)

    # -- running ----------------------------------------------------------------------------------------------

    def run(self, algorithm: Any, name: str, run: Any, args: tuple[Any, ...], wanted: frozenset[str]) -> Any:
        """`algorithm.<name>(run, *args, wanted)` on plain arrays; a backend may compile it once per hashable `run`."""
        with self.quiet():
            return getattr(algorithm, name)(run, *args, wanted)

    def uncompiled(self, algorithm: Any, run: Any) -> str | None:
        """Why the steps and products of this solve cannot be compiled, or None."""
        raise NotImplementedError

    def known(self, run: Any, x: Any) -> tuple[Any, Any] | None:
        """The run and its inputs as plain arrays whose values are known now, or None."""
        flat = [self.xp.reshape(v, (-1,)) for v in (x.u0, *x.theta, x.t0, x.t1)]
        there = all(self.concrete(v[0]) is not None for v in flat if v.shape[0])
        return (run, x) if there else None

    def look(self, at: Callable, run: Any, x: Any) -> list[float] | None:
        """The numbers of the vector `at(run, x)`, or None where they are not known now; compiled where the framework
        compiles."""
        known = self.known(run, x)
        if known is None:
            return None
        with self.quiet():
            return known[0].be.concrete_times(at(*known))

    def peak(self, call: Callable[[], Any], like: Array) -> tuple[int | None, str | None]:
        """The most bytes of arrays that a call holds at one time, on the device of `like`, and how that is known; None
        where it cannot be told."""
        del like
        call()
        return None, None

    def quiet(self) -> Any:
        """Context in which the framework records nothing for differentiation."""
        return contextlib.nullcontext()

    def report(self, progress: Callable, fraction: Scalar, t: Scalar) -> None:
        progress(fraction, t)

    # -- derivatives ------------------------------------------------------------------------------------------

    def attach(self, algorithm: Any, run: Any, x: Any) -> tuple[Any, Any]:
        """`algorithm.plain(run, x)` with the algorithm's derivatives attached to the framework's own AD."""
        return algorithm.plain(run, x)

    def hoist(self, f: Callable, t: Any, u: Tree, p: Tree) -> tuple[Callable, tuple[Array, ...]]:
        """`f` with what it closes over made explicit: `(g, captured)`, `g(t, u, p, *captured)`."""
        del t, u, p
        return f, ()

    def vjp(self, f: Callable, theta: tuple[Array, ...], time: bool, params: bool) -> Callable:
        """`pull(t, u, ct) -> (ct_u, ct_theta, ct_t)` for `f(theta)(t, u)`.

        `ct_t` is 0.0 unless `time`; `ct_theta` is () unless `params`.
        """
        raise NotImplementedError

    def value_and_vjp(self, f: Callable, theta: tuple[Array, ...], time: bool, params: bool) -> Callable:
        """`at(t, u) -> (f, pull)` with `pull(ct)` as in `vjp`: one evaluation, kept for its product."""
        rhs, pull = f(theta), self.vjp(f, theta, time, params)
        return lambda t, u: (rhs(t, u), lambda ct: pull(t, u, ct))

    def jvp(self, f: Callable, theta: tuple[Array, ...], d_theta: tuple[Array, ...]) -> Callable:
        """`push(t, u, du, dt) -> (f, df)` along many directions at once.

        `du` has shape `(m, n)`, every `d_theta` leaf `(m, *leaf shape)`, `dt` shape `(m,)` or None.
        """
        raise NotImplementedError

    def second(self, f: Callable, theta: tuple[Array, ...], d_theta: tuple[Array, ...], params: bool) -> Callable:
        """`turn(t, u, w, nu, lam) -> (u_bar, theta_bar, w_bar)`: with `phi = nu . f + lam . (f_u w + f_theta d_theta)`,

        `u_bar` and `theta_bar` are its derivatives in `u` and `theta`, `w_bar = f_u^T lam`; `theta_bar` is () unless
        `params`.
        """
        raise NotImplementedError

    def loss_second(self, loss: Callable, args: tuple[Array, ...],
                    d: tuple[Array, ...]) -> tuple[Any, tuple[Array, ...], tuple[Array, ...]] | None:
        """Value, gradient, and Hessian times `d`, of a scalar user function; None where the framework cannot."""
        del loss, args, d
        return None

    def jacobian(self, rhs: Callable) -> Callable:
        """`jac(t, u) -> (n, n)`, the derivative of `rhs(t, u)` with respect to `u`."""
        push = self.jvp(lambda _: rhs, (), ())

        def jac(t: Any, u: Array) -> Array:
            n = u.shape[0]
            return push(t, u, self.unit_rows(n, n, 0, u), None)[1].T

        return jac

    def pulls(self, rhs: Callable) -> Callable:
        """`pull(t, u, rows) -> rows f_u` for `rhs(t, u)`, one product with the transpose for each row."""
        pull = self.vjp(lambda _: rhs, (), False, False)
        return lambda t, u, rows: self.gathered(self.scan(lambda _, x: (0, pull(t, u, x[0])[0]), 0, (rows,))[1])

    def keep(self, x: Array, value: Any) -> None:
        """Let `kept(x)` find `value` for as long as this very array lives, if there is room."""

    def kept(self, x: Array) -> Any:
        """What was kept with this very array, or None."""
        del x
        return None

    def concrete_matrix(self, A: Array) -> Any:
        """A matrix as NumPy numbers if they are known now, else None."""
        rows = [self.concrete_times(A[i, :]) for i in range(A.shape[0])]
        return None if None in rows else _numbers(rows)

    def along(self, f: Callable, u: Array, du: Array) -> Array:
        """Derivative of `f` at `u` along `du` by forward mode; the framework can differentiate it once more."""
        raise NotImplementedError

    def fixed(self, x: Any, name: str) -> Any:
        """`x`, of which no derivative may be asked: one that is raises `UnsupportedCombination` with the `name`."""
        del name
        return x

    def loss_vjp(self, loss: Callable, args: tuple[Array, ...]) -> tuple[Any, tuple[Array, ...]] | None:
        """Value and gradient of a scalar user function of arrays, or None where the framework cannot."""
        del loss, args
        return None

    def recording(self) -> bool:
        """Whether the framework records operations for AD as they run, and does so now."""
        return "reverse" in self.modes and not (self.traced or self.opaque)

    # -- the first-call check ----------------------------------------------------------------------------------

    def evaluate(self, f: Callable, t: Any, u: Tree, p: Tree) -> Any:
        """Call `f` for inspection; a tracing backend returns shapes and dtypes only."""
        return f(t, u, p)

    def copy(self, x: Array) -> Array:
        return self.xp.asarray(x, copy=True)

    def rows_in(self, memory: Any, rows: int, like: Array) -> Array:
        """So many vectors like `like` as the rows of a matrix that shares the start of a writable buffer."""
        raise UnsupportedCombination(f"spill=True is not available on the {self.name} backend",
                                     "its arrays do not lie in a file", "memory= or checkpoints=")

    def write(self, row: Array, x: Array) -> None:
        """Put the vector `x` into a row of `rows_in`."""
        row[...] = x

    def read(self, row: Array, like: Array) -> Array:
        """A row of `rows_in` as a vector of its own on the device of `like`."""
        del like
        return self.copy(row)

    def connected(self, f: Callable, t: Any, u: Array, p: Tree) -> bool | None:
        """Whether the framework's AD sees that `f` depends on `u`; None if it cannot tell."""
        del f, t, u, p
        return None


def _numbers(rows: list[Any]) -> Any:
    from .registry import registry

    return registry().backend("numpy").xp.asarray(rows)
