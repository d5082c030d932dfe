"""Many members of one problem: solved together in this process, or spread over an executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from .errors import InputError, SensitivityError, SolveError, UnsupportedCombination
from .problems import ODEProblem, Problem
from .registry import registry
from .retcode import RetCode
from .solution import Gradient, Solution, Stats
from .steady import SteadyStateProblem
from .stochastic import SDEProblem
from .together import GROUP, can_go, together

CHUNK = 16
PARTS = ("u0", "p", "tspan", "key")
VALUES = ("value", "u0", "p", "t0", "t1", "saveat")
METADATA = ("prob", "alg", "sensealg", "events", "dense")


@dataclass(frozen=True, eq=False)
class EnsembleProblem(Problem):
    """Members of one problem that differ in initial state, parameters, times or, where there is noise, paths.

    Parameters
    ----------
    prob : ODEProblem, SDEProblem or SteadyStateProblem
        What the members have in common.
    u0, p : pytree, optional
        In the structure of `prob.u0` and `prob.p`; every array has one axis more, in front, for the members. Leaves of
        `p` that are no arrays are common to all.
    tspan : (t0, t1) or array `(members, 2)`, optional
        As a pair, each of the two is a number or a vector with one time per member.
    key : integer array `(members,)` or `(members, 2)`, optional
        The path of each member of an `SDEProblem`; without it all see the same path.

    Raises
    ------
    InputError
        Nothing is given, `key` is given where it cannot say what the path is, or leading axes differ in length.
    UnsupportedCombination
        `prob` is of another kind.
    """

    prob: Any
    u0: Any = None
    p: Any = None
    tspan: Any = None
    key: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.prob, ODEProblem | SDEProblem | SteadyStateProblem):
            raise UnsupportedCombination(f"an ensemble of {type(self.prob).__name__} is not available",
                                         "members differ in u0, p, tspan and key of an ODEProblem, SDEProblem or "
                                         "SteadyStateProblem", "a loop over members")
        if self.key is not None and getattr(self.prob, "brownian", self.prob) is not None:
            raise InputError(f"key was given with {'a path' if isinstance(self.prob, SDEProblem) else 'no noise'}",
                             "it makes the paths of an SDEProblem that has no brownian= of its own",
                             "EnsembleProblem(SDEProblem(f, g, u0, tspan, p), key=np.arange(100))")
        if self.tspan is not None and isinstance(self.prob, SteadyStateProblem):
            raise InputError("tspan was given with a SteadyStateProblem", "a steady state has no times", "leave it out")
        if self.tspan is not None and getattr(self.tspan, "ndim", None) == 2:
            object.__setattr__(self, "tspan", (self.tspan[:, 0], self.tspan[:, 1]))
        lengths = {f"{name}{where}": count for name in self.given for where, count in self._lengths(name)}
        if not lengths:
            raise InputError("EnsembleProblem was given neither u0, p, tspan nor key with an axis for the members",
                             "its leading axis counts them", "EnsembleProblem(prob, p=np.stack([p1, p2, p3]))")
        if len(set(lengths.values())) > 1:
            seen = ", ".join(f"{name} has {count}" for name, count in lengths.items())
            raise InputError(f"members are counted differently: {seen}", "leading axes have one length",
                             "one row per member in everything that is given")
        object.__setattr__(self, "_count", next(iter(lengths.values())))

    def __len__(self) -> int:
        return self._count  # type: ignore[attr-defined]

    def member(self, i: int) -> Any:
        """The problem of one member."""
        be = backend(self)
        return self.prob.remake(**_taken(be, self.varied(), lambda x: x[i, ...]))

    @property
    def given(self) -> tuple[str, ...]:
        """What differs between members."""
        return tuple(name for name in PARTS if getattr(self, name) is not None)

    def varied(self) -> dict[str, Any]:
        """The trees with the members in front."""
        return {name: getattr(self, name) for name in self.given}

    def _lengths(self, name: str) -> list[tuple[str, int]]:
        from . import tree

        value = getattr(self, name)
        leaves, paths = tree.flatten(value)[0], tree.names(value)
        found = []
        for x, path in zip(leaves, paths, strict=True):
            shape = getattr(x, "shape", None)
            if shape:
                found.append((path, shape[0]))
            elif shape is not None and name != "tspan":
                raise InputError(f"{name}{path} has no axis for the members", "the first axis counts them",
                                 "one entry per member")
        return found


def backend(ensemble: EnsembleProblem, name: str | None = None) -> Any:
    """The backend of an ensemble's arrays."""
    from . import tree

    if name:
        return registry().backend(name)
    sources = [(k, getattr(ensemble, k)) for k in ensemble.given] + [("u0", ensemble.prob.u0), ("p", ensemble.prob.p)]
    return registry().backend_for([(k, x) for k, value in sources for x in tree.flatten(value)[0]])


def run(task: Callable[..., Any], ensemble: EnsembleProblem, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """`task(prob, *args, **options)` for every member, results with the members in front.

    `task` is `solve` or `gradient`; `executor` and `chunk` are taken out of the options. Where no method is named, all
    members take that of the first. Events happen in each member, but `sol.events`, whose length differs, is not kept.

    Raises
    ------
    UnsupportedCombination
        `saveat="steps"` or `dense=True`, whose results have no common shape.
    """
    executor, chunk = options.pop("executor", None), options.pop("chunk", None)
    if options.get("dense") or (isinstance(options.get("saveat"), str) and options["saveat"] == "steps"):
        raise UnsupportedCombination("dense=True and saveat='steps' cannot be used for an ensemble",
                                     "members take different numbers of steps", "saveat=[...]")
    if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
        raise InputError(f"chunk={chunk!r} is not a positive integer", "it counts the members of one task", "chunk=8")
    if executor is not None and not hasattr(executor, "submit"):
        raise InputError(f"executor={executor!r} cannot be used", "members are handed to executor.submit",
                         "executor=concurrent.futures.ProcessPoolExecutor(...)")
    from .recommend import method_of

    args = (method_of(ensemble.member(0), args[0], options), *args[1:])
    be = backend(ensemble, options.get("backend"))
    count = len(ensemble)
    abreast = can_go(be, ensemble.prob, ensemble.given, args, options)
    if executor is not None:
        results = _spread(be, task, ensemble, args, options, executor,
                          chunk or (GROUP if abreast else CHUNK if be.traced else 1))
    else:
        ranges = _ranges(count, chunk or (GROUP if abreast else count))
        results = [_batch(be, task, ensemble.prob, _slice(be, ensemble, *r), args, options, r[0]) for r in ranges]
    result = results[0] if len(results) == 1 else stacked(be, results, "concat")
    sol = result.solution if isinstance(result, Gradient) else result
    sol.prob = ensemble
    if options.get("on_failure") == "raise":
        _check(be, sol)
    return result


def _ranges(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _taken(be: Any, trees: dict[str, Any], take: Callable[[Any], Any]) -> dict[str, Any]:
    """Trees with `take` applied to every array that has an axis for the members."""
    out = {}
    for name, value in trees.items():
        leaves, structure = be.flatten(value)
        out[name] = be.unflatten(structure, [take(x) if getattr(x, "shape", ()) else x for x in leaves])
    return out


def _slice(be: Any, ensemble: EnsembleProblem, start: int, stop: int) -> dict[str, Any]:
    if (start, stop) == (0, len(ensemble)):
        return ensemble.varied()
    return _taken(be, ensemble.varied(), lambda x: x[start:stop, ...])


def _batch(be: Any, task: Callable[..., Any], prob: Any, varied: dict[str, Any], args: tuple[Any, ...],
           options: dict[str, Any], first: int) -> Any:
    """All members of one batch, in this process."""
    if can_go(be, prob, tuple(varied), args, options):
        result = together(be, task, prob, varied, args, options)
        if result is not None:
            return result
    leaves, structure = be.flatten(varied)
    batched = [bool(getattr(x, "shape", ())) for x in leaves]
    rows = [x for x, on in zip(leaves, batched, strict=True) if on]

    def one(i: int | None, arrays: list[Any]) -> Any:
        given = iter(arrays)
        parts = be.unflatten(structure, [next(given) if on else x for x, on in zip(leaves, batched, strict=True)])
        try:
            return _bare(task(prob.remake(**parts), *args, **options))
        except SensitivityError as e:
            if i is not None:
                e.add_note(f"This is member {first + i} of the ensemble.")
            raise

    return be.members(one, rows)


def _bare(result: Any) -> Any:
    """A solution without what belongs to one member only."""
    if isinstance(result, Gradient):
        return dataclasses.replace(result, solution=_bare(result.solution))
    return dataclasses.replace(result, prob=None, dense=None, events=None)


def _check(be: Any, sol: Any) -> None:
    """Raise for a member that failed where nothing could be raised, in a batch."""
    for i, code in enumerate(be.concrete_times(sol.retcode) or ()):
        if code not in (RetCode.Success, RetCode.Terminated):
            raise SolveError(f"member {i} of the ensemble failed: {RetCode(int(code)).name}", "its results are NaN",
                             f"sa.solve(ensemble.member({i}), ...) says more; or on_failure='nan'", RetCode(int(code)),
                             None, sol)


def stacked(be: Any, results: list[Any], join: str = "stack") -> Any:
    """Solutions or gradients as one, with the members in front."""
    first = results[0]
    if isinstance(first, Gradient):
        parts = {k: _trees(be, [getattr(r, k) for r in results], join) for k in VALUES}
        sol = stacked(be, [r.solution for r in results], join)
        stats = stacked_stats(be, [r.stats for r in results], join)
        return Gradient(**parts, solution=sol, stats=stats, sensealg=first.sensealg)
    t, u = (_trees(be, [getattr(r, k) for r in results], join) for k in ("t", "u"))
    stats = stacked_stats(be, [r.stats for r in results], join)
    retcode, n_steps = (_counts(be, [getattr(r, k) for r in results], join) for k in ("retcode", "n_steps"))
    return Solution(t, u, stats, retcode, n_steps, None, first.alg, first.sensealg)


def stacked_stats(be: Any, stats: list[Stats], join: str) -> Stats:
    """Counts as vectors."""
    return Stats(**{f.name: _counts(be, [s[f.name] for s in stats], join) for f in dataclasses.fields(Stats)})


def _trees(be: Any, trees: list[Any], join: str) -> Any:
    """Arrays of equal trees joined along a first axis; other leaves are those of the first."""
    if trees[0] is None:
        return None
    rows = [be.flatten(v)[0] for v in trees]
    structure = be.flatten(trees[0])[1]
    joined = []
    for xs in zip(*rows, strict=True):
        numbers = be.is_array(xs[0]) or isinstance(xs[0], float)
        kind = be.default_float() if isinstance(xs[0], float) and not be.is_array(xs[0]) else None
        joined.append(getattr(be.xp, join)([be.asarray(x, dtype=kind) for x in xs]) if numbers else xs[0])
    return be.unflatten(structure, joined)


def _counts(be: Any, counts: list[Any], join: str) -> Any:
    if any(v is None for v in counts):
        return None
    return getattr(be.xp, join)([be.asarray(int(v) if isinstance(v, int) else v) for v in counts])


# -- executors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What a worker gets: everything that pickles, arrays as NumPy's, and how the framework is set up here."""

    backend: str
    setup: Any
    task: Callable[..., Any]
    prob: Any
    common: dict[str, Any]
    varied: dict[str, Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    first: int


def _spread(be: Any, task: Callable[..., Any], ensemble: EnsembleProblem, args: tuple[Any, ...],
            options: dict[str, Any], executor: Executor, chunk: int) -> list[Any]:
    """Chunks of members by an executor, in order."""
    prob = ensemble.prob
    names = [f.name for f in dataclasses.fields(prob) if f.name in PARTS]
    common = _packed(be, {n: getattr(prob, n) for n in names if n not in ensemble.given})
    skeleton = prob.remake(**{n: (0.0, 1.0) if n == "tspan" else None for n in names})
    shared = {k: _packed(be, v) if be.is_array(v) else v for k, v in options.items()}
    futures = []
    for start, stop in _ranges(len(ensemble), chunk):
        varied = _packed(be, _slice(be, ensemble, start, stop))
        futures.append(executor.submit(
            _work, _Task(be.name, be.setup(), task, skeleton, common, varied, args, shared, start)))
    try:
        return [_mapped(future.result(), lambda v: _unpacked(be, v)) for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


class Shipped:
    """One array on its way, as NumPy's, so that it arrives in a process whose framework is not set up yet."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _packed(be: Any, value: Any) -> Any:
    leaves, structure = be.flatten(value)
    return be.unflatten(structure, [Shipped(be.host(x)) if be.is_array(x) else x for x in leaves])


def _unpacked(be: Any, value: Any) -> Any:
    leaves, structure = be.flatten(value)
    return be.unflatten(structure, [be.asarray(x.value) if isinstance(x, Shipped) else x for x in leaves])


def _work(job: _Task) -> Any:
    """One chunk, in a worker."""
    be = registry().backend(job.backend)
    be.restore(job.setup)
    prob = job.prob.remake(**_unpacked(be, job.common))
    options = {k: _unpacked(be, v) if isinstance(v, Shipped) else v for k, v in job.options.items()}
    result = _batch(be, job.task, prob, _unpacked(be, job.varied), job.args, options, job.first)
    return _mapped(result, lambda v: _packed(be, v))


def _mapped(result: Any, convert: Callable[[Any], Any]) -> Any:
    """A solution or gradient with every array in it converted."""
    if isinstance(result, Gradient):
        parts = {k: convert(getattr(result, k)) for k in VALUES}
        return dataclasses.replace(result, **parts, solution=_mapped(result.solution, convert),
                                   stats=_mapped(result.stats, convert))
    return dataclasses.replace(result, **{
        f.name: _mapped(v, convert) if isinstance(v, Stats) else convert(v)
        for f in dataclasses.fields(result) if (v := getattr(result, f.name)) is not None and f.name not in METADATA})
