"""The hooks a plugin may implement; `hookimpl` marks them."""

from __future__ import annotations

from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("sensitivity")
hookimpl = pluggy.HookimplMarker("sensitivity")


@hookspec
def sensitivity_backends() -> list[Any]:  # type: ignore[empty-body]
    """Return `BackendInfo` entries; must not import the framework."""


@hookspec
def sensitivity_methods() -> dict[str, type]:  # type: ignore[empty-body]
    """Return stepping methods by name."""


@hookspec
def sensitivity_algorithms() -> dict[str, type]:  # type: ignore[empty-body]
    """Return sensitivity algorithms by name."""


@hookspec
def sensitivity_vjps() -> dict[str, type]:  # type: ignore[empty-body]
    """Return VJP choices by name."""


@hookspec
def sensitivity_rules() -> list[Any]:  # type: ignore[empty-body]
    """Return `Rule` entries for the automatic choice; they are asked before the library's own."""
