"""Checkpoint schedules: which states to keep, and in which order to take steps again.

A solve took `l` steps, numbered from 0; step `n` starts from state `n`. The reverse pass needs the steps from `l - 1`
down to 0 while at most `c` states are held beside the one at work, the first one among them. A schedule is data:
iterators over places and actions, without arrays, which every backend performs in its own way.

With `beta(c, r) = (c + r)! / (c! r!)`, the number of steps that can be reversed when none is taken more than `r`
times beforehand (Griewank 1992), and `r` such that `beta(c, r - 1) < l <= beta(c, r)`, the fewest steps taken beside
those that are reversed are

    t(l, c) = r l - beta(c + 1, r - 1)                                          (Griewank, Walther 2000, prop. 1).

References
----------
Griewank, Walther 2000, ACM Trans. Math. Softw. 26, 19: algorithm 799, revolve (`l` known beforehand).
Wang, Moin, Iaccarino 2009, SIAM J. Sci. Comput. 31, 2549: minimal repetition (`l` unknown).
Stumm, Walther 2010, SIAM J. Sci. Comput. 32, 836: online checkpointing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Plan(NamedTuple):
    """What a solve keeps for its reverse pass.

    `slots` states; all steps with their stages as long as there are at most `whole` of them. `steps` is the number of
    steps where it is known beforehand, else None. With `spill`, the states go to a file in that folder, or in the
    system's own if it is "". Up to `block` steps that are taken again are held together until they are reversed, so
    that schedules count blocks instead of steps.
    """

    slots: int
    steps: int | None = None
    whole: int = 0
    spill: str | None = None
    block: int = 1

    def places(self) -> Iterator[int]:
        """For each step the slot that its state goes to, or -1; never ends."""
        if self.steps is None:
            places = online(self.slots)
        else:
            blocks = 1 - (1 - self.steps) // self.block  # the newest step is one of its own, as it is not taken again
            places = itertools.chain(offline(blocks, self.slots), itertools.repeat(-1))
        inside = (-1,) * (self.block - 1)
        return (place for first in places for place in (first, *inside))


class Action(NamedTuple):
    """One thing to do in a reverse pass.

    `restore`: continue from the state in `slot`, which is state `step`. `advance`: take step `step`. `store`: put the
    present state, `step`, into `slot`. `hold`: take step `step` and keep its stages. `reverse`: use the stages of step
    `step`, which is taken now unless it is held.
    """

    kind: str
    step: int
    slot: int = -1


def beta(slots: int, times: int) -> int:
    """`(slots + times)! / (slots! times!)`; 0 for a negative number of times."""
    return math.comb(slots + times, slots) if times >= 0 else 0


def repetitions(steps: int, slots: int) -> int:
    """The least `r` with `steps <= beta(slots, r)`: how often a step is taken again at most."""
    r, reach = 0, 1
    while reach < steps:
        r += 1
        reach = reach * (slots + r) // r
    return r


def advances(steps: int, slots: int) -> int:
    """`t(l, c)`, the fewest steps taken beside those reversed (Griewank, Walther 2000, proposition 1)."""
    r = repetitions(steps, slots)
    return r * steps - beta(slots + 1, r - 1)


def split(steps: int, slots: int) -> int:
    """How far behind the first state of `steps` steps the next state is stored, `slots > 1`.

    Any `m` with `beta(c, r-2) <= m <= beta(c, r-1)` and `beta(c-1, r-1) <= l - m <= beta(c-1, r)` is optimal in
    `t(l, c) = min_m m + t(l - m, c - 1) + t(m, c)` (Griewank, Walther 2000, section 3); this is the largest.
    """
    r = repetitions(steps, slots)
    return min(beta(slots, r - 1), steps - beta(slots - 1, r - 1))


def offline(steps: int, slots: int) -> Iterator[int]:
    """For each step of a solve of known length, the slot that its state goes to, or -1 (revolve's first sweep)."""
    left, free, slot = steps, slots, 0
    while left > 0:
        yield slot
        m = split(left, free) if free > 1 and left > 1 else left
        for _ in range(m - 1):
            yield -1
        left, free, slot = left - m, free - 1, slot + 1


def online(slots: int) -> Iterator[int]:
    """For each step of a solve of unknown length, the slot that its state goes to; never ends.

    There are `slots + 1` of them, as the newest state is always in one. Wang, Moin, Iaccarino 2009, algorithm 1: a new
    state has level 0 and replaces one that is dispensable, which means that a later one has a higher level; if none
    is, it replaces the latest one and gets the next higher level. Whenever the solve ends, no step is then taken more
    than `repetitions(l, c)` times beside its reversal (their proposition on minimal repetition).
    """
    held = [(0, math.inf)]  # (slot, level), in the order of steps
    yield 0
    while True:
        slot, level = len(held), 0.0
        if slot > slots:
            out = _dispensable([x[1] for x in held])
            if out is None:
                out = len(held) - 1
                level = held[out][1] + 1
            slot = held.pop(out)[0]
        held.append((slot, level))
        yield slot


def _dispensable(levels: Sequence[float]) -> int | None:
    """The latest place whose level is lower than one behind it."""
    top = -1.0
    for i in reversed(range(len(levels))):
        if levels[i] < top:
            return i
        top = max(top, levels[i])
    return None


def reverse(steps: int, slots: int, held: dict[int, int], block: int = 1) -> Iterator[Action]:
    """The actions that reverse steps `steps - 1, ..., 0`, given which states are held: `{slot: step}`.

    The solve has just taken the newest step, so that its stages are at hand. Between two held states the number of
    steps is known, so revolve is optimal there with the slots that are free. With the states that `offline` chose,
    `advances(steps, slots)` steps are taken in all, those before a `reverse` included. With larger blocks the same
    holds for the number of blocks, each of which is held for its reversal.
    """
    if steps > 0:
        yield Action("reverse", steps - 1)
    stack = sorted((step, slot) for slot, step in held.items() if step < steps - 1)
    unused = sorted(set(range(min(slots, steps) + 1)) - {slot for _, slot in stack})
    last = steps - 2
    while last >= 0:
        while stack[-1][0] > last:
            unused.append(stack.pop()[1])
        here, slot = stack[-1]
        yield Action("restore", here, slot)
        while last - here >= block:
            free, blocks = slots - len(stack) + 1, 1 + (last - here) // block
            target = here + block * (split(blocks, free) if free > 1 else blocks - 1)
            for step in range(here, target):
                yield Action("advance", step)
            if free > 1:
                stack.append((target, unused.pop()))
                yield Action("store", *stack[-1])
            here = target
        for step in range(here, last):
            yield Action("hold", step)
        for step in reversed(range(here, last + 1)):
            yield Action("reverse", step)
        last = here - 1
