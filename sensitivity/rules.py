"""Which sensitivity algorithm: the questions of the decision tree, and what is said of the others.

`auto` and `advise` read the same two tables. `RULES` are asked in their order, and the first that holds decides;
`REMARKS` say of a candidate what speaks against it. What an algorithm cannot do at all is no rule: `refuse` says it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .algorithms import base, budget
from .algorithms.discrete import RecursiveCheckpointAdjoint
from .algorithms.forward import ForwardSensitivity
from .algorithms.forward_ad import ForwardADSensitivity
from .algorithms.gauss import GaussAdjoint
from .algorithms.implicit import ImplicitAdjoint
from .algorithms.interpolating import InterpolatingAdjoint
from .algorithms.reversibleheun import ReversibleHeunAdjoint
from .algorithms.second_order import ForwardOverAdjoint
from .errors import InputError, UnsupportedCombination
from .integrate import Run
from .registry import registry
from .stochasticmethods import ReversibleHeun
from .system import Inputs
from .uservjp import UserVJP
from .vjp import FiniteDifferenceVJP, ReverseVJP

# The thresholds of all rules. tests/benchmarks/thresholds.py measures where each of them lies.
FEW = 100
# Digits lost backwards that rule a method out: a growth of exp(15) in float64, exp(7) in float32.
LOST = {64: 6.5, 32: 3.0}
# Decay times span from which an implicit method takes less work, and how much more for each entry of the state.
STIFF, STIFF_PER_ENTRY = 500.0, 30.0
# Explicit steps tried where something is fast; the longer trial where it is less than a tenth of all steps.
TRIAL, LONG_TRIAL = 50, 400
# Relative tolerance down to which Tsit5 is taken.
TIGHT = 1e-9


def stiff_from(n: int) -> float:
    """Decay times span from which a problem with `n` entries is stiff: a Jacobian costs `n` evaluations of `f`."""
    return STIFF + STIFF_PER_ENTRY * n


@dataclass(frozen=True)
class Facts:
    """What the rules know of a problem.

    Attributes
    ----------
    kind : "ode", "dde", "sde" or "steady".
    n, params : number of entries of the state, and of the parameters that can be differentiated.
    wanted : the inputs to differentiate, "u0", "theta", "t0", "t1", "saveat"; None where all may be asked for.
    saves : how many rows of output, or "steps".
    method : "explicit", "implicit" or "black box".
    mass, events, dense : whether there is a singular mass matrix, there are events, there is dense output.
    backend : its name.
    transposes : whether a product `f_u^T w` costs about one evaluation of `f`, and not one per entry.
    bits : of the floating-point format.
    memory : the budget in bytes, as it was given, or None; known to `advise` only.
    kept : bytes of all steps with their stages, where a solve has shown them; known to `advise` only.
    ito : whether there is noise in the sense of Ito.
    budgets : whether the discrete adjoint can keep to a budget of memory here, to this one if there is one.
    device : where the arrays are.
    digits : how many digits the contraction of the solution costs who goes backwards; known to `advise` only.
    steps : accepted steps of the forward solve; known to `advise` only.
    order : of the derivatives that are asked for.
    undone : whether the method's own steps can be undone exactly.
    stiff : whether the method is for stiff problems, black boxes too.
    """

    kind: str
    n: int
    params: int
    wanted: frozenset[str] | None
    saves: int | str
    method: str
    mass: bool
    events: bool
    dense: bool
    backend: str
    transposes: bool
    bits: int
    memory: Any = None
    kept: float | None = None
    limit: int | None = None
    digits: float | None = None
    ito: bool = False
    budgets: bool = False
    device: str = "cpu"
    steps: int | None = None
    order: int = 1
    undone: bool = False
    stiff: bool = False

    @property
    def over(self) -> bool:
        """Whether all steps are more than the memory allows."""
        return self.memory is not None and self.kept is not None and self.kept > (self.limit or 0)

    @property
    def safe(self) -> bool:
        """Whether nothing is known that speaks against going backwards."""
        return self.digits is None or self.digits <= LOST.get(self.bits, 3.0)

    @property
    def columns(self) -> int:
        """How many numbers are differentiated with respect to."""
        if self.wanted is None:
            return self.n + self.params
        return (self.n * ("u0" in self.wanted) + self.params * ("theta" in self.wanted)
                + len(self.wanted & {"t0", "t1"}))


@dataclass(frozen=True)
class Rule:
    """One question of the decision tree.

    Attributes
    ----------
    id : its name.
    question : what is asked.
    holds : `holds(facts)`.
    take : `take(facts)` is the algorithm where it holds.
    because : the reason, one sentence.
    reference : where it comes from: a paper, or a count of the work.
    """

    id: str
    question: str
    holds: Callable[[Facts], bool]
    take: Callable[[Facts], Any]
    because: str
    reference: str


@dataclass(frozen=True)
class Remark:
    """What speaks against a candidate: `holds(facts, algorithm)`; with `excludes` it is not offered."""

    id: str
    holds: Callable[[Facts, Any], bool]
    because: Callable[[Facts], str]
    reference: str
    excludes: bool = False


RULES: tuple[Rule, ...] = (
    Rule("second-order-hidden", "Are second derivatives wanted, of a method that hides its stages?",
         lambda f: f.order > 1 and f.method == "black box", lambda f: ForwardOverAdjoint(InterpolatingAdjoint()),
         "tangent of a continuous adjoint: the method shows its solution and not its stages",
         "Ozyurt, Barton (2005)"),
    Rule("second-order-steady", "Are second derivatives wanted, of a steady state?",
         lambda f: f.order > 1 and f.kind == "steady", lambda f: ForwardOverAdjoint(ImplicitAdjoint()),
         "tangent of the implicit function theorem: four solves with the same matrix per direction",
         "Christianson (1994); Griewank, Walther (2008), section 15.2"),
    Rule("second-order", "Are second derivatives wanted?",
         lambda f: f.order > 1, lambda f: ForwardOverAdjoint(),
         "tangent of the adjoint: one adjoint of twice the size per direction, however many parameters, and exact for "
         "the computed solution", "Ozyurt, Barton (2005); Griewank, Walther (2008), section 3.3"),
    Rule("steady", "Is a steady state wanted?",
         lambda f: f.kind == "steady", lambda f: ImplicitAdjoint(),
         "implicit function theorem: one transposed linear solve, however many parameters", "Christianson (1994)"),
    Rule("columns-hidden", "Does the method hide its stages, are products made by differences, and columns few?",
         lambda f: f.method == "black box" and not f.transposes and f.columns <= min(f.n, FEW) and not f.stiff
         and not f.dense and f.saves != "steps",
         lambda f: ForwardSensitivity(),
         "by differences one product per column costs no more than a transposed one, which takes every entry of u, and "
         "forwards there is no second solve", "2 m evaluations of f per stage, against 2 n and a solve backwards"),
    Rule("hidden-stages", "Does the method hide its stages?",
         lambda f: f.method == "black box", lambda f: GaussAdjoint(),
         "the method shows its solution and not its stages, so the adjoint is continuous",
         "Norcliffe, Deisenroth (2023)"),
    Rule("memory-undone", "Are the steps more than the memory allows, and can the method undo them?",
         lambda f: f.over and f.undone and f.safe and not (f.events or f.dense), lambda f: ReversibleHeunAdjoint(),
         "exact gradient along the path, from the end alone: its steps are undone, which takes one more of each",
         "Kidger, Foster, Li, Lyons (2021)"),
    Rule("memory", "Are the steps more than the memory allows, and can they be repeated?",
         lambda f: f.over and f.budgets,
         lambda f: RecursiveCheckpointAdjoint(memory=f.memory),
         "exact gradient of the computed solution; keeps the states that fit, and repeats steps for the others",
         "Griewank, Walther (2000)"),
    Rule("memory-segments", "Are they more than the memory allows, and an ODE's?",
         lambda f: f.over and f.kind == "ode" and not f.dense,
         lambda f: GaussAdjoint(checkpoints=f.memory if isinstance(f.memory, str) else f"{f.memory}B"),
         "the discrete adjoint cannot keep to so little: an adjoint of the equation, which solves again between "
         "checkpoints that share the memory", "Serban, Hindmarsh (2005)"),
    Rule("delays", "Does f look at the past?",
         lambda f: f.kind == "dde", lambda f: RecursiveCheckpointAdjoint(),
         "exact gradient of the computed solution, with break points that move with the lags",
         "Calver, Enright (2017)"),
    Rule("noise", "Is there noise?",
         lambda f: f.kind == "sde", lambda f: RecursiveCheckpointAdjoint(),
         "exact gradient along the path; a continuous adjoint would be right only up to the error of the steps",
         "Kidger (2021), chapter 5"),
    Rule("constraints", "Is the mass matrix singular?",
         lambda f: f.mass, lambda f: RecursiveCheckpointAdjoint(),
         "exact gradient of the computed solution, and the constraints need no adjoint initial values",
         "Cao, Li, Petzold, Serban (2003)"),
    Rule("columns", "Are products made by differences, u0 fixed, and parameters few?",
         lambda f: not f.transposes and f.wanted == frozenset({"theta"}) and f.params <= min(f.n, FEW)
         and f.method == "explicit" and not (f.events or f.dense),
         lambda f: ForwardADSensitivity(),
         "exact gradient of the computed solution; by differences one product per parameter and stage costs less than "
         "a transposed one, which takes every entry of u as well",
         "2 p evaluations of f per stage, against 2 (n + p)"),
    Rule("default", "None of these?", lambda f: True, lambda f: RecursiveCheckpointAdjoint(),
         "exact gradient of the computed solution; costs one product with the derivatives of f per stage",
         "Hager (2000); Sanz-Serna (2016)"),
)

REMARKS: tuple[Remark, ...] = (
    Remark("contraction", lambda f, a: a.retraces and not f.safe,
           lambda f: f"going backwards would lose {amount(f.digits)} digits: what contracts forwards grows backwards",
           "Gholami, Keutzer, Biros (2019); McCallum, Foster (2024)", excludes=True),
    Remark("backwards", lambda f, a: a.retraces and f.digits is not None and f.digits > 1.0,
           lambda f: f"going backwards puts {amount(f.digits)} digits at risk", "Gholami, Keutzer, Biros (2019)"),
    Remark("stiff-backwards", lambda f, a: a.retraces and f.digits is None and f.method == "implicit",
           lambda f: "nothing is known of how fast the solution contracts, but the method is for stiff problems, where "
                     "what decays forwards grows backwards", "Kim, Ji, Deng, Ma, Rackauckas (2021)", excludes=True),
    Remark("ito", lambda f, a: f.ito and not a.exact,
           lambda f: "adjoint of the Stratonovich equation with the same solution, whose drift needs derivatives of g; "
                     "right up to the error of the steps", "Kidger (2021), section 5.1"),
    Remark("many-columns", lambda f, a: a.per_input and f.columns > FEW,
           lambda f: f"{f.columns} columns: its work grows with the number of inputs", "Ma et al. (2021)"),
    Remark("second-order", lambda f, a: a.order > 1,
           lambda f: "for second derivatives; a gradient is that of its inner adjoint", "Ozyurt, Barton (2005)"),
    Remark("restarts", lambda f, a: a.restarts and f.steps is not None and isinstance(f.saves, int)
           and f.saves > f.steps,
           lambda f: f"its backward solve starts again at each of {f.saves} save times, which are more than the "
                     f"{f.steps} steps of the solve", "Serban, Hindmarsh (2005)"),
    Remark("tape", lambda f, a: not a.boundary,
           lambda f: "exact, but the tape holds every stage of each attempted step",
           "Griewank, Walther (2008)"),
    Remark("discretised", lambda f, a: not a.exact,
           lambda f: "derivative of the equation, right up to the " + (
               "error of the steps" if f.kind == "sde" else "tolerance"),
           "Hager (2000)"),
)


class Source:
    """What is known of where products with the derivatives of `f` could come from.

    `own` : whether the problem carries them, and they reach everything; `lost` : why the framework's reverse mode does
    not serve, or None, found out when asked.
    """

    def __init__(self, backend: str, own: bool, lost: Callable[[], str | None]) -> None:
        self.backend, self.own, self._lost = backend, own, lost

    @cached_property
    def lost(self) -> str | None:
        return self._lost()


@dataclass(frozen=True)
class Choice:
    """One question about products, or about the method: `take` where `holds(known)`, and `because(known)` why."""

    id: str
    question: str
    holds: Callable[[Any], bool]
    take: Any
    because: Callable[[Any], str]
    reference: str


PRODUCT_RULES: tuple[Choice, ...] = (
    Choice("own-products", "Does the problem carry its own derivatives, and does f close over nothing else?",
                lambda s: s.own, UserVJP(), lambda s: "the problem carries its own derivatives",
                "no graph is made; checked by value at the first gradient"),
    Choice("reverse", "Does the framework's reverse mode see all of f?",
                lambda s: s.lost is None, ReverseVJP(), lambda s: f"reverse-mode AD of {s.backend}",
                "4 evaluations of f at most, against 2.5 for each column: Griewank, Walther (2008), section 4.6"),
    Choice("differences", "None of these?", lambda s: True, FiniteDifferenceVJP(),
                lambda s: f"central differences, because {s.lost}; vjp=ComplexStepVJP() is exact for an analytic f, "
                          "ODEProblem(vjp=...) for any", "2 (n + p) evaluations of f, about nine digits"),
)


def amount(digits: float | None) -> str:
    """A number of digits as text."""
    return "no" if digits is None else "more than 300" if digits > 300 else f"{digits:.1f}"


def facts(run: Run, x: Inputs, vjp: Any, wanted: frozenset[str] | None = None, **more: Any) -> Facts:
    """The facts of a run; nothing is evaluated."""
    method = "black box" if not run.method.one_step else "implicit" if run.method.implicit else "explicit"
    saves = run.saves if isinstance(run.saves, int | str) and run.saves != "ts" else (
        1 if x.saveat is None else x.saveat.shape[0])
    device = run.be.device(x.u0)
    undone = isinstance(run.method, ReversibleHeun)
    return Facts("ode" if run.kind is None else run.kind.name, x.u0.shape[0],
                 sum(math.prod(v.shape) for v in x.theta), wanted, saves, method, run.mass is not None,
                 bool(run.events), run.dense, run.backend, vjp.transposes, run.be.xp.finfo(x.u0.dtype).bits,
                 ito=getattr(run.kind, "interpretation", None) == "ito", budgets=_budgets(run, x, more.get("memory")),
                 device="cpu" if device is None else str(device), undone=undone, stiff=run.method.implicit, **more)


def _budgets(run: Run, x: Inputs, memory: Any) -> bool:
    algorithm: Any = RecursiveCheckpointAdjoint(memory=1 if memory is None else memory)
    try:
        algorithm = algorithm if run.kind is None else run.kind.algorithm(algorithm)
        algorithm.refuse(run)
        if memory is not None and (run.kind is None or run.kind.name == "sde"):
            budget.plan(run, x, base.bound(run, x), None, memory, False)
    except (UnsupportedCombination, InputError):
        return False
    return True


def rules() -> tuple[Rule, ...]:
    """The rules of plugins, then those above."""
    return (*registry().rules, *RULES)


def selected(known: Facts) -> Rule:
    """The first rule that holds."""
    return next(rule for rule in rules() if rule.holds(known))


def remark(known: Facts, algorithm: Any) -> Remark | None:
    """The first remark on a candidate, if there is one."""
    return next((r for r in REMARKS if r.holds(known, algorithm)), None)
