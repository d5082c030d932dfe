"""Forward sensitivities: integrate the state and its derivatives together.

    S' = f_u S + f_x,   S(t0) = du0/dx (and -f(t0, u0) for x = t0),

one column of S per entry of the inputs asked for. Reverse mode is then `S^T ct`, forward mode `S d`; both cost one
solve with `m` extra right-hand sides, which pays for few parameters. Reference: Hairer, Norsett, Wanner I, I.14.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ..backend import Array
from ..errors import InputError
from ..integrate import Run, evaluations, integrate, span
from ..system import Inputs
from . import base
from .frozen import save_time_tangents


class Columns(NamedTuple):
    """Derivatives of the saved states, `(k, m_x, n)` for each input asked for, and the slopes there, `(k, n)`."""

    x: Inputs
    u0: Array | None
    theta: Array | None
    t0: Array | None
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

    references: ClassVar[tuple[str, ...]] = ("hairer1993",)

    def __post_init__(self) -> None:
        chosen = self.jvp if self.vjp is None else self.vjp
        object.__setattr__(self, "jvp", chosen)
        object.__setattr__(self, "vjp", chosen)
        if self.errors not in ("all", "state"):
            raise InputError(f"errors={self.errors!r} is none of the possible values", "they are 'all' and 'state'",
                             "errors='all'")

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
        out, aux, S, speed = self._solve(run, x, d, base.times_wanted(wanted))
        pieces, start = {}, 0
        for name, size in parts:
            pieces[name] = S[:, start:start + size, :]
            start += size
        columns = Columns(x, pieces.get("u0"), pieces.get("theta"), pieces.get("t0"), speed, aux.status)
        return out, aux, columns

    def along(self, run: Run, x: Inputs, d: base.Tangents,
              wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Array]:
        """One extra right-hand side per direction, however many inputs there are."""
        del wanted
        moving = not (d.t0 is None and d.t1 is None and d.saveat is None)
        out, aux, S, speed = self._solve(run, x, d, moving)
        S = run.be.xp.permute_dims(S, (1, 0, 2))
        return out, aux, S if speed is None else S + _save_moves(run, d)[:, :, None] * speed[None, :, :]

    def _solve(self, run: Run, x: Inputs, d: base.Tangents,
               moving: bool) -> tuple[base.Outputs, base.Aux, Array, Array | None]:
        """State, derivatives `(k, m, n)` along `d` at fixed save times, and, if times move, the slopes there."""
        be, xp = run.be, run.be.xp
        n, m = x.u0.shape[0], d.u0.shape[0]
        s = span(be, x.t0, x.t1)
        rhs = run.field.bind(be, x.theta, x.constants)
        push = run.vjp.pushforward(run, x, d.theta)
        S0 = d.u0 if d.t0 is None else d.u0 - d.t0[:, None] * rhs(be.time(s.t0), x.u0)[None, :]

        def augmented(t: Any, z: Array) -> Array:
            f, df = push(t, z[:n], xp.reshape(z[n:], (m, n)), None)
            return xp.concat([f, xp.reshape(df, (m * n,))])

        own, covered = run.norm or be.rms, self.errors == "all" and m > 0
        norm = (lambda e: be.greatest(own(e[:n]), be.rms(e[n:]))) if covered else (lambda e: own(e[:n]))
        stepper = run.stepper(augmented)
        z0 = xp.concat([x.u0, xp.reshape(S0, (m * n,))])
        ts = [s.t1] if run.saves is None else base.save_times(run, x, s)
        sink = None
        if run.saves is not None:
            sink = be.sampler(stepper.interpolate, ts, z0, s.direction, run.capacity, stepper.restage)
        end, rows = integrate(run, stepper, s, z0, x.rtol, _wide(be, x.atol, m), sink=sink, norm=norm,
                              limit=None if sink is None else run.capacity)
        rows = end.u[None, :] if rows is None else be.reached(rows, ts, end.t, s.direction)
        u, S = rows[:, :n], xp.reshape(rows[:, n:], (-1, m, n))
        speed = None
        nfe = evaluations(run, stepper, end) + (d.t0 is not None)
        if moving:
            _, slopes = be.scan(lambda _, i: (0, rhs(be.time(i[0]), i[1])), 0, (ts, u))
            speed, nfe = be.gathered(slopes), nfe + u.shape[0]
        ts_out = [end.t] if run.saves is None else ts
        aux = base.Aux(ts_out, end.t, end.accepted, end.rejected, nfe, end.status, end.ratio, end.h, None,
                       algebra=stepper.algebra(end.accepted + end.rejected, 0, run.controller.adaptive))
        return base.Outputs(u, None, None), aux, S, speed

    def reverse(self, run: Run, residuals: Columns, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be, xp = run.be, run.be.xp
        x, S_u0, S_theta, S_t0, speed, status = residuals

        def pulled(S: Array) -> Array:
            k, m, n = S.shape
            return xp.reshape(xp.permute_dims(S, (1, 0, 2)), (m, k * n)) @ xp.reshape(ct.u, (k * n,))

        u0 = 0.0 * x.u0 if S_u0 is None else pulled(S_u0)
        theta = be.zeros(x.theta) if S_theta is None else be.split(pulled(S_theta), x.theta)
        t0 = 0.0 if S_t0 is None else be.scalar(pulled(S_t0)[0])
        t1, ts_bar = 0.0, None
        if speed is not None:
            moves = be.scalars(xp.sum(ct.u * speed, axis=1))
            if run.saves is None:
                t1 = moves[0]
            else:
                ts_bar = moves
                t0, t1 = base.fold_times(run, ts_bar, t0, t1)
        return base.Cotangents(u0, theta if "theta" in wanted else (), t0, t1, ts_bar, 0, 0, status)

    def tangent(self, run: Run, residuals: Columns, d: base.Tangents) -> Array:
        xp = run.be.xp
        _, S_u0, S_theta, S_t0, speed, _ = residuals
        rows = d.u0.shape[0]

        def pushed(c: Array, S: Array) -> Array:
            k, m, n = S.shape
            return xp.reshape(c @ xp.reshape(xp.permute_dims(S, (1, 0, 2)), (m, k * n)), (rows, k, n))

        terms = []
        if S_u0 is not None:
            terms.append(pushed(d.u0, S_u0))
        if S_theta is not None:
            flat = [xp.reshape(v, (rows, -1)) for v in d.theta]
            terms.append(pushed(xp.concat(flat, axis=1), S_theta))
        if S_t0 is not None and d.t0 is not None:
            terms.append(pushed(d.t0[:, None], S_t0))
        if speed is not None:
            terms.append(_save_moves(run, d)[:, :, None] * speed[None, :, :])
        return sum(terms[1:], terms[0])


def _save_moves(run: Run, d: base.Tangents) -> Array:
    """Directions of the save times, `(m, k)`."""
    zero = 0.0 * d.u0[:, 0]
    dt0, dt1 = zero if d.t0 is None else d.t0, zero if d.t1 is None else d.t1
    return dt1[:, None] if run.saves is None else save_time_tangents(run, d, dt0, dt1)


def _wide(be: Any, atol: Any, m: int) -> Any:
    """A tolerance vector for the state, repeated for each column."""
    return atol if getattr(atol, "ndim", 0) == 0 else be.xp.concat([atol] * (m + 1))

