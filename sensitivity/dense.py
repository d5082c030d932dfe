"""`sol(t)`: dense output as a function of the recorded steps, differentiable in the framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .algorithms.base import Aux, Outputs
from .errors import TimesError
from .integrate import Run
from .interpolate import interpolant
from .system import Inputs


def dense_output(run: Run, x: Inputs, out: Outputs, aux: Aux) -> Callable[[Any], Any]:
    """The function behind `Solution.__call__`."""
    be, layout = run.be, run.field.u
    t0, t1 = be.concrete(x.t0), be.concrete(x.t1)
    log = be.unstacked(*aux.mesh, out.nodes, out.stages, aux.accepted)
    interpolate = interpolant(be, run.tableau)
    direction = be.choose(be.scalar(x.t1) >= be.scalar(x.t0), 1.0, -1.0)

    def state(t: Any) -> Any:
        ts = be.asarray(t, dtype=be.time_dtype(x.u0.dtype), device=be.device(x.u0))
        single = ts.ndim == 0
        ts = be.xp.reshape(ts, (-1,))
        for value in be.concrete_times(ts) or ():
            if t0 is not None and t1 is not None and not min(t0, t1) <= value <= max(t0, t1):
                raise TimesError(f"sol({value:g}) lies outside tspan=({t0:g}, {t1:g})",
                                 "the solver does not extrapolate", "choose t inside the span")
        rows = be.sample(interpolate, log, be.scalars(ts), x.u0, direction)
        leaves = layout.unravel(be, rows[0, :] if single else rows)
        return be.unflatten(layout.structure, leaves)

    return state
