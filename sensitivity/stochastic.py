"""Stochastic differential equations: the problem, its field driven by a path, and the checks that belong to it.

    du = f(t, u, p) dt + g(t, u, p) dW

in the sense of Ito or of Stratonovich. The solve sees it as a field `rhs(a, u) = delta f + g w + (g_u g) v` whose
first argument `a = [t, delta, w, v]` holds time and what the path does during a step (`stochasticmethods.py`). So all
products with derivatives, of f and of g, are products of one field, and everything that serves ODEs serves here.
Increments of the path are computed for all steps at once, from the path's own arrays, wherever they are needed:
forward, replay, reverse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from .backend import Array, Backend, Scalar
from .errors import InputError, SignatureError, TimesError, UnsupportedCombination, undefined
from .noise import DEEPEST, Abreast, Parallel, Path, TabulatedPath, Tree, words
from .problems import Problem, pair
from .stochasticchecks import action, check_path
from .stochasticmethods import Scheme, StochasticMethod
from .system import Field

FREE = 18  # levels of the tree of a key where steps are adaptive
NOISES = ("diagonal", "scalar", "additive", "general")
INTERPRETATIONS = ("ito", "stratonovich")


@dataclass(frozen=True, eq=False)
class SDEProblem(Problem):
    """Initial value problem `du = f(t, u, p) dt + g(t, u, p) dW`, `u(t0) = u0`.

    Parameters
    ----------
    f, g : callable
        Drift and diffusion. `g(t, u, p)` has the structure and shapes of `u`, or, for general noise, one more axis of
        length m at the end of each array.
    u0 : pytree of arrays
        Initial state; many members in one array make a batch, each entry with a noise of its own when diagonal.
    tspan : (t0, t1)
        Start and end, `t0 < t1`.
    p : pytree, optional
        Parameters handed to `f` and `g`.
    noise : "diagonal", "scalar", "additive" or "general"
        One noise per entry of u (entry i of g depends on entry i of u only); one noise for all; g independent of u
        (shaped as for diagonal or for general noise); m noises.
    interpretation : "ito" or "stratonovich"
        Which integral is meant; for additive noise they are the same.
    key : int or array of two integers
        The path, where `brownian` is not given: a Brownian tree as deep as the steps need.
    brownian : VirtualBrownianTree or TabulatedPath, optional
        The path.

    Raises
    ------
    SignatureError
        `f` or `g` is not callable.
    InputError
        `tspan` is not a pair; `noise`, `interpretation` or `brownian` is none of the possible values.
    """

    f: Callable[..., Any]
    g: Callable[..., Any]
    u0: Any
    tspan: tuple[Any, Any]
    p: Any = None
    _: dataclasses.KW_ONLY
    noise: str = "diagonal"
    interpretation: str = "ito"
    key: Any = 0
    brownian: Any = None

    def __post_init__(self) -> None:
        for name in ("f", "g"):
            if not callable(value := getattr(self, name)):
                raise SignatureError(f"{name} is {type(value).__name__}, which cannot be called",
                                     "drift and diffusion are functions of time, state and parameters",
                                     f"SDEProblem(f, g, u0, tspan, p) with def {name}(t, u, p): ...")
        for name, allowed in (("noise", NOISES), ("interpretation", INTERPRETATIONS)):
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"{name}={value!r} is none of the possible values",
                                 f"they are {', '.join(map(repr, allowed))}", f"{name}={allowed[0]!r}")
        if self.brownian is not None and not isinstance(self.brownian, Path):
            raise InputError(f"brownian is {type(self.brownian).__name__}, which is no path",
                             "steps ask it for increments at any time",
                             "brownian=sa.VirtualBrownianTree(key, tspan, tol), or sa.TabulatedPath(ts, W)")
        object.__setattr__(self, "tspan", pair(self.tspan))


@dataclass(frozen=True, eq=False)
class Members(SDEProblem):
    """Many members as one problem: arrays have the members in front, and `abreast` says how entries meet the paths."""

    abreast: Abreast | None = None


# -- what the solve works with ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stochastic:
    """What a run knows of its kind; on a `coarse` path there are points that are further apart than the steps."""

    interpretation: str
    additive: bool
    coarse: bool
    name = "sde"

    @classmethod
    def of(cls, be: Backend, prob: SDEProblem, dt: float | None) -> Stochastic:
        """What is to be known of a problem solved with steps of this size, or of any."""
        known = be.concrete_times(be.asarray(prob.brownian.ts)) if isinstance(prob.brownian, TabulatedPath) else None
        coarse = known is not None and (
            dt is None or any(b - a > dt * (1.0 + 1e-9) for a, b in pairwise(known)))
        return cls(prob.interpretation, prob.noise == "additive", coarse)

    def products(self, run: Any, x: Any) -> tuple[Any, Any]:
        """Run and inputs with which derivatives of the field are made."""
        return run, x

    def algorithm(self, algorithm: Any) -> Any:
        """The algorithm for SDEs, or `UnsupportedCombination` if there is none."""
        from .algorithms.pathwise import adapted

        algorithm = adapted(algorithm)
        if self.name not in algorithm.kinds:
            why, fix = REFUSED.get(algorithm.name, ("it was made for other problems", EXACT))
            raise UnsupportedCombination(f"{algorithm.name} does not go with an SDEProblem", why, fix)
        return algorithm

    def refuse_times(self, names: tuple[str, ...]) -> None:
        """Raise `UnsupportedCombination` if derivatives with respect to times are asked for."""
        for name in names:
            if name in ("t0", "t1", "saveat"):
                raise UnsupportedCombination(*undefined(name))


EXACT = "sensealg=RecursiveCheckpointAdjoint() or ForwardADSensitivity(), exact for the computed solution"
SMOOTH = ("its quadrature needs an integrand that is smooth in time, and here it is driven by noise",
          "sensealg=InterpolatingAdjoint(), or RecursiveCheckpointAdjoint(), exact for the computed solution")
REFUSED = {
    "QuadratureAdjoint": SMOOTH,
    "GaussAdjoint": SMOOTH,
    "ForwardOverAdjoint": ("second derivatives through steps with noise have not been written",
                           "differences of sa.gradient on the same path; on JAX jax.hessian of a solve with "
                           "sensealg=DirectAdjoint()"),
    "ReversibleAdjoint": ("its pair of solutions with a coupling of its own is made of deterministic steps",
                          "ReversibleAdjoint() without options, with method ReversibleHeun()"),
}


@dataclass(frozen=True)
class Pair:
    """Drift and diffusion as one function; of the captured arrays the first `split` are the drift's."""

    f: Callable[..., Any]
    g: Callable[..., Any]
    split: int

    @classmethod
    def hoisted(cls, be: Any, prob: Any, t: Any, u: Any, p: Any) -> tuple[Pair, tuple[Array, ...]]:
        """What `f` and `g` close over made explicit (`Backend.hoist`)."""
        f, with_f = be.hoist(prob.f, t, u, p)
        g, with_g = be.hoist(prob.g, t, u, p)
        return cls(f, g, len(with_f)), (*with_f, *with_g)

    @property
    def live(self) -> tuple[Array, ...]:
        """What `f` and `g` find by themselves."""
        return (*getattr(self.f, "live", ()), *getattr(self.g, "live", ()))

    def __call__(self, t: Any, u: Any, p: Any, *captured: Array) -> list[Any]:
        k = self.split
        return [self.f(t, u, p, *captured[:k]), self.g(t, u, p, *captured[k:])]


@dataclass(frozen=True, kw_only=True)
class NoisyField(Field):
    """A field driven by a path.

    Attributes
    ----------
    acts : "each", "one" or "all"
        How g meets the noise: entry by entry, one noise for all entries, or as a matrix.
    m : number of noises.
    squares : whether the term of Milstein's method is wanted.
    pieces : whether the right-hand side is drift and diffusion one behind the other, not yet driven.
    corrected : whether the drift is that of the Stratonovich equation with the same solution as this Ito equation.
    law, kept : the path's law, and how many arrays at the end of the constants are its own, before t0 and t1.
    dt, steps : step size, and number of steps; free steps have neither.
    additive : whether g does not depend on u.
    dtype : of the state, and so of all that the stages are told.
    unscaled : whether `delta` is one in every stage.
    """

    acts: str
    m: int
    squares: bool
    law: Any
    kept: int
    dt: float | None
    steps: int
    additive: bool
    dtype: Any
    corrected: bool = False
    pieces: bool = False
    unscaled: bool = False

    @property
    def free(self) -> bool:
        """Whether steps of any size may be taken."""
        return self.dt is None

    def argument(self, be: Backend, t: Any) -> Array:
        like = be.asarray([0.0], dtype=self.dtype, device=be.device(be.asarray(t)))
        more = self.squares * (1 if self.acts == "all" else self.m)
        return be.xp.concat([be.vector([t], like), be.vector([1.0] * (1 + self.m + more), like)])

    def bind(self, be: Backend, theta: tuple[Array, ...], constants: tuple[Array, ...]) -> DrivenRHS:
        k = self.p.count
        return DrivenRHS(self, be, self.p.join(be, theta[:k], constants), theta[k:k + self.captured], constants)


class DrivenRHS:
    """`rhs(a, u) = delta f + g w + (g_u g) v` at `a = [t, delta, w, v]`; the last term as `_squares` has it."""

    def __init__(self, field: NoisyField, be: Any, p: Any, captured: tuple[Array, ...], constants: Any) -> None:
        self.field, self.be, self.p, self.captured, self.constants = field, be, p, captured, constants
        self.reshapes = field.u.opener(be), field.u.closer(be)

    def __call__(self, a: Array, u: Array) -> Array:
        field, be, t = self.field, self.be, a[0]
        f, g = self.parts(be, t, u)
        if field.pieces:
            return be.xp.concat([f, be.xp.reshape(g, (-1,))])
        out = self.combined(a, f, g)
        if field.squares:
            out = out + self._squares(a, t, u, g)
        if field.corrected:
            out = out - (0.5 * a[1]) * self._correction(t, u, g)
        return out

    def _squares(self, a: Array, t: Array, u: Array, g: Array) -> Array:
        """The term of Milstein's method; for general noise `v (g w)_u (g w) - delta/2 sum_k (g_k)_u g_k`."""
        m, through = self.field.m, self.be.differentiable()
        w, v = a[2:2 + m], a[2 + m:]
        if self.field.acts != "all":
            return self.driven(self.be.along(lambda x: self.parts(through, t, x)[1], u, g), v)
        twice = self.be.along(lambda x: self.driven(self.parts(through, t, x)[1], w), u, self.driven(g, w))
        return v[0] * twice - (0.5 * a[1]) * self._correction(t, u, g)

    def _correction(self, t: Array, u: Array, g: Array) -> Array:
        """`sum_k (g_k)_u g_k`, twice the difference of the two drifts; g as in `parts`."""
        through = self.be.differentiable()
        if self.field.acts != "all":
            return self.be.along(lambda v: self.parts(through, t, v)[1], u, g)
        columns = [self.be.along(lambda v, k=k: self.parts(through, t, v)[1][:, k], u, g[:, k])
                   for k in range(self.field.m)]
        return sum(columns[1:], columns[0])

    def parts(self, be: Any, t: Any, u: Array) -> tuple[Array, Array]:
        """Drift `(n,)`, and diffusion `(n,)` or `(n, m)`."""
        field = self.field
        opened, closed = self.reshapes if be is self.be else (field.u.opener(be), field.u.closer(be))
        f, g = field.f(t, opened(u), self.p, *self.captured)
        if field.acts != "all":
            return closed(f), closed(g)
        rows = [be.xp.reshape(x, (-1, field.m)) for x in be.flatten(g)[0]]
        return closed(f), rows[0] if len(rows) == 1 else be.xp.concat(rows)

    def combined(self, a: Array, f: Array, g: Array) -> Array:
        """`delta f + g w`."""
        noise = self.driven(g, a[2:2 + self.field.m])
        return f + noise if self.field.unscaled else a[1] * f + noise

    def diffusion(self, pieces: Array, n: int) -> Array:
        """The diffusion in the pieces, as `parts` gives it."""
        m = self.field.m
        return self.be.xp.reshape(pieces[n:n + n * m], (n, m)) if self.field.acts == "all" else pieces[n:2 * n]

    def driven(self, g: Array, w: Array) -> Array:
        """The diffusion times what the noises do."""
        if self.field.acts == "all":
            return g @ self.be.xp.astype(w, g.dtype)
        return g * w if self.field.acts == "each" else g * w[0]

    def spread(self, ct: Array, w: Array) -> Array:
        """The transpose of `driven` in g, flat."""
        if self.field.acts == "all":
            return self.be.xp.reshape(ct[:, None] * self.be.xp.astype(w, ct.dtype)[None, :], (-1,))
        return ct * w if self.field.acts == "each" else ct * w[0]

    def stages(self, scheme: Scheme) -> Callable[[Scalar, Scalar], Array]:
        """`(t, h) -> (s, 2 + m ...)`: the first arguments of the stages of the step from `t` to `t + h`."""
        field, be, xp = self.field, self.be, self.be.xp
        *_, t0, t1 = self.constants[-field.kept - 2:]
        if field.dt is None:
            def drive(t: Scalar, h: Scalar) -> Array:
                s = be.vector([t, t + 0.5 * h, t + h], t0)
                h = be.vector([h], t0)[:, None]
                h = xp.where(h > 0.0, h, xp.ones_like(h))  # a loop that is through may run on without a step
                return self._arguments(scheme, s[:1], h, *self._path(s, 2))[0, ...]

            return drive
        n = be.asarray(range(field.steps + 1), dtype=t0.dtype, device=be.device(t0))
        s = xp.minimum(t0 + field.dt * n, t1)
        h = s[1:] - s[:-1]
        h = xp.where(h > 0.0, h, xp.full_like(h, field.dt))[:, None]
        arguments = cache(lambda: self._arguments(scheme, s[:-1], h, *self._path(s, 1)))  # a reverse pass may need none
        if be.traced:
            arguments()  # outside the loops that it is for
        start, dt = be.scalar(t0), field.dt
        return lambda t, h: be.pick(arguments(), (be.scalar(t) - start) / dt)

    def _path(self, s: Array, parts: int) -> tuple[Array, Array]:
        """Increments over intervals that `s` divides into so many parts each, `(k, parts, m)`, and the integrals of the
        path from the start of each interval on, `(k, m)`."""
        field, xp = self.field, self.be.xp
        W, A = field.law(self.be, tuple(self.constants[-field.kept - 2:-2]), field.m, s)
        k = (s.shape[0] - 1) // parts
        length = xp.reshape(s[parts::parts] - s[:-1:parts], (k, 1))
        return (xp.reshape(W[1:, :] - W[:-1, :], (k, parts, field.m)),
                A[parts::parts, :] - A[:-1:parts, :] - length * W[:-1:parts, :])

    def _arguments(self, scheme: Scheme, t: Array, h: Array, parts: Array, area: Array) -> Array:
        """First arguments of the stages, `(k, s, 2 + m ...)`, of steps from `t` `(k,)` of sizes `h` `(k, 1)`."""
        xp = self.be.xp
        dW = xp.sum(parts, axis=1)
        H = area / h - 0.5 * dW
        rows = []
        for i, c in enumerate(scheme.times):
            w = scheme.alpha[i] * dW + scheme.beta[i] * H
            if scheme.gamma:
                w = w + scheme.gamma[i] * (parts[:, 0, :] - parts[:, 1, :])
            row = [t[:, None] + c * h, xp.full_like(h, scheme.delta[i]), w / h]
            v = 0.5 * h if self.field.acts == "all" else 0.5 * (dW * dW / h - 1.0)
            rows.append(xp.concat(row + [v] * scheme.squares, axis=1))
        return xp.astype(xp.stack(rows, axis=1), self.field.dtype)


def levels(dt: float | None, steps: int) -> int:
    """How often the tree of a key is halved: until there is a part for each step, or often enough for any step."""
    return FREE if dt is None else min(DEEPEST, max(0, (steps - 1).bit_length()))


def drive(be: Any, prob: SDEProblem, method: StochasticMethod, base: Field, g: Any, like: Array, t0: Array, t1: Array,
          dt: float | None, steps: int) -> tuple[NoisyField, tuple[Array, ...]]:
    """The driven field, and the arrays that it finds at the end of the constants; `g` is `g` at the start."""
    acts, m = action(be, prob, base, g)
    if be.is_complex(like):
        raise UnsupportedCombination("u0 is complex", "the noise is real", "u0 as pairs of real numbers")
    c0, c1 = be.concrete(t0), be.concrete(t1)
    if c0 is not None and c1 is not None and not c1 > c0:
        raise TimesError(f"tspan=({c0:g}, {c1:g}) of an SDEProblem does not run forwards",
                         "noise at later times is independent of the state",
                         f"tspan=({min(c0, c1):g}, {max(c0, c1):g})")
    path, abreast = prob.brownian, getattr(prob, "abreast", None)
    if abreast and acts == "all":
        raise UnsupportedCombination("members whose g is a matrix cannot share one state",
                                     "their noises would meet in one matrix", "one solve for each")
    if path is None:
        law: Any = Tree(levels(dt, steps))
        arrays: tuple[Array, ...] = (prob.key if abreast and abreast.own else words(be, prob.key), t0, t1)
    else:
        law, arrays = path.law, path.arrays(be, like)
        check_path(be, path, abreast.noises if abreast else m, dt, c0, c1)
    if abreast:
        law, acts, m = Parallel(law, abreast), "each", base.u.size
    field = NoisyField(base.f, base.u, base.p, base.captured, acts=acts, m=m, squares=method.scheme.squares, law=law,
                       kept=len(arrays), dt=dt, steps=steps, additive=prob.noise == "additive", dtype=like.dtype,
                       unscaled=all(v == 1.0 for v in method.scheme.delta))
    return field, (*arrays, t0, t1)
