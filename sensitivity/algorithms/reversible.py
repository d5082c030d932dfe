"""Reversible adjoint: the exact gradient of a solve whose steps can be undone, so that none of them is kept.

The solve itself is made with the reversible pair of `sensitivity.reversible`; that pair is the computed solution. Of
each accepted step only time and size are kept, `(t_n, h_n)`, and of the states only the last. Reverse, one step at a
time: undo the step, and pull its cotangents back at the points that undoing it went through,

    (y_n, z_n) = step_n^{-1}(y_{n+1}, z_{n+1}),   (ybar, zbar)_n = (d step_n)^T (ybar, zbar)_{n+1} + outputs in step n,

and `dG/du0 = ybar_0 + zbar_0`. Each of the 2 s stages is evaluated once in reverse, together with its product.

Undoing divides by the coupling l_n, so round-off grows like `1 / prod l_n`. With the step-proportional coupling
`l_n = exp(-6 h_n / |t1 - t0|)` that is `e^6`, however many steps there are; with a constant coupling it is `l^-n`.
On top of it comes `e^{|a| T}` where the solution contracts at a rate `a`, as for any solve backwards in time.
Forwards the pair is stable on the negative real axis for `h |a| <= 1 - l` only; beyond it `y - z` grows.

Steps, couplings and checkpoints are constants of the differentiation; times move the mesh as in the discrete adjoint.

References: McCallum, Foster 2024 (arXiv 2410.11648).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

from ..backend import Array, Mark, Record, Scalar
from ..choose import auto
from ..errors import InputError, ReconstructionWarning, UnstableSensealgError
from ..estimates import Effort, Work
from ..integrate import Run, Span, State, evaluations, initial_step, integrate, span
from ..methods import RungeKutta
from ..retcode import RetCode
from ..reversible import Backward, Forward, Pair
from ..system import Inputs
from . import base
from .frozen import save_time_tangents

APART = 1e3
NONSENSE = 0.1


class Undoable(NamedTuple):
    """What the forward solve leaves: times and sizes of steps, the last state, slopes at the save times if wanted."""

    x: Inputs
    log: Any
    end: State
    speed: Array | None


@dataclass(frozen=True)
class ReversibleAdjoint(base.SensitivityAlgorithm):
    """Exact gradient in memory that does not grow with the number of steps: the steps are undone in reverse.

    The solution itself is that of a reversible pair of twice the cost, made from the method asked for: any explicit
    Runge-Kutta method, with fixed or controlled steps. Per step: `2 s` evaluations of `f` forwards, and in reverse
    `2 s` evaluations with a product each. Gives derivatives with respect to `u0`, `p`, `t0`, `t1` and `saveat`, in
    reverse and forward mode.

    Parameters
    ----------
    coupling : auto or float
        What holds the two solutions of the pair together. `auto`: `exp(-6 h / |t1 - t0|)` for a step of size h. A
        number in (0, 1]: the constant coupling of McCallum and Foster.
    checkpoint_every : int, optional
        Keep the pair every so many steps, and undo no further than to there: exact where the solution contracts.
    vjp : VJP, optional

    Raises
    ------
    InputError
        `coupling` or `checkpoint_every` is out of range.
    UnsupportedCombination
        Implicit methods, `dense=True`, and problems that are not an ordinary differential equation.
    SolveError
        With `RetCode.Unstable`: in the solve, the two solutions of the pair came apart, as they do where the solution
        contracts.

    Warns
    -----
    ReconstructionWarning
        Undone to the start, the pair missed `u0` by more than 1e-6 of it in float64, 1e-2 in float32. If it missed
        by more than a tenth, the gradient is nonsense: `UnstableSensealgError`, and NaN where nothing can be raised.

    References: McCallum, Foster 2024, arXiv 2410.11648.
    """

    vjp: Any = field(default=None, kw_only=True)
    coupling: Any = auto
    checkpoint_every: int | None = None

    exact: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"stages", "explicit"})
    keeps: ClassVar[str] = "end"
    undoes: ClassVar[bool] = True
    retraces: ClassVar[bool] = True
    second_order: ClassVar[bool] = True
    elsewhere: ClassVar[frozenset[str]] = frozenset({"sde"})
    references: ClassVar[tuple[str, ...]] = ("mccallum2024",)

    def __post_init__(self) -> None:
        c, k = self.coupling, self.checkpoint_every
        number = isinstance(c, Real) and not isinstance(c, bool)
        if c is not auto and not (number and 0.0 < c <= 1.0):
            raise InputError(f"coupling={c!r} is neither auto nor a number in (0, 1]",
                             "it weighs the two solutions of the reversible pair",
                             "coupling=sa.auto, or coupling=0.999")
        if k is not None and not (isinstance(k, Integral) and not isinstance(k, bool) and k >= 1):
            raise InputError(f"checkpoint_every={k!r} is not a positive integer",
                             "it counts steps between stored states", "checkpoint_every=100, or None")

    def work(self, w: Work) -> Effort:
        again = 2 * w.extra * w.N * w.s
        return Effort(w.A * w.s + again, 0, 2 * w.N * w.s, 4 * w.n + 2 * w.N)

    def refuse(self, run: Run) -> None:
        if run.kind is not None:
            raise base.unsupported(self.name, f"problems of the kind {type(run.kind).__name__}",
                                   "RecursiveCheckpointAdjoint()")
        if not isinstance(run.method, RungeKutta):
            raise base.unsupported(self.name, f"{run.method.name}, which is not an explicit Runge-Kutta method",
                                   "RecursiveCheckpointAdjoint(), or a method such as Tsit5()")
        if run.dense:
            raise base.unsupported(self.name, "dense=True, which keeps every step",
                                   "RecursiveCheckpointAdjoint(), or ask for the times with saveat=")

    # -- the solve ----------------------------------------------------------------------------------------------------

    def plain(self, run: Run, x: Inputs) -> tuple[base.Outputs, base.Aux]:
        out, aux, _ = self._solve(run, x, keep=False, time=False)
        return out, aux

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Undoable]:
        return self._solve(run, x, keep=True, time=base.times_wanted(wanted))

    def _pair(self, run: Run, x: Inputs, s: Span) -> Pair:
        """The pair for this run; a span of no length has no steps, so its coupling does not matter."""
        be = run.be
        length = abs(s.t1 - s.t0)
        assert isinstance(run.method, RungeKutta)
        coupling = None if self.coupling is auto else float(self.coupling)
        return Pair(be, run.method.tableau(True), run.field.bind(be, x.theta, x.constants), coupling,
                    be.choose(length > 0.0, length, 1.0))

    def _solve(self, run: Run, x: Inputs, keep: bool, time: bool) -> tuple[base.Outputs, base.Aux, Undoable]:
        be, xp = run.be, run.be.xp
        s = span(be, x.t0, x.t1)
        pair = self._pair(run, x, s)
        n = x.u0.shape[0]
        timed = run.saves not in (None, "steps")
        ts = base.save_times(run, x, s) if timed else None
        speeds = time and timed
        every = 1 if run.saves == "steps" else self.checkpoint_every if keep else None
        sink = None
        if timed:
            def rows(record: Record, ts: Any) -> Array:
                u = pair.interpolate(record, ts)
                return xp.concat([u, pair.slope(record, ts)], axis=1) if speeds else u

            first = be.padded(x.u0, 2 * n) if speeds else x.u0
            sink = be.marks(run.capacity, every, rows, ts, first, s)
        elif keep or run.saves == "steps":
            sink = be.marks(run.capacity, every)
        rtol, atol = (_twice(be, v) for v in (x.rtol, x.atol))
        norm = run.norm or be.rms
        h = None
        if run.dt is None:
            h = initial_step(run, pair, s, x.u0, pair.rhs(be.time(s.t0), x.u0), x.rtol, x.atol, norm)
        end, kept = integrate(run, pair, s, xp.concat([x.u0, x.u0]), rtol, atol, sink=sink, norm=lambda e: norm(e[:n]),
                              h=h, limit=None if sink is None else run.capacity, guard=self._guard(run, x, pair))
        log, u = (None, None) if kept is None else kept
        ends, speed = pair.halves(end.u)[0], None
        if timed:
            assert u is not None
            u, speed = (u[:, :n], u[:, n:]) if speeds else (u, None)
            u = be.reached(u, ts, end.t, s.direction)
        elif run.saves == "steps":
            u, ts = be.nodes(log, end.u, end.t)
            u = u[:, :n]
        else:
            u, ts = ends[None, :], [end.t]
        aux = base.Aux(ts, end.t, end.accepted, end.rejected, evaluations(run, pair, end), end.status, end.ratio, end.h,
                       None)
        return base.Outputs(u, None, None), aux, Undoable(x, log, end, speed)

    def _guard(self, run: Run, x: Inputs, pair: Pair) -> Any:
        """Whether `y` and `z` came apart: in tolerances where these steer the steps, else beyond what `y` itself is."""
        be = run.be
        norm = run.norm or be.rms

        def unstable(w0: Array, w1: Array) -> Any:
            (y0, _), (y1, z1) = pair.halves(w0), pair.halves(w1)
            if run.controller.adaptive:
                gap = norm(be.scaled(y1 - z1, y0, y1, x.rtol, x.atol))
                return gap > APART
            return be.rms(y1 - z1) > be.rms(y1) + be.rms(y1 - y0)

        return lambda w0, w1: be.choose(unstable(w0, w1), int(RetCode.Unstable), int(RetCode.Success))

    # -- derivatives --------------------------------------------------------------------------------------------------

    def reverse(self, run: Run, residuals: Undoable, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be, xp = run.be, run.be.xp
        x, log, end, speed = residuals
        time, params = base.times_wanted(wanted), "theta" in wanted and bool(x.theta)
        s = span(be, x.t0, x.t1)
        pair = self._pair(run, x, s)
        at = run.vjp.value_and_pullback(run, x, time=time, params=params)
        on_nodes = run.saves == "steps"
        stored = on_nodes or self.checkpoint_every is not None
        lam, extra, ts_bar = 0.0 * x.u0, None, None
        if run.saves is None:
            lam = ct.u[0, :]
        elif on_nodes:
            extra, lam = be.nodes_vjp(log, ct.u)
        else:
            extra, _ = be.sample_vjp(pair.interpolate_vjp(time), log, base.save_times(run, x, s), ct.u, s.direction)
            if time:
                ts_bar = be.scalars(xp.sum(ct.u * speed, axis=1))

        def back(state: Backward, mark: Mark, out: Any, last: Any) -> Backward:
            state = pair.unstep(at, mark.t, mark.h, None if on_nodes else out, last, time, state)
            if on_nodes and out is not None:
                state = state._replace(lam=state.lam + be.padded(out.u, state.lam.shape[0]))
            if stored:
                w = be.choose(mark.stored, mark.u, state.w)
                state = state._replace(w=w, missed=state.missed + _missed(be, state.w, w))
            return state

        start = Backward(end.u, be.padded(lam, end.u.shape[0]), be.zeros(x.theta) if params else (), 0.0, 0.0, 0.0)
        w, lam, theta, t0_bar, h_bar, missed = be.replay(back, start, log, extra)
        missed = missed + _missed(be, w, xp.concat([x.u0, x.u0]))
        status = be.choose(missed <= NONSENSE, end.status, int(RetCode.Unstable))
        y_bar, z_bar = pair.halves(lam)
        nvjp = 2 * pair.stages * end.accepted
        allowed = 1e-6 if be.eps(x.u0.dtype) < 1e-10 else 1e-2
        if ts_bar is not None:
            t0_bar = t0_bar - be.total(ts_bar)
        t0_bar, t1_bar = base.fold_times(run, ts_bar, t0_bar - h_bar, h_bar) if time else (0.0, 0.0)
        return base.Cotangents(y_bar + z_bar, theta, t0_bar, t1_bar, ts_bar, nvjp, run.vjp.extra(run) * nvjp, status,
                               missed / allowed, missed)

    def verdict(self, bar: base.Cotangents, status: float | None, mismatch: float | None) -> None:
        """Raise or warn when undoing the steps did not lead back to `u0`."""
        if status is None or mismatch is None:
            return
        what = f"undone to the start, the solution misses u0 by {float(bar.drift):.1e} of it"
        why = "round-off grows like exp(|a| T) where the solution contracts at a rate a"
        fix = f"{self.name}(checkpoint_every=100), or RecursiveCheckpointAdjoint()"
        if status == RetCode.Unstable:
            raise UnstableSensealgError(f"the steps could not be undone: {what}", why, fix, RetCode.Unstable)
        if mismatch > 1.0 and status == RetCode.Success:
            warnings.warn(f"{what}, and the gradient loses digits; {why}: {fix}", ReconstructionWarning, stacklevel=4)

    def tangent(self, run: Run, residuals: Undoable, d: base.Tangents) -> Array:
        """Tangents through the frozen steps, which are made once more."""
        be, xp = run.be, run.be.xp
        x, log, end, _ = residuals
        m, n = d.u0.shape
        timed = run.saves not in (None, "steps")
        moving = not (d.t0 is None and d.t1 is None and d.saveat is None)
        zero = d.u0[:, 0] * 0.0
        dt0, dt1 = (zero if d.t0 is None else d.t0), (zero if d.t1 is None else d.t1)
        s = span(be, x.t0, x.t1)
        pair = self._pair(run, x, s)
        push = run.vjp.pushforward(run, x, d.theta)
        value, speed = pair.base_output()
        sink = be.marks(run.capacity, 1 if run.saves == "steps" else None)
        if timed:
            def rows(record: Record, ts: Any) -> Array:
                return xp.concat([value(record, ts)[:, n:], speed(record, ts)[:, :n]], axis=1)

            ts = base.save_times(run, x, s)
            sink = be.marks(run.capacity, None, rows, ts, xp.concat([xp.reshape(d.u0, (-1,)), 0.0 * x.u0]), s)

        def ahead(state: Forward, mark: Mark, last: Any) -> tuple[Forward, Record]:
            dh = be.choose(last, dt1 - dt0, zero) if moving else None
            new, u, K = pair.jvp_pair(push, mark.t, mark.h, dt0 if moving else None, dh, state)
            if run.saves == "steps":
                u = pair.halves(state.dw)[0]
            return new, Record(mark.t, mark.h, xp.reshape(u, (-1,)), xp.reshape(K, (K.shape[0], -1)))

        start = Forward(xp.concat([x.u0, x.u0]), xp.concat([d.u0, d.u0], axis=1))
        state, (made, du) = be.follow(ahead, start, log, sink)
        dy = pair.halves(state.dw)[0]
        if run.saves is None:
            return dy[:, None, :]
        if run.saves == "steps":
            du, _ = be.nodes(made, xp.reshape(dy, (-1,)), end.t)
            return xp.permute_dims(xp.reshape(du, (-1, m, n)), (1, 0, 2))
        speeds = du[:, m * n:]
        du = xp.permute_dims(xp.reshape(du[:, :m * n], (-1, m, n)), (1, 0, 2))
        if moving:
            # Inside the last step, a fraction x of the way, the stretching of the step moves the output's place in it.
            h = be.last_size(log)
            x_last = be.vector([be.greatest((t - (end.t - h)) / h, 0.0) for t in ts], x.u0)
            ds = save_time_tangents(run, d, dt0, dt1) - dt0[:, None] - (dt1 - dt0)[:, None] * x_last[None, :]
            du = du + ds[:, :, None] * speeds[None, :, :]
        return du


def _twice(be: Any, tolerance: Any) -> Any:
    """A tolerance for each entry, for both halves."""
    return be.xp.concat([tolerance, tolerance]) if getattr(tolerance, "ndim", 0) else tolerance


def _missed(be: Any, w: Array, given: Array) -> Scalar:
    """How far `w` is from where it should be, relative to that unless it is zero."""
    size = be.rms(given)
    return be.rms(w - given) / be.choose(size > 0.0, size, 1.0)
