"""Brownian paths as functions of time: reproducible from a key, at any times, in any order, on any backend.

A virtual Brownian tree (Li, Wong, Chen, Duvenaud 2020, section 4) halves the time span again and again. Every interval
`[s, t]` of length h carries its increment `W` and its space-time Levy area `H = (1/h) int_s^t (W_r - W_s) dr - W/2`
(Foster, Lyons, Oberhauser 2020), independent with variances h and h/12. Both halves follow from them by

    W_su = W/2 + 3H/2 + Z,   H_su = H/4 - Z/2 + N/2,   H_ut = H/4 - Z/2 - N/2,   Z ~ N(0, h/16),  N ~ N(0, h/12),

and any part of length `x h` by the bridge in `_bridged`. The normal numbers of an interval depend on the key, on the
place of the interval in the tree and on the channel, through the counter-based generator Threefry-2x32 (Salmon,
Moraes, Dror, Shaw 2011), so nothing is stored and no order of queries matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from .backend import Array
from .errors import InputError
from .threefry import MASK

DEEPEST = 30
FEW = 8  # times for which the numbers of all levels are drawn at once


def normals(be: Any, key: Array, nodes: Array, channels: Array, dtype: Any) -> tuple[Array, Array]:
    """Two independent standard normal numbers for every node and channel, `(len(nodes), len(channels))` (Box, Muller).

    Uniform numbers have 32 bits, so no number is larger than 6.8.
    """
    xp = be.xp
    x0, x1 = xp.broadcast_arrays(nodes[:, None], channels[None, :])
    x0, x1 = be.threefry(key[0], key[1], x0, x1)
    r = xp.sqrt(-2.0 * xp.log((xp.astype(x0, dtype) + 0.5) / 2.0**32))
    angle = xp.astype(x1, dtype) * (2.0 * math.pi / 2.0**32)
    return r * xp.cos(angle), r * xp.sin(angle)


def words(be: Any, key: Any) -> Array:
    """A key as two words: of an integer, its lower and its upper half; of an array, its one or two entries."""
    if isinstance(key, int):
        return be.asarray([key & MASK, (key >> 32) & MASK], dtype=be.word())
    try:
        key = be.xp.reshape(be.asarray(key), (-1,))
        whole = be.xp.isdtype(key.dtype, "integral")
    except (TypeError, ValueError):
        whole = False
    if not whole or key.shape[0] > 2 or key.shape[0] == 0:
        raise InputError(f"key={key!r} is not an integer, nor an array of two integers",
                         "the noise is computed from these numbers", "key=0; of a new-style JAX key, "
                         "key=jax.random.key_data(key)")
    key = be.xp.astype(key, be.word())
    return key if key.shape[0] == 2 else be.xp.concat([key, key * 0])


def tree(be: Any, key: Any, channels: Array, length: Any, s: Array, levels: int) -> tuple[Array, Array]:
    """`W(s)` and `int_0^s W dr`, each `(len(s), m)`, of the paths in `m` channels on `[0, length]`.

    The two words of `key` are numbers, or vectors with words for each column.

    Times between the ends of the smallest intervals, `2^-levels length`, are bridged: the law of a path seen at
    times of which no two lie inside one smallest interval is that of Brownian motion.
    """
    xp, dtype = be.xp, s.dtype
    m = channels.shape[0]
    leaves = 2**levels
    q = s * (leaves / length)
    # Close to the end of an interval is on it: a path has no derivative, so round-off in time would count as sqrt(eps).
    near = xp.round(q)
    q = xp.where(xp.abs(q - near) <= min(16.0 * be.eps(dtype) * leaves, 1e-3), near, q)
    leaf = xp.clip(xp.astype(xp.floor(q), be.word()), 0, leaves - 1)
    x = q - xp.astype(leaf, dtype)

    h = length
    first, second = normals(be, key, be.counters(1, s), channels, dtype)
    W, H = first * h**0.5, second * (h / 12.0) ** 0.5
    wide = min(levels, (s.shape[0] - 1).bit_length())
    for level in range(wide):
        count = 2**level
        left, right = _halved(W, H, h, normals(be, key, be.counters(count, s) + count, channels, dtype))
        W, H = (xp.reshape(xp.stack(pair, axis=1), (2 * count, m)) for pair in zip(left, right, strict=True))
        h = h / 2.0
    W_left = xp.cumulative_sum(W, axis=0) - W
    area = h * (W_left + 0.5 * W + H)
    A_left = xp.cumulative_sum(area, axis=0) - area

    at = leaf >> (levels - wide)
    W, H, W_left, A_left = (xp.take(v, at, axis=0) for v in (W, H, W_left, A_left))
    nodes = [(leaf >> (levels - level)) + 2**level for level in range(wide, levels + 1)]
    k, drawn = s.shape[0], None
    if k <= FEW:
        drawn = normals(be, key, xp.concat(nodes), channels, dtype)

    def numbers(i: int) -> tuple[Array, Array]:
        if drawn is None:
            return normals(be, key, nodes[i], channels, dtype)
        return drawn[0][i * k:(i + 1) * k, :], drawn[1][i * k:(i + 1) * k, :]

    for level in range(wide, levels):
        left, right = _halved(W, H, h, numbers(level - wide))
        h = h / 2.0
        later = ((leaf >> (levels - level - 1)) & 1)[:, None] == 1
        A_left = xp.where(later, A_left + h * (W_left + 0.5 * left[0] + left[1]), A_left)
        W_left = xp.where(later, W_left + left[0], W_left)
        W, H = (xp.where(later, b, a) for a, b in zip(left, right, strict=True))
    W, H = _bridged(xp, W, H, h, x[:, None], numbers(levels - wide))
    part = x[:, None] * h
    return W_left + W, A_left + part * (W_left + 0.5 * W + H)


def _halved(W: Array, H: Array, h: Any, numbers: tuple[Array, Array]) -> tuple[tuple[Array, Array], ...]:
    """`(W, H)` of the left and of the right half of intervals of length `h`."""
    Z, N = numbers[0] * (h / 16.0) ** 0.5, numbers[1] * (h / 12.0) ** 0.5
    left = 0.5 * W + 1.5 * H + Z
    mean = 0.25 * H - 0.5 * Z
    return (left, mean + 0.5 * N), (W - left, mean - 0.5 * N)


def _bridged(xp: Any, W: Array, H: Array, h: Any, x: Array, numbers: tuple[Array, Array]) -> tuple[Array, Array]:
    """`(W, H)` of the first part, `x h`, of intervals of length `h` (Foster 2020, theorem 6.1.4)."""
    y = 1.0 - x
    d = xp.sqrt(x**3 + y**3)
    mixed, root = xp.sqrt(x * y), h**0.5
    first = x * W + 6.0 * x * y * H + root * mixed * d * numbers[0]
    area = x**2 * H - root * (x**2 * mixed / (2.0 * d)) * numbers[0]
    return first, area + root * (math.sqrt(3.0) / 6.0) * (y * mixed / d) * numbers[1]


def tabulated(be: Any, ts: Array, W: Array, s: Array) -> tuple[Array, Array]:
    """`W(s) - W(ts[0])` of a piecewise linear path and the integral of that from `ts[0]`, each `(len(s), m)`."""
    xp = be.xp
    W = W - W[:1, :]
    h = ts[1:] - ts[:-1]
    areas = xp.cumulative_sum(0.5 * h[:, None] * (W[1:, :] + W[:-1, :]), axis=0)
    areas = xp.concat([0.0 * W[:1, :], areas])
    i = xp.clip(xp.searchsorted(ts, s, side="right") - 1, 0, ts.shape[0] - 2)
    W0, W1, x = xp.take(W, i, axis=0), xp.take(W, i + 1, axis=0), (s - xp.take(ts, i))[:, None]
    value = W0 + x / xp.take(h, i)[:, None] * (W1 - W0)
    return value, xp.take(areas, i, axis=0) + 0.5 * x * (W0 + value)


class Tree(NamedTuple):
    """The law of a virtual Brownian tree; its arrays are the key and the ends of its span."""

    levels: int

    def __call__(self, be: Any, arrays: tuple[Array, ...], m: int, s: Array) -> tuple[Array, Array]:
        key, t0, t1 = arrays
        channels = be.counters(m, s)
        if key.ndim == 2:  # as many paths as rows, one behind the other
            each = m // key.shape[0]
            channels = channels % each
            key = be.xp.repeat(key.T, each, axis=1)
        return tree(be, key, channels, t1 - t0, s - t0, self.levels)


class Table(NamedTuple):
    """The law of a tabulated path; its arrays are times and values."""

    def __call__(self, be: Any, arrays: tuple[Array, ...], m: int, s: Array) -> tuple[Array, Array]:
        del m
        ts, W = arrays
        return tabulated(be, ts, W, s)


class Abreast(NamedTuple):
    """How the entries of many members, leaf by leaf with the members in front, meet their paths.

    Attributes
    ----------
    members : how many there are.
    sizes : entries of one member in each leaf.
    one : whether there is one noise for all entries of a member, or one for each.
    own : whether each member has its own path.
    """

    members: int
    sizes: tuple[int, ...]
    one: bool
    own: bool

    @property
    def noises(self) -> int:
        """Noises of one member."""
        return 1 if self.one else sum(self.sizes)

    def columns(self, be: Any, like: Array) -> Array:
        """Which column, of paths that lie one behind the other, drives each entry."""
        xp, parts, before = be.xp, [], 0
        first = be.counters(self.members, like)[:, None] * (self.noises if self.own else 0)
        for size in self.sizes:
            inside = be.counters(size, like) * (0 if self.one else 1) + (0 if self.one else before)
            parts.append(xp.reshape(first + inside[None, :], (-1,)))
            before += size
        return xp.concat(parts)


class Parallel(NamedTuple):
    """The law of the paths of many members, one column for each entry of their states."""

    law: Any
    abreast: Abreast

    def __call__(self, be: Any, arrays: tuple[Array, ...], m: int, s: Array) -> tuple[Array, Array]:
        del m
        k = self.abreast.noises * (self.abreast.members if self.abreast.own else 1)
        columns = self.abreast.columns(be, s)
        W, A = self.law(be, arrays, k, s)
        return be.xp.take(W, columns, axis=1), be.xp.take(A, columns, axis=1)


class Path:
    """Base of the Brownian paths that a problem can carry.

    `law(be, arrays, m, s)`, where `law` is hashable and `arrays` belong to one path, is `W(s)` less its first value and
    the integral of that from the start of the path on, each `(len(s), m)`.
    """

    width: int | None = None

    @property
    def law(self) -> Any:
        raise NotImplementedError

    def arrays(self, be: Any, like: Array) -> tuple[Array, ...]:
        """The arrays of this path beside states like `like`."""
        raise NotImplementedError

    def span(self, be: Any) -> tuple[float, float] | None:
        """Where the path is defined, if that is known now."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class VirtualBrownianTree(Path):
    """Brownian motion as a function of a key: nothing is stored, any time can be asked for, in any order.

    Parameters
    ----------
    key : int or array of two integers
        The same key gives the same path on every backend.
    tspan : (t0, t1)
        Where the path is defined.
    tol : float
        Length of the smallest intervals, at most the step size of the solves. Between their ends a path is bridged.

    Raises
    ------
    InputError
        `tspan` or `tol` make no sense.

    References: Li, Wong, Chen, Duvenaud 2020, AISTATS; Jelincic, Foster, Kidger 2024, arXiv 2405.06464.
    """

    key: Any
    tspan: tuple[Any, Any]
    tol: float

    def __post_init__(self) -> None:
        try:
            t0, t1 = (float(t) for t in self.tspan)
        except (TypeError, ValueError):
            raise InputError(f"tspan={self.tspan!r} of VirtualBrownianTree is not a pair of known numbers",
                             "the tree divides this span", "VirtualBrownianTree(key, (0.0, 1.0), tol)") from None
        if not t1 > t0:
            raise InputError(f"tspan=({t0:g}, {t1:g}) of VirtualBrownianTree does not run forwards",
                             "a path starts at zero at its first time", f"tspan=({min(t0, t1):g}, {max(t0, t1):g})")
        if not 0.0 < float(self.tol) or not (t1 - t0) / float(self.tol) <= 2.0**DEEPEST:
            raise InputError(f"tol={self.tol!r} is not a length between {(t1 - t0) * 2.0**-DEEPEST:.1e} and "
                             f"{t1 - t0:g}", "it is the smallest interval that the tree tells apart",
                             f"tol={(t1 - t0) * 2.0**-16:.1e}")
        object.__setattr__(self, "tspan", (t0, t1))

    @property
    def levels(self) -> int:
        """How often the span is halved."""
        return max(0, math.ceil(math.log2((self.tspan[1] - self.tspan[0]) / float(self.tol)) - 1e-9))

    @property
    def law(self) -> Tree:
        return Tree(self.levels)

    def arrays(self, be: Any, like: Array) -> tuple[Array, ...]:
        ends = (be.asarray(t, dtype=be.time_dtype(like.dtype), device=be.device(like)) for t in self.tspan)
        return (words(be, self.key), *ends)

    def span(self, be: Any) -> tuple[float, float] | None:
        return self.tspan

    def __call__(self, ts: Any, m: int = 1) -> Array:
        """`W` at the times `ts`, shape `(len(ts), m)`, in the framework of `ts`."""
        return _values(self, ts, m)


@dataclass(frozen=True, eq=False)
class TabulatedPath(Path):
    """A path through given points, linear between them.

    Parameters
    ----------
    ts : array
        Increasing times.
    W : array, shape `(len(ts), m)` or `(len(ts),)`
        The path there, one column per noise.

    Raises
    ------
    InputError
        Shapes or times make no sense.
    """

    ts: Any
    W: Any

    def __post_init__(self) -> None:
        shape, times = tuple(getattr(self.W, "shape", ())), tuple(getattr(self.ts, "shape", ()))
        if len(times) != 1 or times[0] < 2 or len(shape) not in (1, 2) or shape[0] != times[0]:
            raise InputError(f"TabulatedPath got ts of shape {times} and W of shape {shape}",
                             "each time has its row, and there are two at least",
                             "ts an array of k times, W an array of shape (k, m)")

    @property
    def width(self) -> int:  # type: ignore[override]
        return 1 if len(self.W.shape) == 1 else int(self.W.shape[1])

    def arrays(self, be: Any, like: Array) -> tuple[Array, ...]:
        ts = be.fixed(be.asarray(self.ts, dtype=be.time_dtype(like.dtype), device=be.device(like)), "TabulatedPath.ts")
        known = be.concrete_times(ts)
        if known is not None and not all(a < b for a, b in pairwise(known)):
            raise InputError("the times of TabulatedPath do not increase", "a path has one value at each time",
                             "sort ts, and W with it")
        W = be.fixed(be.asarray(self.W, dtype=be.time_dtype(like.dtype), device=be.device(like)), "TabulatedPath.W")
        return ts, be.xp.reshape(W, (W.shape[0], -1))

    @property
    def law(self) -> Table:
        return Table()

    def span(self, be: Any) -> tuple[float, float] | None:
        known = be.concrete_times(be.asarray(self.ts))
        return None if known is None else (known[0], known[-1])

    def __call__(self, ts: Any, m: int | None = None) -> Array:
        """`W` at the times `ts`, less its first value, shape `(len(ts), m)`, in the framework of `ts`."""
        return _values(self, ts, self.width)


def _values(path: Path, ts: Any, m: int) -> Array:
    from .registry import registry

    be = registry().backend_for([("ts", ts)])
    s = be.asarray(ts)
    return path.law(be, path.arrays(be, s), m, s)[0]
