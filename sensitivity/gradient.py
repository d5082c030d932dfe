"""`gradient`: the derivative of a loss of the solution, in any framework and without an AD library too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import ensemble
from .algorithms.base import Aux, Cotangents, Outputs, fractions
from .algorithms.carried import carrying
from .assembled import Assembled, assemble
from .choose import auto, choose
from .costs import Cost
from .ensemble import EnsembleProblem
from .errors import InputError, NumericalDerivativeWarning, UnsupportedCombination
from .integrate import Run
from .jacobian import sizes
from .probe import through_ad
from .retcode import RetCode
from .solution import Gradient
from .solve import asked, build, checked, count, finished, prepare_options, warn_numerical
from .stochastic import Stochastic
from .system import Inputs
from .verdict import judge, warn_of_chaos

NAMES = ("u0", "p", "t0", "t1", "saveat")


def gradient(prob: Any, alg: Any = None, loss: Any = None, *, wrt: Any = None,
             sensealg: Any = auto, dloss: Callable[[Any], Any] | None = None, on_failure: str = "raise",
             **options: Any) -> Gradient:
    """Value and gradient of `loss(solution)`.

    Parameters
    ----------
    prob, alg, sensealg
        As for `solve`.
    loss : callable, DiscreteCost, ContinuousCost, or a sum of them
        A real scalar function of the `Solution`, or a cost given by its derivatives or its integrand. For a sum, or
        for a cost, the solution that is shown (to a callable too) has the rows of `saveat`; without `saveat`, the end
        where a callable or only a running cost asks for it, else the times of the `DiscreteCost`.
        With an `EnsembleProblem` there is one loss, and one gradient, for each member.
    wrt : str or tuple of str, optional
        Which of "u0", "p", "t0", "t1", "saveat" to differentiate with respect to; `u0` and, if there are any, `p`.
    dloss : callable, optional
        `dloss(solution)` is the derivative of the loss with respect to `sol.u`, in its structure, for a loss that
        uses nothing else of the solution. Without it the
        framework's AD differentiates the loss; where there is none, central differences do (with a warning).
        In a sum with costs it belongs to the callable.
    options
        The keywords of `solve`.

    Returns
    -------
    Gradient
        `value, u0, p, t0, t1, saveat, solution, stats, sensealg`.

    Raises
    ------
    InputError
        `wrt` names something unknown, or something that the problem does not have.
    SolveError
        The forward or the reverse solve failed.
    """
    if isinstance(prob, EnsembleProblem):
        return ensemble.run(gradient, prob, (alg, loss),
                            {**options, "wrt": wrt, "sensealg": sensealg, "dloss": dloss, "on_failure": on_failure})
    if not isinstance(loss, Assembled):
        wrt = asked(sensealg, loss, wrt)
    names = checked_names(wrt)
    if isinstance(loss, Cost):
        return _of_cost(prob, alg, loss, wrt, names, sensealg, dloss, on_failure, options)
    if not (callable(loss) or isinstance(loss, Assembled)):
        raise InputError("loss is not callable", "a gradient is that of a number",
                         "loss=lambda sol: (sol.u ** 2).sum()")
    if not hasattr(prob, "tspan") and (timed := {"t0", "t1", "saveat"} & set(names)):
        raise InputError(f"wrt holds {min(timed)!r}, but a {type(prob).__name__} has no times",
                         "nothing can be differentiated", "wrt='p'")
    run, x = prepare_options(prob, alg, options, through_ad(prob, sensealg, names))
    if isinstance(run.kind, Stochastic):
        run.kind.refuse_times(names)
    if wrt is None and not x.theta:
        names = ("u0",)
    if "p" in names and not x.theta:
        raise InputError("wrt holds 'p', but the problem has no floating-point parameters",
                         "nothing can be differentiated", "ODEProblem(f, u0, tspan, p), or wrt='u0'")
    if "saveat" in names and run.saves != "ts":
        raise InputError("wrt holds 'saveat', but saveat is not an array of times", "there is nothing to vary",
                         "saveat=np.array([...])")
    wanted = frozenset("theta" if n == "p" else n for n in names)
    algorithm, run = choose(run, x, checked(sensealg), wanted=wanted)
    warn_numerical(algorithm)
    task = _through if not algorithm.boundary else _explicit
    return task(prob, run, x, algorithm, loss, dloss, wanted, on_failure)


def adjoint_sensitivities(prob: Any, alg: Any = None, cost: Any = None, sensealg: Any = auto,
                          **options: Any) -> Gradient:
    """Gradient of a cost given by its derivatives, or by its integrand; see `gradient`.

    Parameters
    ----------
    prob, alg, sensealg
        As for `solve`.
    cost : DiscreteCost, ContinuousCost or a sum of them
    options
        `wrt` and the keywords of `solve`.

    Returns
    -------
    Gradient
        `value` is None where a `DiscreteCost` came without `g`.

    Raises
    ------
    InputError
        `cost` is something else; for a callable of the solution there is `gradient`.
    """
    if not isinstance(cost, Cost):
        raise InputError(f"cost is {type(cost).__name__}, not a DiscreteCost or ContinuousCost",
                         "their derivatives are what this function starts from",
                         "sa.DiscreteCost(ts, dgdu), or sa.gradient(prob, alg, loss) for a callable of the solution")
    return gradient(prob, alg, cost, sensealg=sensealg, **options)


def checked_names(wrt: Any) -> tuple[str, ...]:
    """`wrt` as a tuple of names that exist."""
    names = ("u0", "p") if wrt is None else (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in names:
        if name not in NAMES:
            raise InputError(f"wrt holds {name!r}", "a problem has no such part",
                             f"choose from {', '.join(NAMES)}")
    return names


def _of_cost(prob: Any, alg: Any, cost: Cost, wrt: Any, names: tuple[str, ...], sensealg: Any, dloss: Any,
             on_failure: str, options: dict[str, Any]) -> Gradient:
    """The cost as a loss of a solve that saves what it needs."""
    if not hasattr(prob, "tspan"):
        raise UnsupportedCombination(f"{type(cost).__name__} does not go with a {type(prob).__name__}",
                                     "it is a sum or an integral over time", "loss= as a function of the solution")
    by_ad = through_ad(prob, sensealg, names)
    run, x = prepare_options(prob, alg, options, by_ad)
    if "saveat" in names and run.saves != "ts":
        raise InputError("wrt holds 'saveat', but saveat is not an array of times",
                         "the times of a DiscreteCost are fixed numbers", "saveat=np.array([...]) and a callable loss")
    plan = assemble(prob, cost, options, run, x, by_ad)
    if dloss is not None and not plan.others:
        raise InputError("dloss= goes with a callable loss", "a cost carries its own derivatives", "leave dloss out")
    every = (*names, "saveat") if plan.timed and "t1" in names and "saveat" not in names else names
    r = gradient(plan.prob, run.method, plan, wrt=None if wrt is None else every, sensealg=sensealg, dloss=dloss,
                 on_failure=on_failure, **plan.options)
    return plan.finished(run.be, r, prob, names)


def _explicit(prob: Any, run: Run, x: Inputs, algorithm: Any, loss: Any, dloss: Any, wanted: frozenset[str],
              on_failure: str) -> Gradient:
    """Forward, loss, reverse: one after the other."""
    be = run.be
    worker = carrying(algorithm, run)
    out, aux, residuals = be.run(worker, "forward", run, (x,), wanted)
    sol, out = finished(prob, run, x, algorithm, out, aux, on_failure)
    value, ct, direct = loss_cotangent(prob, run, x, algorithm, out, aux, loss, dloss, sol, wanted)
    bar: Cotangents = be.run(worker, "reverse", run, (residuals, ct), wanted)
    status = be.concrete(bar.status)
    if on_failure == "raise" and be.concrete(aux.status) == RetCode.Success:
        judge(algorithm, be, bar, sol)
        if isinstance(loss, Assembled) and loss.only_running:
            warn_of_chaos(algorithm, run, x, out.u[-1, :], value, bar)
    if bar.mismatch is not None:
        sol.stats.mismatch, sol.stats.drift = (_number(be, v) for v in (bar.mismatch, bar.drift))
    sol.stats.nvjp, sol.stats.nfe = count(be, bar.nvjp), count(be, sol.stats.nfe + bar.nfe)
    for name, more in zip(("njac", "nlu", "nsolve"), bar.algebra, strict=True):
        setattr(sol.stats, name, count(be, sol.stats[name] + more))
    parts: dict[str, Any] = {"u0": (bar.u0,), "theta": bar.theta}
    parts |= {n: (be.time_vector(getattr(bar, n), x.u0),) for n in wanted - parts.keys()}
    total: dict[str, Any] = {}
    for name in wanted:
        rows = parts[name]
        if status != RetCode.Success and on_failure != "return":
            rows = tuple(be.nan_where(bar.status != int(RetCode.Success), v) for v in rows)
        if name in direct:
            rows = tuple(a + b for a, b in zip(rows, direct[name], strict=True))
        total[name] = rows if name == "theta" else rows[0]
    return _result(run, x, value, total, sol, algorithm)


def _number(be: Any, x: Any) -> Any:
    """A number where it is known."""
    value = be.concrete(x)
    return x if value is None else value


def _through(prob: Any, run: Run, x: Inputs, algorithm: Any, loss: Any, dloss: Any, wanted: frozenset[str],
             on_failure: str) -> Gradient:
    """The framework's own AD through solve and loss."""
    be = run.be
    order: list[str] = [n for n in ("u0", "theta", "t0", "t1", "saveat") if n in wanted]
    boxed = replace(run, be=be.differentiable())
    if dloss is not None:
        raise InputError("dloss= cannot be used with DirectAdjoint", "the framework differentiates the loss itself",
                         "leave dloss out, or sensealg=RecursiveCheckpointAdjoint()")
    with be.quiet():
        out, aux = algorithm.plain(run, x)
    sol, _ = finished(prob, run, x, algorithm, out, aux, on_failure)
    recorded = loss.through(run, x, sol) if isinstance(loss, Assembled) else loss

    def total(*arrays: Any) -> Any:
        moved = _replaced(x, order, arrays)
        out, aux = algorithm.plain(run, moved)
        return recorded(finished(*_moved(prob, boxed, moved, aux, order, algorithm, out), on_failure=on_failure)[0])

    answer = be.loss_vjp(total, _selected(x, order))
    if answer is None:
        raise UnsupportedCombination(f"{be.name} AD fails on the solve or on the loss",
                                     f"{algorithm.name} needs it for both",
                                     f"write f and loss in the AD's namespace{be.how_to_get_ad}, or "
                                     "sensealg=RecursiveCheckpointAdjoint() with dloss=")
    value, grads = answer
    if isinstance(loss, Assembled):
        value = loss.value(run, x, sol)
    bars: dict[str, Any] = {}
    rest = list(grads)
    for name in order:
        take = len(x.theta) if name == "theta" else 1
        bars[name] = tuple(rest[:take]) if name == "theta" else rest[0]
        rest = rest[take:]
    return _result(run, x, value, bars, sol, algorithm)


def _selected(x: Inputs, order: list[str]) -> tuple[Any, ...]:
    out: list[Any] = []
    for name in order:
        out += list(x.theta) if name == "theta" else [getattr(x, name)]
    return tuple(out)


def _replaced(x: Inputs, order: list[str], arrays: Any) -> Inputs:
    rest = list(arrays)
    for name in order:
        if name == "theta":
            x, rest = x._replace(theta=tuple(rest[:len(x.theta)])), rest[len(x.theta):]
        else:
            x, rest = x._replace(**{name: rest[0]}), rest[1:]
    return x


def _moved(prob: Any, run: Run, x: Inputs, aux: Aux, order: list[str], algorithm: Any,
           out: Outputs) -> tuple[Any, Run, Inputs, Any, Outputs, Aux]:
    """The arguments of `build` at moved inputs: a loss may use `sol.prob` and `sol.t` as well as `sol.u`."""
    be, field = run.be, run.field
    changes: dict[str, Any] = {}
    if "u0" in order:
        changes["u0"] = be.unflatten(field.u.structure, field.u.unravel(be, x.u0))
    if "theta" in order and field.p.count:
        changes["p"] = field.p.join(be, x.theta[:field.p.count], x.constants)
    if "t0" in order or "t1" in order:
        changes["tspan"] = (x.t0, x.t1)
    if run.saves == "ts" and "saveat" in order:
        aux = aux._replace(ts=x.saveat)
    elif isinstance(run.saves, int) and "tspan" in changes:
        aux = aux._replace(ts=be.spread(x.t0, x.t1, fractions(run.saves)))
    elif run.saves is None and "t1" in order:
        aux = aux._replace(ts=[x.t1])
    return prob.remake(**changes), run, x, algorithm, out, aux


def _result(run: Run, x: Inputs, value: Any, bars: dict[str, Any], sol: Any, algorithm: Any) -> Gradient:
    be, field = run.be, run.field
    u0 = p = None
    if "u0" in bars:
        u0 = be.unflatten(field.u.structure, field.u.unravel(be, bars["u0"]))
    if "theta" in bars:
        p = field.p.join(be, bars["theta"][:field.p.count], x.constants) if field.p.count else bars["theta"]
    times = {n: None if bars.get(n) is None else be.time_vector(bars[n], x.u0) for n in ("t0", "t1", "saveat")}
    return Gradient(value, u0, p, times["t0"], times["t1"], times["saveat"], sol, sol.stats, algorithm)


def loss_cotangent(prob: Any, run: Run, x: Inputs, algorithm: Any, out: Outputs, aux: Aux, loss: Any, dloss: Any,
                   sol: Any, wanted: frozenset[str]) -> tuple[Any, Outputs, dict[str, Any]]:
    """Value of the loss, cotangents of the outputs, and what the loss takes from the inputs `wanted` directly."""
    be, layout = run.be, run.field.u
    if isinstance(loss, Assembled):
        value, rows, theta = loss.known(run, x, sol)
        ct = Outputs(rows, *_zeros(be, out))
        direct: dict[str, Any] = {}
        if theta is not None and "theta" in wanted:
            direct["theta"] = (*theta, *be.zeros(x.theta[len(theta):]))
        if not loss.by_ad:
            return value, ct, direct
        derived = None if dloss is None else lambda sol: loss.spread(be, sol, dloss(loss.view(be, sol)))
        more, ct_ad, direct_ad = loss_cotangent(prob, run, x, algorithm, out, aux,
                                                lambda sol: loss.recorded(be, sol), derived, sol, wanted)
        ct = Outputs(*(None if a is None else a + b for a, b in zip(ct, ct_ad, strict=True)))
        for name, bars in direct_ad.items():
            direct[name] = tuple(a + b for a, b in zip(direct[name], bars, strict=True)) if name in direct else bars
        return None if value is None else value + more, ct, direct
    if dloss is not None:
        leaves = [be.asarray(v, dtype=out.u.dtype) for v in be.flatten(dloss(sol))[0]]
        shapes = tuple((out.u.shape[0], *s) for s in layout.shapes)
        if tuple(tuple(v.shape) for v in leaves) != shapes:
            raise InputError(f"dloss(sol) has shapes {[tuple(v.shape) for v in leaves]}, sol.u has {list(shapes)}",
                             "it weighs each output", "return the derivative of the loss with respect to sol.u")
        return loss(sol), Outputs(layout.ravel(be, leaves, batch=1), *_zeros(be, out)), {}

    kept = tuple(v for v in out if v is not None)
    order: list[str] = [n for n in ("u0", "theta", "t0", "t1", "saveat") if n in wanted]
    boxed = replace(run, be=be.differentiable())

    def outputs(arrays: Any) -> Outputs:
        given = iter(arrays)
        return Outputs(*(None if v is None else next(given) for v in out))

    def of(*arrays: Any) -> Any:
        moved = _replaced(x, order, arrays[len(kept):])
        return loss(build(*_moved(prob, boxed, moved, aux, order, algorithm, outputs(arrays))))

    arrays = (*kept, *_selected(x, order))
    value, grads = be.loss_vjp(of, arrays) or _differences(be, of, arrays)
    _check_scalar(value)
    direct = {}
    rest = tuple(grads[len(kept):])
    for name in order:
        take = len(x.theta) if name == "theta" else 1
        direct[name], rest = rest[:take], rest[take:]
    return value, outputs(grads), direct


def _check_scalar(value: Any) -> None:
    if getattr(value, "ndim", 0) != 0:
        raise InputError(f"loss returned shape {tuple(value.shape)}, expected a scalar",
                         "a gradient belongs to one number", "sum or average it: lambda sol: (sol.u ** 2).sum()")


def _zeros(be: Any, out: Outputs) -> tuple[Any, Any]:
    return tuple(None if v is None else be.xp.zeros_like(v) for v in out[1:])  # type: ignore[return-value]


def _differences(be: Any, loss: Callable, arrays: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Central differences of a cheap user loss: no solve is repeated."""
    warnings.warn(f"the loss is differentiated by central differences: the {be.name} backend has no AD for it"
                  f"{be.how_to_get_ad}; pass dloss= for an exact derivative", NumericalDerivativeWarning, stacklevel=6)
    grads = []
    for i, a in enumerate(arrays):
        flat, entries = be.xp.reshape(a, (-1,)), []
        moves = be.eps(a.dtype) ** (1 / 3) * sizes(be, flat, 1e-4)
        for j in range(flat.shape[0]):
            unit = moves[j] * be.unit_rows(1, flat.shape[0], -j, flat)[0, :]
            ends = (be.xp.reshape(v, a.shape) for v in (flat + unit, flat - unit))
            up, down = (float(loss(*arrays[:i], v, *arrays[i + 1:])) for v in ends)
            entries.append((up - down) / (2.0 * float(moves[j])))
        grads.append(be.xp.reshape(be.vector(entries, flat), a.shape))
    return loss(*arrays), tuple(grads)


__all__ = ["gradient"]
