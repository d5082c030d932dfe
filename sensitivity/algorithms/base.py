"""What a sensitivity algorithm is, and what all of them share.

An algorithm is a pair `forward` / `reverse` (and `tangent`), functions of flat arrays. The backend makes the pair
the derivative of the solve in its framework. Laws, which the tests check: `forward` returns the outputs of
`outputs`; `<reverse(ct), d> == <ct, tangent(d)>` for algorithms that are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from ..backend import Array, Scalar
from ..checkpoint import Plan
from ..errors import SolveError, UnsupportedCombination
from ..estimates import Effort, Work
from ..events import EventFunctions
from ..integrate import Run, Span, State, algebra, evaluations, integrate, span
from ..jacobian import of_field
from ..stepper import Stepper
from ..system import Inputs
from ..watch import Watch
from . import consistent


class Outputs(NamedTuple):
    """Differentiable results: states at the save times `(k, n)`; with dense output also start states and stages, with
    events their times `(K,)` and the states just before them `(K, n)`."""

    u: Array
    nodes: Array | None = None
    stages: Array | None = None
    event_t: Array | None = None
    event_u: Array | None = None


class Aux(NamedTuple):
    """Results without derivatives: times, counts, how and where the solve ended, dense mesh.

    `events` holds which events there were, how many, and whether one ended the solve; `algebra` counts Jacobians,
    factorisations and linear solves.
    """

    ts: Any
    t: Scalar
    accepted: Any
    rejected: Any
    nfe: Any
    status: Any
    ratio: Scalar
    h: Scalar
    mesh: Any
    events: Any = None
    algebra: tuple[Any, Any, Any] = (0, 0, 0)


class Cotangents(NamedTuple):
    """Cotangents of `Inputs`, what the reverse pass cost, and how far a state integrated backwards was off (in
    tolerances, and relative)."""

    u0: Array
    theta: tuple[Array, ...]
    t0: Scalar
    t1: Scalar
    saveat: Any
    nvjp: Any
    nfe: Any
    status: Any
    mismatch: Any = None
    drift: Any = None
    algebra: tuple[Any, Any, Any] = (0, 0, 0)


class Tangents(NamedTuple):
    """Directions in `Inputs`, one per row: `u0` `(m, n)`, `theta` leaves `(m, *shape)`, times `(m,)` or None."""

    u0: Array
    theta: tuple[Array, ...]
    t0: Array | None
    t1: Array | None
    saveat: Array | None


@dataclass(frozen=True)
class SensitivityAlgorithm:
    """Base of all sensitivity algorithms; subclasses are frozen dataclasses.

    Attributes
    ----------
    vjp : VJP
        How products with derivatives of `f` are made; None means that `auto` decides.
    because : tuple of str
        Why this was chosen, when `auto` did.
    exact : whether the derivative is that of the computed solution, to round-off.
    boundary : whether `attach` hides the solve from the framework's AD.
    second_order : whether `reverse` needs nothing but `run.field` and `run.vjp.pullback`, so that it can be given a
        `TangentField` (see `sensitivity.second`).
    closed : whether the results of a solve are all that its derivatives need.
    twice : what to do where it gives no second derivatives.
    kinds : which kinds of problems it serves: "ode", "sde", "dde", "steady"; "average" for averages
        along an ODE's solution.
    elsewhere : kinds of problems where its name stands for an algorithm of their own.
    undoes : whether the reverse pass remakes states by undoing steps, and so loses digits that others keep.
    retraces : whether states are found again by going backwards, so that what contracts forwards grows.
    per_input : whether the work grows with the number of inputs.
    events, algebraic : whether it goes with events, and with a singular mass matrix.
    modes : "reverse" and "forward", those that it has.
    order : of the derivatives that it is for.
    restarts : whether a backward solve starts again at each save time, because its costate jumps there.
    needs : of the method and the framework: "stages" of each step, "explicit" ones, "AD" through all of the solve.
    keeps : what stays between the forward and the reverse pass: "steps", "tape", "columns", "saves" or "end".
    devices : where it runs, "cpu" and "gpu".
    references : keys of `citation`.
    """

    vjp: Any = None
    because: tuple[str, ...] = field(default=(), compare=False, repr=False, kw_only=True)

    exact: ClassVar[bool] = False
    events: ClassVar[bool] = False
    undoes: ClassVar[bool] = False
    retraces: ClassVar[bool] = False
    per_input: ClassVar[bool] = False
    order: ClassVar[int] = 1
    restarts: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    keeps: ClassVar[str] = "steps"
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "gpu"})
    boundary: ClassVar[bool] = True
    second_order: ClassVar[bool] = False
    algebraic: ClassVar[bool] = False
    closed: ClassVar[bool] = False
    modes: ClassVar[frozenset[str]] = frozenset({"reverse", "forward"})
    twice: ClassVar[str] = ("sensealg=ForwardOverAdjoint(), saveat= and derivatives in u0 and p; DirectAdjoint(); or "
                            "sa.hessian")
    kinds: ClassVar[frozenset[str]] = frozenset({"ode"})
    elsewhere: ClassVar[frozenset[str]] = frozenset()
    references: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def interpolates(self) -> bool:
        """Whether the output of `dense=True` has derivatives of the steps that were taken."""
        return self.exact

    @property
    def of_pair(self) -> SensitivityAlgorithm:
        """The algorithm for state and tangent together, see `sensitivity.second`; where `second_order` holds."""
        return self

    def asked(self, loss: Any, wrt: Any) -> Any:
        """The inputs to differentiate, `wrt` as the user gave it; None stands for the usual ones.

        Raises `UnsupportedCombination` where derivatives of this `loss` (None for the states themselves) in these
        inputs are not what the algorithm gives.
        """
        del loss
        return wrt

    def refuse(self, run: Run) -> None:
        """Raise `UnsupportedCombination` if this run is beyond the algorithm."""

    def work(self, w: Work) -> Effort | None:
        """What one gradient takes beside the forward solve `w`; None where that is not known beforehand."""

    def plain(self, run: Run, x: Inputs) -> tuple[Outputs, Aux]:
        """Solve without keeping anything for derivatives."""
        return outputs(run, x)

    def residuals(self, run: Run, x: Inputs, out: Outputs, aux: Aux) -> Any:
        """What `forward` keeps, made from the results of `plain`; only where `closed` holds."""
        raise NotImplementedError

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[Outputs, Aux, Any]:
        """Solve, and keep what the derivatives in `wanted` need: `(outputs, aux, residuals)`."""
        raise NotImplementedError

    def reverse(self, run: Run, residuals: Any, ct: Outputs, wanted: frozenset[str]) -> Cotangents:
        """Pull the cotangents of the outputs back to the inputs."""
        raise NotImplementedError

    def tangent(self, run: Run, residuals: Any, d: Tangents) -> Array:
        """Push input directions forward to the save states: `(m, k, n)`."""
        raise NotImplementedError

    def along(self, run: Run, x: Inputs, d: Tangents, wanted: frozenset[str]) -> tuple[Outputs, Aux, Array]:
        """Solve, and push the directions `d` forward: `(outputs, aux, (m, k, n))`."""
        out, aux, residuals = self.forward(run, x, wanted)
        moved = self.tangent(run, residuals, d)
        return out, aux, moved.u if isinstance(moved, Outputs) else moved

    def verdict(self, bar: Cotangents, status: float | None, mismatch: float | None) -> None:
        """Warn of, or raise for, what a reverse pass says about itself; None stands for what is only traced."""

    def reverse_failure(self, solution: Any = None) -> SolveError | None:
        """The algorithm's own words for a reverse pass that failed, if it has any."""
        return None


def weighed(run: Run, moved: Any, ct: Outputs) -> Array:
    """`S^T ct` for tangents of the outputs, one row of `moved` per direction."""
    xp = run.be.xp
    moved = moved if isinstance(moved, Outputs) else Outputs(moved)
    m = moved.u.shape[0]
    terms = [xp.reshape(S, (m, -1)) @ xp.astype(xp.reshape(c, (-1,)), S.dtype)
             for S, c in zip(moved, ct, strict=True) if S is not None and c is not None]
    return sum(terms[1:], terms[0])

def save_times(run: Run, x: Inputs, s: Span) -> Any:
    """The save times as scalars; an integer number of them is spread evenly over the span."""
    if isinstance(run.saves, int):
        return run.be.spread(s.t0, s.t1, fractions(run.saves))
    return run.be.scalars(x.saveat)


def fractions(count: int) -> list[float]:
    """Where `count` equally spaced times lie in the span."""
    return [1.0] if count == 1 else [i / (count - 1) for i in range(count)]


def outputs(run: Run, x: Inputs) -> tuple[Outputs, Aux]:
    """Solve without keeping anything for derivatives."""
    out, aux, _ = solve_forward(run, x, keep=False)
    return out, aux


def bound(run: Run, x: Inputs) -> Stepper:
    """The method, bound to the user's vector field and to what is known of its Jacobian."""
    return run.stepper(run.field.bind(run.be, x.theta, x.constants), of_field(run, x) if run.method.implicit else None)


class Solved(NamedTuple):
    """What the forward solve leaves for the derivatives; `x.u0` is the consistent start, `u` the states at the save
    times if they had to be made consistent."""

    x: Inputs
    log: Any
    end: State
    u: Any = None


def solve_forward(run: Run, x: Inputs, keep: bool, shift: Any = None,
                  plan: Callable[[Stepper], Plan] | None = None) -> tuple[Outputs, Aux, Solved]:
    """The forward solve of every algorithm; with `keep`, all accepted steps are logged, with `plan(stepper)` what that
    plan says."""
    be = run.be
    stepper = bound(run, x)
    s = span(be, x.t0, x.t1)._replace(shift=shift)
    timed = run.saves not in (None, "steps")
    ts = save_times(run, x, s) if timed else None
    u0, spent = stepper.start(be.time(s.t0), x.u0)
    u0 = stepper.lift(u0)
    sink, logged = None, keep or run.dense or run.saves == "steps"
    if plan is not None:
        sink = be.checkpoints(plan(stepper), stepper, run.saves, ts, u0, s.direction, run.capacity)
    elif logged:
        sink = be.store(run.capacity)
    elif timed:
        sink = be.sampler(stepper.interpolate, ts, u0, s.direction, run.capacity, stepper.restage)
    watch = None
    if run.events:
        watch = Watch(be, stepper, EventFunctions(run, x), s.direction, s.t1, run.max_events,
                      run.controller.adaptive)
    end, kept = integrate(run, stepper, s, u0, x.rtol, x.atol, sink=sink, watch=watch,
                          limit=None if sink is None or run.events else run.capacity)
    if stepper.algebraic:
        end = consistent.judged(be, stepper, s, x.u0, u0, end, not run.tstops)
    log = kept
    if plan is not None:
        log, kept = kept
    elif logged:
        kept = be.reopen(kept, stepper.restage)
    if timed:
        u = kept
        if plan is None and (keep or run.dense):
            u = be.sample(stepper.interpolate, kept, ts if shift is None else x.saveat, u0, s.direction)
        u = be.reached(stepper.seen(u), ts, end.t, s.direction)
        if stepper.algebraic:
            u, more = consistent.states(be, stepper, ts, u)
            spent, end = spent + more, consistent.complete(be, u, end)
    elif run.saves == "steps":
        u, ts = be.nodes(kept, end.u, end.t) if plan is None else be.node_rows(kept, log, end.u, end.t)
        u = stepper.seen(u)
    else:
        u, ts = stepper.seen(end.u[None, :]), [end.t]
    nodes = stages = mesh = None
    if run.dense and run.method.one_step:
        times, sizes, nodes, stages = be.stacked(kept)
        mesh = (times, sizes)
    elif run.dense:
        mesh = kept
    nfe, events, event_t, event_u = evaluations(run, stepper, end) + spent, None, None, None
    if run.events:
        times, event_u, index = be.entries(end.watch.entries, end.u)
        event_t, nfe = be.time_vector(times, x.u0), nfe + stepper.fsal * end.watch.count
        events = (index, end.watch.count, end.watch.ended)
    made = algebra(run, stepper, end)
    aux = Aux(ts, end.t, end.accepted, end.rejected, nfe, end.status, end.ratio, end.h, mesh, events,
              consistent.worked(stepper, made, spent))
    kept = x._replace(u0=u0) if stepper.algebraic else x
    return Outputs(u, nodes, stages, event_t, event_u), aux, Solved(
        kept, log if keep or run.dense else None, end, u if timed and stepper.algebraic else None)


def opened(run: Run, solved: Solved) -> tuple[Solved, Stepper]:
    """What the forward solve left, with the stages of its steps within reach, and its method."""
    stepper = bound(run, solved.x)
    return solved._replace(log=run.be.reopen(solved.log, stepper.restage)), stepper


def fold_times(run: Run, ts_bar: Any, t0_bar: Scalar, t1_bar: Scalar) -> tuple[Scalar, Scalar]:
    """Equally spaced save times are functions of the span: hand their cotangents to `t0` and `t1`."""
    if isinstance(run.saves, int):
        w = fractions(run.saves)
        t1_bar = t1_bar + run.be.total(ts_bar, w)
        t0_bar = t0_bar + run.be.total(ts_bar, [1.0 - w_i for w_i in w])
    return t0_bar, t1_bar


def size_of(x: Array) -> int:
    """Number of entries."""
    return math.prod(x.shape)


NAMES = ("u0", "theta", "t0", "t1", "saveat")


def columns(x: Inputs, names: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """The inputs of these names, in their order (a set has that of `NAMES`), and how many entries each has."""
    counts = {"u0": x.u0.shape[0], "theta": sum(size_of(v) for v in x.theta), "t0": 1, "t1": 1,
              "saveat": 0 if x.saveat is None else x.saveat.shape[0]}
    ordered = [n for n in NAMES if n in names] if isinstance(names, frozenset) else names
    return tuple((name, counts[name]) for name in ordered if counts[name])


def directions(be: Any, x: Inputs, parts: tuple[tuple[str, int], ...], rows: Array) -> Tangents:
    """Directions in the inputs `parts` from a matrix with one direction per row, its columns in the order of `parts`.
    """
    m, start = rows.shape[0], 0
    given: dict[str, Array] = {}
    for name, size in parts:
        given[name] = rows[:, start:start + size]
        start += size
    u0 = given.get("u0", be.unit_rows(m, x.u0.shape[0], m, x.u0))
    theta, start = [], 0
    for v in x.theta:
        size = size_of(v)
        block = be.unit_rows(m, size, m, v)
        if "theta" in given:
            block = be.xp.astype(given["theta"][:, start:start + size], v.dtype)
            start += size
        theta.append(be.xp.reshape(block, (m, *v.shape)))
    t0, t1 = (given[n][:, 0] if n in given else None for n in ("t0", "t1"))
    return Tangents(u0, tuple(theta), t0, t1, given.get("saveat"))


def times_wanted(wanted: frozenset[str]) -> bool:
    return bool(wanted & {"t0", "t1", "saveat"})


def unsupported(algorithm: str, cause: str, instead: str) -> UnsupportedCombination:
    return UnsupportedCombination(f"{algorithm} does not go with {cause}", "", f"sensealg={instead}")


__all__ = ["Aux", "Cotangents", "Outputs", "SensitivityAlgorithm", "Solved", "Tangents", "bound", "columns",
           "directions", "fold_times", "fractions", "opened", "outputs", "replace", "save_times", "size_of",
           "solve_forward",
           "times_wanted", "unsupported"]
