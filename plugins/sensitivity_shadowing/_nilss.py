"""Non-intrusive least squares shadowing: a shadow from the unstable tangents alone.

The span is cut into K segments. On each, tangents are pushed through the accepted steps: `M` homogeneous ones W and an
inhomogeneous one v* for every parameter (Ni, Wang 2017, J. Comput. Phys. 347, section 3). With the projection
`P v = v - f (f.v) / (f.f)` to what is not along the solution,

    at the end of a segment   P W = Q R,  b = Q^T P v*,   next W = Q,  next v* = P v* - Q b,
    min sum_k a_k^T C_k a_k / 2 + d_k^T a_k  subject to  a_{k+1} = R_k a_k + b_k,
    C_k = int (P W)^T P W dt,   d_k = int (P W)^T P v* dt,

and with v = v* + W a, whose part along f at the end of a segment is xi_k = v.f / (f.f),

    dG/dp = sum_k [ int g_u v + g_p dt + xi_k (<g> - g(t_k)) ].

`int g_u v + g_p` is the tangent of the running cost, the last entry of the state. C and d only say which shadow is the
smallest: they are made by the trapezoidal rule. A segment ends at the first node beyond its share of the span.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from sensitivity.algorithms import base
from sensitivity.backend import Array, Record
from sensitivity.integrate import Run, span
from sensitivity.stepper import Stepper, Tangent
from sensitivity.system import Inputs

from ._averages import concluded, timeless
from ._chain import shortest
from ._segments import GROWN, Segmented, orthonormal, present, repeated, start_rows


class Segments(NamedTuple):
    """What is known of the segments behind, each with K entries: `C`, `R` `(M, M)`, `d`, `b` `(P, M)`, `gain` and
    `along`, the integral and xi of each tangent `(m,)`, `g` at the end, and the size of v* before and behind it."""

    C: Array
    R: Array
    d: Array
    b: Array
    gain: Array
    along: Array
    g: Array
    before: Array
    size: Array


class Ahead(NamedTuple):
    """Tangents of the node, half the step before it, how many segments are behind, and the integrals of this one."""

    node: Tangent
    half: Any
    behind: Any
    C: Array
    d: Array
    segments: Segments


@dataclass(frozen=True)
class NILSS(Segmented):
    """Non-intrusive least squares shadowing, tangent form, for few unstable directions and few parameters.

    For `gradient` with a `ContinuousCost`; the gradient is the span times that of the average. Experimental.

    Parameters
    ----------
    segments : int
        Into how many the span is cut; a tangent may grow much within one, and not beyond what the format holds.
    unstable : int, optional
        How many homogeneous tangents there are: no fewer than positive Lyapunov exponents. All but the one direction
        along the solution unless given.
    vjp : VJP, optional

    Raises
    ------
    InputError
        `segments` or `unstable` is no count, or `unstable` no smaller than the state.
    UnsupportedCombination
        The loss is no time integral; derivatives in anything but `p`; events, constraints, delays, noise.
    SolveError
        `f` or `g` depends on `t`; tangents still grow.

    Work: a tangent through every accepted step for each unstable direction and each parameter. All accepted steps are
    kept.

    References: Ni, Wang 2017, J. Comput. Phys. 347.
    """

    per_input: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("ni2017",)

    vjp: Any = field(default=None, kw_only=True)

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        del wanted
        be, x = run.be, residuals.x
        solved, stepper = base.opened(run, residuals)
        n, end = x.u0.shape[0] - 1, solved.end
        walk = _Walk(run, x, stepper, self.segments, self.growing(n))
        state, _ = be.follow(walk.ahead, walk.start(), solved.log)
        (_, _, behind, _, _, known), _ = walk.meet(state, end.t, end.u, True)
        tied = present(be, self.segments, behind - 1, x.u0)[:, None, None]
        a = shortest(be, known.C, known.d, known.R * tied, known.b * tied)
        mean = (end.u[n] - x.u0[n]) / be.vector([end.t - walk.t0], x.u0)[0]
        part, M = known.gain + known.along * (mean - known.g)[:, None], walk.M
        total = be.xp.sum(part[:, M:] + be.xp.sum(a * part[:, None, :M], axis=2), axis=0)
        # v* is rid of all that grows; if it does grow from segment to segment, there is more than W spans
        early = known.before * present(be, self.segments, (behind + 3) // 4, x.u0)
        bounded = be.scalar(be.xp.max(known.size)) <= GROWN * be.scalar(be.xp.max(early))
        status = concluded(run, end.status, timeless(run, x, end.u), bounded)
        theta = be.split(ct.u[-1, -1] * total, x.theta)
        return base.Cotangents(0.0 * x.u0, theta, 0.0, 0.0, None, 0, end.accepted + 5, status)


class _Walk:
    """The way through the accepted steps, `M` homogeneous tangents and one per parameter at once."""

    def __init__(self, run: Run, x: Inputs, stepper: Stepper, K: int, M: int) -> None:
        be = run.be
        parts, s = base.columns(x, ("theta",)), span(be, x.t0, x.t1)
        self.be, self.x, self.stepper, self.K, self.M, self.P = be, x, stepper, K, M, parts[0][1]
        self.n, self.t0, self.direction, self.length = x.u0.shape[0] - 1, s.t0, s.direction, abs(s.t1 - s.t0) / K
        self.rhs = run.field.bind(be, x.theta, x.constants)
        rows = be.xp.concat([be.unit_rows(M, self.P, M, x.u0), be.unit_rows(self.P, self.P, 0, x.u0)])
        self.push = run.vjp.pushforward(run, x, base.directions(be, x, parts, rows).theta)

    def start(self) -> Ahead:
        be, like, M, P = self.be, self.x.u0, self.M, self.P
        slope = self.rhs(be.time(self.t0), like)
        W, unit = start_rows(be, M, self.n, like), be.unit_rows(M, M, 0, like)
        W, _ = orthonormal(be, self.beside(slope, W)[0])
        data, every, one = be.unit_rows(P, M, P, like), be.padded(like[:0], M + P), be.padded(like[:0], self.K)
        C, R, d, b, gain, along = (repeated(be, row, self.K) for row in (unit, unit, data, data, every, every))
        segments = Segments(C + unit[None, :, :], R, d, b, gain, along, one, 1.0 * one, 1.0 * one)
        node = self.tangents(self.t0, like, W, be.unit_rows(P, self.n, P, like))
        return Ahead(node, 0.0, 0, 0.0 * unit, data, segments)

    def beside(self, slope: Array, rows: Array) -> tuple[Array, Array]:
        """The part of tangents that is not along `f`, and how much of `f` there is in them."""
        f = slope[:self.n]
        along = rows @ f / self.be.xp.sum(f * f)
        return rows - along[:, None] * f[None, :], along

    def products(self, rows: Array) -> tuple[Array, Array]:
        """Inner products of the homogeneous tangents with each other and with those of the parameters."""
        W = rows[:self.M, :]
        return W @ W.T, rows[self.M:, :] @ W.T

    def tangents(self, t: Any, u: Array, W: Array, v: Array) -> Tangent:
        """Tangents at the start of a segment, where the integral of the running cost starts anew."""
        rows = self.be.xp.concat([W, v])
        rows = self.be.xp.concat([rows, 0.0 * rows[:, :1]], axis=1)
        first = self.stepper.first_jvp(self.push, self.be.time(t), u, rows, None) if self.stepper.fsal else None
        return Tangent(rows, first)

    def ahead(self, state: Ahead, record: Record, last: Any) -> tuple[Ahead, Any]:
        """From a node to the next."""
        del last
        t, h = record.t, record.h
        ends = self.direction * (t - self.t0) >= (state.behind + 1) * self.length * (1.0 - 1e-12)
        state, here = self.meet(state, t, record.u, ends)
        half = 0.5 * abs(h)
        w = self.be.vector([half], self.x.u0)[0]
        node, _ = self.stepper.jvp(self.push, record, None, None, state.node)
        return state._replace(node=node, half=half, C=state.C + w * here[0], d=state.d + w * here[1]), h

    def meet(self, state: Ahead, t: Any, u: Array, ends: Any) -> tuple[Ahead, tuple[Array, Array]]:
        """At a node: what it adds to the integrals; where a segment `ends` the next is opened."""
        slope = self.rhs(self.be.time(t), u)
        rows, along = self.beside(slope, state.node.u[:, :self.n])
        here, w = self.products(rows), self.be.vector([state.half], self.x.u0)[0]
        state = state._replace(C=state.C + w * here[0], d=state.d + w * here[1])
        return self.be.when(ends, lambda: self.turn(state, t, u, slope[self.n], rows, along), (state, here))

    def turn(self, state: Ahead, t: Any, u: Array, g: Array, rows: Array,
             along: Array) -> tuple[Ahead, tuple[Array, Array]]:
        """Close a segment at the node, and open the next."""
        be, xp, M = self.be, self.be.xp, self.M
        Q, R = orthonormal(be, rows[:M, :])
        b = rows[M:, :] @ Q.T
        v = rows[M:, :] - b @ Q
        sizes = (xp.sqrt(xp.max(xp.sum(rows * rows, axis=1))) for rows in (rows[M:, :], v))
        closed = (state.C, R, state.d, b, state.node.u[:, self.n], along, g, *sizes)
        segments = Segments(*(be.put(old, state.behind, new) for old, new in zip(state.segments, closed, strict=True)))
        state = Ahead(self.tangents(t, u, Q, v), state.half, state.behind + 1, 0.0 * state.C, 0.0 * state.d, segments)
        return state, self.products(xp.concat([Q, v]))
