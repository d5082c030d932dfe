"""Logs that keep some states only, for frameworks that run eagerly, and the reverse pass that takes steps again."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any

from .checkpoint import Plan, reverse
from .records import Array, Contribution, Record, Scalar
from .spill import Spilled

Stepper = Any


class Checkpoints:
    """A sink that keeps times and sizes of all steps, some states as the plan has it, and the newest step whole.

    `sampler` is a sink that gets every step as well, for the output that the forward solve hands out.
    """

    def __init__(self, be: Any, plan: Plan, stepper: Stepper, sampler: Any) -> None:
        self.be, self.plan, self.stepper, self.sampler = be, plan, stepper, sampler
        self.t, self.h = array("d"), array("d")
        self.whole: list[Record] | None = [] if plan.whole else None
        self.places = plan.places()
        self.states: Any = {} if plan.spill is None else Spilled(be, plan.spill)
        self.newest: Record | None = None

    def __len__(self) -> int:
        return len(self.t)

    def add(self, record: Record) -> None:
        if self.sampler is not None:
            self.sampler.add(record)
        self.t.append(record.t)
        self.h.append(record.h)
        self.newest = record
        if self.whole is None:
            self._keep(len(self.t) - 1, record)
        elif len(self.whole) < self.plan.whole:
            self.whole.append(record)
        else:
            early, self.whole = self.whole, None
            for n in range(len(early)):
                self._keep(n, early[n])
                early[n] = record  # lets go of the stages
            self._keep(len(self.t) - 1, record)

    def _keep(self, n: int, record: Record) -> None:
        slot = next(self.places)
        if slot >= 0:
            k = self.stepper.entry(record)
            self.states[slot] = n, record.u, None if k is None else self.be.copy(k)

    def held(self) -> dict[int, int]:
        """Which state lies in which slot."""
        return self.states.steps if isinstance(self.states, Spilled) else {s: x[0] for s, x in self.states.items()}

    def result(self) -> tuple[Checkpoints, Any]:
        sampler, self.sampler = self.sampler, None
        return self, None if sampler is None else sampler.result()


class Nodes:
    """A sink that keeps the state at the start of every step."""

    def __init__(self) -> None:
        self.u: list[Array] = []

    def add(self, record: Record) -> None:
        self.u.append(record.u)

    def result(self) -> list[Array]:
        return self.u


class Recall:
    """The steps of a solve from the newest to the first, taken again where they were not kept.

    `taken` counts them, and `iterations` the evaluations of `f` in them that no formula knows. `crossing(t, u, k)` is
    what the next step starts from where one ended at time t with state u and slope k, and how many evaluations of `f`
    that takes; None where nothing happens between steps.
    """

    def __init__(self, kept: Checkpoints, stepper: Stepper, crossing: Callable | None = None) -> None:
        self.kept, self.stepper, self.crossing, self.taken, self.iterations = kept, stepper, crossing, 0, 0
        self.steps: Iterator[tuple[int, Record]] | None = None

    def __len__(self) -> int:
        return len(self.kept)

    def replay(self, body: Callable, state: Any, extra: Any) -> Any:
        """As `Loops.replay`."""
        return self.rewind(body, state, extra, len(self), lambda *_: True)[0]

    def rewind(self, body: Callable, state: Any, extra: Any, position: int,
               more: Callable[[Any, Scalar], Any]) -> tuple[Any, int]:
        """As `Loops.rewind`; each call goes on where the last one ended."""
        self.steps = self.steps or self.backwards()
        while position > 0 and more(state, self.kept.t[position - 1]):
            position, record = next(self.steps)
            out = None
            if extra is not None:
                out = extra.at(position, record) if isinstance(extra, Pulled) else extra[position]
            state = body(state, record, out, position == len(self) - 1)
        return state, position

    def backwards(self) -> Iterator[tuple[int, Record]]:
        """`(number, record)` of each step, the newest first.

        Slots are used anew as they become free, so a second pass finds fewer states that help it, and takes longer.
        """
        kept, stepper, states = self.kept, self.stepper, self.kept.states
        if kept.whole is not None:
            yield from ((n, kept.whole[n]) for n in reversed(range(len(kept.whole))))
            return
        u = k = None
        held: dict[int, Record] = {}
        for kind, n, slot in reverse(len(kept), kept.plan.slots, kept.held(), kept.plan.block):
            if kind == "restore":
                _, u, k = states[slot]
            elif kind == "store":
                states[slot] = n, u, k if k is None else kept.be.copy(k)
            elif kind == "advance":
                u, k = self._taken(stepper.attempt, n, u, k)[:2]
            elif n in held:
                yield n, held.pop(n)
            elif n == len(kept) - 1 and kept.newest is not None:
                yield n, kept.newest
            else:
                u, k, record = self._taken(stepper.retake, n, u, k)
                if kind == "hold":
                    held[n] = record
                else:
                    yield n, record

    def _taken(self, take: Callable, n: int, u: Array, k: Array | None) -> tuple[Array, Array | None, Record]:
        """Step `n` from `u` with the carried slope `k`: what the next one starts from, and the step."""
        t, h = self.kept.t[n], self.kept.h[n]
        u1, K, iterations = take(t, h, u, k)
        k1, crossed = self.stepper.carry(K), 0
        if self.crossing is not None and n + 1 < len(self):
            u1, k1, crossed = self.crossing(self.kept.t[n + 1], u1, k1)
        self.taken, self.iterations = self.taken + 1, self.iterations + iterations + crossed
        return u1, k1, Record(t, h, u, K)

    def forwards(self, u: Array) -> Iterator[Record]:
        """All steps from the first, which starts from `u`, to the newest."""
        kept = self.kept
        if kept.whole is not None:
            yield from kept.whole
            return
        held = kept.held()
        k = kept.states[min(held, key=lambda slot: held[slot])][2] if held else None
        for n in range(len(kept)):
            u, k, record = self._taken(self.stepper.attempt, n, u, k)
            yield record


class Pulled:
    """Cotangents of the output inside steps, pulled back as the steps come by; afterwards `ts` has those of the times.

    `transpose` as in `Loops.sample_vjp`; `groups` are the numbers of the output times in each step.
    """

    def __init__(self, be: Any, transpose: Callable, ts: Any, ct: Array, groups: dict[int, list[int]],
                 newest: int) -> None:
        self.be, self.transpose, self.times, self.ct, self.groups = be, transpose, ts, ct, groups
        self.ts = [0.0] * len(ts)
        self.silent = newest not in groups

    def at(self, n: int, record: Record) -> Contribution | None:
        """What the output inside step `n` contributes."""
        members = self.groups.get(n)
        if members is None:
            return None
        rows = self.be.picked(self.ct, members)
        out, bars = self.transpose(record, [self.times[i] for i in members], rows)
        for i, bar in zip(members, bars, strict=True):
            self.ts[i] = bar
        return out


class Recomputing:
    """Primitives of a backend for solves that keep some states only; the base of `Loops`."""

    def checkpoints(self, plan: Plan, stepper: Stepper, saves: Any, ts: Any, u0: Array, direction: Scalar,
                    capacity: int) -> Any:
        """A sink that keeps what `plan` says; its result is `(kept, rows)`, `kept` for `recall`.

        `rows` holds the states at the times `ts`, the states that steps start from for `saves="steps"` (see
        `node_rows`), or None.
        """
        be: Any = self
        sampler: Any = None
        if saves == "steps":
            sampler = Nodes()
        elif saves is not None:
            sampler = be.sampler(stepper.interpolate, ts, u0, direction, capacity, stepper.restage)
        return Checkpoints(self, plan, stepper, sampler)

    def recall(self, kept: Any, stepper: Stepper, crossing: Callable | None = None) -> Any:
        """What `checkpoints` kept as a log for `replay`, `rewind`, `sample_vjp`, `nodes_vjp`, which takes steps again.

        `stepper` takes steps as those that were recorded: see `integrate.controlled`; `crossing` as in `Recall`.
        """
        return Recall(kept, stepper, crossing)

    def recalled(self, log: Any, extra: Any, position: Any = None) -> tuple[Any, Any, Any]:
        """What a `replay` of `recall`, or a `collect` of `retaking`, leaves: steps taken again, iterations in them, and
        cotangents of the times of `sample_vjp`. With `position`, what parts of it, by `rewind`, left there."""
        del position
        return log.taken, log.iterations, extra.ts if isinstance(extra, Pulled) else None

    def remade(self, log: Any, u0: Array) -> Any:
        """All steps of a `recall` in a log as `store` makes it."""
        be: Any = self
        sink = be.store(len(log))
        for record in log.forwards(u0):
            sink.add(record)
        return sink.result()

    def node_rows(self, rows: Any, log: Any, end: Array, t_end: Scalar) -> tuple[Array, Any]:
        """As `Loops.nodes`, from the rows that `checkpoints` collected for "steps"."""
        xp = self.xp  # type: ignore[attr-defined]
        states = [*rows[1:], end] if rows else []
        u = xp.stack(states) if states else xp.reshape(end, (1, -1))[:0, :]
        return u, [*log.t[1:], t_end] if rows else []


__all__ = ["Checkpoints", "Pulled", "Recall", "Recomputing"]
