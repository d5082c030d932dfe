"""Direct differentiation: the framework's own AD runs through the solver's loop.

Accept, reject and step sizes are constants of the differentiation. So that times have derivatives too, every step
starts at `t_n + (t0 - [t0])` and the last one has size `h_N + (t1 - [t1]) - (t0 - [t0])`, where `[x]` is the value
of x without its derivative: zero in value, right in derivative, and the same convention as the discrete adjoint.
"""

from __future__ import annotations

from typing import ClassVar

from ..estimates import Effort, Work
from ..integrate import Run
from ..system import Inputs
from . import base


class DirectAdjoint(base.SensitivityAlgorithm):
    """The framework's AD through the loop, forward and reverse; memory grows with every operation of every step."""

    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"stages", "explicit", "AD"})
    keeps: ClassVar[str] = "tape"
    kinds: ClassVar[frozenset[str]] = frozenset({"ode", "sde"})
    boundary: ClassVar[bool] = False

    def work(self, w: Work) -> Effort:
        return Effort(0, 0, w.A * w.s, 2 * w.A * (w.s + 1) * w.n)

    def refuse(self, run: Run) -> None:
        if not {"reverse", "forward"} & run.be.modes:
            raise base.unsupported(self.name, f"the {run.backend} backend, which has no AD of its own",
                                   "RecursiveCheckpointAdjoint()")
        if run.method.implicit:
            raise base.unsupported(self.name, f"{run.method.name}: a tape of Newton's iterations is neither exact nor "
                                   "cheap", "RecursiveCheckpointAdjoint()")

    def plain(self, run: Run, x: Inputs) -> tuple[base.Outputs, base.Aux]:
        """Solve on arrays that the framework differentiates."""
        be = run.be
        value = be.detached(x)
        shift = (x.t0 - value.t0, x.t1 - value.t1)
        moving = value._replace(saveat=be.spread(x.t0, x.t1, base.fractions(run.saves))
                                if isinstance(run.saves, int) else x.saveat)
        through = base.replace(run, be=be.differentiable())
        out, aux, _ = base.solve_forward(through, moving, keep=True, shift=shift)
        return out, aux
