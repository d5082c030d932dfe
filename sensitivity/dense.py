"""`sol(t)`: dense output as a function of the recorded steps, differentiable in the framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .algorithms.base import Aux, Outputs, bound
from .errors import TimesError
from .integrate import Run
from .system import Inputs


@dataclass(frozen=True, eq=False)
class DenseOutput:
    """The states between the recorded steps of one solve, moved onto the constraints where there are some."""

    run: Run
    x: Inputs
    out: Outputs
    aux: Aux

    @cached_property
    def log(self) -> Any:
        if self.out.nodes is None:
            return self.aux.mesh
        return self.run.be.unstacked(*self.aux.mesh, self.out.nodes, self.out.stages, self.aux.accepted)

    def __call__(self, t: Any) -> Any:
        run, x = self.run, self.x
        be, layout = run.be, run.field.u
        t0, t1 = be.concrete(x.t0), be.concrete(x.t1)
        ts = be.asarray(t, dtype=be.time_dtype(x.u0.dtype), device=be.device(x.u0))
        single = ts.ndim == 0
        ts = be.xp.reshape(ts, (-1,))
        for value in be.concrete_times(ts) or ():
            if t0 is not None and t1 is not None and not min(t0, t1) <= value <= max(t0, t1):
                raise TimesError(f"sol({value:g}) lies outside tspan=({t0:g}, {t1:g})",
                                 "the solver does not extrapolate", "choose t inside the span")
        direction = be.choose(be.scalar(x.t1) >= be.scalar(x.t0), 1.0, -1.0)
        stepper = bound(run, x)
        scalars = be.scalars(ts)
        rows = stepper.seen(be.sample(stepper.interpolate, self.log, scalars, stepper.lift(x.u0), direction))
        if stepper.algebraic:
            _, rows = be.scan(lambda _, x: (0, stepper.corrected(be.time(x[0]), x[1])), 0, (scalars, rows))
            rows = be.gathered(rows)
        leaves = layout.unravel(be, rows[0, :] if single else rows)
        return be.unflatten(layout.structure, leaves)


@dataclass(eq=False)
class LaterOutput:
    """Dense output of a solution that kept none: the first call solves once more, and keeps it."""

    solve: Callable[..., Any]
    prob: Any
    alg: Any
    options: dict[str, Any]
    dense: Any = None

    def __call__(self, t: Any) -> Any:
        if self.dense is None:
            self.dense = self.solve(self.prob, self.alg, **{**self.options, "saveat": None, "dense": True}).dense
        return self.dense(t)
