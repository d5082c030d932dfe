"""What the two algorithms on segments share: how the span is cut, and bases of directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sensitivity.backend import Array
from sensitivity.errors import InputError

from ._averages import Shadowing, counted, warn_of_few

GROWN = 1e3  # of what should stay bounded over the span


@dataclass(frozen=True)
class Segmented(Shadowing):
    """Base of the algorithms on segments; see `NILSS`."""

    segments: int = 100
    unstable: int | None = None

    def __post_init__(self) -> None:
        counted("segments", self.segments, 2)
        if self.unstable is not None:
            counted("unstable", self.unstable, 1)

    def asked(self, loss: Any, wrt: Any) -> tuple[str, ...]:
        names = super().asked(loss, wrt)
        warn_of_few(self.name, self.segments)
        return names

    def fits(self, n: int) -> None:
        super().fits(n)
        if self.unstable is not None and self.unstable >= n:
            raise InputError(f"unstable={self.unstable}, and the state has {n} entries",
                             "one direction, along the solution, neither grows nor decays",
                             f"unstable={n - 1} or less")

    def growing(self, n: int) -> int:
        """How many directions are taken to grow."""
        return n - 1 if self.unstable is None else self.unstable


def orthonormal(be: Any, rows: Array) -> tuple[Array, Array]:
    """`(Q, R)` with orthonormal rows of Q and `rows^T = Q^T R`."""
    Q, R = be.xp.linalg.qr(rows.T)
    return Q.T, R


def start_rows(be: Any, m: int, n: int, like: Array) -> Array:
    """Directions without any relation to a problem: `(m, n)`."""
    return be.xp.stack([be.vector([math.cos(1.0 + k + (2.0 + k) * i) for i in range(n)], like) for k in range(m)])


def repeated(be: Any, row: Array, count: int) -> Array:
    """So many zero arrays of this shape."""
    return be.xp.stack([0.0 * row] * count)


def present(be: Any, count: int, number: Any, like: Array) -> Array:
    """1 for the first `number` of `count`, else 0."""
    xp = be.xp
    return xp.astype(xp.arange(count, device=be.device(like)) < number, like.dtype)
