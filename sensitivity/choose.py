"""The automatic choice: which algorithm, which VJP, and the sentences that say why."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from .algorithms.base import bound, unsupported
from .errors import SensitivityWarning, UnsupportedCombination
from .integrate import Run
from .mass import check_index
from .rules import PRODUCT_RULES, Rule, Source, facts, selected
from .system import Inputs
from .trust import checked_once
from .userfunction import calling_depth
from .uservjp import UserVJP
from .vjp import VJP, ReverseVJP


class _Auto:
    """Let the library choose; what it chose and why stands on `sol.sensealg`."""

    def __repr__(self) -> str:
        return "auto"

    def __reduce__(self) -> str:
        return "auto"


auto: Any = _Auto()


def choose(run: Run, x: Inputs, sensealg: Any, verify: bool = True,
           wanted: frozenset[str] | None = None) -> tuple[Any, Run]:
    """The algorithm in use, with its reasons, and the run with its VJP choice bound.

    `wanted` are the inputs to differentiate, where they are known beforehand. Without `verify`, which a solve that
    nobody can differentiate does not need, products are not checked by value.

    Raises
    ------
    UnsupportedCombination
        The algorithm or the VJP choice cannot serve this run.
    """
    because: tuple[str, ...] = ()
    own: tuple[VJP, str] | None = None
    if sensealg is auto:
        own = _products(run, x, verify)
        rule, sensealg = suggested(run, x, own[0], wanted)
        because = (rule.because,)
    elif "stages" in sensealg.needs and not run.method.one_step:
        raise UnsupportedCombination(f"{sensealg.name} cannot differentiate {run.method.name}",
                                     "it needs the stages of each step, and the method keeps them to itself",
                                     "sensealg=GaussAdjoint(), InterpolatingAdjoint() or ForwardSensitivity()")
    if run.kind is not None:
        sensealg = run.kind.algorithm(sensealg)
    vjp = sensealg.vjp
    if vjp is None or vjp is auto:
        vjp, reason = own or _products(run, x, verify)
        because += (reason,)
    elif missing := vjp.missing(run):
        raise UnsupportedCombination(f"{vjp.name} cannot be used", missing,
                                     "vjp=FiniteDifferenceVJP() serves any f; vjp=auto chooses")
    elif unused := vjp.unused(run):
        warnings.warn(unused, SensitivityWarning, stacklevel=calling_depth())
    run = replace(run, vjp=vjp)
    if run.events and not sensealg.events:
        raise UnsupportedCombination(f"{sensealg.name} does not go with events", "it has no jump conditions for them",
                                     "sensealg=RecursiveCheckpointAdjoint()")
    sensealg.refuse(run)
    vjp.refuse(run, sensealg)
    _check_device(run, x, sensealg, vjp)
    if run.mass is not None:
        if not sensealg.algebraic:
            raise unsupported(sensealg.name, "a singular mass matrix",
                              "RecursiveCheckpointAdjoint(), GaussAdjoint() or ForwardSensitivity()")
        _check_index(run, x)
    return replace(sensealg, vjp=vjp, because=because), run


def suggested(run: Run, x: Inputs, vjp: VJP, wanted: frozenset[str] | None, **more: Any) -> tuple[Rule, Any]:
    """The rule that decides, and the algorithm that it takes; `more` facts as `rules.Facts` has them."""
    known = facts(run, x, vjp, wanted, **more)
    rule = selected(known)
    return rule, rule.take(known)


def _products(run: Run, x: Inputs, verify: bool) -> tuple[VJP, str]:
    """`choose_vjp` at what stands in place of `f` in this kind of problem."""
    at = (run, x) if run.kind is None else run.kind.products(run, x)
    return choose_vjp(at[0], at[1], verify)


def _check_device(run: Run, x: Inputs, *parts: Any) -> None:
    """Refuse what does not run where the arrays are."""
    device = run.be.device(x.u0)
    kind = "cpu" if device is None or "cpu" in str(device).lower() else "gpu"
    for part in (run.method, *parts):
        if kind not in part.devices:
            raise UnsupportedCombination(f"{part.name} does not run on {device}",
                                         f"it is for {' and '.join(sorted(part.devices))}",
                                         "move the arrays, or choose another one")


def _check_index(run: Run, x: Inputs) -> None:
    """Refuse what is no index-1 problem, where the numbers are known."""
    known = run.be.known(run, x)
    if known is None:
        return
    run, x = known
    be = run.be
    with be.quiet():
        stepper: Any = bound(run, x)
        t = be.time(be.scalar(x.t0))
        start, _ = stepper.start(t, x.u0)
        check_index(be, run.mass, stepper.jac.near, t, start if be.isfinite(be.rms(start)) else x.u0)


def choose_vjp(run: Run, x: Inputs, verify: bool = True) -> tuple[VJP, str]:
    """What the first of `PRODUCT_RULES` that holds takes, and why."""
    def lost() -> str | None:
        missing = ReverseVJP().missing(run)
        return checked_once(run, x) if missing is None and run.be.opaque and verify else missing

    source = Source(run.be.name, UserVJP().missing(run) is None and not run.field.captured, lost)
    rule = next(rule for rule in PRODUCT_RULES if rule.holds(source))
    return rule.take, rule.because(source)
