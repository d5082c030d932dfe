"""Solutions as tables, problems and results as HTML; optional packages are imported only when they are asked for."""

from __future__ import annotations

import dataclasses
from html import escape
from importlib import import_module
from typing import Any

from .errors import BackendMissingError, InputError
from .retcode import RetCode
from .userfunction import location


def columns(sol: Any) -> dict[str, Any]:
    """Every component of `sol.u` by name, `(k,)` each; `t` first."""
    out = {"t": _numpy(sol.t)}
    if out["t"].ndim != 1:
        raise InputError("this is the solution of an ensemble", "a table has one axis for time",
                         "one table per member: sa.solve(ensemble.member(i), ...)")
    for name, values in _leaves(sol):
        flat = values.reshape(values.shape[0], -1)
        shape = values.shape[1:]
        for j in range(flat.shape[1]):
            out[f"{name}{_place(j, shape)}"] = flat[:, j]
    return out


def to_frame(sol: Any) -> Any:
    """See `Solution.to_frame`."""
    pandas = _package("pandas", "to_frame")
    table = columns(sol)
    return pandas.DataFrame({k: v for k, v in table.items() if k != "t"}, index=pandas.Index(table["t"], name="t"))


def to_xarray(sol: Any) -> Any:
    """See `Solution.to_xarray`."""
    xarray = _package("xarray", "to_xarray")
    t = _numpy(sol.t)
    members, coordinates = (("member",), {}) if t.ndim == 2 else ((), {"time": t})
    variables = {}
    for name, values in _leaves(sol):
        own = tuple(f"{name}_{i}" for i in range(values.ndim - t.ndim))
        variables[name] = ((*members, "time", *own), values)
    if members:
        variables["t"] = ((*members, "time"), t)
    attributes = {"method": repr(sol.alg), "sensealg": repr(sol.sensealg)}
    return xarray.Dataset(variables, coords=coordinates, attrs=attributes)


def problem_html(prob: Any) -> str:
    """A problem as a table of its fields."""
    rows = []
    for f in dataclasses.fields(prob):
        value = getattr(prob, f.name)
        if value is not None:
            rows.append((f.name, location(value) if callable(value) else _short(value)))
    return _table(type(prob).__name__, rows)


def solution_html(sol: Any) -> str:
    """How a solve went, as a table."""
    code = sol.retcode.name if isinstance(sol.retcode, RetCode) else str(sol.retcode)
    stats = ", ".join(f"{f.name} {sol.stats[f.name]}" for f in dataclasses.fields(sol.stats))
    rows = [("retcode", code), ("t", _short(sol.t)), ("u", _short(sol.u)), ("method", repr(sol.alg)),
            ("sensealg", repr(sol.sensealg)), ("stats", stats)]
    rows += [("because", reason) for used in (sol.alg, sol.sensealg) for reason in getattr(used, "because", ())]
    return _table("Solution", rows)


def gradient_html(r: Any) -> str:
    """A loss and its derivatives, as a table."""
    rows = [(name, _short(getattr(r, name))) for name in ("value", "u0", "p", "t0", "t1", "saveat")
            if getattr(r, name) is not None]
    return _table("Gradient", [*rows, ("sensealg", repr(r.sensealg))]) + solution_html(r.solution)


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th style='text-align:left'>{escape(k)}</th><td style='text-align:left'>{escape(v)}</td></tr>"
                    for k, v in rows)
    return f"<table><caption><b>{escape(title)}</b></caption>{cells}</table>"


def _short(value: Any) -> str:
    """An array by its shape if it is long, anything else by a few of its letters."""
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape) and max(shape) > 6:
        return f"array {tuple(shape)}, {str(value.dtype).removeprefix('torch.')}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _leaves(sol: Any) -> list[tuple[str, Any]]:
    from . import tree

    leaves, _ = tree.flatten(sol.u)
    names = [_plain(path) or "u" for path in tree.names(sol.u)]
    return [(name, _numpy(leaf)) for name, leaf in zip(names, leaves, strict=True)]


def _plain(path: str) -> str:
    """`['x'][0]` as `x.0`."""
    return path.replace("][", ".").strip("[]").replace("'", "")


def _place(j: int, shape: tuple[int, ...]) -> str:
    """The index of entry j in an array of this shape; nothing for a number."""
    index = []
    for size in reversed(shape):
        index.append(j % size)
        j //= size
    return f"[{','.join(map(str, reversed(index)))}]" if index else ""


def _numpy(x: Any) -> Any:
    import numpy as np

    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


def _package(name: str, what: str) -> Any:
    try:
        return import_module(name)
    except ImportError as e:
        raise BackendMissingError(f"{what} needs {name}, which is not installed ({e})", "",
                                  f"pip install {name}") from e
