"""Interpolating adjoint: costate and parameter integral together, along the dense forward solution.

On each leg (see `continuous`) the augmented system

    lam' = -f_u(t, u(t), p)^T lam,   mu' = -f_p(t, u(t), p)^T lam

is integrated backwards, one VJP for each evaluation. `u(t)` is the dense output of the forward solve, or, with
checkpoints, of a second solve of that leg from the state stored at its start; so the error is that of the two solves
and of the interpolant. The error norm is the larger of those of `lam` and `mu`.

References: Cao, Li, Petzold, Serban 2003, SIAM J. Sci. Comput. 24, eq. (2.11); Rackauckas et al. 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..backend import Array, Scalar
from ..estimates import Effort, Work
from .continuous import ContinuousAdjoint
from .costate import Costate
from .points import checked_points
from .walk import Leg, Way, path, worst_part


@dataclass(frozen=True)
class InterpolatingAdjoint(ContinuousAdjoint):
    """Continuous adjoint along the forward solution, which is kept dense or solved again from checkpoints.

    Parameters
    ----------
    vjp : VJP, optional
    checkpointing : "auto", True or False
        True: keep states at checkpoints and save times only, and solve one interval again at a time. "auto": if
        `checkpoints` are given.
    checkpoints : optional
        "saveat": the save times; a number of equal intervals; a list of times; or an amount of memory such as "200MB",
        half of which is for states. States at save times always serve too.
    alg, rtol, atol : optional
        Method and tolerances of the backward solve; those of the forward solve if not given.

    References: Cao, Li, Petzold, Serban 2003, SIAM J. Sci. Comput. 24, eq. (2.11).
    """

    checkpointing: Any = "auto"  # type: ignore[misc]
    checkpoints: Any = None  # type: ignore[misc]

    second_order: ClassVar[bool] = True
    algebraic: ClassVar[bool] = True
    elsewhere: ClassVar[frozenset[str]] = frozenset({"sde", "dde"})
    references: ClassVar[tuple[str, ...]] = ("cao2003", "rackauckas2020")

    def __post_init__(self) -> None:
        super().__post_init__()
        points = checked_points(self.name, self.checkpointing, self.checkpoints, ("auto", True, False))
        object.__setattr__(self, "checkpoints", points)

    def work(self, w: Work) -> Effort:
        effort = Effort(0, 0, w.back * w.s, w.stored + (w.n + w.P) * (w.s + 3))
        return effort if self.checkpoints is None else effort.within(w)

    def cross(self, way: Way, leg: Leg, t: Scalar, u: Array) -> Leg:
        n = leg.lam.shape[0]
        known, leg = path(way, leg, t, u)
        equation = Costate(way, known)
        rhs, jac = equation.both(n)
        parts = (n, leg.mu.shape[0])
        z = way.be.xp.concat([equation.enter(leg), leg.mu])
        last, _, stepper = way.solve(leg, t, rhs, z, worst_part(way.be, parts), parts=parts, jac=jac,
                                     mass=equation.wide_mass)
        before = leg
        leg, count = way.ran(leg, stepper, last)
        solves, rows = leg.algebra[2] - before.algebra[2] - stepper.starting(True)[2], equation.rows(before, leg)
        leg = equation.counted(before, leg, count)
        if way.params and equation.forward is not None:
            count = count + solves
        count = count + rows
        return leg._replace(lam=equation.leave(last.u[:n]), mu=last.u[n:], nvjp=leg.nvjp + count)
