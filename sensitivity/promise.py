"""Is `jac_sparsity` true? An entry that it leaves out would be taken to be zero, in the gradient too."""

from __future__ import annotations

import math
import warnings
from typing import Any

from .backend import Array
from .errors import InputError, ProbeWarning
from .jacobian import between, compressed_differences, sizes
from .sparsity import Pattern
from .userfunction import calling_depth

FAR, ROUNDING = 1e-4, 1e-9


def check_pattern(run: Any, x: Any, anchor: Any, mode: str) -> None:
    """Compare, once for each `f`, the Jacobian of the pattern with a difference of f, along one direction at the start.

    Raises
    ------
    InputError
        A row has more entries than `jac_sparsity` says; a warning with `mode="warn"`.
    """
    pattern = _pattern(run)
    if _seen(pattern, anchor):
        return
    found = run.be.look(_both, run, x)
    if found is None:
        return
    n = pattern.size
    gaps, scale = found[:n], [abs(v) for v in found[:n]]
    floor = ROUNDING * max(scale)
    for i, entry in zip(pattern.rows.tolist(), found[n:], strict=True):
        gaps[i] -= entry
        scale[i] += abs(entry)
    rows = [i for i in range(n) if abs(gaps[i]) > FAR * scale[i] + floor]
    if rows and all(map(math.isfinite, found)):
        row = rows[0]
        wrong = InputError(f"jac_sparsity leaves out entries of row {row}: f_{row} depends on more of u than it says",
                           "what it leaves out would be taken to be zero, in the gradient too",
                           "a pattern with all entries of df/du that may be nonzero, or none at all")
        if mode != "warn":
            raise wrong
        warnings.warn(str(wrong), ProbeWarning, stacklevel=calling_depth())
    try:
        pattern.checked.add(anchor)
    except TypeError:  # what cannot be remembered is looked at each time
        pass


def _pattern(run: Any) -> Pattern:
    return run.kind.pattern if run.sparsity is None else run.sparsity


def _seen(pattern: Pattern, anchor: Any) -> bool:
    try:
        return anchor in pattern.checked
    except TypeError:
        return False


def _both(run: Any, x: Any) -> Array:
    """`f_u w` as a difference of f, and the entries of the pattern times those of w."""
    be, pattern = run.be, _pattern(run)
    xp, n, u, t = be.xp, pattern.size, x.u0, be.time(be.scalar(x.t0))
    rhs = run.field.bind(be, x.theta, x.constants)
    step = be.eps(u.dtype) ** (1 / 3) * sizes(be, u, 1e-3) * be.vector([1.0 + 0.5 * math.cos(i) for i in range(n)], u)
    entries = compressed_differences(be, rhs, pattern)(t, u) * xp.take(step, be.asarray(pattern.columns))
    return xp.concat([between(rhs, t, u, step), entries])
