"""What `checkpoints=` may be: save times, a number of intervals, times, or an amount of memory."""

from __future__ import annotations

import math
from typing import Any

from ..backend import Array
from ..errors import InputError
from ..integrate import Run


def checked_points(name: str, checkpointing: Any, checkpoints: Any, possible: tuple[Any, ...]) -> Any:
    """`checkpoints` as something hashable, after a look at both arguments."""
    if not any(checkpointing is v or (isinstance(v, str) and checkpointing == v) for v in possible):
        raise InputError(f"checkpointing={checkpointing!r} is none of the possible values",
                         f"they are {', '.join(map(repr, possible))}", f"{name}(checkpointing={possible[0]!r})")
    if checkpoints is None:
        return None
    if checkpointing is False:
        raise InputError(f"{name} has checkpoints={checkpoints!r} and checkpointing=False", "the two contradict",
                         "leave one of them out")
    if isinstance(checkpoints, str):
        if checkpoints != "saveat":
            budget(checkpoints)
        return checkpoints
    if isinstance(checkpoints, int) and not isinstance(checkpoints, bool):
        if checkpoints < 1:
            raise InputError(f"checkpoints={checkpoints} stores nothing", "an integer is the number of intervals",
                             "checkpoints=10")
        return checkpoints
    try:
        times = tuple(float(t) for t in checkpoints)
    except (TypeError, ValueError) as e:
        raise InputError(f"checkpoints={checkpoints!r} are no times",
                         "states are stored there, known before the solve",
                         "checkpoints=10, [1.0, 2.0], 'saveat' or '200MB'") from e
    if not all(map(math.isfinite, times)):
        raise InputError(f"checkpoints={checkpoints!r} holds a time that is not finite", "states are stored there",
                         "checkpoints=10")
    return times


def budget(text: str) -> float:
    """Bytes in a text such as "200MB"."""
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "B": 1.0}
    for unit, factor in units.items():
        if text.endswith(unit):
            try:
                size = float(text.removesuffix(unit)) * factor
            except ValueError:
                break
            if size > 0.0:
                return size
            break
    raise InputError(f"checkpoints={text!r} is neither 'saveat' nor an amount of memory",
                     f"the units are {', '.join(units)}", "checkpoints='200MB'")


def width(run: Run, like: Array) -> int:
    """Size of one number."""
    real = 8 if run.be.eps(like.dtype) < 1e-10 else 4
    return 2 * real if run.be.is_complex(like) else real
