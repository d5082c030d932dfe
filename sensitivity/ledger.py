"""What events need of the loops: branches, parts of a reverse sweep, and a list that grows inside a loop's state."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any

from .recompute import Recall
from .records import Array, Scalar


class LedgerLoops:
    """The eager form; a tracing backend has its own."""

    xp: Any = None

    def scalar(self, x: Any) -> Scalar:
        """A number as the loops use it."""
        raise NotImplementedError

    def when(self, pred: Any, then: Callable[[], Any], otherwise: Any) -> Any:
        """`then()` if the scalar `pred` holds, else `otherwise`, a value of the same structure."""
        return then() if pred else otherwise

    def branch(self, i: Any, functions: Sequence[Callable], *operands: Any) -> Any:
        """`functions[i](*operands)`; all have results of one structure."""
        return functions[i](*operands)

    def newest(self, log: Any, extra: Any) -> Any:
        """The position behind the newest record of a log, where `rewind` with this `extra` starts."""
        del extra
        return len(log)

    def rewind(self, body: Callable, state: Any, log: Any, extra: Any, position: Any,
               more: Callable[[Any, Scalar], Any]) -> tuple[Any, Any]:
        """A part of `replay`: from `position` back while `more(state, start time of the record)`.

        Returns the state and the position reached.
        """
        if isinstance(log, Recall):
            return log.rewind(body, state, extra, position, more)
        while position > 0 and more(state, log[position - 1].t):
            position -= 1
            out = None if extra is None else extra[position]
            state = body(state, log[position], out, position == len(log) - 1)
        return state, position

    def ledger(self, example: Any, capacity: int) -> Any:
        """An empty list of tuples like `example`, part of a loop's state; see `enter`."""
        del example, capacity
        return ()

    def enter(self, ledger: Any, entry: Any) -> Any:
        """The ledger with one more entry."""
        return (*ledger, entry)

    def entries(self, ledger: Any, like: Array, fill: float = math.nan) -> tuple[Any, Array, Any]:
        """A ledger of `(t, u, index)` as columns: times, states `(K, n)`, indices; `fill` and -1 where there is room
        for more."""
        del fill
        rows = [e[1] for e in ledger]
        u = self.xp.stack(rows) if rows else self.xp.reshape(like, (1, -1))[:0, :]
        return [e[0] for e in ledger], u, [e[2] for e in ledger]

    def columns(self, ledger: Any, example: tuple[Array, ...]) -> tuple[Array, ...]:
        """A ledger of tuples of arrays like `example`, stacked by column; zeros beyond what was entered."""
        if not ledger:
            return tuple(self.xp.reshape(x, (1, *x.shape))[:0, ...] for x in example)
        return tuple(self.xp.stack(column) for column in zip(*ledger, strict=True))

    def entry(self, ledger: Any, i: Any) -> Any:
        """Entry `i` of a ledger."""
        return ledger[i]

    def moment(self, ledger: Any, i: Any) -> Scalar:
        """The time of entry `i` of a ledger of events; infinite behind the last."""
        return ledger[i].t if i < len(ledger) else math.inf

    def happened(self, ledger: Any, t: Scalar) -> Any:
        """The number of the entry of a ledger of events at this very time, or -1."""
        sign = 1.0 if not ledger or ledger[0].t <= ledger[-1].t else -1.0
        i = bisect.bisect_left(ledger, sign * t, key=lambda event: sign * event.t)
        return i if i < len(ledger) and ledger[i].t == t else -1

    def within(self, times: Any, index: Any, t0: Scalar) -> Any:
        """Times of a ledger's entries; where there is room for more, `t0`."""
        del index, t0
        return times

    def capped(self, ts: Any, end: Scalar, direction: Scalar) -> Any:
        """Times, none of them behind `end`."""
        return [t if direction * (t - end) <= 0.0 else end for t in ts]

    def whole(self, x: Any) -> Any:
        """A number that is known to be whole, as an integer."""
        return round(float(x))

    def near(self, ts: Any, t: Scalar, distance: Scalar) -> Any:
        """Whether a time lies close to one of several."""
        return any(abs(s - t) <= distance for s in ts)

    def indices(self, values: Any) -> Array:
        """Small integers as an array for the user."""
        return self.xp.asarray(values, dtype=self.xp.int32)

    def unwind(self, body: Callable, state: Any, ledger: Any, extra: tuple[Any, Any] | None) -> Any:
        """Fold `state = body(state, entry, (t_bar, u_bar), newest)` over a ledger, newest entry first.

        `extra` holds the cotangents of the times `(K,)` and states `(K, n)` of `entries`, or nothing.
        """
        for i in reversed(range(len(ledger))):
            bars = None if extra is None else (self.scalar(extra[0][i]), extra[1][i, :])
            state = body(state, ledger[i], bars, i == len(ledger) - 1)
        return state
