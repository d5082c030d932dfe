"""A sum of costs as one loss of one solve: which times are saved, what each saved state contributes.

The save times are those of the user, then those of every `DiscreteCost`, then, where it is needed, the end, which
moves with `t1`. The integral of a running cost is the last entry of the state there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .algorithms.base import size_of
from .costs import ContinuousCost, Cost, DiscreteCost, at_index
from .errors import InputError, TimesError, UnsupportedCombination
from .integrate import Run
from .running import check_integrand, events_of_pair, with_running_cost
from .solution import Gradient, Solution
from .system import Inputs


@dataclass(frozen=True, eq=False)
class WorstPart:
    """The larger of the error norms of the first `n` entries and of the rest, so that neither dilutes the other."""

    be: Any
    n: int
    norm: Callable[[Any], Any] | None

    def __call__(self, e: Any) -> Any:
        return self.be.greatest((self.norm or self.be.rms)(e[:self.n]), self.be.rms(e[self.n:]))

    def __hash__(self) -> int:
        return hash((self.n, self.norm))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorstPart) and (other.n, other.norm) == (self.n, self.norm)


class Known(NamedTuple):
    """What costs given by their derivatives contribute: value, rows for the saved states, and leaves for `p`."""

    value: Any
    rows: Any
    theta: list[Any] | None


@dataclass(frozen=True, eq=False)
class Assembled:
    """The loss that stands for a `Cost`, and the problem and options that go with it.

    `discrete` are pairs of a cost and its first row; `shown` says which rows the user sees.
    """

    own: Any
    prob: Any
    options: dict[str, Any]
    discrete: tuple[tuple[DiscreteCost, int, int], ...]
    running: bool
    others: tuple[Callable[..., Any], ...]
    shown: slice
    timed: bool
    saved: bool

    # -- what the solution shows ------------------------------------------------------------------------------------

    def view(self, be: Any, sol: Solution) -> Solution:
        """The solution of the user's own problem."""
        u, prob, dense, events = sol.u, sol.prob, sol.dense, sol.events
        if self.running:
            u, prob = u[0], self.own.remake(u0=prob.u0[0], p=prob.p, tspan=prob.tspan)
            dense = None if dense is None else lambda t: sol(t)[0]
            events = None if events is None else replace(events, u=events.u[0])
        leaves, structure = be.flatten(u)
        rows = be.unflatten(structure, [v[self.shown, ...] for v in leaves])
        return replace(sol, t=sol.t[self.shown], u=rows, prob=prob, dense=dense, events=events)

    def finished(self, be: Any, r: Gradient, original: Any, names: tuple[str, ...]) -> Gradient:
        """The result for the user's own problem."""
        sol = self.view(be, r.solution)
        sol.prob = original
        t1, saveat = r.t1, None
        if self.timed and "t1" in names:
            t1 = t1 + r.saveat[-1]
        if "saveat" in names:
            saveat = r.saveat[self.shown]
        return replace(r, u0=r.u0[0] if self.running and r.u0 is not None else r.u0, t1=t1, saveat=saveat, solution=sol)

    # -- value and derivatives --------------------------------------------------------------------------------------

    @property
    def only_running(self) -> bool:
        """Whether the loss is an integral over time and nothing else."""
        return self.running and not (self.discrete or self.others)

    @property
    def by_ad(self) -> bool:
        """Whether anything must be differentiated by the framework."""
        return bool(self.others) or any(cost.dgdu is None for cost, _, _ in self.discrete)

    def recorded(self, be: Any, sol: Solution) -> Any:
        """The part of the value that the framework differentiates."""
        total: Any = 0.0
        if self.others:
            shown = self.view(be, sol)
            for loss in self.others:
                total = total + loss(shown)
        for cost, start, stop in self.discrete:
            if cost.dgdu is None:
                total = total + self._value(be, sol, cost, start, stop)
        return total

    def whole(self, be: Any, sol: Solution) -> Any:
        """The value, every part of it from `g`."""
        total: Any = sol.u[1][-1] if self.running else 0.0
        for cost, start, stop in self.discrete:
            total = total + self._value(be, sol, cost, start, stop)
        shown = self.view(be, sol) if self.others else None
        for loss in self.others:
            total = total + loss(shown)
        return total

    def _states(self, be: Any, sol: Solution, start: int, stop: int) -> list[tuple[Any, Any, Any, int]]:
        leaves, structure = be.flatten(sol.u[0] if self.running else sol.u)
        return [(sol.t[j], be.unflatten(structure, [v[j, ...] for v in leaves]), sol.prob.p, j - start)
                for j in range(start, stop)]

    def _value(self, be: Any, sol: Solution, cost: DiscreteCost, start: int, stop: int) -> Any:
        assert cost.g is not None
        total: Any = 0.0
        for state in self._states(be, sol, start, stop):
            total = total + at_index(cost.g, *state)
        return total

    def known(self, run: Run, x: Inputs, sol: Solution) -> Known:
        """What the running cost and the costs given by `dgdu` contribute."""
        be, xp = run.be, run.be.xp
        rows = [0.0 * x.u0] * int(sol.t.shape[0])
        value: Any = 0.0
        theta: list[Any] | None = None
        if self.running:
            n = x.u0.shape[0]
            rows[-1] = be.unit_rows(1, n, 1 - n, x.u0)[0, :]
            value = sol.u[1][-1]
        with be.quiet():
            for cost, start, stop in self.discrete:
                if cost.dgdu is None:
                    continue
                value = None if cost.g is None or value is None else value + self._value(be, sol, cost, start, stop)
                for j, state in enumerate(self._states(be, sol, start, stop), start):
                    rows[j] = self._row(run, x, at_index(cost.dgdu, *state))
                    if cost.dgdp is not None:
                        theta = self._theta(run, x, at_index(cost.dgdp, *state), theta)
            return Known(value, xp.stack(rows), theta)

    def _row(self, run: Run, x: Inputs, tree: Any) -> Any:
        be, xp = run.be, run.be.xp
        leaves = [be.asarray(v, dtype=x.u0.dtype, device=be.device(x.u0)) for v in be.flatten(tree)[0]]
        shapes = tuple(tuple(v.shape) for v in leaves)
        expected = run.field.u.shapes[:-1] if self.running else run.field.u.shapes
        if shapes != expected:
            raise InputError(f"dgdu returned shapes {list(shapes)}, u0 has {list(expected)}",
                             "each entry of the state has a derivative", "return it in the structure of u0")
        flat = [xp.reshape(v, (-1,)) for v in leaves]
        return xp.concat([*flat, 0.0 * x.u0[:1]] if self.running else flat)

    def _theta(self, run: Run, x: Inputs, tree: Any, sofar: list[Any] | None) -> list[Any]:
        be, roles = run.be, run.field.p.roles
        leaves = be.flatten(tree)[0]
        if len(leaves) != len(roles):
            raise InputError(f"dgdp returned {len(leaves)} arrays, p has {len(roles)}",
                             "each parameter has a derivative", "return it in the structure of p")
        own = [v for v, role in zip(leaves, roles, strict=True) if role == "theta"]
        out = [be.asarray(v, dtype=w.dtype, device=be.device(w)) for v, w in zip(own, x.theta, strict=False)]
        for v, w in zip(out, x.theta, strict=False):
            if tuple(v.shape) != tuple(w.shape):
                raise InputError(f"dgdp returned shape {tuple(v.shape)}, p has {tuple(w.shape)}",
                                 "each parameter has a derivative", "return it in the structure of p")
        return out if sofar is None else [a + b for a, b in zip(sofar, out, strict=True)]

    def through(self, run: Run, x: Inputs, plain: Solution) -> Callable[[Solution], Any]:
        """A loss that the framework can differentiate and whose derivatives are those of the cost."""
        be = run.be
        value, rows, theta = self.known(run, x, plain)
        del value

        def loss(sol: Solution) -> Any:
            layout = run.field.u
            total = self.recorded(be, sol)
            for v, w in zip(be.flatten(sol.u)[0], layout.unravel(be, rows), strict=True):
                total = total + (v * w).sum()
            roles, leaves = run.field.p.roles, be.flatten(sol.prob.p)[0]
            own = [v for v, role in zip(leaves, roles, strict=True) if role == "theta"]
            for v, w in zip(own, theta or (), strict=False):
                total = total + (v * w).sum()
            return total

        return loss

    def value(self, run: Run, x: Inputs, sol: Solution) -> Any:
        known = self.known(run, x, sol).value
        return None if known is None else known + self.recorded(run.be, sol)

    def spread(self, be: Any, sol: Solution, tree: Any) -> Any:
        """Cotangents of the rows that the user sees as those of all rows."""
        count = int(sol.t.shape[0])
        start, stop, _ = self.shown.indices(count)
        leaves, structure = be.flatten(tree)
        out = []
        for v in leaves:
            v = be.asarray(v)
            before, after = (be.xp.zeros((k, *v.shape[1:]), dtype=v.dtype, device=be.device(v))
                             for k in (start, count - stop))
            out.append(be.xp.concat([before, v, after]))
        tree = be.unflatten(structure, out)
        return (tree, 0.0 * sol.u[1]) if self.running else tree


def assemble(prob: Any, cost: Cost, options: dict[str, Any], run: Run, x: Inputs,
             wrt: tuple[str, ...] | None) -> Assembled:
    """Lay the save times out and extend the problem; `run` and `x` are those of the user's own problem.

    `wrt` as in `probe.check`.
    """
    be, xp = run.be, run.be.xp
    discrete = [c for c in cost.terms if isinstance(c, DiscreteCost)]
    running = tuple(c for c in cost.terms if isinstance(c, ContinuousCost))
    others = tuple(c for c in cost.terms if not isinstance(c, Cost))
    options = dict(options)
    saved = run.saves == "ts"
    if (running and run.saves == "steps") or (discrete and run.saves not in (None, "ts")):
        raise InputError(f"saveat={run.saves!r} cannot be used with this cost",
                         "the times of the cost are saved beside those asked for", "saveat=np.array([...])")
    times = [x.saveat] if saved else []
    placed, row = [], int(x.saveat.shape[0]) if saved else 0
    shown = slice(0, row)
    for c in discrete:
        ts = _times(be, c.at, x)
        count = int(ts.shape[0])
        placed.append((c, row, row + count))
        times.append(ts)
        row += count
    ended = bool(times) and (bool(running) or (bool(others) and not saved))
    if ended:
        times.append(xp.reshape(x.t1, (1,)))
    if not saved:
        shown = slice(0, row) if discrete and not others else slice(-1, None) if run.saves is None else slice(None)
    if times:
        options["saveat"] = xp.concat(times) if len(times) > 1 else times[0]
    own = prob
    if running:
        if options.get("probe") != "off":
            u = be.unflatten(run.field.u.structure, run.field.u.unravel(be, x.u0))
            p = run.field.p.join(be, x.theta[:run.field.p.count], x.constants)
            for term in running:
                check_integrand(be, term.g, be.time(be.scalar(x.t0)), u, p, options.get("probe", "raise"), wrt)
        n = size_of(x.u0)
        prob = with_running_cost(prob, running, run, x)
        if run.events:
            if ended and any(event.terminal for event in run.events):
                raise UnsupportedCombination("a running cost beside other save times does not go with terminal events",
                                             "the end, where the integral is read, may not be reached",
                                             "the running cost alone, or with a callable of the end: saveat=None")
            options["events"] = events_of_pair(options["events"])
        if run.method.one_step:  # others have error norms of their own
            options["norm"] = WorstPart(be.differentiable(), n, run.norm)
        for name in ("rtol", "atol"):
            if getattr(getattr(x, name), "ndim", 0):
                options[name] = (options[name], xp.min(getattr(x, name)))
    options["probe"] = "off"
    return Assembled(own, prob, options, tuple(placed), bool(running), others, shown, ended, saved)


def _times(be: Any, at: Any, x: Inputs) -> Any:
    try:
        ts = be.asarray(at, dtype=be.time_dtype(x.u0.dtype), device=be.device(x.u0))
    except (TypeError, ValueError) as e:
        raise TimesError(f"at={at!r} is not a list of times", "a DiscreteCost is a sum over times",
                         "DiscreteCost(np.array([1.0, 2.0]), dgdu)") from e
    if ts.ndim != 1 or ts.shape[0] == 0:
        raise TimesError(f"at has shape {tuple(ts.shape)}, expected a vector of times",
                         "a DiscreteCost is a sum over times", "at=[t] for one time")
    t0, t1 = be.concrete(x.t0), be.concrete(x.t1)
    for i, t in enumerate(be.concrete_times(ts) or ()):
        if t0 is not None and t1 is not None and not min(t0, t1) <= t <= max(t0, t1):
            raise TimesError(f"at[{i}]={t:g} lies outside tspan=({t0:g}, {t1:g})", "the solver does not extrapolate",
                             f"tspan=({min(t0, t1, t):g}, {max(t0, t1, t):g})")
    return ts
