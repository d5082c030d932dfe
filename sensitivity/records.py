"""What loops record of a step, and what outputs inside a step hand back to it."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any
Scalar = Any


class Record(NamedTuple):
    """One accepted step: start time, step size, state at the start, stage derivatives `(s, n)`."""

    t: Scalar
    h: Scalar
    u: Array
    k: Array


class Mark(NamedTuple):
    """One accepted step without what was computed in it; where `stored`, with the state at its start."""

    t: Scalar
    h: Scalar
    u: Array | None
    stored: Any


class Contribution(NamedTuple):
    """Cotangents that outputs inside one step hand to that step: of its start state, of its stages, of its size, and
    of its start time."""

    u: Array | None
    k: Array | None
    h: Scalar
    t: Scalar = 0.0
