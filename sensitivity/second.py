"""Second derivatives of a solve: the adjoint of the tangent equation.

With `u' = f(t, u, p)` and its tangent `w' = f_u w + f_p dp` along a direction `(du0, dp)`, let `<l, w>` weigh the
tangent at the outputs. Its gradient is the direction's row of the second derivative. The adjoint of the pair `(u, w)`
is the tangent of the adjoint of `u` (both orders give the same numbers): with cotangents `(nu, lam)`,

    lam' = -f_u^T lam,    nu' = -f_u^T nu - (f_uu w + f_up dp)^T lam,
    mu'  = -f_p^T nu - (f_pu w + f_pp dp)^T lam.

So every adjoint algorithm that needs only `f` and products with its derivatives gives second derivatives when it is
handed the pair: `TangentField` is its vector field, `TangentVJP` its products. With exact algorithms the steps are
those of `u` alone, and the result is the exact second derivative of the computed solution. Reference: Ozyurt and
Barton 2005, SIAM J. Sci. Comput. 26, section 2 (directional second-order adjoints).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .algorithms.base import Outputs, Tangents
from .assembled import WorstPart
from .backend import Array, Backend
from .errors import NumericalDerivativeWarning, UnsupportedCombination
from .integrate import Run
from .system import Field, Inputs, Layout, Products
from .vjp import VJP, FiniteDifferenceVJP, ForwardVJP, Pull, ReverseVJP, _through


@dataclass(frozen=True)
class TangentField(Field):
    """The vector field of state and tangent; `run` is the run of the state alone.

    The direction of the parameters, and a state, are the last of the inputs' `constants`.
    """

    run: Any = None

    @property
    def n(self) -> int:
        return self.run.field.u.size

    def opened(self, theta: tuple[Array, ...], constants: tuple[Array, ...]) -> tuple[Inputs, tuple[Array, ...]]:
        """The inputs of the state alone, and the direction of the parameters."""
        own = len(constants) - len(theta) - 1
        return Inputs(constants[-1], theta, None, None, None, constants[:own], None, None), constants[own:-1]

    def bind(self, be: Any, theta: tuple[Array, ...], constants: tuple[Array, ...]) -> Callable[[Any, Array], Array]:
        x, d_theta = self.opened(theta, constants)
        push = self.run.vjp.pushforward(self.run, x, tuple(v[None, ...] for v in d_theta))
        n = self.n

        def rhs(t: Any, z: Array) -> Array:
            f, df = push(t, z[:n], z[None, n:], None)
            return be.xp.concat([f, df[0, :]])

        return rhs

    def state(self, be: Any, u: Array) -> Any:
        return self.run.field.state(be, u[:self.n])


@dataclass(frozen=True)
class TangentVJP(VJP):
    """Products with the derivatives of a `TangentField`: second derivatives of `f` by the framework's AD, or, where
    first ones are not made by AD, central differences of first ones."""

    def pullback(self, run: Run, x: Inputs, *, time: bool = False, params: bool = True) -> Pull:
        be, field = run.be, run.field
        assert isinstance(field, TangentField)
        assert not time
        n, (inner, d_theta) = field.n, field.opened(x.theta, x.constants)
        if by_ad(field.run):
            turn = be.second(_through(field.run, inner), inner.theta, d_theta, params)
        else:
            turn = _differences(field.run, inner, d_theta, params)

        def pull(t: Any, z: Array, ct: Array) -> tuple[Array, tuple[Array, ...], Any]:
            u_bar, theta_bar, w_bar = turn(t, z[:n], z[n:], ct[:n], ct[n:])
            return be.xp.concat([u_bar, w_bar]), theta_bar, 0.0

        return pull


def by_ad(run: Run) -> bool:
    """Whether the framework's AD makes second derivatives of `f`."""
    return isinstance(run.vjp, ReverseVJP | ForwardVJP) and type(run.be).second is not Backend.second


def _differences(run: Run, x: Inputs, d_theta: tuple[Array, ...], params: bool) -> Callable:
    """As `Backend.second`, by central differences of the first derivatives along the direction."""
    be = run.be
    step = be.eps(x.u0.dtype) ** (1 / 4 if isinstance(run.vjp, FiniteDifferenceVJP) else 1 / 3)
    here = run.vjp.pullback(run, x, params=params)
    size = max((be.concrete(be.xp.max(be.xp.abs(d))) or 0.0 for d in d_theta), default=0.0)

    def turn(t: Any, u: Array, w: Array, nu: Array, lam: Array) -> tuple[Array, tuple[Array, ...], Array]:
        e = step / be.greatest(1.0, be.greatest(size, be.scalar(be.xp.max(be.xp.abs(w)))))
        ends = []
        for s in (e, -e):
            theta = tuple(v + s * d for v, d in zip(x.theta, d_theta, strict=True))
            ends.append(run.vjp.pullback(run, x._replace(theta=theta), params=params)(t, u + s * w, lam))
        u_bar, theta_bar, _ = here(t, u, nu)
        u_bar = u_bar + (ends[0][0] - ends[1][0]) / (2.0 * e)
        theta_bar = tuple(a + (b - c) / (2.0 * e) for a, b, c in zip(theta_bar, ends[0][1], ends[1][1], strict=True))
        return u_bar, theta_bar, here(t, u, lam)[0]

    return turn


@dataclass(frozen=True, eq=False)
class FirstPart:
    """The error norm of the first `n` entries: what rides along does not steer."""

    be: Any
    n: int
    norm: Callable[[Any], Any] | None

    def __call__(self, e: Any) -> Any:
        return (self.norm or self.be.rms)(e[:self.n])

    def __hash__(self) -> int:
        return hash((self.n, self.norm))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FirstPart) and (other.n, other.norm) == (self.n, self.norm)


def paired(algorithm: Any, run: Run, x: Inputs, d: Tangents) -> tuple[Run, Inputs]:
    """The run of state and tangent along the one direction `d`."""
    be, xp, n = run.be, run.be.xp, x.u0.shape[0]
    layout = Layout(be.flatten(x.u0)[1], ((2 * n,),))
    field = TangentField(run.field.f, layout, run.field.p, run.field.captured, run=run)
    norm = (FirstPart if algorithm.exact else WorstPart)(be.differentiable(), n, run.norm)
    direction = tuple(v[0, ...] for v in d.theta)
    rtol, atol = (xp.concat([v, v]) if getattr(v, "ndim", 0) else v for v in (x.rtol, x.atol))
    pair = x._replace(u0=xp.concat([x.u0, d.u0[0, :]]), constants=(*x.constants, *direction, x.u0), rtol=rtol,
                      atol=atol)
    return replace(run, field=field, vjp=TangentVJP(), norm=norm, products=Products(), sparsity=None), pair


def turned(algorithm: Any, run: Run, x: Inputs, d: Tangents, ct: Array, dct: Array,
           wanted: frozenset[str]) -> tuple[Any, tuple[Array, ...], Array]:
    """The change along `d` of the pulled-back cotangents `ct`, themselves changing by `dct`, and of the outputs.

    `(change of the cotangent of u0, of those of theta, change of the outputs (k, n))`.
    """
    be, n = run.be, x.u0.shape[0]
    run, x = paired(algorithm, run, x, d)
    algorithm = algorithm.of_pair
    out, _, residuals = algorithm.forward(run, x, wanted)
    bar = algorithm.reverse(run, residuals, Outputs(be.xp.concat([dct, ct], axis=1), None, None), wanted)
    return bar.u0[:n], bar.theta, out.u[:, n:]


def refuse_second(algorithm: Any, run: Run, wanted: frozenset[str]) -> None:
    """Raise unless this algorithm gives second derivatives of this run.

    Raises
    ------
    UnsupportedCombination
        The algorithm takes no `TangentField`, or times, dense output or another kind of problem are asked for.
    """
    cause = None
    if not algorithm.second_order:
        cause = f"{algorithm.name} gives first derivatives only"
    elif wanted & {"t0", "t1", "saveat"}:
        cause = f"{algorithm.name} gives second derivatives in u0 and p only, not in times"
    elif run.dense:
        cause = "dense=True has no second derivatives"
    elif run.mass is not None:
        cause = "a singular mass matrix has no second derivatives"
    elif (run.kind is not None and run.kind.name != "steady") or run.events:
        cause = "second derivatives are there for steady states and ordinary differential equations without events only"
    if cause:
        raise UnsupportedCombination(cause, "a second one was asked for", algorithm.twice)


def warn_differences(run: Run) -> None:
    """Say that second derivatives of `f` are differences, where they are."""
    if not by_ad(run):
        warnings.warn(f"second derivatives of f are central differences of {run.vjp.name}, which cannot be "
                      "differentiated exactly; vjp=ReverseVJP() is exact for an f that AD runs through",
                      NumericalDerivativeWarning, stacklevel=4)
