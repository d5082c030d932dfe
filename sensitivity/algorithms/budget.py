"""The discrete adjoint within a budget: how many states a solve may keep, and the forward pass that keeps them."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_left
from typing import Any

from ..backend import Backend
from ..checkpoint import Plan
from ..errors import InputError
from ..events import EventFunctions
from ..integrate import Run, controlled
from ..krylov import RESTART
from ..rosenbrock import Rosenbrock
from ..segments import Room
from ..system import Inputs
from . import base

# Stages of the newest step and of the one at work, their inputs, cotangents and what is made of them on the way.
AT_WORK = 8
CACHE = 2**20  # bytes that one core finds again fast
IN_F = 3  # the same for what `f` leaves behind in a step, see `Stepper.retaken`
MATRICES = 8  # the same for what an implicit step solves with: the Jacobian, how it is made, its factors
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def slots(checkpoints: Any) -> int | None:
    """`checkpoints` as a positive number of states, or None."""
    if checkpoints is None:
        return None
    if isinstance(checkpoints, bool) or not isinstance(checkpoints, int) or checkpoints < 1:
        raise InputError(f"checkpoints={checkpoints!r} is not a positive integer",
                         "it is the number of states that are kept, the first one among them", "checkpoints=100")
    return checkpoints


def size(memory: Any) -> int | None:
    """`memory` in bytes, or None."""
    if memory is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?I?B|)\s*", str(memory).upper())
    if isinstance(memory, bool) or not isinstance(memory, str | int) or not found:
        raise InputError(f"memory={memory!r} is not a size", "it bounds what a solve keeps for its gradient",
                         'memory="200MB", "2GiB" or a number of bytes')
    return int(float(found[1]) * UNITS[found[2]])


def folder(spill: Any) -> str | None:
    """Where states are spilled to: a folder, "" for the system's own, or None."""
    if isinstance(spill, bool):
        return "" if spill else None
    if not isinstance(spill, str | os.PathLike) or not os.path.isdir(spill):
        raise InputError(f"spill={spill!r} is neither a bool nor a folder", "states are written there", "spill=True")
    return os.fspath(spill)


def plan(run: Run, x: Inputs, stepper: Any, checkpoints: Any, memory: Any, spill: Any) -> Plan:
    """The plan for this solve; with `memory`, for states and stages of the size and dtype at hand.

    A state costs `n` numbers, `2 n` for a first-same-as-last method, whose slope is kept with it so that the step
    taken again is the same to the last bit. Beside these, pulling one step back takes room for `AT_WORK` steps, and for
    `MATRICES` matrices where the method is implicit. With a step stay its factors, if the backend keeps them. Where
    loops are not compiled, half of the memory, or less if that does as well, holds blocks of steps taken again: with
    states between blocks only, up to `m^2 / 4` steps are taken again once, where `m` steps fit, and not as often as
    `reverse` must with states alone.

    Raises
    ------
    InputError
        The memory does not even hold what one step needs.
    """
    steps = _known_steps(run, x)
    if spill is not False:
        return Plan(run.max_steps, steps, spill=folder(spill))
    if memory is None:
        return Plan(slots(checkpoints), steps)  # type: ignore[arg-type]
    budget = size(memory)
    assert budget is not None
    be = run.be
    u0 = stepper.lift(x.u0)
    vector = u0.shape[0] * be.xp.finfo(x.u0.dtype).bits // 8 * (2 if be.is_complex(x.u0) else 1)
    factors, kept = _factors(run, x, stepper, vector)
    step, state = (stepper.stages + 1) * vector, (1 + stepper.fsal) * vector
    held = stepper.retaken(x, run.dt, vector)
    work = AT_WORK * step + IN_F * (held - step) + MATRICES * factors
    step, held = step + kept, held + kept
    room = budget - work
    if room < 2 * state:
        raise InputError(f"memory={memory!r} is too little for {x.u0.shape[0]} unknowns",
                         f"pulling back one step needs {work + 2 * state} bytes",
                         f"memory={work + 10 * state} or more")
    block = 1 if be.traced else _block(room, state, held, steps)
    return Plan(_slots(room, state, held, block), steps, room // step, block=block)


def _slots(room: int, state: int, held: int, block: int) -> int:
    """How many states there is room for beside a block of steps."""
    return (room - (block - 1) * held) // state - 1


def _block(room: int, state: int, held: int, steps: int | None) -> int:
    """Steps in a block: half of the room, or as many as stay in the cache if every step is then taken again once."""
    most = max(1, room // 2 // held)
    if steps is None:
        return most
    enough = bisect_left(range(1, most), steps, key=lambda block: block * _slots(room, state, held, block)) + 1
    return max(enough, min(most, CACHE // held))


def _factors(run: Run, x: Inputs, stepper: Any, vector: int) -> tuple[int, int]:
    """Bytes of the factors that an implicit step solves with, and of those that stay with its record."""
    be = run.be
    if not run.method.implicit:
        return 0, 0
    if stepper.jac.free:
        return 2 * (RESTART + 1) * vector, 0
    pattern = run.sparsity
    if run.method.linear_solver == "dense":  # type: ignore[attr-defined]
        pattern = None
    elif pattern is None and run.products.jac is not None and be.sparse_lu:
        pattern = getattr(stepper.jac.near(be.time(be.scalar(x.t0)), x.u0), "pattern", None)
    n = x.u0.shape[0]
    factors = vector // n * (n * n if pattern is None else pattern.factors(be))
    stays = isinstance(stepper, Rosenbrock) or (pattern is not None and pattern.structure(be) == "sparse")
    return factors, factors if stays and type(be).keep is not Backend.keep else 0


def room(run: Run, x: Inputs, stepper: Any, longest: Any, checkpoints: Any, memory: Any) -> Room:
    """How much a solve that looks back keeps: `checkpoints` stretches of steps, or what fits into `memory`. There
    a step counts twice, for itself and for the cotangent that may wait with it; and once more where loops are
    compiled, as the reverse pass then works on a copy of what it was handed.

    Raises
    ------
    InputError
        The memory does not even hold what three steps need.
    """
    budget = size(memory)
    if budget is None:
        return Room(None, slots(checkpoints), longest)
    vector = x.u0.shape[0] * run.be.xp.finfo(x.u0.dtype).bits // 8 * (2 if run.be.is_complex(x.u0) else 1)
    step = (stepper.stages + 1) * vector
    records = (budget - AT_WORK * step) // ((3 if run.be.traced else 2) * step)
    if records < 3:
        raise InputError(f"memory={memory!r} is too little for {x.u0.shape[0]} unknowns",
                         f"pulling back one step needs {(AT_WORK + 9) * step} bytes",
                         f"memory={(AT_WORK + 100) * step} or more")
    return Room(records, None, longest)


def _known_steps(run: Run, x: Inputs) -> int | None:
    """The number of steps where the step size is fixed and the span is known."""
    t0, t1 = run.be.concrete(x.t0), run.be.concrete(x.t1)
    if run.controller.adaptive or run.tstops or run.events or t0 is None or t1 is None:
        return None
    assert run.dt is not None
    return min(run.capacity, max(1, math.ceil(abs(t1 - t0) / run.dt * (1 - 1e-9))))


def forward(run: Run, x: Inputs, options: tuple[Any, Any, Any]) -> tuple[base.Outputs, base.Aux, base.Solved]:
    """The forward solve that keeps what the budget allows; its output is made as the steps come by."""
    return base.solve_forward(run, x, keep=True, plan=lambda stepper: plan(run, x, stepper, *options))


def opened(run: Run, solved: base.Solved) -> tuple[base.Solved, Any]:
    """As `base.opened`, for what `forward` left."""
    x, stepper = solved.x, base.bound(run, solved.x)
    again = controlled(run, stepper, x.rtol, x.atol)
    crossing = Crossing(run, x, stepper, solved.end.watch.entries) if run.events else None
    return solved._replace(log=run.be.recall(solved.log, again, crossing)), stepper


class Crossing:
    """What events do between steps, from what a solve wrote down of them; see `Recall`."""

    def __init__(self, run: Run, x: Inputs, stepper: Any, entries: Any) -> None:
        self.be, self.stepper, self.entries = run.be, stepper, entries
        self.functions = EventFunctions(run, x)

    def __call__(self, t: Any, u: Any, k: Any) -> tuple[Any, Any, Any]:
        i = self.be.happened(self.entries, t)
        return self.be.when(i >= 0, lambda: self._after(i), (u, k, 0))

    def _after(self, i: Any) -> tuple[Any, Any, int]:
        event = self.be.entry(self.entries, i)
        u = self.functions.after(event.index, event.t, event.u)
        return u, self.stepper.first(self.be.time(event.t), u), int(self.stepper.fsal)


def repeated(run: Run, stepper: Any, taken: Any, iterations: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    """How often `f` is evaluated in steps that are taken again, and their algebra."""
    nfe = stepper.evaluations(taken, True) - stepper.evaluations(0, True) + iterations
    return nfe, stepper.algebra(taken, iterations, run.controller.adaptive)


def remade(run: Run, solved: base.Solved) -> base.Solved:
    """What a solve without a budget leaves: all steps, taken once more."""
    opening, stepper = opened(run, solved)
    return solved._replace(log=run.be.remade(opening.log, stepper.lift(solved.x.u0)))
