"""Non-intrusive least squares adjoint shadowing: the costate that stays bounded, for any number of parameters.

The span is cut into K segments, k = 0 the last one. Backwards over each of them go `M` homogeneous costates W and the
inhomogeneous v* of the running cost (Ni, Talnikar 2019, J. Comput. Phys. 395, section 3),

    W' = -f_u^T W,   v*' = -f_u^T v* - g_u,

and where a segment starts they are made orthonormal again, to go on from there:

    W = Q R,  b = Q^T v*,   next W = Q,  next v* = v* - Q b.

The costate v = v* + W a is continuous, small, and leaves no part of the average to the direction along the solution:

    min sum_k a_k^T C_k a_k / 2 + d_k^T a_k,   C_k = int W^T W dt,   d_k = int W^T v* dt,
    subject to   a_{k+1} = R_k a_k + b_k,   sum_k int f.(v* + W a_k) dt = 0,

and then dG/dp = int f_p^T v + g_p dt, by a second sweep that starts every segment from v. Costates are pulled through
the accepted steps (`Stepper.vjp`); with a 1 for the running cost, the last entry, they are inhomogeneous. There have to
be more of them than unstable directions, `M = unstable + 1`, since the neutral one is needed too. C, d and the last
condition are made by the trapezoidal rule. A segment starts at the first node beyond its share of the span.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from sensitivity.algorithms import base
from sensitivity.backend import Array, Record
from sensitivity.integrate import Run, span
from sensitivity.stepper import Adjoint, Stepper
from sensitivity.system import Inputs

from ._averages import concluded, timeless
from ._chain import shortest
from ._segments import GROWN, Segmented, orthonormal, present, repeated, start_rows


class Segments(NamedTuple):
    """What is known of the segments behind, each with K entries: `C`, `R` `(M, M)`, `d`, `b` `(M,)`, the integral of
    `f.W` and `f.v*` as one row `(M + 1,)`, and the costates `(M + 1, n)` that each started from."""

    C: Array
    R: Array
    d: Array
    b: Array
    along: Array
    first: Array


class Back(NamedTuple):
    """Costates of the node `(M + 1, n)`, v* the last, `[f, g]` there, those the segment started from, how many segments
    are behind, and the integrals of this one: of all inner products, and of those with f."""

    rows: Array
    slope: Array
    first: Array
    behind: Any
    gram: Array
    along: Array
    segments: Segments


@dataclass(frozen=True)
class NILSAS(Segmented):
    """Non-intrusive least squares shadowing, adjoint form, for few unstable directions and many parameters.

    For `gradient` with a `ContinuousCost`; the gradient is the span times that of the average. Experimental.

    Parameters
    ----------
    segments : int
        Into how many the span is cut; a costate may grow much within one, and not beyond what the format holds.
    unstable : int, optional
        No fewer than positive Lyapunov exponents; there is one homogeneous costate more. All but the one direction
        along the solution unless given.
    vjp : VJP, optional

    Raises
    ------
    InputError
        `segments` or `unstable` is no count, or `unstable` no smaller than the state.
    UnsupportedCombination
        The loss is no time integral; derivatives in anything but `p`; events, constraints, delays, noise.
    SolveError
        `f` or `g` depends on `t`; costates still grow.

    Work: `unstable + 3` reverse sweeps through the accepted steps, one of them for the parameters. All accepted steps
    are kept.

    References: Ni, Talnikar 2019, J. Comput. Phys. 395.
    """

    references: ClassVar[tuple[str, ...]] = ("ni2019",)

    vjp: Any = field(default=None, kw_only=True)

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        del wanted
        be, xp, x = run.be, run.be.xp, residuals.x
        solved, stepper = base.opened(run, residuals)
        n, end, K = x.u0.shape[0] - 1, solved.end, self.segments
        sweep = _Sweep(run, x, stepper, K, self.growing(n) + 1)
        state = be.replay(sweep.back, sweep.start(end.t, end.u), solved.log)
        known, M = state.segments, sweep.M
        tied = present(be, K, state.behind - 1, x.u0)[:, None, None]
        # the shadow without the condition on f, and what one unit of its multiplier adds
        force, jump = (xp.stack([v, e], axis=1) for v, e in (
            (known.d, known.along[:, :M]), (known.b, 0.0 * known.b)))
        a = shortest(be, known.C, force, known.R * tied, jump * tied)
        left = xp.sum(known.along[:, M]) + xp.sum(known.along[:, :M] * a[:, 0, :])
        a = a[:, 0, :] - a[:, 1, :] * (left / xp.sum(known.along[:, :M] * a[:, 1, :]))
        shadow = known.first[:, M, :] + xp.sum(a[:, :, None] * known.first[:, :M, :], axis=1)
        theta = sweep.parameters(solved.log, shadow)
        theta = tuple(ct.u[-1, -1] * v for v in theta)
        products = (M + 2) * end.accepted * stepper.products(1, 1, n)
        # the least of the homogeneous costates is the neutral one, or one that decays
        there = present(be, K, state.behind, x.u0)
        growth = xp.sum(xp.log(xp.abs(known.R[:, M - 1, M - 1]) * there + (1.0 - there)))
        status = concluded(run, end.status, timeless(run, x, end.u), be.scalar(growth) <= math.log(GROWN))
        return base.Cotangents(0.0 * x.u0, theta, 0.0, 0.0, None, products, end.accepted + 4, status)


class _Sweep:
    """The way back through the accepted steps, with `M` homogeneous costates and v*."""

    def __init__(self, run: Run, x: Inputs, stepper: Stepper, K: int, M: int) -> None:
        be, s = run.be, span(run.be, x.t0, x.t1)
        self.be, self.run, self.x, self.stepper, self.K, self.M, self.n = be, run, x, stepper, K, M, x.u0.shape[0] - 1
        self.t0, self.direction, self.span, self.length = s.t0, s.direction, abs(s.t1 - s.t0), abs(s.t1 - s.t0) / K
        self.rhs = run.field.bind(be, x.theta, x.constants)
        self.pull = run.vjp.pullback(run, x, params=False)
        self.cost = be.unit_rows(M + 1, 1, M, x.u0)  # 1 where a costate belongs to the running cost

    def start(self, t: Any, end: Array) -> Back:
        be, like, M = self.be, self.x.u0, self.M
        W, _ = orthonormal(be, start_rows(be, M, self.n, like))
        rows, unit = be.xp.concat([W, 0.0 * W[:1, :]]), be.unit_rows(M, M, 0, like)
        shapes = (unit, unit, unit[0, :], unit[0, :], self.cost[:, 0], rows)
        segments = Segments(*(repeated(be, row, self.K) for row in shapes))
        segments = segments._replace(C=segments.C + unit[None, :, :])
        gram = be.unit_rows(M + 1, M + 1, M + 1, like)
        return Back(rows, self.rhs(be.time(t), end), rows, 0, gram, gram[0, :], segments)

    def back(self, state: Back, record: Record, out: Any, last: Any) -> Back:
        """From a node to the one before; where a segment starts, the next is opened."""
        del out, last
        be, xp, n = self.be, self.be.xp, self.n
        gram, along, w = state.gram, state.along, be.vector([0.5 * abs(record.h)], self.x.u0)[0]
        before = xp.concat([state.rows, self.cost], axis=1)
        _, rows = be.scan(lambda _, x: (0, self.over(self.pull, record, x[0], ())[0]), 0, (before,))
        rows, slope = be.gathered(rows)[:, :n], self.rhs(be.time(record.t), record.u)
        for costates, f in ((state.rows, state.slope[:n]), (rows, slope[:n])):
            gram, along = gram + w * (costates @ costates.T), along + w * (costates @ f)
        state = Back(rows, slope, state.first, state.behind, gram, along, state.segments)
        return be.when(self.starts(record, state.behind), lambda: self.turn(state), state)

    def starts(self, record: Record, behind: Any) -> Any:
        """Whether a segment starts with this step."""
        covered = self.direction * (record.t - self.t0)
        return covered <= self.span * (1.0 + 1e-12) - (behind + 1) * self.length

    def over(self, pull: Any, record: Record, lam: Array, theta: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        """A costate pulled over one step, and what the parameters get."""
        be, stepper = self.be, self.stepper
        lam, kappa, theta, _, _ = stepper.vjp(pull, record, None, False, False, Adjoint(lam, None, theta, 0.0, 0.0))
        if kappa is None:
            return lam, theta
        u_bar, theta_bar, _ = stepper.first_vjp(pull, be.time(record.t), record.u, kappa)
        return lam + u_bar, be.add(theta, theta_bar)

    def turn(self, state: Back) -> Back:
        """Close a segment at the node, and open the next."""
        be, M = self.be, self.M
        Q, R = orthonormal(be, state.rows[:M, :])
        b = Q @ state.rows[M, :]
        closed = (state.gram[:M, :M], R, state.gram[M, :M], b, state.along, state.first)
        segments = Segments(*(be.put(old, state.behind, new) for old, new in zip(state.segments, closed, strict=True)))
        rows = be.xp.concat([Q, (state.rows[M, :] - b @ Q)[None, :]])
        return Back(rows, state.slope, rows, state.behind + 1, 0.0 * state.gram, 0.0 * state.along, segments)

    def parameters(self, log: Any, shadow: Array) -> tuple[Array, ...]:
        """The integral of `f_p^T v + g_p` for the costate v that is known where each segment ends, `(K, n)`."""
        be, xp = self.be, self.be.xp
        pull = self.run.vjp.pullback(self.run, self.x)
        one = 1.0 + 0.0 * shadow[:, :1]
        shadow = xp.concat([shadow, one], axis=1)

        def back(state: tuple, record: Record, out: Any, last: Any) -> tuple:
            lam, theta, behind = state
            lam, theta = self.over(pull, record, lam, theta)
            starts = self.starts(record, behind)
            fresh = be.pick(shadow, be.least(behind + 1, self.K - 1))
            return be.choose(starts, fresh, lam), theta, behind + be.choose(starts, 1, 0)

        return be.replay(back, (shadow[0, :], be.zeros(self.x.theta), 0), log)[1]
