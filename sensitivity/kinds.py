"""What preparing a solve takes for each kind of problem: ordinary here, delayed in `delayprepare.py`, stochastic in
`stochasticprepare.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import probe as first_call
from .backend import Array
from .errors import UnsupportedCombination
from .methods import Tsit5
from .stochasticmethods import StochasticMethod
from .system import Field, Layout, Products


class Start(NamedTuple):
    """A problem at its start: `t0` as a 0-d array, `time` as `f` sees it, `u0` flat, `u` and `p` trees, and the ends of
    the time span where they are known."""

    be: Any
    layout: Layout
    t0: Array
    time: Any
    u0: Array
    u: Any
    p: Any
    span: tuple[float | None, float | None]


class Ordinary:
    """An `ODEProblem` on its way to a `Run`; the other kinds override what differs.

    Attributes
    ----------
    special : what a run of this kind knows that others do not (`Run.kind`).
    interpolated : whether the right-hand side looks at the dense solution.
    """

    interpolated = False
    special: Any = None

    def __init__(self, prob: Any) -> None:
        self.prob = prob

    def method(self, alg: Any, steps: dict[str, Any]) -> Any:
        """The method in use; `steps` holds the options that steer its steps."""
        if isinstance(alg, StochasticMethod):
            raise UnsupportedCombination(f"{alg.name} is a method for stochastic problems",
                                         f"a {type(self.prob).__name__} has no noise",
                                         "Tsit5(), or SDEProblem(f, g, u0, tspan, p)")
        return Tsit5() if alg is None else alg

    def function(self, start: Start, method: Any, events: Any, probe: str,
                 wrt: tuple[str, ...] | None) -> tuple[Any, tuple[Array, ...]]:
        """The right-hand side after the first-call check, and the arrays it closes over."""
        if probe != "off":
            first_call.check(start.be, self.prob, start.t0, start.u, start.p, probe, wrt)
        return start.be.hoist(self.prob.f, start.time, start.u, start.p)

    def times(self, be: Any, t0: Array, t1: Array, saveat: Any) -> tuple[Array, Array, Any]:
        return t0, t1, saveat

    def controller(self, given: Any) -> Any:
        """The controller asked for, or that of this kind of problem; None for that of the method."""
        return given

    def finished(self, run: Any) -> Any:
        """The run with what only this kind knows."""
        return run

    def room(self, be: Any, max_steps: int, capacity: int, given: int | None) -> tuple[int, int]:
        """Limits on attempted and recorded steps."""
        return max_steps, capacity

    def driven(self, start: Start, method: Any, field: Field, t1: Array, dt: float | None,
               capacity: int) -> tuple[Field, tuple[Array, ...]]:
        """The field of the solve, and constants that it needs."""
        return field, ()

    def products(self) -> Products:
        """Products with derivatives that the user wrote."""
        prob = self.prob
        return Products(prob.vjp, prob.jvp, prob.jac, prob.paramjac, prob.jac_sparsity)
