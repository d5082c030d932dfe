"""Discrete forward sensitivities: tangents through the accepted steps, with their sizes frozen.

    dU_i = du_n + h sum_j a_ij dk_j,   dk_i = f_u dU_i + f_p dp,   du_{n+1} = du_n + h sum_i b_i dk_i

The exact derivative of the computed solution, column by column: what dual numbers through a solver with frozen step
sizes would give. Its transpose is `RecursiveCheckpointAdjoint`, and both agree to round-off. Reference: Hairer,
Norsett, Wanner I, II.6 (the variational equation of the method is the method of the variational equation).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..estimates import Effort, Work
from ..integrate import Run
from ..system import Inputs
from . import base
from .frozen import frozen_tangent


@dataclass(frozen=True)
class ForwardADSensitivity(base.SensitivityAlgorithm):
    """Tangents through the accepted steps; exact for the computed solution.

    Parameters
    ----------
    vjp : VJP, optional
        How products with derivatives of `f` are made.

    Gives derivatives with respect to `u0`, `p`, `t0`, `t1` and `saveat`, in forward mode and, at the price of one
    column per input, in reverse mode. For few inputs, and for losses of many outputs.
    """

    vjp: Any = field(default=None, kw_only=True)

    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"stages"})
    kinds: ClassVar[frozenset[str]] = frozenset({"ode", "sde"})
    elsewhere: ClassVar[frozenset[str]] = frozenset({"dde"})
    events: ClassVar[bool] = True
    algebraic: ClassVar[bool] = True
    per_input: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("hairer1993",)

    def work(self, w: Work) -> Effort:
        return Effort(0, w.N * w.s * w.m, 0, w.stored + w.n * w.m * (w.s + 2))

    def refuse(self, run: Run) -> None:
        if run.dense:
            raise base.unsupported(self.name, "dense=True", "RecursiveCheckpointAdjoint()")

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, base.Solved]:
        del wanted
        return base.solve_forward(run, x, keep=True)

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        """`S^T ct`, one column of S for each entry of the inputs wanted."""
        be, x = run.be, residuals.x
        parts = base.columns(x, wanted)
        m = sum(size for _, size in parts)
        S = self.tangent(run, residuals, base.directions(be, x, parts, be.unit_rows(m, m, 0, x.u0)))
        bars = base.weighed(run, S, ct)
        pieces, start = {}, 0
        for name, size in parts:
            pieces[name] = bars[start:start + size]
            start += size
        theta = be.split(pieces["theta"], x.theta) if "theta" in pieces else be.zeros(x.theta)
        t0, t1 = (be.scalar(pieces[n][0]) if n in pieces else 0.0 for n in ("t0", "t1"))
        saveat = be.scalars(pieces["saveat"]) if "saveat" in pieces else None
        return base.Cotangents(pieces.get("u0", 0.0 * x.u0), theta if "theta" in wanted else (), t0, t1, saveat, 0, 0,
                               residuals.end.status)

    def tangent(self, run: Run, residuals: base.Solved, d: base.Tangents) -> Any:
        return frozen_tangent(run, residuals, d)
