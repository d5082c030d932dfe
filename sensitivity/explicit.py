"""Explicit Runge-Kutta steps, their transposes and their tangents.

For stages i = 1..s (Hairer, Norsett, Wanner I, II.1):

    U_i = u + h sum_{j<i} a_ij k_j,   k_i = f(t + c_i h, U_i),   u1 = u + h sum_i b_i k_i

Reverse, with `lam` the cotangent of `u1` and `kbar_i` what outputs inside the step add to stage i
(the transposed recursion; Sanz-Serna 2016, section 3):

    Y_i = f_u(U_i)^T w_i,   w_i = h (b_i lam + sum_{j>i} a_ji Y_j) + kbar_i,   lam <- lam + sum_i Y_i,
    pbar += f_p^T w_i

A first-same-as-last method evaluates its last stage at `(t1, u1)` and reuses it as the next first stage, so the
cotangent of the first stage is carried (`kappa`) to the step before, where the two uses meet in one product.

Implicit stages (`a_ii != 0`) have the same transpose, but for one linear equation each, which `solver` provides:
`w_i` is replaced by the solution `x_i` of the equation in `implicit.py`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .backend import Array, Contribution, Record, Scalar
from .interpolate import interpolant, slope, transpose
from .stepper import Adjoint, Stepper, Tangent
from .tableaus import Tableau


class Explicit(Stepper):
    """An explicit Runge-Kutta method bound to a vector field."""

    def __init__(self, be: Any, tab: Tableau, rhs: Any) -> None:
        self.be, self.tab, self.rhs = be, tab, rhs
        self.order, self.stages, self.fsal = tab.order, tab.stages, tab.fsal
        if tab.dense is not None:
            self._value, self._slope = interpolant(be, tab), slope(be, tab)

    def step(self, t: Scalar, h: Scalar, u: Array, k: Array | None) -> tuple[Array, Array]:
        return step(self.be, self.tab, self.rhs, t, h, u, k)

    def restage(self, record: Record) -> Array:
        t, h, u, _ = record
        return self.step(t, h, u, None)[1]  # the first stage among the others: one place less that holds `f`

    def error(self, t: Scalar, h: Scalar, u: Array, K: Array) -> Array:
        return self.be.combine(None, h, self.tab.error, K)

    def interpolate(self, record: Record, ts: Any) -> Array:
        return self._value(record, ts)

    def slope(self, record: Record, ts: Any) -> Array:
        return self._slope(record, ts)

    def interpolate_vjp(self, time: bool) -> Any:
        return transpose(self.be, self.tab, time)

    def vjp(self, pull: Any, record: Record, out: Contribution | None, last: Any, time: bool,
            state: Adjoint, add: Any = None) -> Adjoint:
        return step_vjp(self.be, self.tab, pull, record, out, last, time, state, add=add)

    def jvp(self, push: Any, record: Record, dt: Array | None, dh: Array | None,
            state: Tangent) -> tuple[Tangent, Array]:
        return step_jvp(self.be, self.tab, push, record, dt, dh, state)

    def evaluations(self, attempts: Any, known: bool) -> Any:
        start = 0 if known else 1 if self.fsal else 2
        return (1 + (self.stages - 1) * attempts if self.fsal else self.stages * attempts) + start


@cache
def transposed(tab: Tableau, order: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    """Rows of `a^T` for stages in descending `order`, so that the reverse recursion is lower triangular too."""
    return tuple(tuple(tab.a[j][i] for j in order[:r]) for r, i in enumerate(order))


@cache
def _column(tab: Tableau, j: int, order: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(tab.a[i][j] if j < len(tab.a[i]) else 0.0 for i in order)


def adding(be: Any) -> Any:
    """`add` of `Stepper.vjp` for plain parameters."""
    return lambda total, theta_bar, t, u: be.add(total, theta_bar)


@cache
def ones(count: int) -> tuple[float, ...]:
    # Backends may remember a matrix for each tuple of weights, so one tuple serves all steps.
    return (1.0,) * count


def step(be: Any, tab: Tableau, rhs: Any, t: Scalar, h: Scalar, u: Array, k: Array | None,
         times: Any = None) -> tuple[Array, Array]:
    """One step: `(u1, K)` with `K` of shape `(s, n)`; `k` is the first stage of a first-same-as-last method.

    `times` are the first arguments of `rhs`, one per stage, where they are others than the times of the stages.
    """
    times = be.times(t, h, tab.c) if times is None else times
    u1, K = be.recursion(tab.a, u, h, (times,), lambda _, x, v: (v, rhs(x[0], v)), u, k)
    return (u1 if tab.fsal else be.combine(u, h, tab.b, K)), K


def step_vjp(be: Any, tab: Tableau, pull: Any, record: Record, out: Contribution | None, last: Any, time: bool,
             state: Adjoint, solver: Any = None, times: Any = None, add: Any = None) -> Adjoint:
    """Pull cotangents across one step; `pull(t, u, ct) -> (ct_u, ct_theta, ct_t)`, `times` as in `step`.

    With `time`, also the cotangents of `t0` (every node moves with it) and of the last step's size.
    `solver(t, u, h)` solves the linear equation of one stage; `add` as in `Stepper.vjp`.
    """
    add = add or adding(be)
    t, h, u, K = record
    lam, stages_out = state.lam, None if out is None else out.k
    inputs = be.inputs(tab.inner, u, h, K)
    times = be.times(t, h, tab.c) if times is None else times
    base = be.seeds(tab.b, h, lam, stages_out, state.kappa)
    silent_end = tab.fsal and tab.b[-1] == 0.0 and state.kappa is None and stages_out is None
    order = tuple(range(tab.stages - 1 - silent_end, -1 + tab.fsal, -1))

    def row(carry: tuple, x: tuple, v: Array) -> tuple[tuple, Array]:
        theta, moved, stretched = carry
        time_i, c_i, u_i = x
        if solver is not None:
            v = solver(time_i, u_i, h)(v, transposed=True)
        y, theta_bar, t_bar = pull(time_i, u_i, v)
        if time:
            moved, stretched = moved + t_bar, stretched + c_i * t_bar
        return (add(theta, theta_bar, time_i, u_i), moved, stretched), y

    xs = tuple(be.permuted(x, order) for x in (times, tab.c, inputs))
    (theta, moved, stretched), Y = be.recursion(
        transposed(tab, order), be.permuted_rows(base, order), h, xs, row, (state.theta, state.t0, 0.0))
    kappa = None
    if tab.fsal:
        kappa = be.combine(base[0, :], h, _column(tab, 0, order), Y)
    h_bar = state.h
    if time:
        slope = be.combine(None, 1.0, tab.b, K)
        change = be.dot(lam, slope) + stretched
        moves = be.inputs(tab.inner, 0.0 * u, 1.0, K)
        for position, i in enumerate(order):
            change = change + be.dot(Y[position, :], moves[i])
        if out is not None:
            change, moved = change + out.h, moved + out.t
        h_bar = be.choose(last, change, h_bar)
    lam = be.combine(lam, 1.0, ones(len(order)), Y)
    if out is not None and out.u is not None:
        lam = lam + out.u
    return Adjoint(lam, kappa, theta, moved, h_bar)


def step_jvp(be: Any, tab: Tableau, push: Any, record: Record, dt: Array | None, dh: Array | None,
             state: Tangent, solver: Any = None, times: Any = None) -> tuple[Tangent, Array]:
    """Push `m` tangents across one step; `push(t, u, du, dt) -> (f, df)`. Returns the new state and `dK` `(s, m, n)`.

    `dt` and `dh`, shape `(m,)`, move the start of the step and change its size; `solver` as in `step_vjp`.
    """
    t, h, u, K = record
    m, n = state.u.shape
    inputs = be.inputs(tab.inner, u, h, K)
    times = be.times(t, h, tab.c) if times is None else times
    moves = None if dh is None else be.inputs(tab.inner, 0.0 * u, 1.0, K)

    def row(carry: Any, x: tuple, v: Array) -> tuple[Any, Array]:
        time_i, c_i, u_i, move_i = x
        dv = be.xp.reshape(v, (m, n))
        dt_i = dt
        if dh is not None:
            dv = dv + dh[:, None] * move_i[None, :]
            dt_i = dt + c_i * dh
        _, dk = push(time_i, u_i, dv, dt_i)
        if solver is not None:
            dk = solver(time_i, u_i, h)(dk)
        return carry, be.xp.reshape(dk, (m * n,))

    xs = (times, tab.c, inputs, inputs if moves is None else moves)
    flat = be.xp.reshape(state.u, (m * n,))
    first = None if state.k is None else be.xp.reshape(state.k, (m * n,))
    _, dK = be.recursion(tab.a, flat, h, xs, row, (), first)
    du1 = be.xp.reshape(be.combine(flat, h, tab.b, dK), (m, n))
    if dh is not None:
        du1 = du1 + dh[:, None] * be.combine(None, 1.0, tab.b, K)[None, :]
    dK = be.xp.reshape(dK, (tab.stages, m, n))
    return Tangent(du1, dK[-1, :, :] if tab.fsal else None), dK
