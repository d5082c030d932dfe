"""Gradients by every candidate: time, memory, and whether they agree with a reference that trusts nobody.

The reference is a gradient at tight tolerances whose products with the derivatives of `f` are differences of `f`
itself: neither the problem's own `vjp`, `jvp`, `jac` and `paramjac` nor the framework's AD has a part in it.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import replace
from typing import Any

from .advice import REPEATS, Advice, Candidate
from .algorithms.base import size_of
from .errors import SensitivityError, SensitivityWarning
from .gradient import gradient
from .registry import registry
from .vjp import FiniteDifferenceVJP, ReverseVJP

DIFFERENCES = 200
# Differences of f in float32 have four digits, and gradients made with them fewer.
TOLERANCE = {64: 1e-4, 32: 1e-2}
LOOSE = 100.0
TIE = 0.85
OWN = ("vjp", "jvp", "jac", "paramjac")


def squares(sol: Any) -> Any:
    """The sum of the squares of all of the solution."""
    leaves, _ = registry().backend(sol_backend(sol)).flatten(sol.u)
    total = (leaves[0] * leaves[0]).sum()
    for v in leaves[1:]:
        total = total + (v * v).sum()
    return total


def sol_backend(sol: Any) -> str:
    from . import tree

    leaves, _ = tree.flatten(sol.u)
    return registry().kind_of(leaves[0]) or "numpy"


def measured(advice: Advice, loss: Any, dloss: Any) -> Advice:
    """The advice with what was measured; the best of the right ones is chosen."""
    loss = squares if loss is None else loss
    be = registry().backend(advice.facts.backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SensitivityWarning)
        truth, said = _reference(advice, be, loss, dloss)
        like = be.flatten(advice.prob.u0)[0][0]
        means: set[str] = set()
        table = [_row(advice, be, r, loss, dloss, truth, like, means) if r.verdict in ("chosen", "possible") else r
                 for r in advice.table]
    return replace(_decided(advice, table), reference=said, peaks=", ".join(sorted(means)) or None)


def _decided(advice: Advice, table: list[Candidate]) -> Advice:
    """The fastest of the right ones is chosen; what is as fast within 15 percent gives way to the automatic choice, and
    neither what goes backwards at the cost of digits nor what is for second derivatives is taken."""
    right = sorted((r for r in table if r.verdict in ("chosen", "possible")), key=lambda r: r.seconds or math.inf)
    rest = [r for r in table if r.verdict not in ("chosen", "possible")]
    if not right:
        vjp = FiniteDifferenceVJP()
        own = {"vjp": vjp} | ({"jvp": vjp} if hasattr(advice.sensealg, "jvp") else {})
        safe = replace(advice.sensealg, **own, because=(
            advice.sensealg.because[0], "differences of f, because all gradients by other products disagree with them"))
        return replace(advice, sensealg=safe, vjp=vjp, table=tuple(rest))
    usual = next((r for r in right if r.verdict == "chosen"), None)
    best = next((r for r in right if r.rule not in ("backwards", "second-order")), right[0])
    assert best.seconds is not None
    if usual is not None and usual.seconds is not None and best.seconds > TIE * usual.seconds:
        best = usual
    table = [replace(r, verdict="chosen" if r is best else "possible") for r in right] + rest
    if best is usual:
        return replace(advice, table=tuple(table))
    chosen = replace(best.sensealg, vjp=advice.vjp, **({"jvp": advice.vjp} if hasattr(best.sensealg, "jvp") else {}),
                     because=(f"the fastest of {len(right)} gradients that agree", advice.sensealg.because[-1]))
    last = ("Is another one, measured, faster by more than 15 percent?", "yes", f"{best.name}: {chosen.because[0]}")
    if usual is None:
        last = ("Is the gradient of the automatic choice wrong?", "yes", f"{best.name}: {chosen.because[0]}")
    return replace(advice, sensealg=chosen, table=tuple(table), path=(*advice.path, last))


def _reference(advice: Advice, be: Any, loss: Any, dloss: Any) -> tuple[list[Any], str]:
    """The gradient to compare with, and what it is."""
    prob, options = advice.prob, dict(advice.options)
    stripped = prob.remake(**{name: None for name in OWN if getattr(prob, name, None) is not None})
    few = advice.facts.n + advice.facts.params <= DIFFERENCES
    vjp = FiniteDifferenceVJP() if few or not be.modes else ReverseVJP()
    double = advice.facts.bits == 64
    said = "a gradient by differences of f" if isinstance(vjp, FiniteDifferenceVJP) else "a gradient by AD of f"
    if advice.facts.kind in ("ode", "dde") and advice.alg.adaptive and options.get("controller") is None:
        options |= {"rtol": 1e-10 if double else 2e-5, "atol": 1e-12 if double else 1e-7}
        said += f" at rtol={options['rtol']:g}"
    plain = next(r.sensealg for r in advice.table if r.verdict == "chosen")
    plain = replace(plain, vjp=vjp, **({"jvp": vjp} if hasattr(plain, "jvp") else {}))
    r = gradient(stripped, advice.alg, loss, wrt=advice.wrt, dloss=dloss, sensealg=plain, **options)
    return _arrays(be, r), said


def _row(advice: Advice, be: Any, row: Candidate, loss: Any, dloss: Any, truth: list[Any], like: Any,
         means: set[str]) -> Candidate:
    """One candidate, run."""
    given = None if dloss is None or not row.sensealg.boundary else dloss

    def run() -> Any:
        return gradient(advice.prob, advice.alg, loss, wrt=advice.wrt, dloss=given, sensealg=row.sensealg,
                        **advice.options)

    try:
        found = _arrays(be, run())
        peak, by = be.peak(run, like)
        if by is not None:
            means.add(by)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            _arrays(be, run())
            times.append(time.perf_counter() - start)
    except SensitivityError as e:
        return replace(row, verdict="ruled out", why=str(e))
    seconds, spread = min(times), max(times) / min(times) - 1.0
    size = max(max(abs(v) for v in a) for a in truth) or 1.0
    error = max(abs(v - w) for a, b in zip(found, truth, strict=True) for v, w in zip(a, b, strict=True)) / size
    rtol = advice.options.get("rtol", 1e-6 if advice.facts.bits == 64 else 1e-4)
    tolerance = max(TOLERANCE.get(advice.facts.bits, 1e-2), LOOSE * rtol if isinstance(rtol, float) else 0.0)
    if not error <= tolerance:
        return replace(row, verdict="wrong", why=f"differs from the reference by {error:.1e} of its size",
                       seconds=seconds, peak=peak, error=error, spread=spread)
    return replace(row, seconds=seconds, peak=peak, error=error, spread=spread)


def _arrays(be: Any, r: Any) -> list[list[float]]:
    """All parts of a gradient as numbers; waits for them."""
    leaves: list[Any] = []
    for name in ("u0", "p", "t0", "t1", "saveat"):
        if getattr(r, name) is not None:
            leaves += [v for v in be.flatten(getattr(r, name))[0] if be.is_array(v) and be.is_float(v)]
    with be.quiet():
        flat = [be.xp.reshape(v, (size_of(v),)) for v in leaves]
        if any(be.is_complex(v) for v in flat):
            flat = [w for v in flat for w in (be.xp.real(v), be.xp.imag(v))]
        return [[float(v) for v in be.concrete_times(w)] for w in flat if w.shape[0]]
