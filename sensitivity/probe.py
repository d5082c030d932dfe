"""The first-call check of `f`."""

from __future__ import annotations

from typing import Any


def check(be: Any, prob: Any, t0: Any, u0: Any, p: Any, mode: str) -> None:
    """Placeholder."""
