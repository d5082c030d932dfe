"""Pytrees: optree, with dataclasses registered as they are met."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

NAMESPACE = "sensitivity"
_registered: set[type] = set()


@cache
def _optree() -> Any:
    """Imported when the first tree arrives."""
    import optree

    return optree


def _register(cls: type) -> None:
    names = tuple(f.name for f in dataclasses.fields(cls))

    def rebuild(_: Any, values: Any) -> Any:
        new: Any = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(new, name, value)
        return new

    _optree().register_pytree_node(
        cls, lambda x: (tuple(getattr(x, n) for n in names), None, names), rebuild, namespace=NAMESPACE
    )
    _registered.add(cls)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves of `tree`, and a structure for `unflatten`; `None` is an empty subtree."""
    leaves, structure = _optree().tree_flatten(tree, namespace=NAMESPACE)
    fresh = {type(x) for x in leaves if dataclasses.is_dataclass(x) and not isinstance(x, type)} - _registered
    if not fresh:
        return leaves, structure
    for cls in fresh:
        _register(cls)
    return flatten(tree)


def unflatten(structure: Any, leaves: Any) -> Any:
    """The tree of `structure` with these leaves."""
    return _optree().tree_unflatten(structure, leaves)


def names(tree: Any) -> list[str]:
    """A printable path for each leaf, for messages."""
    flatten(tree)
    return [p if (p := "".join(f"[{k!r}]" for k in path)) else "" for path in
            _optree().tree_paths(tree, namespace=NAMESPACE)]
