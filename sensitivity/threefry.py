"""Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw 2011): random words as a function of a counter and a key."""

from __future__ import annotations

from typing import Any

from .backend import Array

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
MASK = 0xFFFFFFFF


def threefry(k0: Array, k1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds: two words out of a counter `(x0, x1)`.

    Words are integer arrays with values below 2^32, in any integer type that holds them.
    """
    keys = (k0, k1, k0 ^ k1 ^ (k0 * 0 + 0x1BD11BDA))
    x0, x1 = (x0 + k0) & MASK, (x1 + k1) & MASK
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            x0 = (x0 + x1) & MASK
            x1 = (((x1 << r) & MASK) | (x1 >> (32 - r))) ^ x0
        x0, x1 = (x0 + keys[(i + 1) % 3]) & MASK, (x1 + keys[(i + 2) % 3] + (i + 1)) & MASK
    return x0, x1


def threefry_in_place(k0: Any, k1: Any, x0: Any, x1: Any) -> tuple[Any, Any]:
    """`threefry` of NumPy arrays, in 32-bit words that overflow by themselves."""
    import numpy as np

    k0, k1, x0, x1 = (np.array(v, dtype=np.uint32) for v in (k0, k1, *np.broadcast_arrays(x0, x1)))
    keys, spare = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA)), np.empty_like(x1)
    x0 += k0
    x1 += k1
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            x0 += x1
            np.left_shift(x1, np.uint32(r), out=spare)
            x1 >>= np.uint32(32 - r)
            x1 |= spare
            x1 ^= x0
        x0 += keys[(i + 1) % 3]
        x1 += keys[(i + 2) % 3]
        x1 += np.uint32(i + 1)
    return x0, x1
