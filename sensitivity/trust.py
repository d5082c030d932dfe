"""Whether AD may be trusted with a user's function: by value, against differences, once."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from typing import Any

from .integrate import Run, span
from .system import Inputs
from .vjp import VJP, FiniteDifferenceVJP, ReverseVJP, UserVJP

_verdicts: weakref.WeakKeyDictionary[Any, dict[Any, str | None]] = weakref.WeakKeyDictionary()


def checked_once(run: Run, x: Inputs) -> str | None:
    """`_disagreement`, remembered for each function and each shape of its arguments."""
    try:
        known = _verdicts.setdefault(run.field.f, {})
    except TypeError:
        return _disagreement(run, x, x.u0.shape[0])
    key = (run.backend, x.u0.dtype, run.field.u.shapes, tuple(tuple(v.shape) for v in x.theta))
    if key not in known:
        known[key] = _disagreement(run, x, x.u0.shape[0])
    return known[key]


def trusted(run: Run, x: Inputs, size: int) -> VJP:
    """The choice for a condition or an affect: that of the run, or one that needs nothing from the problem."""
    if not isinstance(run.vjp, UserVJP | ReverseVJP):
        return run.vjp
    reverse = ReverseVJP()
    fails = reverse.missing(run) or (run.be.opaque and _disagreement(run, x, size))
    return FiniteDifferenceVJP() if fails else reverse


def _disagreement(run: Run, x: Inputs, size: int) -> str | None:
    """Why reverse-mode AD cannot be trusted with this `f`, checked by value at the initial point."""
    be = run.be
    s = span(be, x.t0, x.t1)
    ct = be.vector([1.0 + 0.25 * i / size for i in range(size)], x.u0)
    results = []
    for vjp in (ReverseVJP(), FiniteDifferenceVJP()):
        try:
            bound = replace(run, vjp=vjp)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the values decide, not what AD says on the way
                results.append(vjp.pullback(bound, x, params=False)(run.field.argument(be, s.t0), x.u0, ct)[0])
        except Exception as e:  # any failure of AD on a user's function means the same: it cannot serve
            return f"{be.name} AD fails on f ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
    exact, numeric = results
    gap = be.rms(exact - numeric)
    if gap <= 1e-4 * (be.rms(numeric) + be.rms(ct)):
        return None
    return f"{be.name} AD of f disagrees with differences at the start (f leaves the AD's namespace)"
