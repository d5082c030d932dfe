"""Solves that keep some states only, compiled: slots of a fixed number, and a reverse pass that takes steps again.

Which slot a state goes to depends on its number alone, so the schedule is a table of integers. In the reverse pass
the number of steps is a traced value; one loop takes one step in each round, and either goes on or pulls it back.
"""

from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sensitivity.backend import Contribution, Record

from ._lanes import select
from ._log import Log, OpenLog, Store, room_for_stages
from ._typed import arrays, like

LARGEST = 40_000  # more slots than this would overflow the binomial numbers, and change nothing


class Kept(NamedTuple):
    """Times and sizes of `count` steps, the newest step, and states with their slopes: slot `j` has state `step[j]`.

    The last slot is a bin for what is not to be kept. `rows` is the output, as `Rows` makes it.
    """

    t: Any
    h: Any
    count: Any
    newest: Record
    step: Any
    u: Any
    k: Any
    rows: Any


@cache
def _table(plan, capacity):
    return np.array(list(islice(plan.places(), capacity)), np.int32)


class Whole(NamedTuple):
    """A sink for a budget that holds all steps there may be."""

    store: Store
    sampler: Any

    @property
    def capacity(self):
        return self.store.capacity

    def start(self, record):
        return self.store.start(record)

    def add(self, log, record, mine):
        return self.store.add(log, record, mine)

    def result(self, log):
        return log, None if self.sampler is None else self.sampler.result(log)


class Rows(NamedTuple):
    """Output made as the steps come by: at times `ts`, at the start of every step ("steps"), or none (None)."""

    interpolate: Any
    ts: Any
    u0: Any
    direction: Any

    def _sorted(self):
        order = jnp.argsort(self.direction * self.ts)
        return order, self.ts[order]

    def start(self, record, capacity):
        """The rows, and how many of them are made."""
        rows = None
        if isinstance(self.ts, str):
            rows = jnp.zeros((capacity, *record.u.shape), record.u.dtype)
        elif self.ts is not None:
            rows = jnp.zeros((self.ts.shape[0], record.u.shape[0]), record.u.dtype)
        return rows, jnp.int32(0)

    def add(self, made, i, record, mine):
        """The rows after step `i`, if it is `mine`."""
        rows, done = made
        put = lambda b, x, at: lax.dynamic_update_index_in_dim(b, x.astype(b.dtype), at, 0)  # noqa: E731
        if isinstance(self.ts, str):
            return put(rows, jnp.where(mine, record.u, rows[i]), i), done
        if self.ts is None:
            return made
        _, ts = self._sorted()
        end = self.direction * (record.t + record.h)

        def inside(carry):
            _, done = carry
            return mine & (done < ts.shape[0]) & (self.direction * ts[jnp.minimum(done, ts.shape[0] - 1)] <= end)

        def output(carry):
            rows, done = carry
            return put(rows, self.interpolate(record, [ts[done]])[0], done), done + 1

        return lax.while_loop(inside, output, made)

    def result(self, made, newest, count):
        """All rows in the order of `ts`."""
        made, done = made
        if self.ts is None or isinstance(self.ts, str):
            return made
        order, ts = self._sorted()
        # Round-off may leave a time at t1 behind the last node.
        newest = newest._replace(h=jnp.where(count > 0, newest.h, 1.0).astype(newest.h.dtype))
        rest = jax.vmap(lambda t: self.interpolate(newest, [t])[0])(ts)
        rest = jnp.where(count > 0, rest, self.u0)
        rows = jnp.where((jnp.arange(ts.shape[0]) < done)[:, None], made, rest)
        return jnp.zeros_like(rows).at[order].set(rows)


class Checkpoints(NamedTuple):
    """A sink as `plan` has it; `rows` is the output."""

    plan: Any
    stepper: Any
    rows: Rows
    capacity: int

    def start(self, record):
        slots = min(self.plan.slots, self.capacity) + 2
        k = jax.eval_shape(self.stepper.entry, record)
        zeros = lambda x, *shape: jnp.zeros((*shape, *x.shape), x.dtype)  # noqa: E731
        return Kept(zeros(record.t, self.capacity), zeros(record.h, self.capacity), jnp.int32(0),
                    jax.tree.map(zeros, record), jnp.full(slots, -1, jnp.int32), zeros(record.u, slots),
                    jax.tree.map(lambda x: zeros(x, slots), k), self.rows.start(record, self.capacity))

    def add(self, log, record, mine):
        i = log.count
        put = lambda b, x, at: lax.dynamic_update_index_in_dim(b, x.astype(b.dtype), at, 0)  # noqa: E731
        bin_ = log.step.shape[0] - 1
        slot = jnp.asarray(np.minimum(_table(self.plan, self.capacity), bin_))[i]
        slot = jnp.where(mine & (slot >= 0), slot, bin_)
        k = jax.tree.map(lambda b, x: put(b, x, slot), log.k, self.stepper.entry(record))
        return log._replace(t=put(log.t, record.t, i), h=put(log.h, record.h, i), count=i + mine.astype(jnp.int32),
                            newest=select(mine, like(record, log.newest), log.newest), k=k,
                            step=put(log.step, jnp.where(slot == bin_, -1, i), slot), u=put(log.u, record.u, slot),
                            rows=self.rows.add(log.rows, i, record, mine))

    def result(self, log):
        return log._replace(rows=None), self.rows.result(log.rows, log.newest, log.count)


class Pulled:
    """Cotangents of the output inside steps, pulled back as the steps come by; see `sensitivity.recompute.Pulled`."""

    def __init__(self, transpose, ts, ct, slots):
        self.order = jnp.argsort(slots)
        self.ts, self.ct, self.slots = ts[self.order], ct[self.order], slots[self.order]
        self.transpose = transpose

    def start(self, record):
        """Where to go on, and cotangents of the times: the loop's state."""
        shape = jax.eval_shape(self._one, record, jnp.int32(0))[0]
        self.zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
        return jnp.int32(self.ts.shape[0] - 1), jnp.zeros_like(self.ts)

    def _one(self, record, i):
        out, (bar,) = self.transpose(record, [self.ts[i]], self.ct[i][None, :])
        return arrays(out), jnp.asarray(bar, self.ts.dtype)

    def at(self, n, record, state):
        """What the output inside step `n` contributes."""
        def more(carry):
            i = carry[0]
            return (i >= 0) & (self.slots[jnp.maximum(i, 0)] == n)

        def pull(carry):
            i, bars, total = carry
            out, bar = self._one(record, i)
            return i - 1, bars.at[i].set(bar), jax.tree.map(jnp.add, total, out)

        *state, total = lax.while_loop(more, pull, (*state, self.zero))
        return total, tuple(state)


class Position(NamedTuple):
    """A reverse pass on its way: step `due` is to be pulled back next, step `here` starts from `u` with slope `k`, the
    state of step `target` is to be stored; slots, counts, and what `Pulled` remembers."""

    due: Any
    here: Any
    u: Any
    k: Any
    target: Any
    memory: Any
    taken: Any
    iterations: Any
    output: Any


class Recall:
    """The steps of a solve from the newest to the first, taken again where they were not kept; see
    `sensitivity.recompute.Recall`."""

    def __init__(self, kept, stepper, crossing=None):
        self.kept, self.stepper, self.crossing, self.end = kept, stepper, crossing, None

    def start(self, extra):
        """The position behind the newest step."""
        kept, none = self.kept, jnp.int32(0)
        last = kept.count - 1
        return Position(last, last, kept.newest.u, self.stepper.entry(kept.newest), jnp.int32(-1),
                        _Memory(kept.step, kept.u, kept.k), none, none,
                        extra.start(kept.newest) if isinstance(extra, Pulled) else ())

    def replay(self, body, state, extra):
        state, self.end = self.rewind(body, state, extra, self.start(extra), lambda *_: True)
        return state

    def rewind(self, body, state, extra, position, more):
        """A part of `replay`, as `LedgerLoops.rewind`."""
        kept, stepper, last = self.kept, self.stepper, self.kept.count - 1
        pulled = isinstance(extra, Pulled)

        def back(i, record, state, output):
            out = None
            if pulled:
                out, output = extra.at(i, record, output)
            elif extra is not None:
                out = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, i, 0, False), extra)
            return like(arrays(body(state, record, out, i == last)), state), output

        def round_(carry):
            (due, here, u, k, target, memory, taken, iterations, output), state = carry
            t, h = kept.t[here], kept.h[here]
            known = u, kept.newest.k, jnp.int32(0)
            u1, K, spent = lax.cond(here == last, lambda: known, lambda: like(stepper.attempt(t, h, u, k), known))
            turn = here == due
            state, output = lax.cond(turn, lambda: back(here, Record(t, h, u, K), state, output),
                                     lambda: (state, output))
            due = due - turn.astype(jnp.int32)
            taken = taken + (here != last).astype(jnp.int32)
            # A branch, as XLA copies all slots where it fuses reading one with what comes after writing another.
            here, u, k, crossed = lax.cond(turn, lambda: (*memory.restored(due), jnp.int32(0)),
                                           lambda: self._onward(here + 1, u1, stepper.carry(K)))
            store = ~turn & (here == target)
            memory = memory.stored(store, due, here, u, k)
            target = jnp.where(turn | store, memory.target(turn | store, here, due), target)
            return Position(due, here, u, k, target, memory, taken, iterations + spent + crossed, output), state

        def on(carry):
            position, state = carry
            return (position.due >= 0) & more(state, kept.t[jnp.maximum(position.due, 0)])

        position, state = lax.while_loop(on, round_, (position, arrays(state)))
        return state, position

    def _onward(self, n, u, k):
        """What step `n` starts from where the one before ended with state `u` and slope `k`."""
        if self.crossing is None:
            return n, u, k, jnp.int32(0)
        return n, *like(arrays(self.crossing(self.kept.t[n], u, k)), (u, k, jnp.int32(0)))

    def left(self, extra, position):
        """What `Recomputing.recalled` says."""
        _, _, _, _, _, _, taken, iterations, output = position
        if not isinstance(extra, Pulled):
            return taken, iterations, None
        return taken, iterations, jnp.zeros_like(output[1]).at[extra.order].set(output[1])

    def forwards(self, be, u0):
        """All steps in a log of their own."""
        del be
        kept, stepper = self.kept, self.stepper
        capacity = kept.t.shape[0]
        room = room_for_stages(kept.newest.k, capacity)
        zeros = lambda x, slots: jnp.zeros((slots, *x.shape), x.dtype)  # noqa: E731
        buffers = zeros(kept.newest.u, capacity), zeros(kept.newest.k, room)
        first = jnp.argmin(jnp.where(kept.step >= 0, kept.step, capacity))
        k = select(kept.count > 1, jax.tree.map(lambda b: b[first], kept.k), stepper.entry(kept.newest))

        def ahead(carry):
            i, u, k, states, stages = carry
            u1, K, _ = stepper.attempt(kept.t[i], kept.h[i], u, k)
            _, u1, k1, _ = self._onward(jnp.minimum(i + 1, capacity - 1), u1, stepper.carry(K))
            states = lax.dynamic_update_index_in_dim(states, u, i, 0)
            if room:
                stages = lax.dynamic_update_index_in_dim(stages, K.astype(stages.dtype), i, 0)
            return i + 1, *like((u1, k1), (u, k)), states, stages

        *_, states, stages = lax.while_loop(lambda c: c[0] < kept.count, ahead, (jnp.int32(0), u0, k, *buffers))
        return Log(Record(kept.t, kept.h, states, stages), jnp.arange(capacity) < kept.count, kept.count,
                   jnp.maximum(kept.count - 1, 0))


class _Memory(NamedTuple):
    """The slots of a reverse pass."""

    step: Any
    u: Any
    k: Any

    def restored(self, due):
        """The latest state that is not behind step `due`."""
        slot = jnp.argmax(jnp.where(self.step <= due, self.step, -1))
        return self.step[slot], self.u[slot], jax.tree.map(lambda b: b[slot], self.k)

    def stored(self, store, due, here, u, k):
        """The same with a state in a slot that is free, if `store`, else in the bin."""
        bin_ = self.step.shape[0] - 1
        slot = jnp.where(store, jnp.argmax((self.step[:-1] < 0) | (self.step[:-1] > due)), bin_)
        put = lambda b, x: lax.dynamic_update_index_in_dim(b, x, slot, 0)  # noqa: E731
        return _Memory(put(self.step, jnp.where(store, here, -1)), put(self.u, u), jax.tree.map(put, self.k, k))

    def target(self, wanted, here, due):
        """The step whose state is to be stored next, or -1; as `sensitivity.checkpoint.reverse` has it."""
        held = jnp.sum((self.step >= 0) & (self.step <= due), dtype=jnp.int32)
        left = due - here + 1
        free = jnp.minimum(jnp.minimum(self.step.shape[0] - 2 - held + 1, left), LARGEST)
        possible = wanted & (free > 1) & (left > 1)
        return jnp.where(possible, here + _split(jnp.where(possible, left, 1), free), -1).astype(jnp.int32)


def _split(steps, slots):
    """`sensitivity.checkpoint.split` for traced numbers."""
    def grow(carry):
        r, whole, _, fewer, _ = carry
        r = r + 1
        return r, whole * (slots + r) // r, whole, fewer * (slots - 1 + r) // r, fewer

    one = jnp.ones_like(steps)
    _, _, whole, _, fewer = lax.while_loop(lambda c: c[1] < steps, grow, (0 * one, one, 0 * one, one, 0 * one))
    return jnp.minimum(whole, steps - fewer)


class Recomputing:
    """The twins of `sensitivity.recompute.Recomputing`; the base of `JaxLoops`."""

    def checkpoints(self, plan, stepper, saves, ts, u0, direction, capacity):
        if plan.whole >= capacity:
            sampler = None
            if saves not in (None, "steps"):
                sampler = self.sampler(stepper.interpolate, ts, u0, direction, capacity, stepper.restage)
            return Whole(self.store(capacity), sampler)
        rows = Rows(stepper.interpolate, "steps" if saves == "steps" else ts, u0, direction)
        return Checkpoints(plan, stepper, rows, capacity)

    def recall(self, kept, stepper, crossing=None):
        return OpenLog(kept, stepper.restage) if isinstance(kept, Log) else Recall(kept, stepper, crossing)

    def recalled(self, log, extra, position=None):
        if isinstance(log, OpenLog):
            return 0, 0, None
        if isinstance(log, Recall):
            return log.left(extra, log.end if position is None else position)
        return log.taken, log.iterations, log.ts_bar

    def remade(self, log, u0):
        return log.log if isinstance(log, OpenLog) else log.forwards(self, u0)

    def node_rows(self, rows, log, end, t_end):
        if isinstance(log, Log):
            return self.nodes(OpenLog(log, None), end, t_end)
        index = jnp.arange(rows.shape[0])
        u, t = jnp.roll(rows, -1, axis=0), jnp.roll(log.t, -1)
        return (jnp.where((index == log.count - 1)[:, None], end, u),
                jnp.where(index >= log.count - 1, t_end, t))

    def _node_starts(self, log, ct):
        """`nodes_vjp` for a `Recall`."""
        count = log.kept.count
        used = jnp.where((jnp.arange(ct.shape[0]) < count - 1)[:, None], ct, 0.0)
        none = jnp.zeros(ct.shape[0], log.kept.h.dtype)
        return Contribution(jnp.roll(used, 1, axis=0), None, none, none), ct[jnp.maximum(count - 1, 0)]
