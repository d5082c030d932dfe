"""Forward sensitivities of delay equations: the state and its derivatives as one delay equation.

    S' = f_u S + sum_i f_{v_i} [S(t - tau_i) - u'(t - tau_i) dtau_i/dp] + f_p,   S(t0) = du0/dp - f(t0+) dt0/dp,
    S(s) = phi_p(s) and u'(s) = phi_t(s) for s < t0, else u'(s) = f(s, u(s), ...),
    S(xi+) = S(xi-) + [f(xi-) - f(xi+)] dxi/dp   at the break points xi = t0 + sum_i n_i tau_i.

`u'` in the past is taken from `f`, not from the dense output, which would lose an order. The jumps of S are zero but
for the first break points of a solution that starts with a jump; the formula is applied at all of them.

References: Hairer, Norsett, Wanner I, I.14 and II.17; Baker and Rihan 1999 for sensitivities of delay equations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..backend import Array, Scalar
from ..delay import stage_inputs
from ..delaysolve import Breaks, Equation, Inside, State, inside, march, past_of, solve_forward
from ..integrate import Run, Span
from ..system import Inputs
from . import base, forward
from .delay import refuse_ambiguous
from .delaytangent import moves


@dataclass(frozen=True)
class ForwardSensitivity(forward.ForwardSensitivity):
    """Continuous forward sensitivities of a delay equation; see the module."""

    events: ClassVar[bool] = False

    def plain(self, run: Run, x: Inputs) -> tuple[base.Outputs, base.Aux]:
        out, aux, _ = solve_forward(run, x)
        return out, aux

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, forward.Columns]:
        refuse_ambiguous(run, x, wanted)
        return super().forward(run, x, wanted)

    def along(self, run: Run, x: Inputs, d: base.Tangents,
              wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Array]:
        refuse_ambiguous(run, x, wanted)
        return super().along(run, x, d, wanted)

    def _solve(self, run: Run, x: Inputs, d: base.Tangents,
               moving: bool) -> tuple[base.Outputs, base.Aux, base.Outputs, Array | None, Any]:
        be, xp = run.be, run.be.xp
        eq = Augmented.of(run, x, d, self.errors)
        end, log, more = march(eq)
        ts = [eq.span.t1] if run.saves is None else base.save_times(run, x, eq.span)
        rows = end.u[None, :]
        if run.saves is not None:
            rows = be.reached(be.sample(eq.stepper.interpolate, log, ts, eq.u0, 1.0), ts, end.t, 1.0)
        u, S = rows[:, :eq.n], xp.reshape(rows[:, eq.n:], (-1, eq.m, eq.n))
        speed = None
        nfe = eq.evaluations(end) + more + (d.t0 is not None)
        if moving:
            _, slopes = be.scan(lambda _, i: (0, eq.state.at_output(log, i[0])), 0, (ts,))
            speed, nfe = be.gathered(slopes), nfe + u.shape[0]
        aux = base.Aux([end.t] if run.saves is None else ts, end.t, end.accepted, end.rejected, nfe, end.status,
                       end.ratio, end.h, None, None, eq.algebra(end))
        moved = base.Outputs(xp.permute_dims(S, (1, 0, 2)))
        return base.Outputs(u), aux, moved, speed, end.status


class Augmented(Equation):
    """The equation of state and sensitivities, `z = (u, S)` with one row of S per column of the derivative."""

    def __init__(self, run: Run, x: Inputs, tau: Any, s: Span, breaks: Breaks, d: base.Tangents,
                 errors: str) -> None:
        super().__init__(run, x, tau, s, breaks)
        be, xp = run.be, run.be.xp
        self.n, self.m, self.d = x.u0.shape[0], d.u0.shape[0], d
        n, m = self.n, self.m
        self.state = State(run, x, tau, s, breaks)
        S0 = d.u0
        if d.t0 is not None:
            S0 = S0 - d.t0[:, None] * self.state.first(be.time(s.t0), x.u0)[None, :]
        self.u0 = xp.concat([x.u0, xp.reshape(S0, (m * n,))])
        self.atol = forward._wide(be, x.atol, m)
        own, covered = run.norm or be.rms, errors == "all" and m > 0
        self.norm = (lambda e: be.greatest(own(e[:n]), be.rms(e[n:]))) if covered else (lambda e: own(e[:n]))
        self.stages = run.kind.products(run, x)[0]
        self.moves = moves(run, x, d)
        self.rhs = self._rhs

    def _rhs(self, t: Any, z: Array, past: Any) -> Array:
        """Derivative of `z`; the past's values are states and sensitivities."""
        be, xp, n, m = self.run.be, self.run.be.xp, self.n, self.m
        values = [v[:n] for v in past.values]
        slopes = [v[:n] for v in past.slopes]
        inputs = stage_inputs(be, self.x, z[:n], past._replace(values=values, slopes=slopes))
        dz = xp.concat([xp.reshape(v[n:], (m, n)) for v in (z, *past.values)], axis=1)
        push = self.run.vjp.pushforward(self.stages, inputs, self.d.theta)
        f, df = push(t, inputs.u0, dz, None)
        return xp.concat([f[:n], xp.reshape(df[:, :n], (m * n,))])

    def jacobian(self, log: Any, step: Inside) -> None:
        return None

    def beside(self, t: Scalar, h: Scalar, evaluations: Any) -> Any:
        jumped = self.run.be.choose(self.jumps(t), 2, 0)
        return evaluations * self.state.known(inside(t, h)) + jumped

    def derivative(self, log: Any, step: Inside) -> Any:
        be = self.run.be

        def at(t: Any, z: Array) -> Array:
            looked = [seen._replace(slope=self.state.slope(log, seen)) for seen in self.looked(log, step, t, z)]
            return self.rhs(t, z, past_of(looked, self.far, be.scalar(math.inf)))

        return at

    def jumps(self, t: Scalar) -> Any:
        """Whether S may jump at the start of a step."""
        breaks, be = self.breaks, self.run.be
        b = be.following(breaks.times, t - breaks.near)
        return (abs(breaks.times[b] - t) <= breaks.near) & (t > self.span.t0 + breaks.near)

    def enter(self, log: Any, t: Scalar, h: Scalar, u: Array) -> Array:
        """The jump of S at a break point."""
        be, xp, n, m = self.run.be, self.run.be.xp, self.n, self.m
        b = be.following(self.breaks.times, t - self.breaks.near)
        before, after = inside(t - self.shortest, self.shortest), inside(t, h)

        def jumped() -> Array:
            now = be.time(t)
            left, right = (self.state.derivative(log, side)(now, u[:n]) for side in (before, after))
            row = self.moves @ xp.astype(self.breaks.rows[b, :], u.dtype)
            jump = row[:, None] * (left - right)[None, :]
            return u + xp.concat([0.0 * u[:n], xp.reshape(jump, (m * n,))])

        return be.either(self.jumps(t), jumped, lambda: u)
