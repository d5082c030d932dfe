"""The exact gradient of reversible Heun with nothing stored between the steps: each step is undone, then pulled back.

    b = F(t1, z1),  z = 2 y1 - z1 - h b,  a = F(t0, z),  y = y1 - h/2 (a + b)

is the inverse of a step (Kidger, Foster, Li, Lyons 2021, algorithm 2); its cotangents then go through the transposed
step at the points found. The increments of the path are computed again from its key. Between the nodes output is
linear, so an output at time s belongs to the nodes beside it, with weights that a hat function gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..backend import Array, Record
from ..errors import UnsupportedCombination
from ..integrate import Run, span
from ..retcode import RetCode
from ..stepper import Adjoint
from ..stochasticmethods import ReversibleHeun
from ..system import Inputs
from . import base
from .frozen import frozen_tangent


@dataclass(frozen=True)
class ReversibleHeunAdjoint(base.SensitivityAlgorithm):
    """Exact gradient of an SDE solved with `ReversibleHeun`, undoing its steps: no state is stored between them.

    Per step, in reverse: two evaluations of f and g, and two products. Round-off in the undone states grows where the
    solution contracts; if they miss `u0` by more than a tenth, the reverse solve fails. Forward mode stores the steps.

    Parameters
    ----------
    vjp : VJP, optional

    Raises
    ------
    UnsupportedCombination
        Another method, `dense=True`, a problem that is no SDEProblem.

    References: Kidger, Foster, Li, Lyons 2021, NeurIPS, section 3.
    """

    vjp: Any = field(default=None, kw_only=True)

    exact: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"sde"})
    retraces: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("kidger2021sde",)

    def refuse(self, run: Run) -> None:
        if not isinstance(run.method, ReversibleHeun):
            raise UnsupportedCombination(f"{self.name} does not go with {run.method.name}",
                                         "its steps cannot be undone",
                                         "ReversibleHeun(), or sensealg=RecursiveCheckpointAdjoint()")
        if run.dense:
            raise base.unsupported(self.name, "dense=True, which keeps every step", "RecursiveCheckpointAdjoint()")

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, base.Solved]:
        del wanted
        out, aux, (_, _, end) = base.solve_forward(run, x, keep=False)
        return out, aux, base.Solved(x, None, end)

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be = run.be
        x, _, end = residuals
        stepper: Any = run.stepper(run.field.bind(be, x.theta, x.constants))
        s = span(be, x.t0, x.t1)
        params = "theta" in wanted and bool(x.theta)
        pull = run.vjp.pullback(run, x, params=params)
        ts: Any = base.save_times(run, x, s) if run.saves not in (None, "steps") else None

        def node(n: Any) -> Any:
            """The time of a node; those beyond the ends keep the distance of full steps."""
            t = s.t0 + n * run.dt
            return be.choose(t > s.t1, be.choose(n > end.accepted, s.t1 + run.dt, s.t1), t)

        def from_outputs(n: Any) -> Array:
            """The cotangent that outputs hand to the state at a node."""
            if run.saves is None:
                return be.choose(n == end.accepted, 1.0, 0.0) * ct.u[0, :]
            if run.saves == "steps":
                return be.choose(n > 0, 1.0, 0.0) * be.pick(ct.u, be.greatest(n - 1, 0))
            before, here, after = node(n - 1), node(n), node(n + 1)
            hats = [be.least((t - before) / (here - before), (after - t) / (after - here)) for t in ts]
            return be.vector([be.least(be.greatest(w, 0.0), 1.0) for w in hats], ct.u) @ ct.u

        def back(state: tuple[Array, Adjoint], i: tuple[Any]) -> tuple[tuple[Array, Adjoint], float]:
            u1, adjoint = state
            n = i[0]
            t = node(n)
            h = node(n + 1) - t
            u, K = stepper.back(t, h, u1)
            new = stepper.vjp(pull, Record(t, h, u, K), None, False, False, adjoint)
            new = new._replace(lam=new.lam + stepper.seen_vjp(from_outputs(n)[None, :])[0, :])
            return be.choose(n < end.accepted, (u, new), state), 0.0

        lam = stepper.seen_vjp(from_outputs(end.accepted)[None, :])[0, :]
        state = end.u, Adjoint(lam, None, be.zeros(x.theta) if params else (), 0.0, 0.0)
        (u, adjoint), _ = be.scan(back, state, (list(range(run.capacity))[::-1],))
        missed = be.rms(u - stepper.lift(x.u0)) / be.greatest(be.rms(x.u0), be.rms(end.u))
        status = be.choose(missed <= 0.1, end.status, int(RetCode.NonFinite))
        products = 2 * end.accepted
        u0_bar = stepper.lift_vjp(adjoint.lam)
        return base.Cotangents(u0_bar, adjoint.theta, 0.0, 0.0, None, products, products, status)

    def tangent(self, run: Run, residuals: base.Solved, d: base.Tangents) -> Array:
        """Tangents through the frozen steps, which are made and stored once more."""
        return frozen_tangent(run, base.solve_forward(run, residuals.x, keep=True)[2], d)
