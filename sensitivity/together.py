"""Members of a stochastic problem side by side: one state and one set of steps for all, a path for each.

Steps with noise have fixed times, so members whose time span is the same take the same steps, and what a step does is
done for all of them at once. Gradients stay apart, because no member's state depends on another's parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from .algorithms.base import SensitivityAlgorithm
from .backend import Array, Unbatched
from .choose import auto, choose
from .errors import SensitivityError, SensitivityWarning
from .noise import Abreast, words
from .prepare import prepare
from .probe import through_ad
from .problems import Problem
from .solution import Solution, Stats
from .stochastic import Members, SDEProblem
from .userfunction import calling_depth
from .vjp import FiniteDifferenceVJP

GROUP = 64  # members in one state


@dataclass(frozen=True)
class Rows:
    """`f` for every member: trees of arrays with the members in front, but for the leaves of `p` that are `common`."""

    f: Callable[..., Any]
    be: Any
    common: tuple[bool, ...]

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        (rows, of_u), (leaves, of_p) = self.be.flatten(u), self.be.flatten(p)
        own = [x for x, shared in zip(leaves, self.common, strict=True) if not shared]
        be = self.be if all(self.be.is_array(x) for x in (*rows, *own)) else self.be.differentiable()
        k, bare, structure = len(rows), be.is_array(u), of_u

        def one(arrays: list[Array]) -> list[Array]:
            nonlocal structure
            state, moved = arrays[0] if bare else be.unflatten(of_u, arrays[:k]), p
            if own:
                given = iter(arrays[k:])
                moved = be.unflatten(of_p, [x if shared else next(given)
                                            for x, shared in zip(leaves, self.common, strict=True)])
            out = self.f(t, state, moved)
            if bare and be.is_array(out):
                return [out]
            leaves_out, structure = be.flatten(out)
            return leaves_out

        columns = be.rows(one, [*rows, *own])
        return be.unflatten(structure, columns)


def can_go(be: Any, prob: Problem, varied: tuple[str, ...], args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether members share their steps: fixed ones, at the same times, with a noise for each entry or for all; with
    derivatives where `f` is seen by all members at once, because else nothing is gained."""
    wrt = options.get("wrt")
    times = {"t0", "t1", "saveat"} & set((wrt,) if isinstance(wrt, str) else wrt or ())
    return (isinstance(prob, SDEProblem) and not be.traced and "tspan" not in varied and prob.noise != "general"
            and not getattr(options.get("controller"), "adaptive", False) and not times and all(map(callable, args[1:]))
            and (options["sensealg"] is auto or isinstance(options["sensealg"], SensitivityAlgorithm))
            and (be.batches or not (be.attaches or len(args) > 1)))


def together(be: Any, task: Callable[..., Any], prob: SDEProblem, varied: dict[str, Any], args: tuple[Any, ...],
             options: dict[str, Any]) -> Any:
    """The result for all members, with the members in front; None where they have to be taken one by one."""
    count = next(x.shape[0] for v in varied.values() for x in be.flatten(v)[0] if getattr(x, "shape", ()))
    first = prob.remake(**{k: _member(be, v, 0) for k, v in varied.items()})
    differentiated = len(args) > 1
    try:
        sensealg = _algorithm(be, first, args[0], options, differentiated)
    except (SensitivityError, TypeError):  # what is wrong with the arguments, members alone say
        return None
    if sensealg is None:
        return None
    joined = _joined(be, prob, varied, count, differentiated)
    options = {**options, "sensealg": sensealg, "probe": "off"}
    try:
        if differentiated:
            return _gradient(be, task, prob, joined, count, args, options)
        sol = task(joined, *args, **options)
    except Unbatched as e:
        warnings.warn(f"members are taken one by one: {e.args[0]}", SensitivityWarning, stacklevel=calling_depth())
        return None
    except SensitivityError:  # members alone say which of them failed
        return None
    return _apart(be, sol, count) if sol.success else None


def _algorithm(be: Any, first: SDEProblem, alg: Any, options: dict[str, Any], differentiated: bool) -> Any:
    """What a member alone would be differentiated by, if that does not cost more the more members there are."""
    sensealg = options["sensealg"]
    kept = {k: v for k, v in options.items() if k not in ("sensealg", "on_failure", "wrt", "dloss")}
    run, x = prepare(first, alg, **kept, wrt=through_ad(first, sensealg))
    algorithm, _ = choose(run, x, sensealg)
    by_columns = algorithm.per_input or isinstance(algorithm.vjp, FiniteDifferenceVJP)
    unused = not (differentiated or run.be.attaches)
    return algorithm if algorithm.boundary and (unused or not by_columns) else None


def _member(be: Any, value: Any, i: int) -> Any:
    return _mapped(be, lambda x: x[i, ...] if getattr(x, "shape", ()) else x, value)


def _mapped(be: Any, change: Callable[[Any], Any], value: Any) -> Any:
    leaves, structure = be.flatten(value)
    return be.unflatten(structure, [change(x) for x in leaves])


def _joined(be: Any, prob: SDEProblem, varied: dict[str, Any], count: int, apart: bool) -> Members:
    """All members as one problem; with `apart`, what they have in common is written out for each."""
    def spread(x: Any) -> Any:
        x = be.asarray(x, dtype=be.default_float()) if isinstance(x, float) and not be.is_array(x) else be.asarray(x)
        return be.xp.stack([x] * count)

    u0 = varied["u0"] if "u0" in varied else _mapped(be, spread, prob.u0)
    leaves, structure = be.flatten(varied.get("p", prob.p))
    common = ["p" not in varied or not getattr(x, "shape", ()) for x in leaves]
    if apart:
        moved = [on and (isinstance(x, float) or (be.is_array(x) and be.is_float(x)))
                 for x, on in zip(leaves, common, strict=True)]
        leaves = [spread(x) if on else x for x, on in zip(leaves, moved, strict=True)]
        common = [a and not b for a, b in zip(common, moved, strict=True)]
    sizes = tuple(be.xp.reshape(x, (count, -1)).shape[1] for x in be.flatten(u0)[0])
    parts = {f.name: getattr(prob, f.name) for f in fields(SDEProblem)}
    parts |= {name: Rows(getattr(prob, name), be, tuple(common)) for name in ("f", "g")}
    if (own := "key" in varied):
        parts["key"] = be.xp.stack([words(be, varied["key"][i, ...]) for i in range(count)])
    return Members(**{**parts, "u0": u0, "p": be.unflatten(structure, leaves)},
                   abreast=Abreast(count, sizes, prob.noise == "scalar", own))


def _gradient(be: Any, task: Callable[..., Any], prob: SDEProblem, joined: Members, count: int, args: tuple[Any, ...],
              options: dict[str, Any]) -> Any:
    """Gradients of all members from that of the sum of their losses."""
    alg, loss = args
    options = dict(options)
    if (dloss := options.pop("dloss")) is not None:
        def slopes(sol: Solution) -> Any:
            rows = [be.flatten(dloss(_view(be, prob, sol, i)))[0] for i in range(count)]
            return be.unflatten(be.flatten(sol.u)[1], [be.xp.stack(x, axis=1) for x in zip(*rows, strict=True)])

        options["dloss"] = slopes
    r = task(joined, alg, lambda sol: sum(loss(_view(be, prob, sol, i)) for i in range(count)), **options)
    if not r.solution.success:
        return None
    with be.quiet():
        values = be.xp.stack([be.asarray(loss(_view(be, prob, r.solution, i))) for i in range(count)])
    sol = _apart(be, r.solution, count)
    return replace(r, value=values, solution=sol, stats=sol.stats)


def _view(be: Any, prob: SDEProblem, sol: Solution, i: int) -> Solution:
    """The solution of one member, as its loss sees it."""
    leaves, structure = be.flatten(sol.prob.p)
    p = be.unflatten(structure, [x if on else x[i, ...] for x, on in zip(leaves, sol.prob.f.common, strict=True)])
    return replace(sol, u=_mapped(be, lambda x: x[:, i, ...], sol.u), dense=None,
                   prob=prob.remake(u0=_member(be, sol.prob.u0, i), p=p))


def _apart(be: Any, sol: Solution, count: int) -> Solution:
    """A solution with the members in front, and counts for each."""
    def counts(n: Any) -> Any:
        return None if n is None else be.xp.stack([be.asarray(n if isinstance(n, float) else int(n))] * count)

    stats = Stats(**{f.name: counts(sol.stats[f.name]) for f in fields(Stats)})
    return replace(sol, t=be.xp.stack([sol.t] * count), u=_mapped(be, lambda x: be.xp.moveaxis(x, 1, 0), sol.u),
                   stats=stats, retcode=counts(sol.retcode), n_steps=counts(sol.n_steps), prob=None, dense=None)
