"""Laws of the loops that look back at their own steps, against plain Python, and a delay equation by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

from ..backend import Record
from ..segments import Room
from .harness import Harness


class Walk(NamedTuple):
    """State of the test loop: a time and a vector."""

    t: Any
    u: Any


def walk(h: Harness) -> tuple[Walk, Any]:
    """Steps of 0.5 from 0 to 3 with `u <- u + [t, 1] + half the start of the step that holds t - 1.2`; the attempt at
    t = 1 is not kept the first time."""
    be = h.be

    def step(s: Walk, log: Any) -> tuple[Walk, Record, Any]:
        def seek() -> Any:
            return be.record(log, be.locate(log, s.t - 1.2)).u

        seen = be.either(s.t - 1.2 < 0.0, lambda: 0.0 * s.u, seek)
        record = Record(s.t, 0.5 + 0.0 * s.t, s.u, be.xp.stack([seen, s.u]))
        first = (s.t == 1.0) & (be.scalar(s.u[1]) < 2.5)
        u = s.u + be.vector([s.t, 1.0 + 0.0 * s.t], s.u) + 0.5 * seen
        return Walk(be.choose(first, s.t, s.t + 0.5), u), record, first == be.truth(False)

    zero = be.scalar(h.array(0.0))
    like = Record(zero, zero, h.array([0.0, 0.0]), h.array([[0.0, 0.0], [0.0, 0.0]]))
    return be.unfold(step, Walk(zero, h.array([1.0, 0.0])), lambda s: s.t < 3.0, 100, 16, like)


def walked() -> tuple[float, list[float], list[tuple[float, list[float], list[float]]]]:
    """The same in Python: time, state, kept records."""
    t, u = 0.0, [1.0, 0.0]
    kept: list[tuple[float, list[float], list[float]]] = []
    while t < 3.0:
        seen = [0.0, 0.0] if t - 1.2 < 0.0 else [r[1] for r in kept if r[0] <= t - 1.2][-1]
        first = t == 1.0 and u[1] < 2.5
        if not first:
            kept.append((t, u, seen))
        u = [u[0] + t + 0.5 * seen[0], u[1] + 1.0 + 0.5 * seen[1]]
        t = t if first else t + 0.5
    return t, u, kept


def check_unfold(h: Harness) -> None:
    """`unfold` equals a written-out loop that reads the records it has kept."""
    state, log = walk(h)
    t, u, kept = walked()
    h.close(state, [t, *u], 1e-15, "state")
    for i, r in enumerate(kept):
        record = h.be.record(log, h.be.locate(log, h.be.scalar(h.array(r[0] + 0.1))))
        h.close(record.u, r[1], 1e-15, f"start of step {i}")
        h.close(record.k[0, :], r[2], 1e-15, f"what step {i} saw")
    end = h.be.record(log, h.be.locate_end(log, h.be.scalar(h.array(1.0))))
    h.close(end.t, 0.5, 0.0, "the step that ends at a node")


def check_collect(h: Harness) -> None:
    """`collect` goes from the newest record to the oldest and hands each what was left for it."""
    be = h.be
    _, log = walk(h)
    _, _, kept = walked()

    def left(record: Record, weight: float) -> Record:
        return Record(weight + 0.0 * record.t, 0.0 * record.t, weight * record.u, 0.0 * record.k)

    index = be.locate(log, be.scalar(h.array(2.1)))
    pending = be.deposit(be.pending(log), index, be.truth(False), lambda: left(be.record(log, index), 3.0))

    def body(state: Any, pending: Any, record: Record, ct: Record, log: Any) -> tuple[Any, Any]:
        at = be.locate(log, record.t - 0.9)
        old = record.t - 0.9 < 0.0
        pending = be.deposit(pending, at, old, lambda: left(record, be.choose(old, 0.0, 2.0)))
        return 0.5 * state + ct.u + be.vector([ct.t, record.t], ct.u), pending

    got = be.collect(body, h.array([0.0, 0.0]), log, pending)
    cts = [[0.0, 0.0, 0.0] for _ in kept]
    for i, weight, source in ((4, 3.0, kept[4]), *((max(n - 2, 0), 2.0, r) for n, r in enumerate(kept) if r[0] >= 0.9)):
        cts[i] = [a + b for a, b in zip(cts[i], [weight, *(weight * v for v in source[1])], strict=True)]
    want = [0.0, 0.0]
    for (t, _, _), ct in zip(reversed(kept), reversed(cts), strict=True):
        want = [0.5 * want[0] + ct[1] + ct[0], 0.5 * want[1] + ct[2] + t]
    h.close(got, want, 1e-14, "collect")


def check_onward(h: Harness) -> None:
    """`onward` goes from the oldest record to the newest, and its `body` reads what it wrote."""
    be = h.be
    _, log = walk(h)
    _, _, kept = walked()

    def body(state: Any, record: Record, news: Any) -> tuple[Any, Record]:
        def seek() -> Any:
            return be.record(news, be.locate(log, record.t - 0.9)).u

        seen = be.either(record.t - 0.9 < 0.0, lambda: 0.0 * record.u, seek)
        new = 0.5 * state + seen + record.u
        return new, Record(record.t, record.h, new, record.k)

    zero = h.array([0.0, 0.0])
    t = be.scalar(h.array(0.0))
    got, news = be.onward(body, zero, log, Record(t, t, zero, h.array([[0.0, 0.0], [0.0, 0.0]])))
    want: list[list[float]] = []
    state = [0.0, 0.0]
    for n, (_, u, _) in enumerate(kept):
        seen = want[n - 2] if n >= 2 else [0.0, 0.0]
        state = [0.5 * a + b + c for a, b, c in zip(state, seen, u, strict=True)]
        want.append(state)
    h.close(got, want[-1], 1e-14, "onward")
    for n, (start, _, _) in enumerate(kept):
        h.close(be.record(news, be.locate(log, be.scalar(h.array(start + 0.1)))).u, want[n], 1e-14, f"record {n}")


def check_segments(h: Harness) -> None:
    """A log with room for some records hands `collect` the same ones, taken again where they are missing, and the same
    cotangents; the steps taken are those of the segments' gaps and the one before each."""
    be, end, span = h.be, 20.0, 0.7

    def seen(log: Any, t: Any, like: Any) -> Any:
        return be.either(t - span < 0.0, lambda: 0.0 * like, lambda: be.record(log, be.locate(log, t - span)).u)

    def retake(log: Any, t: Any, size: Any, u: Any) -> tuple[Any, Any, Any]:
        past = seen(log, t, u)
        return u + size * (be.vector([0.1 * t, 1.0 + 0.0 * t], u) - 0.9 * past), be.xp.stack([past, u]), 2

    def step(s: Walk, log: Any) -> tuple[Walk, Record, Any]:
        u, k, _ = retake(log, s.t, 0.5 + 0.0 * s.t, s.u)
        return Walk(s.t + 0.5, u), Record(s.t, 0.5 + 0.0 * s.t, s.u, k), be.truth(True)

    def body(state: Any, pending: Any, record: Record, ct: Record, log: Any) -> tuple[Any, Any]:
        old = record.t - span < 0.0
        at = be.locate(log, record.t - span)
        weight = be.choose(old, 0.0, 0.3)
        pending = be.deposit(pending, at, old, lambda: Record(
            weight + 0.0 * record.t, 0.0 * record.t, weight * state, 0.0 * record.k))
        return 0.5 * state + ct.u + be.vector([ct.t, record.t], ct.u) * record.k[0, :], pending

    zero, like = be.scalar(h.array(0.0)), h.array([[0.0, 0.0], [0.0, 0.0]])
    first = Walk(zero, h.array([1.0, 0.0]))
    example = Record(zero, zero, first.u, like)
    stepper: Any = SimpleNamespace(interpolate=None, restage=None)
    one = h.array([1.0, -2.0])
    end_state, whole = be.unfold(step, first, lambda s: s.t < end, 100, 60, example)
    want = be.collect(body, one, whole, be.pending(whole))
    # 40 steps, of which one looks two back. With segments of eight, five starts and two more before four of them, the
    # newest three and the longest segment are 24 records. Of a segment five steps are missing, of the newest four.
    for records, taken in ((60, 0.0), (26, 4 * 6.0 + 5.0), (9, None)):
        sink = be.segments(Room(records, None, be.scalar(h.array(span))), stepper, None, None, first.u, 60)
        last, (kept, _) = be.unfold(step, first, lambda s: s.t < end, 100, 60, example, sink)
        h.close(be.overfull(kept), float(taken is None), 0.0, f"{records} records are too few")
        if taken is None:
            continue
        log = be.retaking(kept, retake)
        h.close(be.collect(body, one, log, be.pending(log)), want, 1e-14, f"collect with {records} records")
        steps, iterations, _ = be.recalled(log, None)
        h.close(steps, taken, 0.0, "steps taken again")
        h.close(iterations, 2.0 * taken, 0.0, "their iterations")
        again = be.remade(be.retaking(kept, retake), first.u)
        h.close(be.record(again, be.locate(again, last.t)).k, be.record(whole, be.locate(whole, last.t)).k, 1e-15,
                "the newest step, taken again with all before it")
        h.close(last, list(end_state), 0.0, "the end")


def check_lookups(h: Harness) -> None:
    """Small choices by value."""
    be = h.be
    times = be.scalars(h.array([0.0, 1.0, 1.0, 2.5]))
    for t, index in ((-1.0, 0), (0.0, 1), (1.0, 3), (2.0, 3), (9.0, 3)):
        h.close(be.following(times, be.scalar(h.array(t))), float(index), 0.0, f"following({t})")
    sums = be.add_at(be.add_at(be.blank(times), 1, be.scalar(h.array(2.0))), 1, be.scalar(h.array(0.5)))
    h.close(sums, [0.0, 2.5, 0.0, 0.0], 0.0, "add_at")
    i, gap = be.nearest([be.scalar(h.array(v)) for v in (1.0, 4.0, 2.0)], h.array(2.25))
    h.close(i, 2.0, 0.0, "nearest")
    h.close(gap, 0.25, 1e-15, "distance of the nearest")
    h.close(be.member([h.array([1.0]), h.array([2.0])], be.least(1, 1)), [2.0], 0.0, "member")


def check_delay_equation(h: Harness) -> None:
    """u' = -p u(t - tau) with a jump at the start, by hand: value, and gradient in p, tau and u0."""
    import sensitivity as sa

    xp = h.be.xp
    prob = sa.DDEProblem(lambda t, u, past, p: -p[0] * past(t - p[1]), h.array([0.4]),
                         lambda t, p: 0.0 * p[:1] + 1.0, (0.0, 1.7), h.array([1.2, 0.9]), lags=lambda p: [p[1]])
    vjp = None if "reverse" in h.be.modes else sa.FiniteDifferenceVJP()
    r = sa.gradient(prob, sa.RK4(), lambda sol: xp.sum(sol.u), dloss=lambda sol: xp.ones_like(sol.u), dt=0.1,
                    backend=h.be.name, sensealg=sa.RecursiveCheckpointAdjoint(vjp=vjp))
    a, tau, d = 1.2, 0.9, 0.8
    tol = 1e-10 if vjp is None else 1e-7  # differences have about nine digits
    h.close(r.value, 0.4 - a * tau - a * 0.4 * d + a * a * d * d / 2, 1e-12, "value")
    h.close(r.p, [-tau - 0.4 * d + a * d * d, -a + 0.4 * a - a * a * d], tol, "gradient")
    h.close(r.u0, [1.0 - a * d], tol, "derivative in u0")
