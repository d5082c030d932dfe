"""Whether AD may be trusted with a user's function: by value, against differences, once."""

from __future__ import annotations

import math
import warnings
import weakref
from dataclasses import replace
from typing import Any

from .errors import NumericalDerivativeWarning
from .integrate import Run, span
from .jacobian import sizes
from .system import Inputs
from .userfunction import calling_depth
from .uservjp import UserVJP
from .vjp import VJP, FiniteDifferenceVJP, ReverseVJP

ENTRYWISE = 256

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
    fails = reverse.missing(run) or (_disagreement(run, x, size) if run.be.opaque else None)
    if fails is None:
        return reverse
    warnings.warn(f"a condition or affect of an event is differentiated by central differences, because {fails}; "
                  "write it in the AD's namespace for exact derivatives", NumericalDerivativeWarning,
                  stacklevel=calling_depth())
    return FiniteDifferenceVJP()


def _disagreement(run: Run, x: Inputs, size: int) -> str | None:
    """Why reverse-mode AD cannot be trusted with this `f`, checked by value at the initial point."""
    be = run.be
    s = span(be, x.t0, x.t1)
    ct = be.vector([1.0 + 0.25 * i / size for i in range(size)], x.u0)
    t, agree = run.field.argument(be, s.t0), _agree if x.u0.shape[0] <= ENTRYWISE else _agree_along
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the values decide, not what AD says on the way
            exact = ReverseVJP().pullback(replace(run, vjp=ReverseVJP()), x, params=False)(t, x.u0, ct)[0]
            if agree(replace(run, vjp=FiniteDifferenceVJP()), x, t, ct, exact):
                return None
    except Exception as e:  # any failure of AD on a user's function means the same: it cannot serve
        return f"{be.name} AD fails on f ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
    return f"{be.name} AD of f disagrees with differences at the start (f leaves the AD's namespace)"


def _agree(run: Run, x: Inputs, t: Any, ct: Any, exact: Any) -> bool:
    """Whether every entry of `f_u^T ct` is that of differences; where those are not finite, nothing is known."""
    be = run.be
    numeric = run.vjp.pullback(run, x, params=False)(t, x.u0, ct)[0]
    size = be.rms(numeric)
    return not be.isfinite(size) or be.rms(exact - numeric) <= 1e-4 * (size + be.rms(ct))


def _agree_along(run: Run, x: Inputs, t: Any, ct: Any, exact: Any) -> bool:
    """`_agree` along four directions, for states with many entries."""
    be = run.be
    n = x.u0.shape[0]
    rows = [be.vector([math.cos(1.0 + k + (2.0 + k) * i) for i in range(n)], x.u0) for k in range(4)]
    du = be.xp.stack(rows) * sizes(be, x.u0, 1e-3)[None, :]
    df = run.vjp.pushforward(run, x, tuple(0.0 * be.xp.stack([v] * 4) for v in x.theta))(t, x.u0, du, None)[1]
    for k in range(4):
        got, want = be.dot(exact, du[k, :]), be.dot(ct, df[k, :])
        # One wrong entry is about 1/n of the whole; differences are right to about nine digits of it.
        size = n * be.rms(ct) * be.rms(df[k, :])
        if be.isfinite(want) and not abs(got - want) <= max(1e-6, 10.0 * be.eps(ct.dtype) ** 0.5) * size:
            return False
    return True
