"""The exact gradient of reversible Heun with nothing stored between the steps: each step is undone, then pulled back.

With drift and diffusion at the points z_m, each evaluated once, and `F_m(n)` their sum `h f + g dW` over step n,

    y_m = y~_m - F_m(m)/2,   z_{m-1} = 2 y_m - z_m - F_m(m-1),   y~_{m-1} = y_m - F_m(m-1)/2

is the inverse of the steps (Kidger, Foster, Li, Lyons 2021, algorithm 2). At the same points their cotangents are

    ybar_m = ybar_{m+1} + 2 zbar_{m+1} + (outputs at m),
    zbar_m = -zbar_{m+1} + (F_m(m))_z^T (ybar_{m+1}/2 + zbar_{m+1}) + (F_m(m-1))_z^T ybar_m/2,

one product with the derivatives of drift and diffusion for each point. The increments of the path are computed again
from its key. Between the nodes output is linear, so an output at time s belongs to the nodes beside it, with weights
that a hat function gives.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from ..backend import Array
from ..errors import ReconstructionWarning, UnstableSensealgError, UnsupportedCombination
from ..estimates import Effort, Work
from ..integrate import Run, span
from ..retcode import RetCode
from ..stochasticmethods import ReversibleHeun
from ..system import Inputs
from . import base
from .frozen import frozen_tangent

NONSENSE = 0.1


class Undone(NamedTuple):
    """Where the walk back stands, between two points: `y~` and `z`, cotangents of the points above, and of theta."""

    y: Array
    z: Array
    y_bar: Array
    z_bar: Array
    theta: tuple[Array, ...]


@dataclass(frozen=True)
class ReversibleHeunAdjoint(base.SensitivityAlgorithm):
    """Exact gradient of an SDE solved with `ReversibleHeun`, undoing its steps: no state is stored between them.

    Per step, in reverse: one evaluation of f and g with one product. Round-off in the undone states grows where the
    solution contracts; `stats.drift` says by how much `u0` was missed. Forward mode stores the steps.

    Parameters
    ----------
    vjp : VJP, optional

    Raises
    ------
    UnsupportedCombination
        Another method, `dense=True`, a problem that is no SDEProblem.
    UnstableSensealgError
        The undone steps miss `u0` by more than a tenth of it; NaN where nothing can be raised.

    Warns
    -----
    ReconstructionWarning
        They miss it by more than 1e-6 of it in float64, 1e-2 in float32.

    References: Kidger, Foster, Li, Lyons 2021, NeurIPS, section 3.
    """

    vjp: Any = field(default=None, kw_only=True)

    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"stages"})
    keeps: ClassVar[str] = "end"
    kinds: ClassVar[frozenset[str]] = frozenset({"sde"})
    retraces: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("kidger2021sde",)

    def work(self, w: Work) -> Effort:
        return Effort(2 * w.N, 0, 2 * w.N, 6 * w.n)

    def refuse(self, run: Run) -> None:
        if not isinstance(run.method, ReversibleHeun):
            raise UnsupportedCombination(f"{self.name} does not go with {run.method.name}",
                                         "its steps cannot be undone",
                                         "ReversibleHeun(), or sensealg=RecursiveCheckpointAdjoint()")
        if run.dense:
            raise base.unsupported(self.name, "dense=True, which keeps every step", "RecursiveCheckpointAdjoint()")

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, base.Solved]:
        del wanted
        out, aux, (_, _, end, _) = base.solve_forward(run, x, keep=False)
        return out, aux, base.Solved(x, None, end)

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be = run.be
        x, _, end, _ = residuals
        n = x.u0.shape[0]
        pieces: Any = replace(run, field=replace(run.field, pieces=True))  # type: ignore[call-arg]
        rhs = pieces.field.bind(be, x.theta, x.constants)
        drive, noises = rhs.stages(ReversibleHeun.scheme), pieces.field.m
        s = span(be, x.t0, x.t1)
        params = "theta" in wanted and bool(x.theta)
        at = run.vjp.value_and_pullback(pieces, x, params=params)
        ts: Any = base.save_times(run, x, s) if run.saves not in (None, "steps") else None

        def node(m: Any) -> Any:
            """The time of a node; those beyond the ends keep the distance of full steps."""
            t = s.t0 + m * run.dt
            return be.choose(t > s.t1, be.choose(m > end.accepted, s.t1 + run.dt, s.t1), t)

        def from_outputs(m: Any) -> Array:
            """The cotangent that outputs hand to the state at a node."""
            if run.saves is None:
                return be.choose(m == end.accepted, 1.0, 0.0) * ct.u[0, :]
            if run.saves == "steps":
                return be.choose(m > 0, 1.0, 0.0) * be.pick(ct.u, be.greatest(m - 1, 0))
            before, here, after = node(m - 1), node(m), node(m + 1)
            hats = [be.least((t - before) / (here - before), (after - t) / (after - here)) for t in ts]
            return be.vector([be.least(be.greatest(w, 0.0), 1.0) for w in hats], ct.u) @ ct.u

        def increment(m: Any) -> tuple[Any, Array]:
            """Size of step m and what the path does in it; nothing, if there is no such step."""
            t = node(be.least(be.greatest(m, 0), end.accepted - 1))  # where there is a step
            h = be.choose((m >= 0) & (m < end.accepted), node(m + 1) - node(m), 0.0)
            return h, be.vector([h], x.u0) * drive(t, h)[0, 2:2 + noises]

        def undo(state: Undone, i: tuple[Any]) -> tuple[Undone, float]:
            y, z, y_bar, z_bar, theta = state
            m = i[0]
            (h_up, W_up), (h, W) = increment(m), increment(m - 1)
            point, pull = at(be.vector([node(m)], x.u0), z)
            f, g = point[:n], rhs.diffusion(point, n)
            y = be.combine(y, -0.5, (1.0, 1.0), be.xp.stack([h_up * f, rhs.driven(g, W_up)]))
            moved = h * f + rhs.driven(g, W)
            above = 0.5 * y_bar + z_bar
            y_bar = y_bar + 2.0 * z_bar + from_outputs(m)
            ct_f, ct_g = h_up * above + (0.5 * h) * y_bar, rhs.spread(above, W_up) + rhs.spread(0.5 * y_bar, W)
            z_moved, theta_moved, _ = pull(be.xp.concat([ct_f, ct_g]))
            new = Undone(y - 0.5 * moved, 2.0 * y - z - moved, y_bar, z_moved - z_bar, be.add(theta, theta_moved))
            return be.choose(m <= end.accepted, new, state), 0.0

        zero = 0.0 * x.u0
        start = Undone(end.u[:n], end.u[n:], zero, zero, be.zeros(x.theta) if params else ())
        (y, _, y_bar, z_bar, theta), _ = be.scan(undo, start, (list(range(run.capacity + 1))[::-1],))
        size = be.greatest(be.rms(x.u0), be.rms(end.u))
        missed = be.rms(y - x.u0) / be.choose(size > 0.0, size, 1.0)
        status = be.choose((end.status != int(RetCode.Success)) | (missed <= NONSENSE), end.status,
                           int(RetCode.Unstable))
        points = end.accepted + 1
        allowed = 1e-6 if be.eps(x.u0.dtype) < 1e-10 else 1e-2
        return base.Cotangents(y_bar + z_bar, theta, 0.0, 0.0, None, points, run.vjp.extra(run) * points, status,
                               missed / allowed, missed)

    def verdict(self, bar: base.Cotangents, status: float | None, mismatch: float | None) -> None:
        """Raise or warn when undoing the steps did not lead back to `u0`."""
        if status is None or mismatch is None:
            return
        what = f"the steps of ReversibleHeun, undone to the start, miss u0 by {float(bar.drift):.1e} of it"
        why = "where the solution contracts, the hidden half of the state oscillates and grows, and round-off with it"
        fix = "sensealg=RecursiveCheckpointAdjoint(), which undoes nothing; or StochasticHeun(), without a hidden half"
        if status == RetCode.Unstable:
            raise UnstableSensealgError(what, why, fix, RetCode.Unstable)
        if mismatch > 1.0 and status == RetCode.Success:
            warnings.warn(f"{what}, and the gradient loses digits: {why}; {fix}", ReconstructionWarning, stacklevel=4)

    def tangent(self, run: Run, residuals: base.Solved, d: base.Tangents) -> Array:
        """Tangents through the frozen steps, which are made and stored once more."""
        return frozen_tangent(run, base.solve_forward(run, residuals.x, keep=True)[2], d)
