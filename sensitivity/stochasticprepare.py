"""From an `SDEProblem` to what its solve needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import probe as first_call
from .backend import Array
from .control import FixedStep
from .kinds import Ordinary, Start
from .stochastic import FREE, Pair, Stochastic, drive
from .stochasticchecks import check_diffusion, check_steps, method_for
from .system import Field, Products


class Noisy(Ordinary):
    """An `SDEProblem` on its way to a `Run`."""

    def method(self, alg: Any, steps: dict[str, Any]) -> Any:
        method = method_for(self.prob, alg)
        check_steps(method, steps)
        return method

    def controller(self, given: Any) -> Any:
        return FixedStep() if given is None else given

    def function(self, start: Start, method: Any, events: Any, probe: str,
                 wrt: tuple[str, ...] | None) -> tuple[Any, tuple[Array, ...]]:
        be, prob = start.be, self.prob
        if probe != "off":
            first_call.check(be, prob, start.t0, start.u, start.p, probe, wrt)
        self.diffusion = be.evaluate(prob.g, start.time, start.u, start.p)
        if probe != "off":
            check_diffusion(be, prob, method, start.time, start.u, start.p)
        return Pair.hoisted(be, prob, start.time, start.u, start.p)

    def times(self, be: Any, t0: Array, t1: Array, saveat: Any) -> tuple[Array, Array, Any]:
        return be.fixed(t0, "t0"), be.fixed(t1, "t1"), be.fixed(saveat, "saveat")

    def driven(self, start: Start, method: Any, field: Field, t1: Array, dt: float | None,
               capacity: int) -> tuple[Field, tuple[Array, ...]]:
        self.special = Stochastic.of(start.be, self.prob, dt)
        return drive(start.be, self.prob, method, field, self.diffusion, start.u0, start.t0, t1, dt, capacity)

    def finished(self, run: Any) -> Any:
        """No adaptive step is smaller than what the path tells apart."""
        path, span = self.prob.brownian, self.prob.tspan
        least = getattr(path, "tol", 0.0)
        if path is None:
            known = [run.be.concrete(t) for t in span]
            least = 0.0 if None in known else (known[1] - known[0]) * 2.0**-FREE
        return replace(run, dtmin=max(run.dtmin or 0.0, least) or None) if run.controller.adaptive else run

    def products(self) -> Products:
        return Products()
