"""What a solve returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError
from .retcode import RetCode

__all__ = ["Gradient", "RetCode", "Solution", "Stats"]


@dataclass
class Stats:
    """Counts of one solve; `stats.nfe` and `stats["nfe"]` are the same.

    Attributes
    ----------
    nfe : evaluations of `f`. nvjp : products with its transposed derivatives. njac, nlu, nsolve : Jacobians,
        factorisations, linear solves. naccept, nreject : accepted and rejected steps.
    mismatch, drift : how far the state that `BacksolveAdjoint` integrated backwards, or `ReversibleAdjoint` undid, was
        from the stored one, at worst: in tolerances (of stochastic problems, in units of what is allowed), and
        relative to the state; None for algorithms that do neither.
    """

    nfe: Any = 0
    njac: Any = 0
    nvjp: Any = 0
    nlu: Any = 0
    nsolve: Any = 0
    naccept: Any = 0
    nreject: Any = 0
    mismatch: Any = None
    drift: Any = None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@dataclass
class Events:
    """The events of one solve, in the order in which they happened.

    Attributes
    ----------
    t : array `(K,)`
        When; differentiable. Inside `jax.jit` padded with NaN up to `max_events`.
    u : pytree of arrays
        States just before, in the structure of `u0` with the event axis first; differentiable.
    index : integer array `(K,)`
        Which of `events=` it was; -1 in padding.
    count : int
        How many happened.
    """

    t: Any
    u: Any
    index: Any
    count: Any

    def __len__(self) -> int:
        return int(self.count)


@dataclass
class Solution:
    """The solution of a problem.

    Attributes
    ----------
    t : array `(k,)`
        Times of the rows of `u`.
    u : pytree of arrays
        States, in the structure of `u0` with the time axis first.
    stats : Stats
    retcode : RetCode
        An integer array inside `jax.jit`.
    n_steps : int
        Accepted steps; with `saveat="steps"` the number of valid rows.
    prob, alg, sensealg
        What was solved and how; `sensealg.because` says why `auto` chose it, and `alg.because` why this method was
        taken when none was named.
    events : Events or None
        What happened on the way, if `events=` were given.
    """

    t: Any
    u: Any
    stats: Stats
    retcode: Any
    n_steps: Any
    prob: Any = None
    alg: Any = None
    sensealg: Any = None
    events: Any = None
    dense: Callable[[Any], Any] | None = field(default=None, repr=False)

    @property
    def success(self) -> Any:
        return (self.retcode == RetCode.Success) | (self.retcode == RetCode.Terminated)

    def __call__(self, t: Any) -> Any:
        """The state at time `t` (a number or a vector of times) from dense output.

        A solve made without `dense=True` is repeated once, at the first call.

        Raises
        ------
        InputError
            Inside the loss of `gradient`, where nothing is solved again: ask for `dense=True` there.
        TimesError
            A time lies outside the span.
        """
        if self.dense is None:
            raise InputError("sol(t) was called on a solution without dense output", "",
                             "solve(..., dense=True), or saveat=[...] for known times")
        return self.dense(t)

    def plot(self, ax: Any = None) -> Any:
        """Plot every component over time with matplotlib; returns the axes.

        Raises
        ------
        BackendMissingError
            matplotlib is not installed.
        """
        from .plotting import plot_solution

        return plot_solution(self, ax)

    def to_frame(self) -> Any:
        """A pandas `DataFrame`: one column per component, indexed by time.

        Raises
        ------
        BackendMissingError
            pandas is not installed.
        """
        from .report import to_frame

        return to_frame(self)

    def to_xarray(self) -> Any:
        """An xarray `Dataset`: one variable per leaf of the state, with dimension `time`, after `member` in ensembles.

        Raises
        ------
        BackendMissingError
            xarray is not installed.
        """
        from .report import to_xarray

        return to_xarray(self)

    def _repr_html_(self) -> str:
        from .report import solution_html

        return solution_html(self)

    def __repr__(self) -> str:
        code = self.retcode.name if isinstance(self.retcode, RetCode) else "known when the values are"
        return (f"Solution(retcode={code}, rows={len(self.t)}, alg={self.alg!r}, sensealg={self.sensealg!r}, "
                f"stats={self.stats!r})")


@dataclass
class Gradient:
    """What `gradient` returns: the loss, its derivatives, and how they were made.

    `u0`, `p` have the structures of the problem's; `t0`, `t1` are scalars, `saveat` a vector; what was not asked for
    in `wrt` is None.
    """

    value: Any
    u0: Any
    p: Any
    t0: Any
    t1: Any
    saveat: Any
    solution: Solution
    stats: Stats
    sensealg: Any

    def _repr_html_(self) -> str:
        from .report import gradient_html

        return gradient_html(self)
