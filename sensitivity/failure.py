"""What is said of a solve that did not reach its end."""

from __future__ import annotations

from typing import Any

from .algorithms.base import Aux
from .errors import SolveError
from .integrate import Run
from .retcode import RetCode
from .solution import Solution
from .stiffness import stuck
from .system import Inputs


def failure(sol: Solution, run: Run, x: Inputs, aux: Aux, code: RetCode) -> SolveError:
    """The error that says where a solve stood."""
    if explain := getattr(run.kind, "failure", None):
        return explain(sol, run, aux, code)
    t, h, ratio = (float(run.be.concrete(v) or 0.0) for v in (aux.t, aux.h, aux.ratio))
    end = float(sol.prob.tspan[1])
    steps = f"{int(run.be.concrete(aux.accepted) or 0)} accepted steps"
    where = f"at t={t:.6g} of {end:g} after {steps}; last step {h:.1e}, last error {ratio:.1e} tolerances"
    what, why, fix = {
        RetCode.MaxSteps: (f"max_steps={min(run.max_steps, run.capacity)} reached {where}",
                           "the tolerances ask for very short steps",
                           "max_steps= larger, looser tolerances, or rescale the problem"),
        RetCode.DtMin: (f"the step size became too small {where}", "the solution may blow up there, or f jump",
                        "tstops=[...] at known jumps, looser tolerances, or a shorter tspan"),
        RetCode.NewtonFailure: (
            f"Newton's iteration for the stages of {run.method.name} failed {where}",
            "no smaller step avoided it" if run.controller.adaptive else "a fixed step cannot be made smaller",
            "check that f is smooth and finite there, and jac= right if it is given" if run.controller.adaptive
            else "dt= smaller, or the default controller where the method has one"),
        RetCode.NonFinite: (f"f returned a value that is not finite {where}", "no smaller step avoided it",
                            "check f there (negative values under log or sqrt, division by zero)"),
        RetCode.SimultaneousEvents: (f"two events happen at one time {where}",
                                     "which comes first would decide the result",
                                     "merge them into one event, or move one"),
        RetCode.MaxEvents: (f"max_events={run.max_events} reached {where}", "events may accumulate at a point (Zeno)",
                            "a terminal event before it, or max_events= larger"),
        RetCode.Unstable: (f"the two solutions of the reversible pair came apart {where}",
                           "where the solution contracts at a rate a, their difference grows like exp(|a| t)",
                           "sensealg=RecursiveCheckpointAdjoint(), a smaller coupling=, or a shorter tspan"),
        RetCode.IndexTooHigh: _index(t, ratio, end, steps),
        RetCode.Memory: (f"the budget of memory is too small for what later steps look back at {where}",
                         "it has to hold the steps of one largest lag, those of one segment, and their cotangents",
                         "memory= larger, looser tolerances, or RecursiveCheckpointAdjoint() without a budget"),
    }[code]
    if code in (RetCode.MaxSteps, RetCode.DtMin) and not run.method.implicit:
        why, fix = _stiff(sol, run, x, t, abs(h)) or (why, fix)
    if code in (RetCode.NonFinite, RetCode.NewtonFailure) and (name := _not_finite(run.be, sol.prob)):
        what, why, fix = f"{name} holds a value that is not finite; {what}", "NaN and infinity spread to all results", (
            f"look for the first NaN or infinity in {name}")
    return SolveError(what, why, fix, code, t, sol)


def _index(t: float, condition: float, end: float, steps: str) -> tuple[str, str, str]:
    """The words for constraints that do not determine the algebraic variables all the way."""
    why = "the system has index 2 or more there, or a turning point that the solution does not go beyond"
    fix = "a shorter tspan, or constraints that can be solved for the algebraic variables everywhere"
    if t == end:
        return ("the constraints cease to determine the algebraic variables on the way: what can be solved for at the "
                f"ends of tspan has determinants of opposite signs, or a save time lies where it cannot, after {steps}",
                why, fix)
    return (f"the constraints cease to determine the algebraic variables at t={t:.6g} of {end:g} (condition "
            f"{condition:.1e}, where 1 is best) after {steps}", why, fix)


def _stiff(sol: Solution, run: Run, x: Inputs, t: float, h: float) -> tuple[str, str] | None:
    """Why, and what to do, where an explicit method failed because of stiffness; None where it is not that."""
    be = run.be
    if run.kind is not None or not run.method.one_step or be.is_complex(x.u0) or be.known(run, x) is None:
        return None
    rows = run.field.u.ravel(be, be.flatten(sol.u)[0], batch=1)
    reached = [i for i in range(rows.shape[0]) if be.isfinite(be.rms(rows[i, :]))]
    seen = stuck(run, x, t, h, rows[reached[-1], :] if reached else x.u0)
    if seen is None or not seen.stiff:
        return None
    return (f"the problem looks stiff there: what decays fastest does so at a rate of {seen.decay:.2g}, which holds "
            f"the steps of {run.method.name} to {h:.1e} for all of the {seen.left:.2g} to go",
            "alg=sa.Kvaerno5(), an implicit method")


def _not_finite(be: Any, prob: Any) -> str | None:
    """Which of `u0` and `p` cannot give a finite solution."""
    for name in ("u0", "p"):
        for x in be.flatten(getattr(prob, name))[0]:
            if isinstance(x, float) or (be.is_array(x) and be.is_float(x)):
                if not bool(be.xp.all(be.xp.isfinite(be.asarray(x)))):
                    return name
    return None
