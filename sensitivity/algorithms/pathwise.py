"""Continuous adjoints of stochastic equations: Stratonovich equations that run backwards along the same path.

With the Stratonovich drift `b = f - 1/2 sum_k (g_k)_u g_k` of an Ito equation (`b = f` of a Stratonovich one) and
`lam(t)` the total derivative of the loss with respect to `u(t)` (Li, Wong, Chen, Duvenaud 2020, section 3),

    du = b dt + g o dW,   dlam = -b_u^T lam dt - sum_k (g_k)_u^T lam o dW^k,
                          dmu  = -b_p^T lam dt - sum_k (g_k)_p^T lam o dW^k,   dG/du0 = lam(t0),  dG/dp = mu(t0).

The correction belongs to the drift, so its own derivatives, second derivatives of g, enter `b_u` and `b_p`. Backwards
these are solved by Heun's method on the steps of the forward solve. With `F h = b h + g dW` over the step from u0 to u1

    P1 = F_u(u1)^T lam1,   P0 = F_u(u*)^T (lam1 + h P1),   lam0 = lam1 + h/2 (P1 + P0),

and the same for `mu` with `F_p`. Where the state is integrated backwards too, `u* = u1 - h F(u1)` and
`u0 = u1 - h/2 (F(u1) + F(u*))`; where the states at the nodes are known, `u* = u0`. The gradient converges to the
pathwise derivative of the exact solution with the strong order of the two solves. Output is linear between the nodes,
and its cotangents enter at the nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

from ..backend import Array, Contribution, Mark, Record, Scalar
from ..errors import UnstableSensealgError, UnsupportedCombination
from ..integrate import Run, State, evaluations, integrate, span
from ..retcode import RetCode
from ..stochasticchecks import check_entries
from ..stochasticmethods import HEUN, StochasticHeun
from ..system import Inputs
from . import backsolve, base, budget, forward, interpolating, reversible
from .forward_ad import ForwardADSensitivity
from .frozen import frozen_tangent
from .reversibleheun import ReversibleHeunAdjoint

STRETCHES = 10  # between stored states, where nobody said how many
LOST = 0.5  # relative difference at which the state integrated backwards is not that of the forward solve


class Back(NamedTuple):
    """Where the walk stands: state, costate, integral for the parameters, and how far stored states were missed."""

    u: Array
    lam: Array
    theta: tuple[Array, ...]
    missed: Scalar


class Backwards:
    """Steps of the adjoint equation backwards in time."""

    def __init__(self, run: Run, x: Inputs, params: bool) -> None:
        run = stratonovich(run)
        self.be = run.be
        self.pull = run.vjp.pullback(run, x, params=params)
        self.at = run.vjp.value_and_pullback(run, x, params=params)
        rhs: Any = run.field.bind(run.be, x.theta, x.constants)
        self.drive = rhs.stages(HEUN)

    def along(self, t: Scalar, h: Scalar, u0: Array, state: Back) -> Back:
        """From `t + h` to `t`, between states that are known."""
        rows = self.drive(t, h)
        P1, Q1, _ = self.pull(rows[1], state.u, state.lam)
        P0, Q0, _ = self.pull(rows[0], u0, self._moved(state.lam, h, P1))
        return self._new(h, u0, state, (P1, P0), (Q1, Q0))

    def back(self, t: Scalar, h: Scalar, state: Back) -> Back:
        """From `t + h` to `t`, the state with the rest."""
        rows = self.drive(t, h)
        F1, pull = self.at(rows[1], state.u)
        P1, Q1, _ = pull(state.lam)
        F0, pull = self.at(rows[0], self._moved(state.u, -h, F1))
        P0, Q0, _ = pull(self._moved(state.lam, h, P1))
        u0 = self.be.combine(state.u, -h, (0.5, 0.5), self.be.xp.stack([F1, F0]))
        return self._new(h, u0, state, (P1, P0), (Q1, Q0))

    def _moved(self, u: Array, h: Scalar, rate: Array) -> Array:
        return self.be.combine(u, h, (1.0,), rate[None, :])

    def _new(self, h: Scalar, u0: Array, state: Back, P: tuple[Array, Array], Q: Any) -> Back:
        lam = self.be.combine(state.lam, h, (0.5, 0.5), self.be.xp.stack(P))
        theta = tuple((0.5 * h) * (a + b) for a, b in zip(*Q, strict=True))
        return state._replace(u=u0, lam=lam, theta=self.be.add(state.theta, theta))


def stratonovich(run: Run) -> Run:
    """The run with the Stratonovich form of its field."""
    field: Any = run.field
    ito = run.kind.interpretation == "ito" and not run.kind.additive
    return replace(run, field=replace(field, squares=False, corrected=ito))


def spread(be: Any) -> Any:
    """The transpose of output that is linear in a step: to its start `u`, and in place of stages to its end `k[0]`."""

    def pull(step: Any, ts: Any, ct: Array) -> tuple[Contribution, list[Scalar]]:
        w = be.vector([(s - step.t) / step.h for s in ts], ct)
        return Contribution((1.0 - w) @ ct, (w @ ct)[None, :], 0.0), [0.0] * len(ts)

    return pull


def walked(run: Run, walk: Any, log: Any, end: State, u: Array, x: Inputs, ct: base.Outputs, params: bool) -> Back:
    """All steps backwards by `state = walk(state, step)`, with the cotangents of the output on the way."""
    be = run.be
    lam, extra = 0.0 * x.u0, None
    if run.saves is None:
        lam = ct.u[0, :]
    elif run.saves == "steps":
        extra, lam = be.nodes_vjp(log, ct.u)
    else:
        s = span(be, x.t0, x.t1)
        extra, _ = be.sample_vjp(spread(be), log, base.save_times(run, x, s), ct.u, s.direction)

    def back(state: Back, step: Any, out: Any, last: Any) -> Back:
        del last
        if out is not None and out.k is not None:
            state = state._replace(lam=state.lam + out.k[0, :])
        state = walk(state, step)
        return state if out is None else state._replace(lam=state.lam + out.u)

    start = Back(u, lam, be.zeros(x.theta) if params else (), 0.0)
    return be.replay(back, start, log, extra)


def refuse(algorithm: Any, run: Run) -> None:
    """Raise what the continuous adjoints cannot do on stochastic problems."""
    be, kind = run.be, run.kind
    name = algorithm.name
    if run.dense:
        raise base.unsupported(name, "dense=True, whose cotangents lie at no save time", "RecursiveCheckpointAdjoint()")
    if algorithm.alg is not None and not isinstance(algorithm.alg, StochasticHeun):
        raise UnsupportedCombination(f"{name}(alg={algorithm.alg!r}) does not go with an SDEProblem",
                                     "the adjoint equation is a Stratonovich one",
                                     "alg=StochasticHeun(), or leave it out")
    for option in ("rtol", "atol"):
        if getattr(algorithm, option) is not None:
            raise UnsupportedCombination(f"{name}({option}=...) does not go with an SDEProblem",
                                         "the backward solve takes the steps of the forward solve", "a smaller dt=")
    points = algorithm.checkpoints
    if isinstance(points, tuple) or points == "saveat":
        raise UnsupportedCombination(f"{name}(checkpoints={points!r}) does not go with an SDEProblem",
                                     "states are stored at steps, not at times", "checkpoints=10")
    if kind.interpretation == "stratonovich" or kind.additive:
        return
    if kind.coarse:
        raise UnsupportedCombination(f"{name} does not go with an Ito problem on a TabulatedPath with fewer points "
                                     "than steps", "such a path has no Ito integral, and the correction of the drift "
                                     "would be that of another equation", "sensealg=RecursiveCheckpointAdjoint(), "
                                     "interpretation='stratonovich', or VirtualBrownianTree")
    if "forward" not in be.modes:
        raise UnsupportedCombination(f"{name} needs the derivative of g, and there is no AD", be.how_to_get_ad.strip(),
                                     "sensealg=RecursiveCheckpointAdjoint(), or the Stratonovich drift with "
                                     "interpretation='stratonovich'")


@dataclass(frozen=True)
class InterpolatingAdjoint(interpolating.InterpolatingAdjoint):
    """Interpolating adjoint of a stochastic equation: along the states at the nodes, which are kept or, within a
    budget, found again by taking steps again."""

    kinds: ClassVar[frozenset[str]] = frozenset({"sde"})
    second_order: ClassVar[bool] = False
    events: ClassVar[bool] = False
    references: ClassVar[tuple[str, ...]] = ("li2020",)

    def refuse(self, run: Run) -> None:
        refuse(self, run)

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Any]:
        check_entries(run, x, self.name)
        if self.stores:
            points = STRETCHES if self.checkpoints is None else self.checkpoints
            plan = (points, None, False) if isinstance(points, int) else (None, points, False)
            return budget.forward(run, x, plan)
        return base.solve_forward(run, x, keep=True)

    def reverse(self, run: Run, residuals: Any, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        (x, log, end, _), stepper = (budget.opened if self.stores else base.opened)(run, residuals)
        params = "theta" in wanted and bool(x.theta)
        backwards = Backwards(run, x, params)

        def walk(state: Back, record: Record) -> Back:
            return backwards.along(record.t, record.h, stepper.seen(record.u), state)

        state = walked(run, walk, log, end, stepper.seen(end.u), x, ct, params)
        again = run.be.recalled(log, None)[0] * stepper.stages if self.stores else 0
        return base.Cotangents(state.lam, state.theta, 0.0, 0.0, None, 2 * end.accepted, again, end.status)

    def tangent(self, run: Run, residuals: Any, d: base.Tangents) -> Array:
        return frozen_tangent(run, budget.remade(run, residuals) if self.stores else residuals, d)


@dataclass(frozen=True)
class BacksolveAdjoint(backsolve.BacksolveAdjoint):
    """Backsolve adjoint of a stochastic equation: the state is integrated backwards along the path, and compared with
    states stored every so many steps, from which it starts afresh."""

    second_order: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"sde"})
    events: ClassVar[bool] = False
    references: ClassVar[tuple[str, ...]] = ("li2020",)

    def refuse(self, run: Run) -> None:
        refuse(self, run)
        if run.controller.adaptive:
            raise base.unsupported(self.name, "adaptive steps of an SDEProblem, whose number is not known before",
                                   "InterpolatingAdjoint(), RecursiveCheckpointAdjoint(), or a fixed dt=")
        if isinstance(self.checkpoints, str):
            raise base.unsupported(f"{self.name}(checkpoints={self.checkpoints!r})",
                                   "an SDEProblem, whose states are stored at steps", f"{self.name}(checkpoints=10)")

    def every(self, run: Run) -> int | None:
        """How many steps lie between stored states."""
        if not self.checkpointing:
            return None
        return max(1, math.ceil(run.capacity / (STRETCHES if self.checkpoints is None else self.checkpoints)))

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Any]:
        check_entries(run, x, self.name)
        return marked(run, x, self.every(run))

    def reverse(self, run: Run, residuals: Any, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be = run.be
        x, log, end, _ = residuals
        stepper = base.bound(run, x)
        params = "theta" in wanted and bool(x.theta)
        backwards, stored = Backwards(run, x, params), self.checkpointing

        def walk(state: Back, mark: Mark) -> Back:
            state = backwards.back(mark.t, mark.h, state)
            if not stored:
                return state
            u = be.choose(mark.stored, state.u if mark.u is None else stepper.seen(mark.u), state.u)
            return state._replace(u=u, missed=be.greatest(state.missed, apart(be, state.u, u)))

        state = walked(run, walk, log, end, stepper.seen(end.u), x, ct, params)
        gap = be.greatest(state.missed, apart(be, state.u, x.u0))
        lost = (end.status == int(RetCode.Success)) & (gap > LOST)
        status = be.choose(lost, int(RetCode.Unstable), end.status)
        count = 2 * end.accepted
        return base.Cotangents(state.lam, state.theta, 0.0, 0.0, None, count, run.vjp.extra(run) * count, status,
                               gap / LOST, gap)

    def tangent(self, run: Run, residuals: Any, d: base.Tangents) -> Array:
        """Tangents through the steps, which are made and stored once more."""
        return frozen_tangent(run, base.solve_forward(run, residuals.x, keep=True)[2], d)

    def verdict(self, bar: base.Cotangents, status: float | None, mismatch: float | None) -> None:
        """Raise when the state integrated backwards is not the one of the forward solve."""
        del mismatch
        if status == RetCode.Unstable:
            raise UnstableSensealgError(
                f"{self.name}: integrated backwards along the path, the state misses the stored one by "
                f"{float(bar.drift):.1e} of it",
                "what contracts forwards grows backwards, and errors of the steps with it",
                "a smaller dt=, more checkpoints=, or sensealg=InterpolatingAdjoint() or "
                "RecursiveCheckpointAdjoint()", RetCode.Unstable)


def apart(be: Any, u: Array, stored: Array) -> Scalar:
    """The difference of two states, relative to the larger; infinity says that it is no number."""
    size = be.greatest(be.rms(u), be.rms(stored))
    gap = be.rms(u - stored) / be.choose(size > 0.0, size, 1.0)
    return be.choose(be.isfinite(gap), gap, math.inf)


def marked(run: Run, x: Inputs, every: int | None) -> tuple[base.Outputs, base.Aux, base.Solved]:
    """The forward solve that keeps times and sizes of its steps, and the state at the start of every `every`-th."""
    be = run.be
    stepper = base.bound(run, x)
    s = span(be, x.t0, x.t1)
    u0 = stepper.lift(x.u0)
    on_nodes = run.saves == "steps"
    if run.saves is None or on_nodes:
        sink = be.marks(run.capacity, 1 if on_nodes else every)
    else:
        ts = base.save_times(run, x, s)
        sink = be.marks(run.capacity, every, stepper.interpolate, ts, u0, s)
    end, (log, rows) = integrate(run, stepper, s, u0, x.rtol, x.atol, sink=sink, limit=run.capacity)
    if on_nodes:
        u, ts = be.nodes(log, end.u, end.t)
    elif run.saves is None:
        u, ts = end.u[None, :], [end.t]
    else:
        u = be.reached(rows, ts, end.t, s.direction)
    aux = base.Aux(ts, end.t, end.accepted, end.rejected, evaluations(run, stepper, end), end.status, end.ratio, end.h,
                   None)
    return base.Outputs(stepper.seen(u)), aux, base.Solved(x, log, end)


def adapted(sensealg: Any) -> Any:
    """The algorithm for stochastic problems that a name stands for; others as they are.

    Solving the sensitivity equations on the path by the steps of the solve is pushing tangents through these steps.
    """
    kinds: dict[type, Any] = {interpolating.InterpolatingAdjoint: InterpolatingAdjoint,
                              backsolve.BacksolveAdjoint: BacksolveAdjoint}
    kind = kinds.get(type(sensealg))
    if kind is not None:
        return kind(**{f.name: getattr(sensealg, f.name) for f in fields(sensealg)})
    if type(sensealg) is forward.ForwardSensitivity:
        return ForwardADSensitivity(vjp=sensealg.vjp)
    if sensealg == reversible.ReversibleAdjoint(vjp=sensealg.vjp):
        return ReversibleHeunAdjoint(vjp=sensealg.vjp)
    return sensealg
