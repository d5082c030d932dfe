"""A running cost as one more state: the pair `[u, q]` with `u' = f(t, u, p)` and `q' = g(t, u, p)`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import probe as first_call
from .costs import ContinuousCost
from .delayprepare import of_the_state
from .errors import InputError, UnsupportedCombination
from .events import Event, changes_parameters
from .integrate import Run
from .problems import DDEProblem, ODEProblem
from .system import Inputs


@dataclass(frozen=True)
class RunningField:
    """The vector field of `[u, q]`."""

    f: Callable[..., Any]
    g: Callable[..., Any]

    def __call__(self, t: Any, y: Any, p: Any) -> Any:
        u, q = y
        return [self.f(t, u, p), 0.0 * q + self.g(t, u, p)]


@dataclass(frozen=True)
class OwnCondition:
    """An event's condition for the pair `[u, q]`."""

    condition: Callable[..., Any]

    def __call__(self, t: Any, y: Any, p: Any) -> Any:
        return self.condition(t, y[0], p)


@dataclass(frozen=True)
class OwnAffect:
    """An event's affect for the pair `[u, q]`: the integral does not jump."""

    affect: Callable[..., Any]

    def __call__(self, t: Any, y: Any, p: Any) -> Any:
        u, q = y
        out = self.affect(t, u, p)
        return ([out[0], q], out[1]) if changes_parameters(out, u) else [out, q]


def events_of_pair(events: Any) -> list[Any]:
    """The user's events, for the pair `[u, q]`."""
    out = []
    for event in events if isinstance(events, list | tuple) else [events]:
        affect = None if event.affect is None else OwnAffect(event.affect)
        if isinstance(event, Event):
            out.append(replace(event, condition=OwnCondition(event.condition), affect=affect))
        else:
            out.append(replace(event, affect=affect))
    return out


@dataclass(frozen=True)
class Total:
    """The sum of several integrands."""

    terms: tuple[Callable[..., Any], ...]

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        return sum(g(t, u, p) for g in self.terms)


@dataclass(frozen=True)
class DelayedRunningField:
    """The vector field of `[u, q]` where `f` looks at the past of `u`."""

    f: Callable[..., Any]
    g: Callable[..., Any]

    def __call__(self, t: Any, y: Any, h: Any, p: Any) -> Any:
        u, q = y
        return [self.f(t, u, lambda *s, **more: h(*s, **more)[0], p), 0.0 * q + self.g(t, u, p)]


@dataclass(frozen=True)
class OwnHistory:
    """The history of the pair `[u, q]`: nothing was summed up."""

    history: Callable[..., Any]
    zero: Any

    def __call__(self, t: Any, p: Any) -> Any:
        return [self.history(t, p), self.zero]


@dataclass(frozen=True)
class OwnLags:
    """Lags that depend on the state, for the pair `[u, q]`."""

    lags: Callable[..., Any]

    def __call__(self, t: Any, y: Any, p: Any) -> Any:
        return self.lags(t, y[0], p)


def with_running_cost(prob: Any, costs: tuple[ContinuousCost, ...], run: Run, x: Inputs) -> ODEProblem | DDEProblem:
    """The problem of the pair `[u, q]`; `run` and `x` are those of `prob`.

    Raises
    ------
    UnsupportedCombination
        The problem is neither an ODE nor a delay equation, or its state is complex.
    InputError
        `g` does not return a number.
    """
    be = run.be
    cause = None
    if type(prob) not in (ODEProblem, DDEProblem):
        cause = f"{type(prob).__name__}"
    elif be.is_complex(x.u0):
        cause = "a complex state"
    if cause:
        raise UnsupportedCombination(f"ContinuousCost does not go with {cause}",
                                     "its integral is one more entry of an ODE's state",
                                     "a DiscreteCost, or a callable of the solution at many times")
    g = costs[0].g if len(costs) == 1 else Total(tuple(c.g for c in costs))
    zero = be.asarray(0.0, dtype=x.u0.dtype, device=be.device(x.u0))
    if isinstance(prob, DDEProblem):
        lags = OwnLags(prob.lags) if of_the_state(prob.lags) else prob.lags
        return prob.remake(f=DelayedRunningField(prob.f, g), u0=[prob.u0, zero], lags=lags,
                           history=OwnHistory(prob.history, zero))
    mass = run.mass or run.field.mass
    changes: dict[str, Any] = {"f": RunningField(prob.f, g), "u0": [prob.u0, zero], "jac_sparsity": None,
                               "mass_matrix": None if mass is None else mass.beside_one()}
    own = all(c.dgdu is not None for c in costs)
    products = (("vjp", RunningVJP), ("jvp", RunningJVP), ("jac", RunningJac), ("paramjac", RunningParamJac))
    for name, extended in products:
        given = getattr(prob, name)
        changes[name] = extended(be, given, costs) if given is not None and own else None
    return prob.remake(**changes)


def check_integrand(be: Any, g: Callable[..., Any], t: Any, u: Any, p: Any, mode: str,
                    wrt: tuple[str, ...] | None) -> None:
    """See that `g` returns a number, and that an AD which records sees what it depends on; `wrt` as in `probe.check`.
    """
    out = be.evaluate(g, t, u, p)
    shape = getattr(out, "shape", None)
    if shape is None and not isinstance(out, int | float):
        raise InputError(f"g of ContinuousCost returned {type(out).__name__}", "an integrand is a number",
                         "return a scalar, such as (u ** 2).sum()")
    if shape is not None and tuple(shape) != ():
        raise InputError(f"g of ContinuousCost returned shape {tuple(shape)}", "an integrand is a number",
                         "sum it, or take an entry: (u ** 2).sum(), u[0]")
    if not be.recording():
        return

    @functools.wraps(g, assigned=(), updated=())
    def spread(t: Any, u: Any, p: Any) -> Any:
        value = g(t, u, p)
        leaves, structure = be.flatten(u)
        return be.unflatten(structure, [be.xp.zeros_like(v) + value for v in leaves])

    first_call.check(be, ODEProblem(spread, u, (t, t), p), t, u, p, mode, wrt)


@dataclass(frozen=True)
class _Extended:
    """A product of the user for `f`, with the derivatives of the running cost beside it."""

    be: Any
    given: Callable[..., Any]
    costs: tuple[ContinuousCost, ...]

    def slopes(self, name: str, t: Any, u: Any, p: Any) -> list[list[Any]]:
        """The leaves of `dgdu` or `dgdp` of every cost that has them."""
        return [self.be.flatten(d(t, u, p))[0] for c in self.costs if (d := getattr(c, name)) is not None]

    def row(self, name: str, t: Any, u: Any, p: Any, like: Any) -> Any:
        """The same as one vector of the length and dtype of `like`."""
        xp, out = self.be.xp, 0.0 * like
        for leaves in self.slopes(name, t, u, p):
            flat = [xp.reshape(self.be.asarray(v, dtype=like.dtype), (-1,)) for v in leaves]
            out = out + (xp.concat(flat) if len(flat) > 1 else flat[0])
        return out


@dataclass(frozen=True)
class RunningVJP(_Extended):
    def __call__(self, t: Any, y: Any, p: Any, lam: Any) -> Any:
        be, (u, q), (lam_u, lam_q) = self.be, y, lam
        out = []
        for bar, name in zip(self.given(t, u, p, lam_u), ("dgdu", "dgdp"), strict=True):
            leaves, structure = be.flatten(bar)
            for slopes in self.slopes(name, t, u, p):
                leaves = [a + lam_q * b for a, b in zip(leaves, slopes, strict=True)]
            out.append(be.unflatten(structure, leaves))
        return [out[0], 0.0 * q], out[1]


@dataclass(frozen=True)
class RunningJVP(_Extended):
    def __call__(self, t: Any, y: Any, p: Any, dy: Any, dp: Any) -> Any:
        be, (u, q), (du, _) = self.be, y, dy
        dq = 0.0 * q
        for name, moved in (("dgdu", du), ("dgdp", dp)):
            for slopes in self.slopes(name, t, u, p):
                dq = dq + sum(be.xp.sum(a * b) for a, b in zip(slopes, be.flatten(moved)[0], strict=True))
        return [self.given(t, u, p, du, dp), dq]


@dataclass(frozen=True)
class RunningJac(_Extended):
    def __call__(self, t: Any, y: Any, p: Any) -> Any:
        xp = self.be.xp
        J = self.given(t, y[0], p)
        J = xp.concat([J, self.row("dgdu", t, y[0], p, J[0, :])[None, :]], axis=0)
        return xp.concat([J, 0.0 * J[:, :1]], axis=1)


@dataclass(frozen=True)
class RunningParamJac(_Extended):
    def __call__(self, t: Any, y: Any, p: Any) -> Any:
        J = self.given(t, y[0], p)
        return self.be.xp.concat([J, self.row("dgdp", t, y[0], p, J[0, :])[None, :]], axis=0)
