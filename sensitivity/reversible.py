"""Any explicit Runge-Kutta method made algebraically reversible, with its inverse, its transpose and its tangent.

With `Psi_h(t, u)` the increment of one step of the base method and `l` the coupling, the state is a pair `(y, z)`:

    y1 = l y0 + (1 - l) z0 + Psi_h(t, z0),      z1 = z0 - Psi_{-h}(t + h, y1),
    z0 = z1 + Psi_{-h}(t + h, y1),              y0 = z0 + (y1 - z0 - Psi_h(t, z0)) / l

(McCallum, Foster 2024, arXiv 2410.11648, section 3). The solution is `y`, of the order of the base method. The inverse
evaluates `f` where the step did, so one evaluation with its product serves both the inverse and the transpose.

Inside a step the output is `l y0 + (1 - l) z0 + h sum_i b_i(x) k_i`, with the dense output of the base method and its
stages at `z0`; where that needs a slope at the end, it is `f(t + h, y1)`, the first stage of the second half.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

from .backend import Array, Contribution, Record, Scalar
from .explicit import ones, transposed
from .interpolate import interpolant, slope, weights_at
from .stepper import Stepper
from .tableaus import Tableau

STEEPNESS = 6.0


class Backward(NamedTuple):
    """State of a reverse sweep: the pair, its cotangents, those of the parameters, of `t0`, of the last step's size.

    `missed` adds up by how much undone states differed from stored ones.
    """

    w: Array
    lam: Array
    theta: tuple[Array, ...]
    t0: Scalar
    h: Scalar
    missed: Scalar


class Forward(NamedTuple):
    """The pair and its tangents, `m` rows."""

    w: Array
    dw: Array


class _Half(NamedTuple):
    """One evaluated increment, with the pullbacks of its stages."""

    t: Scalar
    h: Scalar
    u: Array
    k: Array
    pulls: tuple[Any, ...]
    psi: Array


class _Bar(NamedTuple):
    """What one increment hands back: cotangents of its state, of the parameters, of its start time, of its size."""

    u: Array
    theta: tuple[Array, ...]
    t: Scalar
    h: Scalar


@cache
def bare(tab: Tableau) -> Tableau:
    """The method without the slope at its end, which a reversible step cannot hand to the next one."""
    if not tab.fsal:
        return tab
    return Tableau(tab.a[:-1], tab.b[:-1], tab.c[:-1], tab.order)


class Pair(Stepper):
    """The reversible pair over an explicit Runge-Kutta method with dense output; its state is `(y, z)` in one vector.

    `coupling` is a number, or None for `exp(-6 h / length)`, so that the product over a solve is `exp(-6)` whatever
    the steps. `rhs` is that of one half, and so are errors, outputs and slopes.
    """

    def __init__(self, be: Any, form: Tableau, rhs: Any, coupling: float | None, length: Scalar) -> None:
        self.be, self.form, self.tab, self.rhs = be, form, bare(form), rhs
        self.constant, self.length = coupling, length
        self.order, self.stages = form.order, self.tab.stages
        self._value, self._slope = interpolant(be, form), slope(be, form)

    def coupling(self, h: Scalar) -> Scalar:
        """`l` of a step of size `h`."""
        return self.constant if self.constant is not None else math.e ** (-STEEPNESS * abs(h) / self.length)

    def halves(self, w: Array) -> tuple[Array, Array]:
        n = w.shape[-1] // 2
        return w[..., :n], w[..., n:]

    def _mixed(self, ell: Scalar, y: Array, z: Array) -> Array:
        """`l y + (1 - l) z`."""
        return self.be.combine(z, ell, (1.0,), (y - z)[None, :])

    # -- forward ------------------------------------------------------------------------------------------------------

    def _increment(self, t: Scalar, h: Scalar, u: Array) -> tuple[Array, Array]:
        be, tab = self.be, self.tab
        _, K = be.recursion(tab.a, u, h, (be.times(t, h, tab.c),), lambda c, x, v: (c, self.rhs(x[0], v)), ())
        return be.combine(None, h, tab.b, K), K

    def step(self, t: Scalar, h: Scalar, u: Array, k: Array | None) -> tuple[Array, Array]:
        be = self.be
        y, z = self.halves(u)
        psi, K = self._increment(t, h, z)
        y = self._mixed(self.coupling(h), y, z) + psi
        back, there = self._increment(t + h, -h, y)
        if self.form.fsal:
            K = be.xp.concat([K, there[:1, :]])
        return be.xp.concat([y, z - back]), K

    def error(self, t: Scalar, h: Scalar, u: Array, K: Array) -> Array:
        """The estimate of the base method for `y`, zeros for `z`."""
        return self.be.padded(self.be.combine(None, h, self.form.error, K), u.shape[0])

    def mixed_start(self, record: Record) -> Record:
        """The record of the base step that the output inside a step belongs to."""
        return record._replace(u=self._mixed(self.coupling(record.h), *self.halves(record.u)))

    def interpolate(self, record: Record, ts: Any) -> Array:
        return self._value(self.mixed_start(record), ts)

    def slope(self, record: Record, ts: Any) -> Array:
        return self._slope(self.mixed_start(record), ts)

    def base_output(self) -> tuple[Any, Any]:
        """`interpolate` and `slope` for records that hold the mixed start, with or without tangents."""
        return self._value, self._slope

    def interpolate_vjp(self, time: bool) -> Any:
        """As for any stepper, from the times alone: the cotangent of the step's size waits for the stages.

        The contribution is of the mixed start `l y0 + (1 - l) z0` and of the stages; in place of the cotangent of `h`
        is the matrix whose product with the stages it is.
        """
        be = self.be

        def pull(record: Any, ts: Any, ct: Array) -> tuple[Contribution, list[Scalar]]:
            x = [(s - record.t) / record.h for s in ts]
            w, d = weights_at(be, self.form, x, ct)
            h_bar = (w - be.vector(x, ct)[:, None] * d).T @ ct if time else 0.0
            return Contribution(be.xp.sum(ct, axis=0), be.vector([record.h], ct) * (w.T @ ct), h_bar), [0.0] * len(ts)

        return pull

    def evaluations(self, attempts: Any, known: bool) -> Any:
        return 2 * self.stages * attempts + (0 if known else 2)

    # -- reverse ------------------------------------------------------------------------------------------------------

    def _evaluated(self, at: Any, t: Scalar, h: Scalar, u: Array) -> _Half:
        be, tab = self.be, self.tab

        def row(pulls: tuple, x: tuple, v: Array) -> tuple[tuple, Array]:
            value, pull = at(x[0], v)
            return (*pulls, pull), value

        pulls, K = be.unrolled(tab.a, u, h, (be.times(t, h, tab.c),), row, ())
        return _Half(t, h, u, K, pulls, be.combine(None, h, tab.b, K))

    def _pulled(self, half: _Half, lam: Array, stages: Array | None, theta: tuple[Array, ...], time: bool) -> _Bar:
        """Pull the cotangent of an increment, and those of its stages, back; see `explicit` for the recursion."""
        be, tab = self.be, self.tab
        order = tuple(range(self.stages - 1, -1, -1))

        def row(carry: tuple, x: tuple, v: Array) -> tuple[tuple, Array]:
            theta, moved, stretched = carry
            pull, c_i = x
            y, theta_bar, t_bar = pull(v)
            if time:
                moved, stretched = moved + t_bar, stretched + c_i * t_bar
            return (be.add(theta, theta_bar), moved, stretched), y

        seeds = be.permuted_rows(be.seeds(tab.b, half.h, lam, stages, None), order)
        (theta, moved, change), Y = be.unrolled(
            transposed(tab, order), seeds, half.h, (half.pulls[::-1], tab.c[::-1]), row, (theta, 0.0, 0.0))
        if time:
            change = change + be.dot(lam, be.combine(None, 1.0, tab.b, half.k))
            moves = be.inputs(tab.a, 0.0 * half.u, 1.0, half.k)
            for position, i in enumerate(order):
                change = change + be.dot(Y[position, :], moves[i])
        return _Bar(be.combine(None, 1.0, ones(self.stages), Y), theta, moved, change)

    def unstep(self, at: Any, t: Scalar, h: Scalar, out: Contribution | None, last: Any, time: bool,
               state: Backward) -> Backward:
        """Undo one step and pull its cotangents back in one go; `at(t, u) -> (f, pull)`."""
        be, s = self.be, self.stages
        ell = self.coupling(h)
        (y, z), (y_bar, z_bar) = self.halves(state.w), self.halves(state.lam)
        inside = first = None
        if out is not None:
            assert out.k is not None
            inside = out.k[:s, :]
            if self.form.fsal:
                first = be.unit_rows(s, 1, 0, y) @ out.k[s:, :]
        there = self._evaluated(at, t + h, -h, y)
        z = z + there.psi
        bar = self._pulled(there, -z_bar, first, state.theta, time)
        y_bar = y_bar + bar.u
        here = self._evaluated(at, t, h, z)
        y = be.combine(z, 1.0 / ell, (1.0,), (y - z - here.psi)[None, :])
        bar2 = self._pulled(here, y_bar, inside, bar.theta, time)
        t0_bar, h_bar = state.t0, state.h
        if time:
            # The second half starts at t + h and has size -h.
            t0_bar = t0_bar + bar.t + bar2.t
            change = bar2.h - bar.h + bar.t
            if out is not None:
                K = be.xp.concat([here.k, there.k[:1, :]]) if self.form.fsal else here.k
                change = change + be.dot(be.xp.reshape(out.h, (-1,)), be.xp.reshape(K, (-1,)))
            h_bar = be.choose(last, change, h_bar)
        if out is not None:
            y_bar = y_bar + out.u
        own = be.combine(None, ell, (1.0,), y_bar[None, :])
        lam = be.xp.concat([own, z_bar + bar2.u + (y_bar - own)])
        return Backward(be.xp.concat([y, z]), lam, bar2.theta, t0_bar, h_bar, state.missed)

    # -- tangents -----------------------------------------------------------------------------------------------------

    def _pushed(self, push: Any, t: Scalar, h: Scalar, u: Array, du: Array, dt: Array | None,
                dh: Array | None) -> tuple[Array, Array, Array]:
        """An increment and its tangents: `(1 + m, n)`; and the stages with theirs, `(s, 1 + m, n)`, `dh` left out."""
        be, xp, tab = self.be, self.be.xp, self.tab
        m, n = du.shape
        flat = xp.reshape(xp.concat([u[None, :], du]), (-1,))

        def row(carry: Any, x: tuple, v: Array) -> tuple[Any, Array]:
            time_i, c_i = x
            v = xp.reshape(v, (m + 1, n))
            dv, dt_i = v[1:, :], dt
            if dh is not None:
                dv = dv + (dh / be.vector([h], dh))[:, None] * (v[0, :] - u)[None, :]
                dt_i = dt + c_i * dh
            f, df = push(time_i, v[0, :], dv, dt_i)
            return carry, xp.reshape(xp.concat([f[None, :], df]), (-1,))

        _, K = be.recursion(tab.a, flat, h, (be.times(t, h, tab.c), tab.c), row, ())
        psi = xp.reshape(be.combine(None, h, tab.b, K), (m + 1, n))
        K = xp.reshape(K, (self.stages, m + 1, n))
        dpsi = psi[1:, :]
        if dh is not None:
            dpsi = dpsi + (dh / be.vector([h], dh))[:, None] * psi[0, :][None, :]
        return psi[0, :], dpsi, K

    def jvp_pair(self, push: Any, t: Scalar, h: Scalar, dt: Array | None, dh: Array | None,
                 state: Forward) -> tuple[Forward, Array, Array]:
        """Push `m` tangents across one step; also start and stages of its output, `(1 + m, n)` and `(s, 1 + m, n)`."""
        be, xp = self.be, self.be.xp
        ell = be.vector([self.coupling(h)], state.w)
        (y, z), (dy, dz) = self.halves(state.w), self.halves(state.dw)
        start, dstart = z + ell * (y - z), dz + ell * (dy - dz)
        psi, dpsi, K = self._pushed(push, t, h, z, dz, dt, dh)
        y, dy = start + psi, dstart + dpsi
        back = None if dh is None else -dh
        there = None if dt is None or dh is None else dt + dh
        psi, dpsi, K2 = self._pushed(push, t + h, -h, y, dy, there, back)
        if self.form.fsal:
            K = xp.concat([K, K2[:1, :, :]])
        if dh is not None:
            K = xp.concat([K[:, :1, :], K[:, 1:, :] + (dh / be.vector([h], dh))[None, :, None] * K[:, :1, :]], axis=1)
        new = Forward(xp.concat([y, z - psi]), xp.concat([dy, dz - dpsi], axis=1))
        return new, xp.concat([start[None, :], dstart]), K
