"""`advise`: what the automatic choice would take for a problem, why, and what the other candidates would cost."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

from .advice import Advice, Candidate, spelled
from .algorithms import budget
from .algorithms.base import bound
from .algorithms.second_order import ForwardOverAdjoint
from .choose import auto, choose, suggested
from .ensemble import EnsembleProblem
from .errors import InputError, SensitivityWarning, SolveError, UnsupportedCombination
from .estimates import Work, estimate
from .fieldfacts import field_facts, plain
from .gradient import checked_names
from .hessians import choose_again
from .integrate import Run
from .methods import Kvaerno5, Rodas5P, Tsit5
from .probe import through_ad
from .problems import DDEProblem
from .registry import algorithms
from .retcode import RetCode
from .rules import Facts, facts, remark, rules
from .second import refuse_second
from .solve import asked, prepare_options, solve
from .stiffness import DENSE, POINTS, Probes, placed, probed
from .system import Inputs
from .trust import checked_once


def advise(prob: Any, alg: Any = None, *, loss: Any = None, measure: bool = False, memory: Any = None,
           wrt: Any = None, dloss: Any = None, order: int = 1, **options: Any) -> Advice:
    """What `sensealg=auto` takes for this problem, why, and what the others would cost.

    The problem is solved once or twice, and `f` is evaluated at a few states to see how stiff it is.

    Parameters
    ----------
    prob : ODEProblem, DDEProblem, SDEProblem or SteadyStateProblem
    alg : method, optional
        Without one, a method is recommended too.
    loss : callable, optional
        Used by `measure` only; the sum of the squares of the solution if not given.
    measure : bool
        Make the gradient with every candidate: time, memory, error against a tight reference.
    memory : int or str, optional
        What may be kept for a gradient: bytes, or "200MB".
    wrt, dloss
        As for `gradient`.
    order : int
        2 for second derivatives, those of `hessian` and `hessian_vector_product`.
    options
        The keywords of `solve`.

    Returns
    -------
    Advice
        `.sensealg`, `.vjp`, `.alg`, `.path`, `.table`, `.code`; `print` it.

    Raises
    ------
    InputError
        The problem is an ensemble: ask for one member; or `order` is neither 1 nor 2.
    UnsupportedCombination
        Second derivatives of this problem are not there, or are to be measured.
    SolveError
        The problem cannot be solved with these options.
    """
    if isinstance(prob, EnsembleProblem):
        raise InputError("prob is an EnsembleProblem", "its members are solved alike", "sa.advise(ensemble.prob, ...)")
    if order not in (1, 2):
        raise InputError(f"order={order!r} is neither 1 nor 2", "it is that of the derivatives",
                         "order=2 for a Hessian")
    if order == 2 and measure:
        raise UnsupportedCombination("second derivatives are not measured", "measure=True makes gradients",
                                     "sa.check_gradient, or advise(..., order=2) without measure")
    names = checked_names(wrt)
    by_ad = through_ad(prob, auto, names)
    limit = budget.size(memory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SensitivityWarning)
        method, why_method, sol, probes = _method(prob, alg, options, by_ad)
        run, x = prepare_options(prob, method, options, by_ad)
        if wrt is None and not x.theta:
            names = ("u0",)
        wanted = frozenset("theta" if name == "p" else name for name in names)
        usual, bound_run = choose(run, x, auto, wanted=wanted)
        if order == 2:
            refuse_second(ForwardOverAdjoint(), run, wanted)
            bound_run = replace(bound_run, vjp=choose_again(run, x)[0])
        work = _work(replace(run, vjp=bound_run.vjp), x, sol)
        more = {"memory": memory, "limit": limit, "kept": float(work.stored * _itemsize(run, x)),
                "digits": None if probes is None else probes.digits, "steps": _number(sol.stats.naccept),
                "order": order}
        known = facts(run, x, bound_run.vjp, wanted, **more)
        rule, taken = suggested(run, x, bound_run.vjp, wanted, **more)
        why = usual.because[-1] if order == 1 else choose_again(run, x)[1]
        taken = replace(taken, vjp=bound_run.vjp, because=(rule.because, why))
        if hasattr(taken, "jvp"):
            taken = replace(taken, jvp=bound_run.vjp)
        table = _table(run, x, known, rule, taken, work)
        shown, start = (run, x) if run.kind is None else _looked_at(prob, run)
        field = field_facts(shown, start, prob.f, run.field.captured)
    advice = Advice(prob=prob, sensealg=taken, vjp=bound_run.vjp, alg=method, why_method=why_method, facts=known,
                    probes=probes, field=field, path=_path(known), table=table, options=dict(options), wrt=wrt,
                    steps=(sol.stats.naccept, sol.stats.nreject))
    if measure:
        from .measure import measured

        return measured(advice, loss, dloss)
    return advice


def _method(prob: Any, alg: Any, options: dict[str, Any], by_ad: Any) -> tuple[Any, str, Any, Probes | None]:
    """The method, why, a solve with it, and the probes along that solve."""
    run, x = prepare_options(prob, alg, options, by_ad)
    method, why = run.method, "; ".join(run.method.because) if alg is None else ""
    stiff = Rodas5P() if run.products.jac is not None else Kvaerno5()
    free = alg is None and run.kind is None and not method.implicit and not run.be.is_complex(x.u0)
    try:
        sol = solve(prob, method, **options)
    except SolveError as e:
        if not (free and e.retcode in (RetCode.MaxSteps, RetCode.DtMin)):
            raise
        why = f"{method.name} does not reach the end; {why}"
        return stiff, why, solve(prob, stiff, **options), _probes(prob, stiff, options, run, x, None)
    probes = _probes(prob, method, options, run, x, sol)
    if free and probes is not None and probes.stiff:
        why = (f"stiff later on: what decays fastest does so {probes.decay * probes.span:.0f} times within the span; "
               f"{method.name} is what solve takes, because at the start it is {why}")
        return stiff, why, solve(prob, stiff, **options), probes
    return method, why, sol, probes


def _probes(prob: Any, alg: Any, options: dict[str, Any], run: Run, x: Inputs, sol: Any) -> Probes | None:
    """Probes at states along the solution; of what `fieldfacts.plain` has in place of other kinds."""
    be, layout = run.be, run.field.u
    if be.is_complex(x.u0) and x.u0.shape[0] > DENSE:
        return None
    length = None
    if hasattr(prob, "tspan"):
        usual = {k: v for k, v in options.items() if k not in ("saveat", "dense", "progress")}
        try:
            sol = solve(prob, alg, saveat=POINTS, **usual)
        except UnsupportedCombination:
            return None
        length = abs(float(be.concrete(x.t1)) - float(be.concrete(x.t0)))
    leaves, _ = be.flatten(sol.u)
    rows = layout.ravel(be, leaves, batch=1)
    times = be.concrete_times(sol.t) if length is not None else [0.0]
    if times is None or be.known(run, x) is None:
        return None
    shown, start = (run, x) if run.kind is None else _looked_at(prob, run)
    points = []
    for i, t in enumerate(times):
        point = placed(shown, start, t, rows[i, :])
        if isinstance(prob, DDEProblem):
            own, past = shown.field.p.count - len(leaves), layout.unravel(be, rows[i, :])
            theta = (*start.theta[:own], *past, *start.theta[shown.field.p.count:])
            point = point._replace(theta=theta)
        points.append(point)
    return probed(shown, start, points, sol.stats.naccept, length)


def _looked_at(prob: Any, run: Run) -> tuple[Run, Inputs]:
    """The field that is looked at, prepared."""
    return prepare_options(plain(prob), Tsit5(), {"probe": "off", "backend": run.backend})


def _work(run: Run, x: Inputs, sol: Any) -> Work:
    """What the forward solve took."""
    s, wanted = sol.stats, facts(run, x, run.vjp, None)
    attempts = s.naccept + s.nreject
    stages = max(1, round(s.nfe / max(1, attempts)))
    if run.kind is None and run.method.one_step:
        stepper = bound(run, x)
        stages = stepper.stages - stepper.fsal
    saves = s.naccept if wanted.saves == "steps" else int(wanted.saves)
    return Work(s.nfe, s.naccept, attempts, stages, x.u0.shape[0], wanted.columns, wanted.params,
                run.method.implicit, run.vjp.extra(run), saves)


def _number(count: Any) -> int | None:
    """A count of the forward solve, where it is known."""
    return None if count is None else int(count)


def _itemsize(run: Run, x: Inputs) -> int:
    return run.be.xp.finfo(x.u0.dtype).bits // 8 * (2 if run.be.is_complex(x.u0) else 1)


def _table(run: Run, x: Inputs, known: Facts, rule: Any, taken: Any, work: Work) -> tuple[Candidate, ...]:
    """Every candidate: the chosen one, the possible ones from exact to cautioned and by their work, the ones ruled out.
    """
    theta = known.wanted is None or "theta" in known.wanted
    room = None if known.limit is None else known.limit // _itemsize(run, x)
    work = work._replace(m=known.columns, P=known.params * theta, room=room)
    rows = [_candidate(run, x, known, taken, work, rule)]
    for kind in algorithms().values():
        algorithm = kind()
        if spelled(replace(algorithm, vjp=None)) != spelled(replace(taken, vjp=None, **_no_jvp(taken))):
            rows.append(_candidate(run, x, known, algorithm, work, None))
    order = {"chosen": 0, "possible": 1, "ruled out": 2}
    calm = (None, "discretised")
    return tuple(sorted(rows, key=lambda r: (order[r.verdict], r.rule not in calm, r.rule is not None,
                                             math.inf if r.estimate is None else r.estimate.evaluations(known))))


def _no_jvp(algorithm: Any) -> dict[str, None]:
    return {"jvp": None} if hasattr(algorithm, "jvp") else {}


def _candidate(run: Run, x: Inputs, known: Facts, algorithm: Any, work: Work, rule: Any) -> Candidate:
    """One row; a refusal is told in its own words."""
    try:
        asked(algorithm, None, None)
        ready, _ = choose(run, x, algorithm, verify=False, wanted=known.wanted)
        if known.order == 2:
            refuse_second(ready, run, known.wanted or frozenset())
    except UnsupportedCombination as e:
        return Candidate(algorithm, "ruled out", str(e))
    if not algorithm.boundary and run.be.opaque and (lost := checked_once(run, x)):
        return Candidate(algorithm, "ruled out", lost, "untraced")
    cost = estimate(algorithm, work, _itemsize(run, x)) if known.order == 1 else None
    if rule is not None:
        return Candidate(algorithm, "chosen", rule.because, rule.id, cost)
    said = remark(known, ready)
    why = "exact gradient of the computed solution" if said is None else said.because(known)
    if known.order == 2 and algorithm.order == 1:
        why = f"stands for ForwardOverAdjoint of it: {why}"
    if known.limit is not None and cost is not None and cost.memory > known.limit:
        much = f"keeps about {cost.memory} bytes, more than the {known.limit} allowed"
        return Candidate(algorithm, "ruled out", much, "memory", cost)
    verdict = "ruled out" if said is not None and said.excludes else "possible"
    return Candidate(algorithm, verdict, why, None if said is None else said.id, cost)


def _path(known: Facts) -> tuple[tuple[str, str, str], ...]:
    """The questions down to the one that decides: `(question, answer, what follows)`."""
    path: list[tuple[str, str, str]] = []
    for rule in rules():
        if rule.holds(known):
            answer = spelled(rule.take(known))
            return (*path, (rule.question, "yes", f"{answer}: {rule.because}"))
        path.append((rule.question, "no", ""))
    return tuple(path)
