"""Forward sensitivities: integrate the state and its derivatives together.

    M S' = f_u S + f_x,   S(t0) = du0/dx (and -u'(t0) for x = t0),

and at an event c(t, u, p) = 0 with u+ = R(t, u-, p) (Serban and Recuero 2019, J. Comput. Nonlinear Dynam. 14; Kong et
al. 2024, Proc. IEEE 112, eq. 8)

    dt* = -(c_u S- + c_x) / (c_t + c_u f-),   S+ = R_u (S- + f- dt*) + R_x + R_t dt* - f+ dt*,

one column of S per entry of the inputs asked for. Reverse mode is then `S^T ct`, forward mode `S d`; both cost one
solve with `m` extra right-hand sides, which pays for few parameters. Reference: Hairer, Norsett, Wanner I, I.14.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ..backend import Array
from ..errors import InputError
from ..estimates import Effort, Work
from ..implicit import relative
from ..integrate import Run, algebra, evaluations, integrate, span
from ..jacobian import Jacobian
from ..mass import Blocks
from ..matrices import dense
from ..system import Inputs
from ..watch import Watch
from . import base, consistent
from .blocks import first_columns, triangular
from .frozen import EventTangents, save_time_tangents
from .jumps import ambiguous


class Columns(NamedTuple):
    """Tangents of the outputs along each entry of the inputs asked for, and the slopes at the save times, `(k, n)`."""

    x: Inputs
    u0: base.Outputs | None
    theta: base.Outputs | None
    t0: base.Outputs | None
    speed: Array | None
    status: Any


@dataclass(frozen=True)
class ForwardSensitivity(base.SensitivityAlgorithm):
    """Continuous forward sensitivities; error control covers the state and its derivatives.

    Parameters
    ----------
    jvp : VJP, optional
        How products with derivatives of `f` are made.
    errors : "all" or "state"
        What the step sizes bound the errors of: the state and its derivatives, or the state alone, in which case the
        steps are those of a plain solve and the derivatives ride along.
    """

    vjp: Any = field(default=None, kw_only=True, repr=False)
    jvp: Any = None
    errors: str = "all"

    events: ClassVar[bool] = True
    algebraic: ClassVar[bool] = True
    per_input: ClassVar[bool] = True
    keeps: ClassVar[str] = "columns"
    elsewhere: ClassVar[frozenset[str]] = frozenset({"sde", "dde"})
    references: ClassVar[tuple[str, ...]] = ("hairer1993",)

    def __post_init__(self) -> None:
        chosen = self.jvp if self.vjp is None else self.vjp
        object.__setattr__(self, "jvp", chosen)
        object.__setattr__(self, "vjp", chosen)
        if self.errors not in ("all", "state"):
            raise InputError(f"errors={self.errors!r} is none of the possible values", "they are 'all' and 'state'",
                             "errors='all'")

    def work(self, w: Work) -> Effort:
        return Effort(0, w.A * w.s * w.m, 0, w.n * (w.m + 1) * (w.s + 3))

    def refuse(self, run: Run) -> None:
        if (run.dense and run.method.one_step) or run.saves == "steps":
            raise base.unsupported(self.name, "dense=True or saveat='steps'", "RecursiveCheckpointAdjoint()")

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Columns]:
        be = run.be
        if run.dense:
            raise base.unsupported(self.name, "dense=True", "RecursiveCheckpointAdjoint()")
        parts = base.columns(x, wanted - {"t1", "saveat"})
        m = sum(size for _, size in parts)
        d = base.directions(be, x, parts, be.unit_rows(m, m, 0, x.u0))
        out, aux, moved, speed, status = self._solve(run, x, d, base.times_wanted(wanted))
        pieces, start = {}, 0
        for name, size in parts:
            pieces[name] = base.Outputs(*(None if v is None else v[start:start + size, ...] for v in moved))
            start += size
        columns = Columns(x, pieces.get("u0"), pieces.get("theta"), pieces.get("t0"), speed, status)
        return out, aux, columns

    def along(self, run: Run, x: Inputs, d: base.Tangents,
              wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Array]:
        """One extra right-hand side per direction, however many inputs there are."""
        del wanted
        moving = not (d.t0 is None and d.t1 is None and d.saveat is None)
        out, aux, moved, speed, _ = self._solve(run, x, d, moving)
        return out, aux, moved.u if speed is None else moved.u + _save_moves(run, d)[:, :, None] * speed[None, :, :]

    def _solve(self, run: Run, x: Inputs, d: base.Tangents,
               moving: bool) -> tuple[base.Outputs, base.Aux, base.Outputs, Array | None, Any]:
        """Outputs, their tangents along `d` at fixed save times, if times move the slopes there, and whether the
        derivatives exist."""
        be, xp = run.be, run.be.xp
        n, m = x.u0.shape[0], d.u0.shape[0]
        s = span(be, x.t0, x.t1)
        rhs, own = run.field.bind(be, x.theta, x.constants), base.bound(run, x)
        push = run.vjp.pushforward(run, x, d.theta)
        u0, spent = own.start(be.time(s.t0), x.u0)
        S0 = own.start_jvp(push, be.time(s.t0), u0, d.u0, d.t0) if own.algebraic else d.u0
        if d.t0 is not None:
            S0 = S0 - d.t0[:, None] * own.derivative(be.time(s.t0), u0)[None, :]

        def augmented(t: Any, z: Array) -> Array:
            f, df = push(t, z[:n], xp.reshape(z[n:], (m, n)), None)
            return xp.concat([f, xp.reshape(df, (m * n,))])

        size, covered = run.norm or be.rms, self.errors == "all" and m > 0
        norm = (lambda e: be.greatest(size(e[:n]), be.rms(e[n:]))) if covered else (lambda e: size(e[:n]))
        stepper = _bound(run, own, push, augmented, n, m)
        z0 = xp.concat([u0, xp.reshape(S0, (m * n,))])
        ts = [s.t1] if run.saves is None else base.save_times(run, x, s)
        sink = None
        if run.saves is not None:
            sink = be.sampler(stepper.interpolate, ts, z0, s.direction, run.capacity, stepper.restage)
        jumps = _Jumps(run, x, rhs, d) if run.events else None
        watch = None
        if jumps is not None:
            watch = Watch(be, stepper, jumps, s.direction, s.t1, run.max_events, run.controller.adaptive)
        end, rows = integrate(run, stepper, s, z0, x.rtol, _wide(be, x.atol, m), sink=sink, norm=norm, watch=watch,
                              limit=None if sink is None or run.events else run.capacity)
        if own.algebraic:
            end = consistent.judged(be, own, s, x.u0, u0, end._replace(u=end.u[:n]), not run.tstops)._replace(u=end.u)
        rows = end.u[None, :] if rows is None else be.reached(rows, ts, end.t, s.direction)
        u, S = rows[:, :n], xp.permute_dims(xp.reshape(rows[:, n:], (-1, m, n)), (1, 0, 2))
        if own.algebraic and run.saves is not None:
            u, more = consistent.states(be, own, ts, u)
            S, spent = consistent.pushed(be, own, push, ts, u, S, None), spent + more
            end = consistent.complete(be, u, end)
        speed = None
        made = algebra(run, stepper, end)
        nfe = evaluations(run, stepper, end) + spent + own.derivative_cost * (d.t0 is not None)
        if m and run.method.implicit and not run.method.one_step:
            nfe = nfe + (n + 1) * made[0]
        if moving:
            _, slopes = be.scan(lambda _, i: (0, own.derivative(be.time(i[0]), i[1])), 0, (ts, u))
            speed, nfe = be.gathered(slopes), nfe + own.derivative_cost * u.shape[0]
        out, moved, events, status = base.Outputs(u), base.Outputs(S), None, end.status
        if jumps is not None:
            out, moved, events = jumps.outputs(end, u, S)
            nfe = nfe + (stepper.fsal + 2) * end.watch.count
            if speed is not None and run.saves is None:
                speed = be.choose(end.watch.ended, 0.0 * speed, speed)
            status = be.choose(end.status == 0, ambiguous(run, x, end.watch.entries), end.status)
        ts_out = [end.t] if run.saves is None else ts
        aux = base.Aux(ts_out, end.t, end.accepted, end.rejected, nfe, end.status, end.ratio, end.h, None, events,
                       consistent.worked(own, made, spent))
        return out, aux, moved, speed, status

    def reverse(self, run: Run, residuals: Columns, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be, xp = run.be, run.be.xp
        x, S_u0, S_theta, S_t0, speed, status = residuals

        u0 = 0.0 * x.u0 if S_u0 is None else base.weighed(run, S_u0, ct)
        theta = be.zeros(x.theta) if S_theta is None else be.split(base.weighed(run, S_theta, ct), x.theta)
        t0 = 0.0 if S_t0 is None else be.scalar(base.weighed(run, S_t0, ct)[0])
        t1, ts_bar = 0.0, None
        if speed is not None:
            moves = be.scalars(xp.sum(ct.u * speed, axis=1))
            if run.saves is None:
                t1 = moves[0]
            else:
                ts_bar = moves
                t0, t1 = base.fold_times(run, ts_bar, t0, t1)
        return base.Cotangents(u0, theta if "theta" in wanted else (), t0, t1, ts_bar, 0, 0, status)

    def tangent(self, run: Run, residuals: Columns, d: base.Tangents) -> Any:
        xp = run.be.xp
        _, S_u0, S_theta, S_t0, speed, _ = residuals
        rows = d.u0.shape[0]
        terms = []
        if S_u0 is not None:
            terms.append((d.u0, S_u0))
        if S_theta is not None:
            terms.append((xp.concat([xp.reshape(v, (rows, -1)) for v in d.theta], axis=1), S_theta))
        if S_t0 is not None and d.t0 is not None:
            terms.append((d.t0[:, None], S_t0))
        moved: list[Any] = []
        for k, like in enumerate(terms[0][1]):
            if like is None:
                moved.append(None)
                continue
            parts = [xp.reshape(c @ xp.reshape(S[k], (c.shape[1], -1)), (rows, *like.shape[1:])) for c, S in terms]
            moved.append(sum(parts[1:], parts[0]))
        if speed is not None:
            moved[0] = moved[0] + _save_moves(run, d)[:, :, None] * speed[None, :, :]
        return base.Outputs(*moved)


def _bound(run: Run, own: Any, push: Any, augmented: Any, n: int, m: int) -> Any:
    """The method for state and tangents, `z = (u, S)`. With J = f_u and `D(v)` the derivative of `f_u S + f_x` in `u`
    along v, its linear systems are block triangular, and all have the matrix of the state alone:

        (M - c J) a = r,   (M - c J) A = R + c D(a)
    """
    be, xp = run.be, run.be.xp
    if not m:
        return own
    if not run.method.implicit:
        return run.stepper(augmented)
    if not run.method.one_step:
        columns = first_columns(be, augmented, n)

        def whole(t: Any, z: Array) -> Any:
            first = columns(t, z)
            return triangular(be, first, [first[:n, :]] * m, z.shape[0], z)

        return run.stepper(augmented, Jacobian(whole, whole))

    def system(t: Any, z: Array, c: Any) -> Any:
        u, S = z[:n], xp.reshape(z[n:], (m, n))
        one = own.system(t, u, c, exact=run.method.exact_jacobian)

        def solve(b: Array) -> Array:
            a = one(b[:n])
            (along,) = be.directional(lambda e: (push(t, u + e * a, S, None)[1],), relative(be, a, u))
            A = one(xp.reshape(b[n:], (m, n)) + c * along)
            return xp.concat([a, xp.reshape(A, (m * n,))])

        return solve

    def jac(t: Any, z: Array) -> Array:
        return dense(be, own.jac.exact(t, z[:n]))

    info = Jacobian(jac, jac, system=system)
    known = (info,) if run.mass is None else (info, Blocks(run.mass, m + 1))
    return run.method.bind(be, augmented, run.inside, *known)


class _Jumps:
    """The events of a run for the state with its derivatives."""

    def __init__(self, run: Run, x: Inputs, rhs: Any, d: base.Tangents) -> None:
        self.be, self.rhs, self.size = run.be, rhs, d.u0.shape
        self.tangents = EventTangents(run, x, d.theta)
        self.functions, self.events = self.tangents.functions, run.events
        self.watched, self.times = self.functions.watched, self.functions.times

    def values(self, t: Any, z: Array) -> Any:
        return self.functions.values(t, z[:self.size[1]])

    def moment(self, i: Any, t: Any, z: Array) -> tuple[Array, Array, Array]:
        """Tangents of the event's time `(m,)` and of the state there `(m, n)`, and the slope before it."""
        be, (m, n) = self.be, self.size
        u, S, now = z[:n], be.xp.reshape(z[n:], (m, n)), be.time(t)
        before, none = self.rhs(now, u), 0.0 * S[:, 0]
        dc = be.branch(i, self.tangents.conditions, now, u, S, none)[:, 0]
        cdot = be.branch(i, self.tangents.speeds, now, u, before[None, :], 0.0 * before[:1] + 1.0)[0, 0]
        dt = -dc / cdot
        return dt, S + dt[:, None] * before[None, :], before

    def after(self, i: Any, t: Any, z: Array) -> Array:
        be, (m, n) = self.be, self.size
        now, u = be.time(t), z[:n]
        dt, du, _ = self.moment(i, t, z)
        behind = self.functions.after(i, t, u)
        moved = be.branch(i, self.tangents.affects, now, u, du, dt)
        on: Any = 1.0
        for k, event in enumerate(self.events):
            if event.terminal:
                on = be.choose(i == k, 0.0, on)
        S = moved - on * dt[:, None] * self.rhs(now, behind)[None, :]
        return be.xp.concat([behind, be.xp.reshape(S, (m * n,))])

    def outputs(self, end: Any, u: Array, S: Array) -> tuple[base.Outputs, base.Outputs, Any]:
        """Outputs with the events, their tangents, and what `Aux` keeps of events."""
        be, (m, n) = self.be, self.size
        xp, watch = be.xp, end.watch
        times, z, index = be.entries(watch.entries, end.u, 0.0)
        shown, rows, _ = be.entries(watch.entries, end.u)
        dt, du = 0.0 * z[:, :m], xp.reshape(0.0 * z[:, n:], (-1, m, n))
        if z.shape[0]:
            _, found = be.scan(lambda _, e: (0, self._tangents(*e)), 0, (times, z, index))
            found = be.gathered(found)
            valid = xp.arange(z.shape[0], device=be.device(z)) < watch.count
            found = xp.where(valid[:, None], found, 0.0 * z[:, :1])
            dt, du = found[:, :m], xp.reshape(found[:, m:], (-1, m, n))
        out = base.Outputs(u, None, None, be.time_vector(shown, u), rows[:, :n])
        moved = base.Outputs(S, None, None, xp.permute_dims(dt, (1, 0)), xp.permute_dims(du, (1, 0, 2)))
        return out, moved, (index, watch.count, watch.ended)

    def _tangents(self, t: Any, z: Array, i: Any) -> Array:
        dt, du, _ = self.moment(self.be.greatest(i, 0), t, z)
        return self.be.xp.concat([dt, self.be.xp.reshape(du, (-1,))])


def _save_moves(run: Run, d: base.Tangents) -> Array:
    """Directions of the save times, `(m, k)`."""
    zero = 0.0 * d.u0[:, 0]
    dt0, dt1 = zero if d.t0 is None else d.t0, zero if d.t1 is None else d.t1
    return dt1[:, None] if run.saves is None else save_time_tangents(run, d, dt0, dt1)


def _wide(be: Any, atol: Any, m: int) -> Any:
    """A tolerance vector for the state, repeated for each column."""
    return atol if getattr(atol, "ndim", 0) == 0 else be.xp.concat([atol] * (m + 1))

