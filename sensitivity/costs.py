"""Costs given by their integrand or by their derivatives: what `gradient` accepts as `loss` beside a callable.

    G = sum_i l(t_i, u(t_i), p) + int_{t0}^{t1} g(t, u, p) dt
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import InputError
from .userfunction import signed


class Cost:
    """Base of the costs; costs add up, also with a callable of the solution: `DiscreteCost(...) + ContinuousCost(...)`.
    """

    @property
    def terms(self) -> tuple[Any, ...]:
        return (self,)

    def __add__(self, other: Any) -> Cost:
        if isinstance(other, Cost):
            return CostSum((*self.terms, *other.terms))
        return CostSum((*self.terms, other)) if callable(other) else NotImplemented

    def __radd__(self, other: Any) -> Cost:
        if isinstance(other, int) and other == 0:  # sum([...]) starts there
            return self
        return CostSum((other, *self.terms)) if callable(other) else NotImplemented


@dataclass(frozen=True, eq=False)
class CostSum(Cost):
    """A sum of costs, and of callables of the solution."""

    parts: tuple[Any, ...]

    @property
    def terms(self) -> tuple[Any, ...]:
        return self.parts


@dataclass(frozen=True, eq=False)
class DiscreteCost(Cost):
    """`sum_i g(t_i, u(t_i), p)`, a cost of the states at some times.

    Parameters
    ----------
    at : sequence of numbers, shape `(k,)`
        The times, inside `tspan`, in any order, repeats and both ends allowed; fixed numbers, which do not move when
        `t0` or `t1` is differentiated.
    dgdu : callable or None
        `dgdu(t, u, p)` is the derivative with respect to `u` of the term at `t`, in the structure of `u0`. A function
        of four arguments, `dgdu(t, u, p, i)`, gets the index of the time in `at` too: `2 * (u - data[i])`.
        None: the framework differentiates `g`.
    dgdp : callable, optional
        `dgdp(t, u, p)` or `dgdp(t, u, p, i)`, the derivative with respect to `p` at fixed `u`, in the structure of
        `p`. Beside a `dgdu`, None means that the cost does not depend on `p` directly.
    g : callable, optional
        `g(t, u, p)` or `g(t, u, p, i)`, the term itself, for the value; without it the value is None.

    Raises
    ------
    InputError
        Neither `dgdu` nor `g` is given, or one of them cannot be called.
    """

    at: Any
    dgdu: Callable[..., Any] | None
    dgdp: Callable[..., Any] | None = None
    g: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        _callables(self, ("dgdu", "dgdp", "g"))
        if self.dgdu is None and (self.g is None or self.dgdp is not None):
            raise InputError("DiscreteCost has no dgdu", "its derivative is given, or made from its value",
                             "DiscreteCost(at, dgdu=lambda t, u, p: ...), or DiscreteCost(at, None, g=...)")


@dataclass(frozen=True)
class ContinuousCost(Cost):
    """`int g(t, u, p) dt` over `tspan`.

    It is the last entry of the state: `q' = g(t, u, p)`, `q(t0) = 0`, with an error control of its own, so that
    every sensitivity algorithm integrates `lam' = -f_u^T lam - g_u` and adds `g_p` to the gradient. Shadowing
    algorithms give the length of `tspan` times the derivative of the long-time average of `g`.

    Parameters
    ----------
    g : callable
        `g(t, u, p)`, a real number.
    dgdu, dgdp : callable, optional
        Its derivatives, `dgdu(t, u, p)` in the structure of `u0` and `dgdp(t, u, p)` in that of `p`. They are used
        where the problem carries its own products (`vjp`, or `jac` and `paramjac`); else `g` is differentiated
        together with `f`. Beside a `dgdu`, None for `dgdp` means that `g` does not depend on `p`.

    Raises
    ------
    InputError
        `g` is not callable, or `dgdp` is given without `dgdu`.
    """

    g: Callable[..., Any]
    dgdu: Callable[..., Any] | None = None
    dgdp: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        _callables(self, ("dgdu", "dgdp"))
        if not callable(self.g):
            raise InputError(f"g={self.g!r} is not callable", "the integrand is a function of time, state, parameters",
                             "ContinuousCost(lambda t, u, p: (u**2).sum())")
        if self.dgdp is not None and self.dgdu is None:
            raise InputError("ContinuousCost has dgdp without dgdu", "one alone is no derivative",
                             "give both, or neither")


def _callables(cost: Cost, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(cost, name)
        if value is not None and not callable(value):
            raise InputError(f"{name}={value!r} is not callable", "it is a function of time, state and parameters",
                             f"{name}=lambda t, u, p: ...")


def at_index(function: Callable[..., Any], t: Any, u: Any, p: Any, i: int) -> Any:
    """`function(t, u, p, i)` if it requires four arguments, else `function(t, u, p)`."""
    return function(t, u, p, i) if _required(function) == 4 else function(t, u, p)


def _required(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(signed(function)).parameters.values()
    except (TypeError, ValueError):
        return 3
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(q.kind in kinds and q.default is q.empty for q in parameters)
