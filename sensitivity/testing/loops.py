"""Laws of the loops and of the small matrix recursions, each against the loop written out in Python."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..backend import Contribution, Record
from .harness import Harness, require

# A lower triangular matrix without pattern, and a row of zeros in the middle.
A = ((), (0.5,), (0.0, 0.0), (-1.0, 2.0, 0.25))


class Walk(NamedTuple):
    """State of the test loop: a time and a vector."""

    t: Any
    u: Any


def walk(h: Harness, limit: int = 100, end: float = 3.0) -> tuple[Walk, Any]:
    """A loop with steps of 0.5 whose third step is not kept: `u <- 2 u + t`."""
    be = h.be

    def step(s: Walk) -> tuple[Walk, Record, Any]:
        record = Record(s.t, 0.5 + 0.0 * s.t, s.u, be.xp.stack([s.u, s.u * s.u]))
        return Walk(s.t + 0.5, 2.0 * s.u + be.vector([s.t, s.t], s.u)), record, s.t != 1.0

    first = Walk(be.scalar(h.array(0.0)), h.array([1.0, -3.0]))
    state, log = be.iterate(step, first, lambda s: s.t < end, limit, be.store(64))
    return state, be.reopen(log, stages(h))


def stages(h: Harness) -> Any:
    """The stages of a step of `walk` again, for backends that do not keep them."""
    return lambda record: h.be.xp.stack([record.u, record.u * record.u])


def walked(limit: int = 100, end: float = 3.0) -> tuple[float, list[float], list[tuple[float, list[float]]]]:
    """The same loop in Python: time, state, kept records."""
    t, u, kept = 0.0, [1.0, -3.0], []
    for _ in range(limit):
        if not t < end:
            break
        if t != 1.0:
            kept.append((t, u))
        u = [2.0 * v + t for v in u]
        t += 0.5
    return t, u, kept


def check_iterate(h: Harness) -> None:
    """`iterate` equals a written-out loop, in its state and in its log; records that are not kept are not there."""
    state, log = walk(h)
    t, u, kept = walked()
    h.close(state, [t, *u], 1e-15, "state")
    times, sizes, starts, slopes = h.be.stacked(log)
    n = len(kept)
    h.close(times[:n], [r[0] for r in kept], 0.0, "times")
    h.close(sizes[:n], [0.5] * n, 0.0, "sizes")
    h.close(starts[:n, :], [v for r in kept for v in r[1]], 1e-15, "start states")
    h.close(slopes[:n, 1, :], [v * v for r in kept for v in r[1]], 1e-15, "stages")
    h.close(h.be.last_size(log), 0.5, 0.0, "last_size")


def check_iterate_limit(h: Harness) -> None:
    """A loop stops at its limit and leaves the state as it stood."""
    state, _ = walk(h, limit=4)
    t, u, _ = walked(limit=4)
    h.close(state, [t, *u], 1e-15, "state")


def check_iterate_zero_steps(h: Harness) -> None:
    """A loop that need not run returns its state untouched, and an empty log folds to the state."""
    state, log = walk(h, end=-1.0)
    h.close(state, [0.0, 1.0, -3.0], 0.0, "state")
    folded = h.be.replay(lambda s, record, extra, last: 2.0 * s, state.u, log)
    h.close(folded, [1.0, -3.0], 0.0, "replay of nothing")
    h.close(h.be.last_size(log), 1.0, 0.0, "last_size of nothing")


def check_replay(h: Harness) -> None:
    """`replay` folds from the newest record to the oldest, marks the newest, and hands each its contribution."""
    be = h.be
    state, log = walk(h)
    _, _, kept = walked()
    n = len(kept)
    padding = be.nodes(log, state.u, state.t)[0].shape[0] - n
    ct = h.array([[float(i * i + 1), 0.5 * i] for i in range(n)] + [[0.0, 0.0]] * padding)
    extra, end = be.nodes_vjp(log, ct)
    h.close(end, [float((n - 1) ** 2 + 1), 0.5 * (n - 1)], 0.0, "cotangent of the end")

    def body(s: Any, record: Record, out: Contribution | None, last: Any) -> Any:
        s = 3.0 * s + record.t * record.u + record.h * record.k[1, :] + be.choose(last, 1000.0, 0.0)
        return s if out is None or out.u is None else s + out.u

    got = be.replay(body, h.array([1.0, 2.0]), log, extra)
    want = [1.0, 2.0]
    for i in reversed(range(n)):
        t, u = kept[i]
        add = [0.0, 0.0] if i == 0 else [float((i - 1) ** 2 + 1), 0.5 * (i - 1)]
        want = [3.0 * w + t * v + 0.5 * v * v + (1000.0 if i == n - 1 else 0.0) + a
                for w, v, a in zip(want, u, add, strict=True)]
    h.close(got, want, 1e-15, "replay")


def check_follow(h: Harness) -> None:
    """`follow` folds from the oldest record to the newest and gives a log of its own."""
    be = h.be
    _, log = walk(h)
    _, _, kept = walked()

    def body(s: Any, record: Record, last: Any) -> tuple[Any, Record]:
        new = 3.0 * s + record.t * record.u + be.choose(last, 1000.0, 0.0)
        return new, Record(record.t, record.h, s, record.k[:1, :])

    got, made = be.follow(body, h.array([1.0, 2.0]), log)
    want, states = [1.0, 2.0], []
    for i, (t, u) in enumerate(kept):
        states += want
        want = [3.0 * w + t * v + (1000.0 if i == len(kept) - 1 else 0.0) for w, v in zip(want, u, strict=True)]
    h.close(got, want, 1e-15, "follow")
    h.close(be.stacked(made)[2][:len(kept), :], states, 1e-15, "the log that follow made")


def check_nodes(h: Harness) -> None:
    """`nodes` are the states at the ends of all steps, `unstacked` undoes `stacked`."""
    be = h.be
    state, log = walk(h)
    t, u, kept = walked()
    n = len(kept)
    rows, times = be.nodes(log, state.u, state.t)
    h.close(rows[:n, :], [*[v for r in kept[1:] for v in r[1]], *u], 1e-15, "states")
    h.close(times[:n], [*[r[0] for r in kept[1:]], t], 0.0, "times")
    again = be.unstacked(*be.stacked(log), n)
    h.close(be.stacked(again)[2][:n, :], [v for r in kept for v in r[1]], 1e-15, "unstacked(stacked(log))")


def check_scan(h: Harness) -> None:
    """`scan` folds over times and rows together and gathers what the body returns."""
    be = h.be
    ts, rows = be.scalars(h.array([0.5, -1.0, 2.0])), h.array([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]])

    def body(s: Any, x: tuple) -> tuple[Any, Any]:
        t, row = x
        s = 2.0 * s + t * row
        return s, s * s

    got, made = be.scan(body, h.array([1.0, -1.0]), (ts, rows))
    want, squares = [1.0, -1.0], []
    for t, row in zip([0.5, -1.0, 2.0], [[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]], strict=True):
        want = [2.0 * s + t * v for s, v in zip(want, row, strict=True)]
        squares += [s * s for s in want]
    h.close(got, want, 1e-15, "state")
    h.close(be.gathered(made), squares, 1e-15, "gathered")


def check_recursion(h: Harness) -> None:
    """`recursion` equals a triple loop: with one base, a base per row, and a given first row."""
    be = h.be
    bases = [[1.0, 2.0], [3.0, -1.0], [0.5, 4.0], [-2.0, 7.0]]
    nodes, scale, times = (0.0, 0.25, 0.5, 1.0), 0.5, (1.0, 1.5, 2.0, 3.0)

    def row(carry: Any, x: tuple, v: Any) -> tuple[Any, Any]:
        t, c, w = x
        out = t * v * v + c + w
        return carry + c * out, out

    def plain(base: list[list[float]], first: list[float] | None) -> tuple[list[float], list[list[float]]]:
        carry, rows = [1.0, 10.0], [] if first is None else [first]
        for i in range(len(rows), 4):
            v = [base[i][m] + scale * sum(A[i][j] * rows[j][m] for j in range(i)) for m in range(2)]
            out = [times[i] * v[m] * v[m] + nodes[i] + bases[3 - i][m] for m in range(2)]
            carry = [carry[m] + nodes[i] * out[m] for m in range(2)]
            rows.append(out)
        return carry, rows

    # `times` and `inputs` show in which form the backend's recursion takes its sequences.
    like = be.inputs(A, h.array(bases[0]), 1.0, h.array(bases))
    words = h.array(bases[::-1]) if be.is_array(like) else [h.array(r) for r in bases[::-1]]
    xs = (be.times(be.scalar(h.array(1.0)), 2.0, nodes), nodes, words)
    h_scale = be.scalar(h.array(scale))
    for what, base, first in (("one base", h.array(bases[1]), None), ("a base per row", h.array(bases), None),
                              ("a first row", h.array(bases[1]), [0.5, 0.25])):
        want_base = bases if base.ndim == 2 else [bases[1]] * 4
        carry, rows = be.recursion(A, base, h_scale, xs, row, h.array([1.0, 10.0]),
                                   None if first is None else h.array(first))
        want_carry, want_rows = plain(want_base, first)
        h.close(rows, [v for r in want_rows for v in r], 1e-14, f"rows, {what}")
        h.close(carry, want_carry, 1e-14, f"carry, {what}")


def check_combine(h: Harness) -> None:
    """`combine`, `inputs`, `seeds` and the permutations against plain sums."""
    be = h.be
    rows = [[1.0, 2.0], [3.0, 5.0], [-7.0, 11.0], [0.5, -13.0]]
    base, scale, b = [10.0, 20.0], 0.25, (0.5, 0.0, -2.0, 3.0)
    R, s = h.array(rows), be.scalar(h.array(scale))
    want = [base[m] + scale * sum(b[i] * rows[i][m] for i in range(4)) for m in range(2)]
    h.close(be.combine(h.array(base), s, b, R), want, 1e-15, "combine")
    h.close(be.combine(None, s, b, R), [w - v for w, v in zip(want, base, strict=True)], 1e-15, "combine, no base")
    h.close(be.combine(h.array(base), s, (0.0, 0.0, 0.0, 0.0), R), base, 0.0, "combine, no weights")
    got = be.inputs(A, h.array(base), s, R)
    for i in range(4):
        h.close(got[i], [base[m] + scale * sum(A[i][j] * rows[j][m] for j in range(i)) for m in range(2)], 1e-15,
                f"inputs, row {i}")
    lam, last = [2.0, -3.0], [100.0, 200.0]
    for with_rows in (False, True):
        for with_last in (False, True):
            want = [scale * b[i] * lam[m] + with_rows * rows[i][m] + (with_last and i == 3) * last[m]
                    for i in range(4) for m in range(2)]
            got = be.seeds(b, s, h.array(lam), R if with_rows else None, h.array(last) if with_last else None)
            h.close(got, want, 1e-15, f"seeds, rows {with_rows}, last {with_last}")
    h.close(R, [v for r in rows for v in r], 0.0, "an argument was changed")
    order = (3, 1, 0)
    h.close(be.permuted_rows(R, order), [v for i in order for v in rows[i]], 0.0, "permuted_rows")
    for chosen in ([1, 2], [0, 1, 3]):
        h.close(be.picked(R, chosen), [v for i in chosen for v in rows[i]], 0.0, "picked")
    h.close(list(be.permuted(be.times(s, 1.0, (0.0, 1.0, 2.0, 3.0)), order)), [3.25, 1.25, 0.25], 0.0, "permuted")


def check_blended(h: Harness) -> None:
    """`blended` weighs rows by a matrix, and `blended_vjp` is its transpose."""
    be, scale = h.be, 0.25
    rows, base, weights = [[1.0, 2.0], [3.0, 5.0], [-7.0, 11.0]], [10.0, 20.0], [[0.5, 0.0, -2.0], [1.0, 3.0, -4.0]]
    s, W = be.scalar(h.array(scale)), h.array(weights)
    want = [base[m] + scale * sum(w[j] * rows[j][m] for j in range(3)) for w in weights for m in range(2)]
    h.close(be.blended(h.array(base), s, W, h.array(rows)), want, 1e-15, "blended")
    ct = [[2.0, -3.0], [0.5, 7.0]]
    base_bar, rows_bar = be.blended_vjp(s, W, h.array(ct))
    h.close(base_bar, [ct[0][m] + ct[1][m] for m in range(2)], 1e-15, "blended_vjp, base")
    want = [scale * sum(weights[i][j] * ct[i][m] for i in range(2)) for j in range(3) for m in range(2)]
    h.close(rows_bar, want, 1e-15, "blended_vjp, rows")
    h.close(W, [v for w in weights for v in w], 0.0, "an argument was changed")


def check_poly(h: Harness) -> None:
    """`poly` evaluates several polynomials at several points."""
    coefficients = ((0.0, 1.0, -2.0), (0.5, 0.0, 3.0))
    x = [0.0, 0.25, 1.0, -2.0]
    xs = h.be.scalars(h.array(x))
    want = [sum(c * v**k for k, c in enumerate(p)) for v in x for p in coefficients]
    h.close(h.be.poly(coefficients, xs, h.array([1.0, 2.0, 3.0])), want, 1e-15, "poly")
    h.close(h.be.poly(((2.0,), (3.0,)), xs, h.array([0.0])), [2.0, 3.0] * 4, 0.0, "poly of degree 0")


def interpolate(h: Harness) -> Any:
    """A dense output that shows where it was evaluated: `u + (t - t_n) k_1`."""

    def of(record: Record, ts: Any) -> Any:
        x = h.be.vector([t - record.t for t in ts], record.u)
        return record.u[None, :] + x[:, None] * record.k[1, :][None, :]

    return of


TIMES = [2.75, 0.25, 0.25, 3.0, 0.0, 2.5, 1.75]


def straight(t: float) -> list[float]:
    """The dense output of `walk` at `t` in Python; a node belongs to the step that ends there."""
    _, _, kept = walked()
    start, u = [r for r in kept if r[0] < t][-1] if t > 0.0 else kept[0]
    return [v + (t - start) * v * v for v in u]


def check_sample(h: Harness) -> None:
    """Dense output at unordered, repeated, first and last times: `sample` of a log, and `sampler` on the way."""
    be = h.be
    want = [v for t in TIMES for v in straight(t)]
    _, log = walk(h)
    u0, one = h.array([1.0, -3.0]), be.choose(be.scalar(h.array(1.0)) > 0.0, 1.0, -1.0)
    ts = be.scalars(h.array(TIMES))
    h.close(be.sample(interpolate(h), log, ts, u0, one), want, 1e-15, "sample")

    def step(s: Walk) -> tuple[Walk, Record, Any]:
        record = Record(s.t, 0.5 + 0.0 * s.t, s.u, be.xp.stack([s.u, s.u * s.u]))
        return Walk(s.t + 0.5, 2.0 * s.u + be.vector([s.t, s.t], s.u)), record, s.t < 3.0

    # Here every step is kept, so the step from 1 to 1.5 is there and the node at 1.5 belongs to it.
    sink = be.sampler(interpolate(h), ts, u0, one, 64, stages(h))
    _, rows = be.iterate(step, Walk(be.scalar(h.array(0.0)), u0), lambda s: s.t < 3.0, 100, sink)
    h.close(rows, want, 1e-15, "sampler")
    dense = be.lookup(interpolate(h), log)
    for t in (0.25, 1.75, 2.75):
        h.close(dense(be.scalar(h.array(t))), straight(t), 1e-15, f"lookup at {t}")


def check_sample_transposed(h: Harness) -> None:
    """`sample_vjp` sends every row to the step that made it, and every time's cotangent back to its place."""
    be = h.be
    _, log = walk(h)
    one = be.choose(be.scalar(h.array(1.0)) > 0.0, 1.0, -1.0)
    ct = [[float(i + 1), -0.5 * i] for i in range(len(TIMES))]

    def transpose(record: Record, ts: Any, rows: Any) -> tuple[Contribution, list[Any]]:
        x = be.vector([t - record.t for t in ts], record.u)
        total = be.xp.sum(rows, axis=0)
        k = be.xp.stack([0.0 * total, be.xp.sum(x[:, None] * rows, axis=0)])
        return Contribution(total, k, 0.0), [be.dot(rows[i, :], record.k[1, :]) for i in range(rows.shape[0])]

    extra, bars = be.sample_vjp(transpose, log, be.scalars(h.array(TIMES)), h.array(ct), one)
    _, _, kept = walked()
    owner = [[i for i, r in enumerate(kept) if r[0] < t][-1] if t > 0.0 else 0 for t in TIMES]
    h.close(bars, [sum(c * v * v for c, v in zip(ct[i], kept[owner[i]][1], strict=True)) for i in range(len(TIMES))],
            1e-15, "cotangents of the times")

    def collect(s: Any, record: Record, out: Contribution | None, last: Any) -> Any:
        weight = 1.0 + record.t
        if out is None or out.u is None or out.k is None:
            return s
        return s + weight * out.u + 10.0 * weight * out.k[1, :]

    got = be.replay(collect, h.array([0.0, 0.0]), log, extra)
    want = [sum((1.0 + kept[owner[i]][0]) * ct[i][m] * (1.0 + 10.0 * (TIMES[i] - kept[owner[i]][0]))
                for i in range(len(TIMES))) for m in range(2)]
    h.close(got, want, 1e-15, "contributions")


def check_sorting(h: Harness) -> None:
    """`sort_down` orders times against the direction, rows with them; `reached` marks what was not reached."""
    be = h.be
    ts, rows = be.scalars(h.array([0.5, 2.0, 1.0])), h.array([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]])
    one = be.choose(be.scalar(h.array(1.0)) > 0.0, 1.0, -1.0)
    times, sorted_rows = be.sort_down(ts, rows, one)
    h.close(times, [2.0, 1.0, 0.5], 0.0, "times")
    h.close(be.gathered([sorted_rows[i] for i in range(3)]), [3.0, 5.0, 7.0, 11.0, 1.0, 2.0], 0.0, "rows")
    times, _ = be.sort_down(ts, rows, -one)
    h.close(times, [0.5, 1.0, 2.0], 0.0, "times, backwards")
    got = h.numbers(be.reached(rows, ts, be.scalar(h.array(1.0)), one))
    require(got[:2] == [1.0, 2.0] and got[4:] == [7.0, 11.0], "reached changes good rows")
    require(all(v != v for v in got[2:4]), "reached leaves a row that was not reached")
