"""Where a matrix is zero: colours, bands, and its entries from few products (Curtis, Powell, Reid 1974).

Columns without a row in common share one product with the matrix, rows without a column in common one product with its
transpose; the greedy colouring is that of Coleman and More (1983). The band is that of the given order or, where that
is narrower, of the order of Cuthill and McKee (1969) reversed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any, NamedTuple
from weakref import WeakSet

from .backend import Array
from .errors import InputError
from .registry import registry

NARROW = 32


class Elimination(NamedTuple):
    """An order in which sparse LU factors have few entries, and the reordered matrix in compressed columns.

    Attributes
    ----------
    order, place : the unknowns in that order, and where each of them is.
    source : which entries of the pattern those of the reordered matrix are.
    rows, starts : their rows, and where columns start among them.
    options : those of SuperLU that suit the pattern.
    fill : about how many entries the factors have.
    """

    order: Any
    place: Any
    source: Any
    rows: Any
    starts: Any
    options: dict[str, Any]
    fill: int

    def matrix(self, values: Any) -> Any:
        """The reordered SciPy matrix of a pattern's entries."""
        from scipy.sparse import csc_array

        return csc_array((values[self.source], self.rows, self.starts), shape=(self.order.shape[0],) * 2)


class Pattern:
    """Where an `(n, n)` matrix may have entries, its diagonal among them; known by its values.

    Attributes
    ----------
    rows, columns : of the entries, column by column.
    column_colours, row_colours : a number for each column and row; lines of one colour share no entry.
    order : the numbering in which the band is narrow, or None for the given one.
    lower, upper : how many diagonals the band has on either side of the main one.
    checked : functions whose Jacobian was seen to have it.
    """

    def __init__(self, rows: Any, columns: Any, size: int) -> None:
        xp = _xp()
        both = xp.unique_values(xp.concat([columns * size + rows, xp.arange(size) * (size + 1)]))
        self.rows, self.columns, self.size = both % size, both // size, size
        self.key = (size, both.tobytes())
        self.checked: WeakSet[Any] = WeakSet()

    @cached_property
    def column_colours(self) -> Any:
        return _xp().asarray(_coloured(self.columns.tolist(), self.rows.tolist(), self.size))

    @cached_property
    def row_colours(self) -> Any:
        return _xp().asarray(_coloured(self.rows.tolist(), self.columns.tolist(), self.size))

    @cached_property
    def _band(self) -> tuple[Any, int, int]:
        order, reach = None, _reach(self.rows, self.columns)
        if max(reach) > 1:
            from scipy.sparse.csgraph import reverse_cuthill_mckee

            other = reverse_cuthill_mckee(self.matrix(_xp().ones(self.rows.shape[0])).tocsr())
            place = _inverse(other)
            narrower = _reach(place[self.rows], place[self.columns])
            if max(narrower) < max(reach):
                order, reach = _xp().astype(other, _xp().int64), narrower
        return order, *reach

    @property
    def order(self) -> Any:
        return self._band[0]

    @cached_property
    def place(self) -> Any:
        """Where `order` puts each entry."""
        return _inverse(self.order)

    @property
    def lower(self) -> int:
        return self._band[1]

    @property
    def upper(self) -> int:
        return self._band[2]

    @cached_property
    def symmetric(self) -> bool:
        """Whether the transpose has entries in the same places."""
        return self.T == self

    @cached_property
    def elimination(self) -> Elimination:
        """By minimum degree, which symmetric patterns allow on `A^T + A`; SuperLU finds it, values do not matter."""
        from scipy.sparse.linalg import splu

        xp = _xp()
        options = {"diag_pivot_thresh": 0.01, "options": {"SymmetricMode": True}} if self.symmetric else {}
        sample = self.matrix(xp.ones(self.rows.shape[0]) + self.size * self.diagonal)
        factors = splu(sample, permc_spec="MMD_AT_PLUS_A" if self.symmetric else "COLAMD", **options)
        place = factors.perm_c
        rows, columns = place[self.rows], place[self.columns]
        source = xp.argsort(columns * self.size + rows)
        starts = xp.searchsorted(columns[source], xp.arange(self.size + 1))
        return Elimination(_inverse(place), place, source, rows[source], starts, options, factors.nnz)

    @cached_property
    def T(self) -> Pattern:
        return Pattern(self.columns, self.rows, self.size)

    @cached_property
    def turned(self) -> Any:
        """Where the entries of the transpose are among those of the matrix."""
        return _xp().argsort(self.rows * self.size + self.columns)

    @cached_property
    def diagonal(self) -> Any:
        """One for the entries of the main diagonal, zero for the others."""
        return _xp().astype(self.rows == self.columns, _xp().float64)

    @cached_property
    def in_square(self) -> Any:
        """The number of the entry at each place of the matrix; that of none is the number of entries."""
        return self._placed((self.size, self.size), self.rows, self.columns)

    @cached_property
    def in_band(self) -> Any:
        """As `in_square`, with diagonals as rows: `(lower + upper + 1, n)`, entry (i, j) in row `upper + i - j`."""
        i, j = self.rows, self.columns
        if self.order is not None:
            i, j = self.place[i], self.place[j]
        return self._placed((self.lower + self.upper + 1, self.size), self.upper + i - j, j)

    def _placed(self, shape: tuple[int, int], i: Any, j: Any) -> Any:
        xp = _xp()
        out = xp.full((shape[0] * shape[1],), self.rows.shape[0], dtype=xp.int64)
        out[i * shape[1] + j] = xp.arange(self.rows.shape[0])
        return out

    def structure(self, be: Any) -> str | None:
        """How a backend factorises such matrices: "banded", by SuperLU as "sparse", or not at all."""
        wide = max(self.lower, self.upper)
        if wide <= NARROW or (not be.sparse_lu and 4 * wide <= self.size):
            return "banded"
        return "sparse" if be.sparse_lu else None

    def factors(self, be: Any) -> int:
        """How many numbers LU factors take, an index counted as half of one."""
        structure = self.structure(be)
        if structure == "sparse":
            return 3 * (self.elimination.fill + self.size) // 2
        return self.size * (self.size if structure is None else 2 * self.lower + self.upper + 1)

    def matrix(self, values: Any) -> Any:
        """A SciPy matrix from its entries as NumPy numbers."""
        from scipy.sparse import csc_array

        return csc_array((values, self.rows, self._starts), shape=(self.size, self.size))

    @cached_property
    def _starts(self) -> Any:
        return _xp().searchsorted(self.columns, _xp().arange(self.size + 1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


def entries_in(A: Any, mass: Any = None) -> tuple[Pattern, Any]:
    """The pattern of a SciPy matrix, with the entries of a `Mass`, and its values in the places of that."""
    from scipy.sparse import csc_array

    A = A if A.format == "csc" else csc_array(A)
    if not A.has_canonical_format:
        A = A.copy()
        A.sum_duplicates()
    pattern, places = _found(A.shape[0], A.indptr.tobytes(), A.indices.tobytes(), A.indices.dtype.name, mass)
    values = _xp().zeros(pattern.rows.shape[0])
    values[places] = A.data
    return pattern, values


@lru_cache(maxsize=64)
def _found(size: int, starts: bytes, rows: bytes, integer: str, mass: Any) -> tuple[Pattern, Any]:
    """The pattern of a matrix in compressed columns, and where it has the entries."""
    xp = _xp()
    ends, i = (xp.astype(xp.frombuffer(v, dtype=integer), xp.int64) for v in (starts, rows))
    j = xp.repeat(xp.arange(size), ends[1:] - ends[:-1])
    rows, columns = i, j
    if mass is not None:
        more, beside = xp.nonzero(mass.values)
        rows, columns = xp.concat([i, xp.astype(more, xp.int64)]), xp.concat([j, xp.astype(beside, xp.int64)])
    pattern = _kept(Pattern(rows, columns, size))
    return pattern, xp.searchsorted(pattern.columns * size + pattern.rows, j * size + i)


def pattern_of(given: Any, size: int, mass: Any = None) -> Pattern | None:
    """The checked pattern of a problem's Jacobian, with the entries of `mass`, an `(n, n)` NumPy array.

    Raises
    ------
    InputError
        It is not an `(n, n)` matrix.
    """
    if given is None:
        return None
    xp = _xp()
    try:
        entries = given.tocoo() if hasattr(given, "tocoo") else xp.asarray(given) != 0
        shape = tuple(entries.shape)
    except Exception as e:  # whatever is no matrix refuses in its own way
        raise InputError(f"jac_sparsity is a {type(given).__name__}, which is no matrix",
                         "its nonzero entries say where df/du may be nonzero", "a SciPy sparse or NumPy matrix") from e
    if shape != (size, size):
        raise InputError(f"jac_sparsity has shape {shape}, expected {(size, size)}", "it is the pattern of df/du",
                         "one row and one column per entry of the raveled state")
    pairs = [(entries.row[entries.data != 0], entries.col[entries.data != 0])
             if hasattr(given, "tocoo") else xp.nonzero(entries)]
    if mass is not None:
        pairs.append(xp.nonzero(mass))
    rows, columns = (xp.astype(xp.concat(v), xp.int64) for v in zip(*pairs, strict=True))
    return _kept(Pattern(rows, columns, size))


@lru_cache(maxsize=64)
def _kept(pattern: Pattern) -> Pattern:
    """One pattern for all solves with an equal one, so that colours are found once."""
    return pattern


def _xp() -> Any:
    return registry().backend("numpy").xp


def _inverse(order: Any) -> Any:
    return _xp().argsort(order)


def _reach(rows: Any, columns: Any) -> tuple[int, int]:
    """How far entries are below and above the diagonal."""
    return int((rows - columns).max()), int((columns - rows).max())


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


# -- entries from products --------------------------------------------------------------------------------------------


def by_columns(be: Any, pattern: Pattern, push: Callable[[Any, Array, Array], Array]) -> Callable[[Any, Array], Array]:
    """`entries(t, u)` from products with the matrix, `push(t, u, rows)` with one direction in each row."""
    return _by_lines(be, pattern, pattern.column_colours, pattern.columns, pattern.rows, push)


def by_rows(be: Any, pattern: Pattern, pull: Callable[[Any, Array, Array], Array]) -> Callable[[Any, Array], Array]:
    """`entries(t, u)` from products with the transpose, `pull(t, u, rows)`."""
    return _by_lines(be, pattern, pattern.row_colours, pattern.rows, pattern.columns, pull)


def _by_lines(be: Any, pattern: Pattern, colours: Any, lines: Any, crossings: Any,
              products: Callable[[Any, Array, Array], Array]) -> Callable[[Any, Array], Array]:
    xp = _xp()
    masks = xp.astype(colours[None, :] == xp.arange(int(xp.max(colours)) + 1)[:, None], xp.float64)
    index = colours[lines] * pattern.size + crossings

    def entries(t: Any, u: Array) -> Array:
        rows = products(t, u, be.asarray(masks, dtype=u.dtype, device=be.device(u)))
        return be.xp.take(be.xp.reshape(rows, (-1,)), be.asarray(index, device=be.device(u)))

    return entries
