"""What is said of a reverse pass that failed, or that may be wrong."""

from __future__ import annotations

import math
import warnings
from typing import Any

from .errors import SensitivityWarning, SolveError
from .retcode import RetCode
from .userfunction import calling_depth

CHAOTIC = 1e4  # relative change of an integral per relative change of where it starts
DECADES = 1e3  # growth of a costate that is exponential


def judge(algorithm: Any, be: Any, bar: Any, sol: Any = None) -> None:
    """Raise for a reverse pass that failed, and let the algorithm say what it found; what is only traced is let be."""
    status = be.concrete(bar.status)
    algorithm.verdict(bar, status, None if bar.mismatch is None else be.concrete(bar.mismatch))
    if status is not None and status != RetCode.Success:
        raise reverse_failure(algorithm, RetCode(int(status)), sol)


def warn_of_chaos(algorithm: Any, run: Any, x: Any, end: Any, value: Any, bar: Any) -> None:
    """Warn where costates of an integral, the last entry of the state, grew exponentially on the way back.

    An integral that depends that much on `u0` is looked at again: is `lam(t0)` more than `int |g_u| dt` can explain?
    """
    be, lam = run.be, bar.u0[:-1]
    size, total = be.concrete(be.rms(x.u0[:-1]) * be.rms(lam)), be.concrete(value)
    if size is None or total is None or run.kind is not None or not CHAOTIC * abs(total) < size < math.inf:
        return
    known = be.known(run, x)
    if known is None:
        return
    run, x = known
    with run.be.quiet():
        pull = run.vjp.pullback(run, x, params=False)
        unit = be.unit_rows(1, x.u0.shape[0], 1 - x.u0.shape[0], x.u0)[0, :]
        slopes = [be.rms(pull(be.time(be.scalar(t)), u, unit)[0][:-1]) for t, u in ((x.t0, x.u0), (x.t1, end))]
    push = float(be.concrete(be.greatest(*slopes)) * abs(be.concrete(x.t1) - be.concrete(x.t0)))
    grown = float(be.concrete(be.rms(lam)))
    if push > 0.0 and grown > DECADES * push:
        warnings.warn(f"{algorithm.name}: costates grow backwards by a factor of {grown / push:.0e}, as they do along "
                      "a chaotic solution. The gradient is that of this one trajectory, and no better known than its "
                      "end. For the derivative of a long-time average take sensealg=sa.AdjointLSS()",
                      SensitivityWarning, stacklevel=calling_depth())


def reverse_failure(algorithm: Any, code: RetCode, sol: Any = None) -> SolveError:
    """The error that says why there is no gradient."""
    if own := algorithm.reverse_failure(sol):
        return own
    name = f"{algorithm.name} has no gradient to give: "
    what, why, fix = {
        RetCode.GrazingEvent: (name + "a condition only grazes zero", "the event's time has no derivative there",
                               "a condition that crosses zero at an angle, or other parameters"),
        RetCode.SimultaneousEvents: (name + "two events happen at one time", "their order decides, so that the limits "
                                     "from the two sides differ", "merge them into one event, or move one"),
        RetCode.EventAtSaveTime: (name + "an output lies exactly on an event",
                                  "it would be the state before or behind the event after the smallest change",
                                  "read sol.events.u, or save a little earlier or later"),
        RetCode.NewtonFailure: (name + "a linear equation of the reverse sweep could not be solved",
                                "f_u is not finite there, I - h f_u is singular, or the linear solver did not converge",
                                "linear_solver='dense', or 'sparse' with jac_sparsity=, of the method"),
    }.get(code, (f"the reverse solve of {algorithm.name} failed: {code.name}",
                 "the adjoint equation needs more steps than allowed, or cannot be followed backwards",
                 "sensealg=RecursiveCheckpointAdjoint(), or max_steps= larger"))
    return SolveError(what, why, fix, code, None, sol)
