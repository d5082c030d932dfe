"""What the shadowing algorithms share: which problems and losses they take, and how they are refused.

A tangent of a chaotic solution grows like exp(L t), L the largest Lyapunov exponent, so the derivative of an average
over the span T is not the derivative of the long-time average: it diverges with T. Shadowing looks for the solution at
the changed parameter that stays near the given one, started elsewhere and run through at another speed,

    v' = f_u v + f_p + eta f,   d<g>/dp = <g_u v + g_p + eta (g - <g>)>,   v bounded,

which exists for uniformly hyperbolic systems. Reference: Wang 2013, J. Comput. Phys. 235, section 3.

The running cost is the last entry of the state, so products with the derivatives of `[f, g]` give those of both.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from sensitivity.algorithms import base
from sensitivity.backend import Array
from sensitivity.costs import ContinuousCost, Cost
from sensitivity.errors import InputError, SensitivityWarning, SolveError, UnsupportedCombination
from sensitivity.integrate import Run
from sensitivity.retcode import RetCode
from sensitivity.system import Inputs
from sensitivity.userfunction import calling_depth

FEW_SEGMENTS = 20
FAR = 0.3819660112501051  # of the span: no period is likely to divide it

STARTS = "the average does not depend on where the solution starts"
WHY = {"u0": STARTS, "t0": STARTS, "t1": "the long-time average does not depend on the span",
       "saveat": "the average uses no save time"}


class Shadowing(base.SensitivityAlgorithm):
    """Base of the shadowing algorithms."""

    modes: ClassVar[frozenset[str]] = frozenset({"reverse"})
    kinds: ClassVar[frozenset[str]] = frozenset({"average"})
    twice: ClassVar[str] = "differences of gradients: a shadowing direction has no derivative here"

    def asked(self, loss: Any, wrt: Any) -> tuple[str, ...]:
        terms = loss.terms if isinstance(loss, Cost) else (loss,)
        if not all(isinstance(term, ContinuousCost) for term in terms):
            raise UnsupportedCombination(
                f"{self.name} gives the derivative of a long-time average, and the loss is none",
                "it shadows a chaotic solution, whose states themselves have no useful derivative",
                f"sa.gradient(prob, alg, sa.ContinuousCost(g), sensealg=sa.{self.name}()) for the integral of g; for "
                "any other loss sensealg=sa.RecursiveCheckpointAdjoint()")
        names = ("p",) if wrt is None else (wrt,) if isinstance(wrt, str) else tuple(wrt)
        for name in names:
            if name in WHY:
                raise UnsupportedCombination(f"{self.name} has no derivative with respect to {name}", WHY[name],
                                             "wrt='p'; for this one trajectory sensealg=sa.InterpolatingAdjoint()")
        return names

    def refuse(self, run: Run) -> None:
        if not run.method.one_step:
            raise base.unsupported(f"{self.name}", f"{run.method.name}, whose steps are not known",
                                   "GaussAdjoint(), or alg=sa.Tsit5()")
        if run.saves == "steps":
            raise UnsupportedCombination(f"{self.name} does not go with saveat='steps'", "an average needs no rows",
                                         "saveat=None")

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, base.Solved]:
        del wanted
        self.fits(x.u0.shape[0] - 1)
        return base.solve_forward(run, x, keep=True)

    def fits(self, n: int) -> None:
        """Raise where the algorithm cannot serve a state of this size."""
        if n < 2:
            raise UnsupportedCombination(f"{self.name} does not go with a single state",
                                         "there is a direction along the solution, and none beside it",
                                         "sensealg=sa.RecursiveCheckpointAdjoint()")

    def verdict(self, bar: base.Cotangents, status: float | None, mismatch: float | None) -> None:
        if status == RetCode.NotAutonomous:
            raise SolveError(f"{self.name} cannot shadow: f or g depends on the time t",
                             "a shadow runs through the solution at another speed, which changes what depends on t",
                             "an autonomous problem; a periodic force as two more states", RetCode.NotAutonomous)
        if status == RetCode.Unstable:
            raise SolveError(f"{self.name} found no bounded shadow: tangents still grow exponentially",
                             "there are more unstable directions than `unstable` says, or segments are so long that "
                             "directions are lost within one",
                             f"{self.name}(unstable= larger, segments= larger)", RetCode.Unstable)


def timeless(run: Run, x: Inputs, end: Array) -> Any:
    """Whether `f` and `g` are the same at three times."""
    be = run.be
    rhs = run.field.bind(be, x.theta, x.constants)
    t0, t1 = be.scalar(x.t0), be.scalar(x.t1)
    first, *others = (rhs(be.time(t), end) for t in (t0, t0 + FAR * (t1 - t0), t1))
    change = sum(be.rms(other - first) for other in others)
    return be.choose(be.isfinite(change), change, 0.0) == 0.0


def concluded(run: Run, status: Any, timeless: Any, bounded: Any) -> Any:
    """The status of a reverse pass."""
    be = run.be
    status = be.choose((status == 0) & bounded, status, be.choose(status == 0, int(RetCode.Unstable), status))
    return be.choose((status == 0) & timeless, status, be.choose(timeless, status, int(RetCode.NotAutonomous)))


def counted(name: str, value: Any, least: int) -> None:
    """Refuse what is no count."""
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        raise InputError(f"{name}={value!r} is not a whole number of at least {least}", "it is a count",
                         f"{name}={least}")


def warn_of_few(name: str, segments: int) -> None:
    """Say that an average over so few segments has not converged."""
    if segments < FEW_SEGMENTS:
        warnings.warn(f"{name}(segments={segments}) averages over few segments: a shadow is wrong near the ends of the "
                      f"span, and its error falls like 1/T; take {FEW_SEGMENTS} segments or more, and a span to fill "
                      "them", SensitivityWarning, stacklevel=calling_depth())
