"""States in a memory-mapped file, for long solves whose states need not all be in memory.

The file has no name, and is gone with the object that has it. It grows by blocks of whole pages, each mapped by itself;
a block that is left is dropped from memory, so that no more than two blocks are resident.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from typing import Any

from .records import Array

BLOCK = 2**22


class Spilled:
    """`spilled[slot] = step, u, k` with vectors of one length, `k` None always or never; `steps` says which step."""

    def __init__(self, be: Any, folder: str) -> None:
        self.be, self.steps = be, dict[int, int]()
        self.file = tempfile.TemporaryFile(dir=folder or None)
        weakref.finalize(self, self.file.close)
        self.blocks: list[tuple[mmap.mmap, Array]] = []
        self.here = 0
        self.like: tuple[Array, Array | None] | None = None

    def __setitem__(self, slot: int, state: tuple[int, Array, Array | None]) -> None:
        n, *vectors = state
        self.like = state[1:]
        self.steps[slot] = n
        for i, v in enumerate(vectors):
            if v is not None:
                self.be.write(self._row(slot, i), v)

    def __getitem__(self, slot: int) -> tuple[int, Array, Array | None]:
        assert self.like is not None
        u, k = (None if v is None else self.be.read(self._row(slot, i), v) for i, v in enumerate(self.like))
        return self.steps[slot], u, k

    def _row(self, slot: int, i: int) -> Array:
        """Where vector `i` of a slot lies in the file."""
        assert self.like is not None
        u, k = self.like
        vectors, rows = 1 if k is None else 2, max(1, BLOCK // max(1, u.nbytes))
        number, row = divmod(vectors * slot + i, rows)
        while number >= len(self.blocks):
            self._grow(rows)
        if number != self.here:
            _release(self.blocks[self.here][0])
            self.here = number
        return self.blocks[number][1][row, :]

    def _grow(self, rows: int) -> None:
        assert self.like is not None
        unit = mmap.ALLOCATIONGRANULARITY
        size = unit * max(1, -(-rows * self.like[0].nbytes // unit))
        start = size * len(self.blocks)
        self.file.truncate(start + size)
        memory = mmap.mmap(self.file.fileno(), size, offset=start)
        self.blocks.append((memory, self.be.rows_in(memory, rows, self.like[0])))


def _release(memory: mmap.mmap) -> None:
    """Leave a block to the file; reading it again brings it back."""
    if hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED)


__all__ = ["Spilled"]
