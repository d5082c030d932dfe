"""Which method, where none is named: for ordinary and differential-algebraic equations.

`METHOD_RULES` are asked in their order, as `rules.RULES` are for the sensitivity algorithm. What they know is in
`Start`: the problem, and what `stiffness.signs` saw of its values. Derivatives have no part in the choice, so that a
solve and its gradient take the same method.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from .integrate import Run
from .methods import Dopri8, Kvaerno5, Method, Rodas5P, Tsit5
from .prepare import prepare
from .problems import ODEProblem
from .rules import TIGHT, TRIAL, Choice
from .stiffness import Signs, signs
from .system import Inputs


@dataclass(frozen=True)
class Start:
    """What is known before a solve.

    Attributes
    ----------
    constraints : whether the mass matrix is singular.
    jac : whether the problem carries its Jacobian.
    exact : whether Jacobians are exact: given, or by AD that is sure to see all of `f`.
    tight : whether the tolerance is.
    unseen : why nothing is known of stiffness, or None.
    signs : what the start of the solution says, or None.
    """

    constraints: bool
    jac: bool
    exact: bool
    tight: bool
    unseen: str | None
    signs: Signs | None

    @property
    def stiff(self) -> bool:
        return self.signs is not None and self.signs.stiff


def _stiff(s: Start) -> str:
    assert s.signs is not None
    return (f"stiff: what decays fastest, at a rate of {s.signs.decay:.2g}, held the steps of Tsit5 to "
            f"{s.signs.step:.1e}, with {s.signs.left:.2g} to go ({s.signs.evaluations} evaluations of f)")


def _calm(s: Start) -> str:
    if s.signs is None:
        return f"stiffness is not known: {s.unseen}"
    how, rate = ("decays", s.signs.decay) if s.signs.decay > 0.0 else ("changes", s.signs.rate)
    return f"not stiff at the start: f {how} at a rate of {rate:.2g} ({s.signs.evaluations} evaluations of f)"


METHOD_RULES: tuple[Choice, ...] = (
    Choice("constraints-exact", "Is the mass matrix singular, and are Jacobians exact?",
           lambda s: s.constraints and s.exact, Rodas5P(),
           lambda s: "the mass matrix is singular: constraints need an implicit method, and this one no iteration",
           "Steinebach (2023)"),
    Choice("constraints", "Is the mass matrix singular?", lambda s: s.constraints, Kvaerno5(),
           lambda s: "the mass matrix is singular, and Jacobians by differences steer an iteration only",
           "Hairer, Wanner (1996), VI.1; Kvaerno (2004)"),
    Choice("stiff-jac", "Is it stiff, with its Jacobian given?", lambda s: s.stiff and s.jac, Rodas5P(), _stiff,
           "Steinebach (2023)"),
    Choice("stiff", f"Is it stiff, as {TRIAL} explicit steps show?", lambda s: s.stiff, Kvaerno5(), _stiff,
           "Hairer, Wanner (1996), IV.2; Kvaerno (2004)"),
    Choice("tight", f"Is rtol at most {TIGHT:g}?", lambda s: s.tight, Dopri8(),
           lambda s: f"rtol <= {TIGHT:g}: high order; {_calm(s)}", "Hairer, Norsett, Wanner (1993), II.10"),
    Choice("explicit", "None of these?", lambda s: True, Tsit5(), _calm, "Tsitouras (2011)"),
)


def recommended(prob: Any, options: dict[str, Any], wrt: tuple[str, ...] | None = None) -> tuple[Run, Inputs]:
    """`prepare` with the method that the rules take; why stands in `run.method.because`."""
    first: Method = Tsit5() if prob.mass_matrix is None else Kvaerno5()
    run, x = prepare(prob, first, wrt=wrt, **options)
    if run.mass is None and first != Tsit5():
        first = Tsit5()
        run, x = prepare(prob, first, wrt=wrt, **options)
    rule, start = decided(run, x)
    if rule.take != first:
        run, x = prepare(prob, rule.take, wrt=wrt, **options)
    return replace(run, method=replace(rule.take, because=(rule.because(start),))), x


def method_of(prob: Any, alg: Any, options: dict[str, Any]) -> Any:
    """The method that `solve` takes; `options` may hold those of `gradient` too."""
    if alg is not None or not isinstance(prob, ODEProblem):
        return alg
    own = inspect.signature(prepare).parameters.keys() - {"wrt"}
    return recommended(prob, {k: v for k, v in options.items() if k in own}, ())[0].method


def decided(run: Run, x: Inputs) -> tuple[Choice, Start]:
    """The rule that holds for a problem that is prepared with some method, and what it knew."""
    start = started(run, x)
    return next(rule for rule in METHOD_RULES if rule.holds(start)), start


def started(run: Run, x: Inputs) -> Start:
    """What is known of a prepared problem."""
    seen, unseen = None, None
    if run.mass is None:
        seen, unseen = _seen(run, x)
    jac = run.products.jac is not None
    exact = jac or (bool(run.be.modes) and not run.be.opaque)
    return Start(run.mass is not None, jac, exact, isinstance(x.rtol, float) and x.rtol <= TIGHT,
                 unseen, seen)


def _seen(run: Run, x: Inputs) -> tuple[Signs | None, str | None]:
    if run.be.is_complex(x.u0):
        return None, "no stiff method here takes a complex state"
    if not run.controller.adaptive:
        return None, "the steps are fixed"
    if run.be.known(run, x) is None:
        return None, "values are not known inside jit and vmap, where a stiff problem needs alg=sa.Kvaerno5()"
    seen = signs(run, x)
    return seen, None if seen is not None else "f is not finite near the start, or raises there"
