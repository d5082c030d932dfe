"""Loops and logs for frameworks that run eagerly.

Vectors are one-dimensional arrays; a *scalar* (time, step size, error ratio) is a Python float on backends that run
eagerly and a 0-d array on backends that trace.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any

from .ledger import LedgerLoops
from .recompute import Pulled, Recall, Recomputing
from .records import Array, Contribution, Mark, Record, Scalar
from .recursions import Recursions
from .segments import Retaken


class Loops(Recursions, LedgerLoops, Recomputing):
    """Loops, selection and small matrix recursions for frameworks that run eagerly.

    A tracing backend overrides every method with the compiled twin; results must be equal.
    """

    traced = False

    def device(self, x: Array) -> Any:
        """Where an array lives."""
        raise NotImplementedError

    def scalar(self, x: Any) -> Scalar:
        """A number as the loops use it."""
        raise NotImplementedError

    def is_array(self, x: Any) -> bool:
        """Whether `x` is an array of this framework."""
        raise NotImplementedError

    def choose(self, pred: Any, a: Any, b: Any) -> Any:
        """`a` where the scalar `pred` holds, else `b`; `a` and `b` have one structure."""
        return a if pred else b

    def least(self, a: Scalar, b: Scalar) -> Scalar:
        return min(a, b)

    def greatest(self, a: Scalar, b: Scalar) -> Scalar:
        return max(a, b)

    def isfinite(self, x: Scalar) -> Any:
        return math.isfinite(x)

    def iterate(self, step: Callable, state: Any, running: Callable, limit: int, sink: Any = None) -> tuple[Any, Any]:
        """Run `state, record, keep = step(state)` while `running(state)`, at most `limit` times.

        Records with `keep` go to `sink` (from `store` or `sampler`), or nowhere. Returns `(state, sink result)`.
        """
        add = None if sink is None else sink.add
        for _ in range(limit):
            if not running(state):
                break
            state, record, keep = step(state)
            if keep and add is not None:
                add(record)
        return state, None if sink is None else sink.result()

    def replay(self, body: Callable, state: Any, log: Any, extra: Any = None) -> Any:
        """Fold `state = body(state, record, extra_n, last)` over a log, newest record first.

        `extra` is a sequence aligned with the log (see `sample_vjp`), or None; `last` marks the newest record.
        """
        if isinstance(log, Recall):
            return log.replay(body, state, extra)
        for n in reversed(range(len(log))):
            state = body(state, log[n], None if extra is None else extra[n], n == len(log) - 1)
        return state

    def follow(self, body: Callable, state: Any, log: Any, sink: Any = None) -> tuple[Any, Any]:
        """Fold `state, new = body(state, record, last)` over a log, oldest record first; the `new` form a log too, or
        go to `sink`."""
        out = _Store() if sink is None else sink
        for n in range(len(log)):
            state, new = body(state, log[n], n == len(log) - 1)
            out.add(new)
        return state, out.result()

    def nodes(self, log: Any, end: Array, t_end: Scalar) -> tuple[Array, Any]:
        """States and times at the ends of all steps: `(N, n)` and N times."""
        states = [r.u for r in log[1:]] + [end] * bool(log)
        u = self.xp.stack(states) if states else self.xp.reshape(end, (1, -1))[:0, :]
        return u, [r.t for r in log[1:]] + [t_end] * bool(log)

    def nodes_vjp(self, log: Any, ct: Array) -> tuple[Any, Array]:
        """Pull cotangents of `nodes` back: contributions aligned with the log, and the cotangent of the end state."""
        return [None] + [Contribution(ct[n, :], None, 0.0) for n in range(len(log) - 1)], ct[len(log) - 1, :]

    def stacked(self, log: Any) -> tuple[Any, Any, Array, Array]:
        """A log as arrays: times, sizes, start states `(N, n)`, stages `(N, s, n)`."""
        xp = self.xp
        return [r.t for r in log], [r.h for r in log], xp.stack([r.u for r in log]), xp.stack([r.k for r in log])

    def unstacked(self, times: Any, sizes: Any, u: Array, k: Array, count: Any) -> Any:
        """A log from the arrays of `stacked`."""
        return [Record(times[n], sizes[n], u[n, :], k[n, :, :]) for n in range(int(count))]

    def trimmed(self, rows: Array, ts: Any, count: Any) -> tuple[Array, Any]:
        """The first `count` rows and times; where `count` is only traced, the rest becomes NaN."""
        return rows, ts

    def stacked_vjp(self, log: Any, u: Array, k: Array, extra: Any) -> Any:
        """Contributions from cotangents of the arrays of `stacked`, added to `extra`."""
        out = []
        for n in range(len(log)):
            old = None if extra is None else extra[n]
            u_n, k_n, h_n, t_n = u[n, :], k[n, :, :], 0.0, 0.0
            if old is not None:
                u_n, h_n, t_n = u_n + old.u, old.h, old.t
                k_n = k_n if old.k is None else k_n + old.k
            out.append(Contribution(u_n, k_n, h_n, t_n))
        return out

    def silent_end(self, extra: Any) -> int:
        """1 if the newest step's last stage got no cotangent from outputs, so that its product was left out."""
        if isinstance(extra, Pulled):
            return int(extra.silent)
        return int(extra is None or extra[-1] is None or extra[-1].k is None)

    def restaged(self, log: Any) -> Any:
        """Of how many steps of a log the stages are evaluated again where they are needed."""
        del log
        return 0

    def last_size(self, log: Any) -> Scalar:
        """Size of the newest step; 1.0 if there is none."""
        return log[-1].h if log else 1.0

    def pick(self, rows: Array, position: Scalar) -> Array:
        """The row whose number is nearest to the scalar `position`."""
        return rows[round(position), ...]

    def spread(self, t0: Any, t1: Any, fractions: Sequence[float]) -> Any:
        """Times `t0 + w (t1 - t0)`, exact at both ends."""
        return [t0 if w == 0.0 else t1 if w == 1.0 else t0 + w * (t1 - t0) for w in fractions]

    def total(self, values: Any, weights: Sequence[float] | None = None) -> Scalar:
        """Weighted sum of scalars."""
        return sum(values) if weights is None else sum(w * v for w, v in zip(weights, values, strict=True))

    def sort_down(self, ts: Any, rows: Array, direction: Scalar) -> tuple[Any, Any]:
        """Times from the last to the first along `direction`, with their rows."""
        order = sorted(range(len(ts)), key=lambda i: -direction * ts[i])
        return [ts[i] for i in order], [rows[i, :] for i in order]

    def gathered(self, rows: Any) -> Array:
        """The result list of `scan` as one array."""
        return self.xp.stack(rows)

    def reached(self, rows: Array, ts: Any, t_end: Scalar, direction: Scalar) -> Array:
        """Rows of times that the solve did not reach become NaN."""
        if all(direction * (t - t_end) <= 0.0 for t in ts):
            return rows
        bad = self.vector([math.nan if direction * (t - t_end) > 0.0 else 0.0 for t in ts], rows)
        return rows + bad[:, None]

    def padded(self, v: Array, size: int) -> Array:
        """`v` followed by zeros up to `size` entries."""
        more = size - v.shape[0]
        return self.xp.concat([v, self.xp.zeros((more,), dtype=v.dtype, device=self.device(v))]) if more else v

    def split(self, flat: Array, like: tuple[Array, ...]) -> tuple[Array, ...]:
        """Pieces of a vector in the shapes and dtypes of `like`."""
        out, start = [], 0
        for v in like:
            stop = start + math.prod(v.shape)
            out.append(self.xp.astype(self.xp.reshape(flat[start:stop], v.shape), v.dtype))
            start = stop
        return tuple(out)

    def detached(self, x: Any) -> Any:
        """Inputs whose `t0` and `t1` carry no derivative."""
        return x

    def differentiable(self) -> Any:
        """The same backend with loops that the framework's own AD can run through."""
        return self

    def nothing(self, like: Array) -> Array | None:
        """A zero cotangent; None on eager backends, which leave it out."""
        del like
        return None

    def scan(self, body: Callable, state: Any, xs: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        """Fold `state, y = body(state, x)` over sequences of one known length; returns the list or array of `y`."""
        ys = []
        for n in range(len(xs[0])):
            state, y = body(state, tuple(x[n, ...] if self.is_array(x) else x[n] for x in xs))
            ys.append(y)
        return state, ys

    def store(self, capacity: int) -> Any:
        """A sink that keeps every record; its result is a log for `replay`, `sample`, `lookup`."""
        del capacity
        return _Store()

    def reopen(self, log: Any, stages: Callable[[Record], Array]) -> Any:
        """A stored log ready for use; `stages(record)` remakes the stages where they were too big to keep."""
        del stages
        return log

    def sampler(self, interpolate: Callable, ts: Any, u0: Array, direction: Scalar, capacity: int,
                stages: Callable[[Record], Array]) -> Any:
        """A sink that keeps only the states at times `ts`; its result has shape `(len(ts), n)`.

        `interpolate(record, ts)` evaluates the dense output of one step at several times; `stages` as in `reopen`.
        """
        del capacity, stages
        return _Sampler(self, interpolate, ts, u0, direction)

    def marks(self, capacity: int, every: int | None, interpolate: Callable | None = None, ts: Any = None,
              first: Array | None = None, s: Any = None) -> Any:
        """A sink that keeps of each step its time and size, and the start state of every `every`-th step.

        With `interpolate` it also takes the rows at times `ts` of the span `s`, step by step as `sampler` says, and
        keeps nothing else of a step; `first` is the row where there is no step. Its result is `(log, rows or None)`.
        """
        del capacity
        return _Marks(every, None if interpolate is None else _Sampler(self, interpolate, ts, first, s.direction))

    def fold(self, body: Callable, state: Any) -> Any:
        """A sink that keeps no record: its result is `state` after `state = body(state, record)` for each."""
        return _Fold(body, state)

    def joined(self, a: Any, b: Any) -> Any:
        """Times `a` followed by times `b`, as the loops keep them."""
        return [*a, *b]

    def lookup(self, interpolate: Callable, log: Any, otherwise: Array | None = None,
               between: tuple[Scalar, Scalar] | None = None) -> Callable[[Scalar], Array]:
        """Dense output over a whole log: `t -> u(t)`; `otherwise` is the answer of an empty log.

        With `between`, two nodes in the order of the log, only steps between them answer: at a node where the solution
        jumps, the side that belongs to the interval.
        """
        if not log and otherwise is not None:
            return lambda t: otherwise
        starts = [r.t for r in log]
        sign = 1.0 if not log or log[0].h >= 0 else -1.0
        keys = [sign * t for t in starts]
        first, last = 0, len(keys) - 1
        if between is not None:
            first = max(bisect.bisect_right(keys, sign * between[0]) - 1, 0)
            last = max(bisect.bisect_left(keys, sign * between[1]) - 1, first)

        def dense(t: Scalar) -> Array:
            n = min(max(bisect.bisect_right(keys, sign * t) - 1, first), last)
            return interpolate(log[n], [t])[0, :]

        return dense

    def place(self, log: Any) -> Callable[[Scalar], Any]:
        """`t -> number of the step around t`; only differences of these numbers mean something."""
        sign = 1.0 if not log or log[0].h >= 0 else -1.0
        keys = [sign * r.t for r in log]
        return lambda t: bisect.bisect_right(keys, sign * t)

    def sample(self, interpolate: Callable, log: Any, ts: Any, u0: Array, direction: Scalar) -> Array:
        """States at times `ts` (any order, repeats allowed) from a log; shape `(len(ts), n)`."""
        sink = _Sampler(self, interpolate, ts, u0, direction)
        for record in log:
            sink.add(record)
        return sink.result()

    def sample_vjp(self, transpose: Callable, log: Any, ts: Any, ct: Array, direction: Scalar) -> tuple[Any, Any]:
        """Pull cotangents `ct` of `sample` back: contributions aligned with the log, and cotangents of `ts`.

        `transpose(record, ts, ct_rows) -> (Contribution, [ct of each t])` is one step's pullback.
        """
        if isinstance(log, Recall | Retaken):
            groups = self._groups(log.kept.t, ts, direction)
            return Pulled(self, transpose, ts, ct, groups, len(log) - 1), None
        groups = self._groups([r.t for r in log], ts, direction)
        extra: list[Contribution | None] = [None] * len(log)
        ts_bar = [0.0] * len(ts)
        for n, members in groups.items():
            rows = self.picked(ct, members)
            extra[n], bars = transpose(log[n], [ts[i] for i in members], rows)
            for i, bar in zip(members, bars, strict=True):
                ts_bar[i] = bar
        return extra, ts_bar

    @staticmethod
    def _groups(times: Any, ts: Any, direction: float) -> dict[int, list[int]]:
        """Indices of the save times inside each step; a time on a node belongs to the step that ends there."""
        starts = [direction * t for t in times]
        groups: dict[int, list[int]] = {}
        for i, t in enumerate(ts):
            if starts:
                groups.setdefault(max(bisect.bisect_left(starts, direction * t) - 1, 0), []).append(i)
        return groups


class _Store(list):
    add = list.append

    def result(self) -> _Store:
        return self


class _Fold:
    def __init__(self, body: Callable, state: Any) -> None:
        self.body, self.state = body, state

    def add(self, record: Record) -> None:
        self.state = self.body(self.state, record)

    def result(self) -> Any:
        return self.state


class _Marks:
    def __init__(self, every: int | None, sampler: _Sampler | None) -> None:
        self.every, self.sampler = every, sampler
        self.log = _Store()

    def add(self, record: Record) -> None:
        stored = self.every is not None and len(self.log) % self.every == 0
        self.log.append(Mark(record.t, record.h, record.u if stored else None, stored))
        if self.sampler is not None:
            self.sampler.add(record)

    def result(self) -> tuple[Any, Any]:
        return self.log, None if self.sampler is None else self.sampler.result()


class _Sampler:
    def __init__(self, be: Loops, interpolate: Callable, ts: Any, u0: Array, direction: float) -> None:
        self.be, self.interpolate, self.direction, self.u0 = be, interpolate, direction, u0
        self.order = sorted(range(len(ts)), key=lambda i: direction * ts[i])
        self.ts = [ts[i] for i in self.order]
        self.keys = [direction * t for t in self.ts]
        self.done = 0
        self.parts: list[Array] = []
        self.last: Record | None = None

    def add(self, record: Record) -> None:
        if self.done == len(self.keys):
            return
        self.last = record
        end = bisect.bisect_right(self.keys, self.direction * (record.t + record.h), self.done)
        if end > self.done:
            self.parts.append(self.interpolate(record, self.ts[self.done:end]))
            self.done = end

    def result(self) -> Array:
        xp = self.be.xp
        k = len(self.ts)
        if self.done < k:
            # Round-off may leave a time at t1 behind the last node; a failed solve leaves the rest unknown.
            if self.last is None:
                self.parts.append(xp.concat([xp.reshape(self.u0, (1, -1))] * k, axis=0))
            else:
                self.parts.append(self.interpolate(self.last, self.ts[self.done:]))
        rows = xp.concat(self.parts, axis=0) if len(self.parts) > 1 else self.parts[0]
        if self.order == list(range(k)):
            return rows
        place = [0] * k
        for position, i in enumerate(self.order):
            place[i] = position
        return xp.stack([rows[j, :] for j in place])
