"""Continuous adjoint of delay equations: the costate solves a delay equation backwards in time.

    lam'(t) = -f_u(t)^T lam(t) - sum_i [t + tau_i <= t1] f_{v_i}(t + tau_i)^T lam(t + tau_i),   lam(t1+) = 0,
    lam(t_i-) = lam(t_i+) + l_{i,u},   mu'(t) = -f_p(t)^T lam(t),   mu(t1) = 0,
    dG/du0 = lam(t0),   dG/dp = mu(t0) + sum_j J_j dxi_j/dp,   dG/dt0 = -lam(t0) . f(t0+) + sum_j J_j dxi_j/dt0,
    J_j = lam(xi_j) . [f(xi_j-) - f(xi_j+)]   at the break points xi_j < t1,

where `f_p` contains what a parameter does through the history and through the times `t - tau_i(p)`, there with u' from
`f`. In the time `-t` the costate's equation has the same lags and the history zero, so the solver of the state solves
it too. Its break points are those of the state and the outputs, with all sums of lags subtracted.

References: Lenz, Schloeder, Bock 2014; Calver and Enright 2017 for the jumps of sensitivities of delay equations.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ..backend import Array, Record, Scalar
from ..delay import stage_inputs
from ..delaysolve import Breaks, Equation, Inside, State, inside, look, march, solve_forward
from ..integrate import Run, Span
from ..retcode import RetCode
from ..system import Inputs
from . import base, gauss, interpolating, quadrature
from .continuous import ContinuousAdjoint
from .delay import refuse_ambiguous, through_lags
from .walk import least


class _Adjoint(ContinuousAdjoint):
    """Continuous adjoint of a delay equation along the dense forward solution; see the module.

    `carries` tells that the parameters' integral is part of the costate's equation.
    """

    carries: ClassVar[bool] = True
    events: ClassVar[bool] = False
    second_order: ClassVar[bool] = False
    modes: ClassVar[frozenset[str]] = frozenset({"reverse"})

    def plain(self, run: Run, x: Inputs) -> tuple[base.Outputs, base.Aux]:
        out, aux, _ = solve_forward(run, x)
        return out, aux

    def refuse(self, run: Run) -> None:
        super().refuse(run)
        if self.stores:
            raise base.unsupported(f"{self.name} with checkpoints", "a delay equation, which looks at its whole past",
                                   f"{self.name}()")
        if not (self.alg or run.method).one_step:
            raise base.unsupported(f"{self.name}(alg={self.alg!r})", "a delay equation, whose costate has delays too",
                                   f"{self.name}(alg=sa.Tsit5())")
        if run.dense or run.saves == "steps":
            raise base.unsupported(self.name, "dense=True or saveat='steps' of a delay equation",
                                   "RecursiveCheckpointAdjoint(), or ask for the times with saveat=")

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Any]:
        refuse_ambiguous(run, x, wanted)
        return solve_forward(run, x)

    def reverse(self, run: Run, residuals: Any, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be = run.be
        x, log, _, _ = residuals
        state, params = State.of(run, x), "theta" in wanted and bool(x.theta)
        s, breaks = state.span, state.breaks
        ts = [s.t1] if run.saves is None else base.save_times(run, x, s)
        more = (len(breaks.times) + len(ts)) * (1 + len(run.kind.combinations))
        back = base.replace(run, method=self.alg or run.method, saves=None, tstops=(), progress=None, norm=None,
                            dt=None if run.controller.adaptive else run.dt, max_steps=run.max_steps + more,
                            capacity=run.capacity + more)
        tolerances = x._replace(rtol=x.rtol if self.rtol is None else self.rtol,
                                atol=x.atol if self.atol is None else self.atol)
        eq = Costate(back, tolerances, state, log, ct.u, ts, params and self.carries)
        end, costates, nfe = march(eq)
        z = eq.enter(costates, -s.t0, 0.0, end.u)
        lam, n = z[:eq.n], eq.n
        nvjp = (1 + run.kind.count) * eq.evaluations(end)
        theta: tuple[Array, ...] = ()
        if params and self.carries:
            theta = be.split(z[n:], x.theta)
        elif params:
            mu, nodes, more, status = self.integral(eq, costates, end.status)
            theta, nvjp, nfe = be.split(mu, x.theta), nvjp + nodes, nfe + more
            end = end._replace(status=status)
        t0_bar = t1_bar = 0.0
        ts_bar = None
        moved = base.times_wanted(wanted)
        if moved or (params and run.kind.moving):
            jumps = _jumps(eq, costates, breaks)
            nfe = nfe + 2 * jumps.shape[0]
            through = jumps @ breaks.rows
            if params and run.kind.moving:
                theta = be.add(theta, through_lags(run, x, through[2:]))
        if moved:
            t0_bar = be.scalar(through[0]) - be.dot(lam, state.first(be.time(s.t0), x.u0))
            speeds = be.scan(lambda _, i: (0, be.dot(i[1], state.at_output(log, i[0]))), 0, (ts, ct.u))[1]
            nfe = nfe + 1 + ct.u.shape[0]
            if run.saves is None:
                t1_bar = be.total(speeds)
            else:
                ts_bar = speeds
                t0_bar, t1_bar = base.fold_times(run, ts_bar, t0_bar, t1_bar)
        return base.Cotangents(lam, theta, t0_bar, t1_bar, ts_bar, nvjp, nfe, end.status)

    def tangent(self, run: Run, residuals: Any, d: base.Tangents) -> Array:
        raise base.unsupported(self.name, "forward mode of a delay equation", "ForwardSensitivity()")

    def integral(self, eq: Costate, costates: Any, status: Any) -> tuple[Array, Any, Any, Any]:
        """`int f_p^T lam dt` along dense costates, how many products it took, evaluations of `f`, and its status."""
        raise NotImplementedError


class InterpolatingAdjoint(_Adjoint, interpolating.InterpolatingAdjoint):
    """The parameters' integral is part of the equation."""


class GaussAdjoint(_Adjoint, gauss.GaussAdjoint):
    """The parameters' integral by Gauss-Legendre quadrature over the backward steps, see `gauss.py`."""

    carries: ClassVar[bool] = False

    def integral(self, eq: Costate, costates: Any, status: Any) -> tuple[Array, Any, Any, Any]:
        be = eq.run.be
        fold = gauss.subtracted(be, eq.share, eq.forward_size, gauss.nodes_for(eq.stepper.order))

        def over(state: tuple, record: Record, out: Any, last: Any) -> tuple:
            (mu, nodes), more = state
            mu, now = fold((mu, 0), record)
            return (mu, nodes + now), more + now * eq.state.known(eq.ahead(inside(record.t, record.h)))

        (mu, nodes), more = be.replay(over, ((eq.no_share(), 0), 0), costates)
        return mu, nodes, more, status


class QuadratureAdjoint(_Adjoint, quadrature.QuadratureAdjoint):
    """The parameters' integral by adaptive quadrature between the break points, see `quadrature.py`."""

    carries: ClassVar[bool] = False

    def integral(self, eq: Costate, costates: Any, status: Any) -> tuple[Array, Any, Any, Any]:
        be = eq.run.be
        rtol = least(be, eq.x.rtol) if self.quad_rtol is None else self.quad_rtol
        atol = least(be, eq.x.atol) if self.quad_atol is None else self.quad_atol
        done = be.choose(status == 0, 0.0, 1.0)

        def coarse(a: Scalar, b: Scalar) -> Any:
            steps = be.locate(costates, b) - be.locate(costates, a)
            ahead = be.locate(eq.forward, -a) - be.locate(eq.forward, -b)
            return (steps > quadrature.STEPS) | (ahead > quadrature.STEPS)

        def between(state: tuple, item: tuple) -> tuple[tuple, int]:
            a, mu, nodes, more, worst = state
            b = item[0]
            step = inside(a, b - a)

            def rate(t: Scalar) -> Array:
                record = be.record(costates, be.locate(costates, be.least(be.greatest(t, step.low), step.high)))
                return -eq.share(record, t)

            mu, now, complete = quadrature.integral(be, rate, a, b, mu, rtol, atol, coarse, done)
            more = more + now * eq.state.known(eq.ahead(step))
            return (b, mu, nodes + now, more, be.greatest(worst, be.choose(complete, 0, int(RetCode.MaxSteps)))), 0

        (_, mu, nodes, more, worst), _ = be.scan(between, (eq.span.t0, eq.no_share(), 0, 0, status),
                                                 (eq.breaks.times,))
        return mu, nodes, more, worst


class Costate(Equation):
    """The equation of `(lam, mu)` in the time `-t`."""

    def __init__(self, run: Run, x: Inputs, state: State, forward: Any, ct: Array, ts: Any, params: bool) -> None:
        s = state.span
        super().__init__(run, x, state.tau, Span(-s.t1, -s.t0, 1.0), _backward_breaks(state, ts))
        be, xp = run.be, run.be.xp
        self.state, self.forward, self.ct, self.params, self.n = state, forward, ct, params, x.u0.shape[0]
        n = self.n
        self.ts = be.time_vector(ts, x.u0)
        size = n + (sum(base.size_of(v) for v in x.theta) if params else 0)
        self.u0 = be.padded(0.0 * x.u0, size)
        self.norm = (lambda e: be.greatest(be.rms(e[:n]), be.rms(e[n:]))) if size > n else be.rms
        if getattr(x.atol, "ndim", 0):
            self.atol = xp.concat([x.atol, xp.max(x.atol) + 0.0 * self.u0[n:]])
        self.first_step = be.last_size(forward)
        self.stages = run.kind.products(run, x)[0]

    def enter(self, log: Any, t: Scalar, h: Scalar, u: Array) -> Array:
        """The jump of the costate at outputs."""
        be, xp = self.run.be, self.run.be.xp
        now = xp.astype(xp.abs(self.ts + t) <= self.breaks.near, self.ct.dtype)
        return u + be.padded(now @ self.ct, u.shape[0])

    def jacobian(self, log: Any, step: Inside) -> None:
        return None

    def beside(self, t: Scalar, h: Scalar, evaluations: Any) -> Any:
        return evaluations * self.state.known(inside(-t - h, h)) if self.params else 0

    def derivative(self, log: Any, step: Inside) -> Any:
        be, xp, n = self.run.be, self.run.be.xp, self.n
        ahead = self.ahead(step)

        def at(back: Any, z: Array) -> Array:
            now = be.scalar(back)
            z_bar, theta_bar = self._pull(-now, ahead, z[:n], self.params)
            out = z_bar[:n]
            for i in range(self.count):
                lag = self.tau[i]
                found = look(be, self.values, None, log, now, step, lag, self.span.t0, z)
                # Beyond t1 the costate is zero; the product is made all the same, at a place that exists.
                shift = be.choose(found.old, 0.0 * lag, lag)
                later, _ = self._pull(shift - now, ahead.shifted(shift), found.value[:n], False)
                out = out + later[n * (i + 1):n * (i + 2)]
            return xp.concat([out, *(xp.astype(xp.reshape(v, (-1,)), z.dtype) for v in theta_bar)])

        return at

    def ahead(self, step: Inside) -> Inside:
        """A backward step in the forward time."""
        return Inside(-step.high, -step.low)

    def share(self, record: Record, t: Scalar) -> Array:
        """`-f_p^T lam`, flat, at a time of a backward step."""
        lam = self.stepper.interpolate(record, [t])[0, :self.n]
        theta_bar = self._pull(-t, self.ahead(inside(record.t, record.h)), lam, True)[1]
        return -self.run.be.xp.concat([self.run.be.xp.astype(self.run.be.xp.reshape(v, (-1,)), lam.dtype)
                                       for v in theta_bar])

    def no_share(self) -> Array:
        return self.run.be.padded(0.0 * self.x.u0[:0], sum(base.size_of(v) for v in self.x.theta))

    def forward_size(self, t: Scalar) -> Scalar:
        """The size of the forward step at a backward time."""
        be = self.run.be
        return be.record(self.forward, be.locate(self.forward, -t)).h

    def _pull(self, t: Scalar, step: Inside, lam: Array, params: bool) -> tuple[Array, tuple[Array, ...]]:
        """`lam` times the derivatives of `f` at a time of the forward solution."""
        be = self.run.be
        u, past = self.state.past_at(self.forward, t, step, params)
        inputs = stage_inputs(be, self.x, u, past)
        pull = self.run.vjp.pullback(self.stages, inputs, params=params)
        z_bar, theta_bar, _ = pull(be.time(t), inputs.u0, be.padded(lam, inputs.u0.shape[0]))
        return z_bar, theta_bar


def _backward_breaks(state: State, ts: Any) -> Breaks:
    """Outputs and break points of the state, less all sums of lags, in the time `-t`."""
    run, s, tau = state.run, state.span, state.tau
    be, xp = run.be, run.be.xp
    own = be.asarray(state.breaks.times, dtype=be.time_dtype(state.x.u0.dtype), device=be.device(state.x.u0))
    starts = -xp.concat([own, be.asarray(be.time_vector(ts, state.x.u0), dtype=own.dtype)])
    combos = be.asarray([(0.0,) * run.kind.count, *(tuple(map(float, c)) for c in run.kind.combinations)],
                        dtype=own.dtype, device=be.device(state.x.u0))
    lags = be.asarray(tau, dtype=own.dtype, device=be.device(state.x.u0))
    times = xp.reshape(starts[:, None] + (combos @ lags)[None, :], (-1,))
    near = state.breaks.near
    end = be.asarray([-s.t0], dtype=own.dtype, device=be.device(state.x.u0))
    times = xp.where(times < -s.t0 - near, times, end)
    return Breaks(be.scalars(xp.sort(xp.concat([times, end]))), own, near)


def _jumps(eq: Costate, costates: Any, breaks: Breaks) -> Array:
    """`J` at each break point: zero at t0, at t1, and where one is listed twice."""
    be, state, n = eq.run.be, eq.state, eq.n
    s, times = state.span, breaks.times

    def at(last: Scalar, t: Scalar) -> tuple[Scalar, Scalar]:
        t = t[0]
        within = (t - last > breaks.near) & (t < s.t1 - breaks.near)
        here = be.choose(within, t, 0.5 * (s.t0 + s.t1))
        record = be.record(costates, be.locate(costates, -here))
        lam = eq.stepper.interpolate(record, [-here])[0, :n]
        now, size = be.time(here), 1e-3 * state.shortest
        before, after = inside(here - size, size), inside(here, size)
        u = state.past_at(eq.forward, here, before, False)[0]
        left, right = (state.derivative(eq.forward, side)(now, u) for side in (before, after))
        return t, be.choose(within, be.dot(lam, left - right), 0.0 * here)

    _, out = be.scan(at, s.t0, (times,))
    return be.vector(be.scalars(out), breaks.rows)
