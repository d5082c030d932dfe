"""The walk of the continuous adjoints where the solution has events: one more stop for each of them."""

from __future__ import annotations

from typing import Any

from ..backend import Array
from ..integrate import Run, span
from ..watch import Happened
from . import base
from .jumps import EventPulls, ambiguous, limit_jump
from .walk import Kept, Leg, Way


def over_events(algorithm: Any, run: Run, kept: Kept, way: Way, ct: base.Outputs,
                wanted: frozenset[str]) -> base.Cotangents:
    """The walk with a stop at each event, before the save times that lie there: they show the left side."""
    be, xp, x = run.be, run.be.xp, kept.x
    n, s, end = x.u0.shape[0], span(be, x.t0, x.t1), kept.end
    rhs = run.field.bind(be, x.theta, x.constants)
    pulls = EventPulls(run, x, way.params)
    kept, ct = _ended(run, kept, ct)
    times, u_left, index = be.entries(end.watch.entries, end.u, 0.0)
    times = be.within(times, index, s.t0)
    which = xp.asarray(xp.astype(be.indices(index), x.u0.dtype), device=be.device(x.u0))[:, None] + 1.0
    # Where there is room for more events, the stop is the start once more.
    u_right = xp.where(which > 0.5, _after(run, pulls, times, u_left, index), x.u0[None, :])
    blank = 0.0 * x.u0[None, :]
    saved, lam = xp.concat([ct.u, 0.0 * kept.u[ct.u.shape[0]:, :]]), 0.0 * x.u0
    if run.saves is None:
        saved, lam = 0.0 * saved, ct.u[0, :]
    rest = 0.0 * kept.u[:, :1]
    plain = xp.concat([saved, kept.u, 0.0 * kept.u, 0.0 * kept.u, rest, rest], axis=1)
    first = xp.concat([blank, x.u0[None, :], blank, blank, blank[:, :1], blank[:, :1]], axis=1)
    t_bar = xp.astype(ct.event_t, x.u0.dtype)[:, None]
    jumps = xp.concat([0.0 * u_left, u_right, u_left, ct.event_u, t_bar, which], axis=1)
    ts, rows = be.sort_down(be.joined(be.joined(times, kept.ts), [s.t0]), xp.concat([jumps, plain, first]),
                            s.direction)
    size = sum(base.size_of(v) for v in x.theta) if way.params else 0
    step = s.direction * abs(end.h if way.adjoint.dt is None else way.adjoint.dt)
    start = Leg(end.t, lam, be.padded(0.0 * x.u0[:0], size), end.u, -step, s.direction * abs(end.h), 0, 0,
                ambiguous(run, x, end.watch.entries), 0.0, 0.0)

    def segment(leg: Leg, stop: tuple) -> tuple[Leg, int]:
        t, row = stop
        goal = be.choose(leg.status == 0, t, leg.t)
        leg = algorithm.cross(way, leg, goal, row[n:2 * n])
        leg = leg._replace(t=t, lam=leg.lam + row[:n])

        def jumped() -> Leg:
            event = Happened(t, row[2 * n:3 * n], be.whole(row[4 * n + 1]) - 1)
            new = limit_jump(run, pulls, rhs, event, leg.lam, (be.scalar(row[4 * n]), row[3 * n:4 * n]))
            mu = leg.mu + way.flat(new.theta, leg.lam) if way.params else leg.mu
            return leg._replace(lam=new.lam, mu=mu, u=row[2 * n:3 * n], nfe=leg.nfe + 2,
                                status=be.greatest(leg.status, new.status))

        return be.when(be.scalar(row[4 * n + 1]) > 0.5, jumped, leg), 0

    leg, _ = be.scan(segment, start, (ts, rows))
    theta = be.split(leg.mu, x.theta) if way.params else ()
    t0_bar, t1_bar, ts_bar, nfe = algorithm.moved(run, kept, ct, leg.lam, wanted)
    if run.saves is None:
        t1_bar = be.choose(end.watch.ended, 0.0, t1_bar)
    return base.Cotangents(leg.lam, theta, t0_bar, t1_bar, ts_bar, leg.nvjp, leg.nfe + nfe, leg.status,
                           *algorithm.measured(leg))


def _ended(run: Run, kept: Kept, ct: base.Outputs) -> tuple[Kept, base.Outputs]:
    """What lies behind a terminal event, unknown and without weight, as copies of the end."""
    if not any(e.terminal for e in run.events):
        return kept, ct
    be, xp, end = run.be, run.be.xp, kept.end
    s = span(be, kept.x.t0, kept.x.t1)
    known = xp.isfinite(be.reached(0.0 * kept.u[:, :1], kept.ts, end.t, s.direction))
    ts = be.capped(kept.ts, end.t, s.direction)
    u = xp.where(known, kept.u, end.u[None, :])
    row = xp.where(known[:ct.u.shape[0], :], ct.u, 0.0 * end.u[None, :])
    return kept._replace(ts=ts, u=u), ct._replace(u=row)


def _after(run: Run, pulls: EventPulls, times: Any, u: Array, index: Any) -> Array:
    """The states behind the events."""
    be = run.be
    if not u.shape[0]:
        return u
    _, rows = be.scan(lambda _, e: (0, pulls.functions.after(be.greatest(e[2], 0), e[0], e[1])), 0, (times, u, index))
    return be.gathered(rows)
