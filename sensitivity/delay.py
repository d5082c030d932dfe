"""Delay equations: the user's `f(t, u, h, p)`, history and lags as functions of flat vectors.

    u'(t) = f(t, u(t), u(t - tau_1), ..., u(t - tau_k), p),   u(s) = phi(s, p) for s < t0,   u(t0) = u0

A stage of a step is served with the states at the declared delayed times, `Past`. Where `f` asks `h(s)`, the answer
is `v_i + u'_i (s - s_i)` with `s_i` the declared time that `s` is: the value is `v_i`, and the derivative in `s` is
that of the dense output, however the user wrote `s`. Before t0, `h(s)` is the history itself, with its own derivatives.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .backend import Array, Backend, Scalar
from .errors import InputError, UnsupportedCombination
from .system import Inputs, Layout, Partition


class Past(NamedTuple):
    """A state with what its derivative depends on: delayed times, states and slopes there, which of them lie in the
    history, a time that certainly does, and how near to one of the times a time asked for has to be."""

    u: Any
    times: Sequence[Scalar]
    values: Sequence[Array]
    slopes: Sequence[Array]
    old: Sequence[Any]
    far: Scalar
    near: Scalar


class Opaque:
    """A value that no framework takes for a tree of arrays; equal where `key` is."""

    key: tuple[Any, ...]

    def __eq__(self, other: Any) -> bool:
        return type(other) is type(self) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


class Setting(Opaque):
    """What every evaluation shares: the backend that AD runs through, the layout of the state, round-off of times."""

    def __init__(self, be: Any, layout: Layout, eps: float) -> None:
        self.be, self.layout, self.eps = be, layout, eps
        self.key = layout, eps

    def vector(self, tree: Any) -> Array:
        """A state that a user's function returned, flat."""
        be, shapes = self.be, self.layout.shapes
        leaves = [be.xp.reshape(be.asarray(x), s) for x, s in zip(be.flatten(tree)[0], shapes, strict=True)]
        return self.layout.ravel(be, leaves)

    def tree(self, v: Array) -> Any:
        return self.be.unflatten(self.layout.structure, self.layout.unravel(self.be, v))


THREE = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in "tup"])


class Delayed(Opaque):
    """`f` and its history as one function `(t, u, p)`, where `u` is a `Past`; a bare state is one at the start."""

    __signature__ = THREE

    def __init__(self, f: Callable[..., Any], history: Callable[..., Any], setting: Setting) -> None:
        self.f, self.history, self.setting = f, history, setting
        self.key = f, history, setting
        self.__wrapped__ = f

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        return _evaluated(self.f, self.history, self.setting, t, u, p)


class DelayedModule(NamedTuple):
    """`Delayed` where `f` or `history` is a pytree with arrays of its own."""

    f: Any
    history: Any
    setting: Setting

    @property
    def __wrapped__(self) -> Any:
        return self.f

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        return _evaluated(self.f, self.history, self.setting, t, u, p)


def _evaluated(f: Any, history: Any, setting: Setting, t: Any, u: Any, p: Any) -> Any:
    if not isinstance(u, Past):
        u = Past(u, (), (), (), (), None, None)
    return f(t, u.u, View(history, setting, u, p), p)


class View:
    """The `h` that `f` receives; without times served, the history."""

    def __init__(self, history: Any, setting: Setting, past: Past, p: Any) -> None:
        self.history, self.setting, self.past, self.p = history, setting, past, p

    def __call__(self, s: Any, *order: Any, **named: Any) -> Any:
        if order or named:
            raise UnsupportedCombination("f asks h for more than a state (a derivative in the past?)",
                                         "neutral equations, with delayed derivatives, are not solved",
                                         "h(t - lag) only")
        be, past = self.setting.be, self.past
        if not past.times:
            return self.setting.tree(self.setting.vector(self.history(s, self.p)))
        i, gap = be.nearest(past.times, s)
        time, value, slope, old = (be.member(x, i) for x in (past.times, past.values, past.slopes, past.old))
        out = be.either(
            old, lambda: self.setting.vector(self.history(be.choose(old, s, past.far), self.p)),
            lambda: value + slope * (s - time))
        out = be.expected(gap <= past.near, out, lambda: _undeclared(be, past, s))
        return self.setting.tree(out)


def _undeclared(be: Any, past: Past, s: Any) -> InputError:
    known = ", ".join(f"{float(t):.12g}" for t in past.times)
    return InputError(f"f asks h({be.scalar(s):.12g}), which is none of the declared delayed times ({known})",
                      "the solution is followed at t - lag for the declared lags only, where its kinks are known",
                      "declare every lag that f uses: DDEProblem(..., lags=lambda p: [p['tau']])")


@dataclass(frozen=True)
class StateLags:
    """Lags that are a function of time, state and parameters."""

    lags: Callable[..., Any]


class Lags(Opaque):
    """The declared lags as a function `(t, u, p)`, a vector."""

    def __init__(self, given: Any, be: Any) -> None:
        self.given, self.be = given, be
        self.key = (given,)

    def __call__(self, t: Any, u: Any, p: Any) -> Array:
        be = self.be
        if isinstance(self.given, StateLags):
            out = self.given.lags(t, u, p)
        else:
            out = self.given(p) if callable(self.given) else self.given
        if be.is_array(out) and out.ndim == 1:
            return out
        items = out if isinstance(out, list | tuple) else [out]
        return be.xp.stack([be.xp.reshape(be.asarray(float(v) if isinstance(v, int) else v), ()) for v in items])


@dataclass(frozen=True)
class Delays:
    """What only a delay equation has, known before it is solved; `Run.kind`.

    `combinations` are the numbers of lags of each kind that add up to a break point.
    """

    lags: Callable[..., Any]
    count: int
    moving: bool
    combinations: tuple[tuple[int, ...], ...]
    setting: Setting
    history: Callable[..., Any]
    dependent: bool
    name = "dde"

    def tau(self, be: Backend, run: Any, x: Inputs) -> Any:
        """The lags as scalars."""
        return be.scalars(self.vector(be, run, x.u0, x.theta, x))

    def bound(self, be: Any, run: Any, x: Inputs) -> Callable[[Any, Array], Array]:
        """The lags as a function `(t, u)` of flat states."""
        layout, p = run.field.u, run.field.p.join(be, x.theta[:run.field.p.count], x.constants)
        return lambda t, u: self.lags(t, be.unflatten(layout.structure, layout.unravel(be, u)), p)

    def vector(self, be: Any, run: Any, u: Array, theta: tuple[Array, ...], x: Inputs) -> Array:
        """The lags as a vector of the framework."""
        layout = run.field.u
        p = run.field.p.join(be, theta[:run.field.p.count], x.constants)
        return self.lags(be.time(be.scalar(x.t0)), be.unflatten(layout.structure, layout.unravel(be, u)), p)

    def before(self, be: Any, run: Any, t0: float, p: Any) -> Array | None:
        """The history at t0, if it has a value now."""
        v = self.setting.vector(self.history(be.time(be.scalar(t0)), p))
        return v if be.concrete(be.xp.sum(v)) is not None else None

    def room(self, be: Any, limit: int, capacity: int, given: int | None) -> tuple[int, int]:
        """Limits on steps and on records; where none was set, each break point may cost one step more."""
        if given is not None:
            return limit, limit
        more = len(self.combinations) + 1
        return limit + more, capacity + more if be.traced else limit + more

    def algorithm(self, sensealg: Any) -> Any:
        """The algorithm of that name for delay equations."""
        from .algorithms.delay import adapted

        return adapted(sensealg, self.dependent)

    def products(self, run: Any, x: Inputs) -> tuple[Any, Inputs]:
        """Run and inputs with which derivatives of `f` at a stage are made, here at the start."""
        be, k = run.be, self.count
        tau = self.tau(be, run, x)
        t0 = be.scalar(x.t0)
        zeros = [0.0 * x.u0 for _ in range(k)]
        past = Past(None, [t0 - tau[i] for i in range(k)], zeros, zeros, [be.truth(True)] * k, t0 - tau[0],
                    be.scalar(math.inf))
        return self.as_field(run, StageField.of(run)), stage_inputs(be, x, x.u0, past)

    def as_field(self, run: Any, field: Any) -> Any:
        """The run with another function in place of `f`, for its derivatives."""
        return replace(run, field=field)


@dataclass(frozen=True)
class StageField:
    """`f` at one stage as a function of `z = (u, v_1, ..., v_k)`, padded with zeros to the length of `z`; or, where
    the past is not `moving`, of the state alone.

    The rest of the `Past` is passed in the inputs' constants.
    """

    f: Callable[..., Any]
    u: Layout
    state: Layout
    p: Partition
    count: int
    moving: bool = True

    def argument(self, be: Any, t: Any) -> Any:
        """The first argument of the bound function at time `t`."""
        return be.time(t)

    @classmethod
    def of(cls, run: Any, moving: bool = True) -> StageField:
        layout, k = run.field.u, run.kind.count
        flat = Layout(None, ((layout.size * (1 + k if moving else 1),),))
        return cls(run.field.f, flat, layout, run.field.p, k, moving)

    def serve(self, be: Any, theta: tuple[Array, ...],
              constants: tuple[Any, ...]) -> Callable[[Any, Array, Past], Array]:
        """`rhs(t, u, past) -> du` with the state as vector."""
        m, state = self.p.count, self.state
        p, captured, f = self.p.join(be, theta[:m], constants), theta[m:], self.f

        def rhs(t: Any, u: Array, past: Past) -> Array:
            tree = be.unflatten(state.structure, state.unravel(be, u))
            return state.ravel(be, be.flatten(f(t, past._replace(u=tree), p, *captured))[0])

        return rhs

    def bind(self, be: Any, theta: tuple[Array, ...], constants: tuple[Any, ...]) -> Callable[[Any, Array], Array]:
        n, k = self.state.size, self.count
        cut = len(constants) - 3 * k - 2 - (0 if self.moving else k)
        rest = constants[cut:]
        rhs = self.serve(be, theta, constants[:cut])

        def past(values: list[Any]) -> Past:
            return Past(None, list(rest[:k]), values, list(rest[k:2 * k]), list(rest[2 * k:3 * k]),
                        *rest[3 * k:3 * k + 2])

        if not self.moving:
            return lambda t, u: rhs(t, u, past(list(rest[3 * k + 2:])))

        def padded(t: Any, z: Array) -> Array:
            values = [z[n * (i + 1):n * (i + 2)] for i in range(k)]
            return be.xp.concat([rhs(t, z[:n], past(values)), 0.0 * z[n:]])

        return padded


def stage_inputs(be: Any, x: Inputs, u: Array, past: Past, moving: bool = True) -> Inputs:
    """Inputs of `StageField`."""
    z = be.xp.concat([u, *past.values]) if moving else u
    held = () if moving else past.values
    return x._replace(u0=z, constants=(*x.constants, *past.times, *past.slopes, *past.old, past.far, past.near, *held))


@dataclass(frozen=True)
class LagField:
    """The lags as a function of the parameters, padded in front by zeros for the state, for their derivatives."""

    lags: Callable[..., Any]
    u: Layout
    state: Layout
    p: Partition

    @classmethod
    def of(cls, run: Any) -> LagField:
        layout = run.field.u
        return cls(run.kind.lags, Layout(None, ((layout.size + run.kind.count,),)), layout, run.field.p)

    def bind(self, be: Any, theta: tuple[Array, ...], constants: tuple[Any, ...]) -> Callable[[Any, Array], Array]:
        p, n, state = self.p.join(be, theta[:self.p.count], constants), self.state.size, self.state

        def padded(t: Any, z: Array) -> Array:
            tree = be.unflatten(state.structure, state.unravel(be, z[:n]))
            tau = self.lags(t, tree, p)
            return be.xp.concat([0.0 * z[:n], be.xp.astype(tau, z.dtype) + 0.0 * z[n:]])

        return padded
