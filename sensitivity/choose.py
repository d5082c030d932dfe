"""The automatic choice: which algorithm, which VJP, and the sentences that say why."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from typing import Any

from .algorithms.discrete import RecursiveCheckpointAdjoint
from .errors import UnsupportedCombination
from .integrate import Run, span
from .system import Inputs
from .vjp import VJP, FiniteDifferenceVJP, ReverseVJP, UserVJP


class _Auto:
    """Let the library choose; what it chose and why stands on `sol.sensealg`."""

    def __repr__(self) -> str:
        return "auto"

    def __reduce__(self) -> str:
        return "auto"


auto: Any = _Auto()


def choose(run: Run, x: Inputs, sensealg: Any, verify: bool = True) -> tuple[Any, Run]:
    """The algorithm in use, with its reasons, and the run with its VJP choice bound.

    Without `verify`, which a solve that nobody can differentiate does not need, products are not checked by value.

    Raises
    ------
    UnsupportedCombination
        The algorithm or the VJP choice cannot serve this run.
    """
    because: tuple[str, ...] = ()
    if sensealg is auto:
        sensealg = RecursiveCheckpointAdjoint()
        because = ("exact gradient of the computed solution; costs one product with the derivatives of f per stage",)
    vjp = sensealg.vjp
    if vjp is None or vjp is auto:
        vjp, reason = choose_vjp(run, x, verify)
        because += (reason,)
    elif missing := vjp.missing(run):
        raise UnsupportedCombination(f"{vjp.name} cannot be used", missing,
                                     "vjp=FiniteDifferenceVJP() serves any f; vjp=auto chooses")
    run = replace(run, vjp=vjp)
    sensealg.refuse(run)
    return replace(sensealg, vjp=vjp, because=because), run


def choose_vjp(run: Run, x: Inputs, verify: bool = True) -> tuple[VJP, str]:
    """The first of: the user's products, the framework's reverse mode, differences."""
    be, user, reverse = run.be, UserVJP(), ReverseVJP()
    if user.missing(run) is None and run.field.p.count == len(x.theta):
        return user, "the problem carries its own derivatives"
    missing = reverse.missing(run)
    if missing is None and be.opaque and verify:
        missing = _checked_once(run, x)
    if missing is None:
        return reverse, f"reverse-mode AD of {be.name}"
    return FiniteDifferenceVJP(), (f"central differences, because {missing}; vjp=ComplexStepVJP() is exact for an "
                                   "analytic f, ODEProblem(vjp=...) for any")


_verdicts: weakref.WeakKeyDictionary[Any, dict[Any, str | None]] = weakref.WeakKeyDictionary()


def _checked_once(run: Run, x: Inputs) -> str | None:
    """`_disagreement`, remembered for each function and each shape of its arguments."""
    try:
        known = _verdicts.setdefault(run.field.f, {})
    except TypeError:
        return _disagreement(run, x)
    key = (run.backend, x.u0.dtype, run.field.u.shapes, tuple(tuple(v.shape) for v in x.theta))
    if key not in known:
        known[key] = _disagreement(run, x)
    return known[key]


def _disagreement(run: Run, x: Inputs) -> str | None:
    """Why reverse-mode AD cannot be trusted with this `f`, checked by value at the initial point."""
    be = run.be
    s = span(be, x.t0, x.t1)
    n = run.field.u.size
    ct = be.vector([1.0 + 0.25 * i / n for i in range(n)], x.u0)
    results = []
    for vjp in (ReverseVJP(), FiniteDifferenceVJP()):
        try:
            bound = replace(run, vjp=vjp)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the values decide, not what AD says on the way
                results.append(vjp.pullback(bound, x, params=False)(be.time(s.t0), x.u0, ct)[0])
        except Exception as e:  # any failure of AD on a user's function means the same: it cannot serve
            return f"{be.name} AD fails on f ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
    exact, numeric = results
    gap = be.rms(exact - numeric)
    if gap <= 1e-4 * (be.rms(numeric) + be.rms(ct)):
        return None
    return f"{be.name} AD of f disagrees with differences at the start (f leaves the AD's namespace)"
