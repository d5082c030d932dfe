"""Sparse Jacobians from few products: one for all columns (or rows) that share no entry (Curtis, Powell, Reid 1974)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .backend import Array
from .errors import InputError
from .registry import registry


class Pattern:
    """Where a matrix may have entries, and a colouring of its columns and of its rows, known by its values.

    Attributes
    ----------
    rows, columns : of the entries.
    column_colours, row_colours : a number for each column and row; lines of one colour share no entry.
    """

    def __init__(self, rows: Any, columns: Any, size: int) -> None:
        self.rows, self.columns, self.size = rows, columns, size
        self.key = (size, rows.tobytes(), columns.tobytes())
        self.column_colours = _coloured(columns.tolist(), rows.tolist(), size)
        self.row_colours = _coloured(rows.tolist(), columns.tolist(), size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


def pattern_of(given: Any, size: int) -> Pattern | None:
    """The checked pattern of a problem's Jacobian.

    Raises
    ------
    InputError
        It is not an `(n, n)` matrix.
    """
    if given is None:
        return None
    xp = registry().backend("numpy").xp
    try:
        entries = given.tocoo() if hasattr(given, "tocoo") else xp.asarray(given) != 0
        shape = tuple(entries.shape)
    except Exception as e:  # whatever is no matrix refuses in its own way
        raise InputError(f"jac_sparsity is a {type(given).__name__}, which is no matrix",
                         "its nonzero entries say where df/du may be nonzero", "a SciPy sparse or NumPy matrix") from e
    if shape != (size, size):
        raise InputError(f"jac_sparsity has shape {shape}, expected {(size, size)}", "it is the pattern of df/du",
                         "one row and one column per entry of the raveled state")
    rows, columns = (entries.row, entries.col) if hasattr(given, "tocoo") else xp.nonzero(entries)
    return Pattern(xp.astype(rows, xp.int64), xp.astype(columns, xp.int64), size)


def _coloured(lines: list[int], crossings: list[int], size: int) -> list[int]:
    """The first colour that no line with a common crossing has, line by line."""
    of_line: list[list[int]] = [[] for _ in range(size)]
    for line, crossing in zip(lines, crossings, strict=True):
        of_line[line].append(crossing)
    taken: list[set[int]] = [set() for _ in range(size)]
    colours = []
    for own in of_line:
        used = set().union(*(taken[c] for c in own)) if own else set()
        colour = next(c for c in range(size + 1) if c not in used)
        colours.append(colour)
        for c in own:
            taken[c].add(colour)
    return colours


def by_columns(be: Any, pattern: Pattern, along: Callable[[Any, Array, Array], Array],
               sizes: Callable[[Array], Array]) -> Callable[[Any, Array], Any]:
    """The Jacobian from differences `along(t, u, step)` of `f`; `sizes(u)` has one step for each column."""
    xp = be.xp
    colours = xp.asarray(pattern.column_colours)
    count = max(pattern.column_colours, default=-1) + 1
    masks = xp.astype(colours[None, :] == xp.arange(count)[:, None], xp.float64)

    def jac(t: Any, u: Array) -> Any:
        step = sizes(u)
        rows = xp.stack([along(t, u, step * xp.astype(mask, u.dtype)) for mask in masks])
        values = rows[colours[pattern.columns], pattern.rows] / step[pattern.columns]
        return be.assembled(pattern.rows, pattern.columns, values, pattern.size)

    return jac


def by_rows(be: Any, pattern: Pattern, pull: Callable) -> Callable[[Any, Array], Any]:
    """The Jacobian from products with its transpose, `pull(t, u, ct) -> (f_u^T ct, ...)`."""
    xp = be.xp
    colours = xp.asarray(pattern.row_colours)
    count = max(pattern.row_colours, default=-1) + 1
    masks = xp.astype(colours[None, :] == xp.arange(count)[:, None], xp.float64)

    def jac(t: Any, u: Array) -> Any:
        rows = xp.stack([pull(t, u, xp.astype(mask, u.dtype))[0] for mask in masks])
        values = rows[colours[pattern.rows], pattern.columns]
        return be.assembled(pattern.rows, pattern.columns, values, pattern.size)

    return jac
