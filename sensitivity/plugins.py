"""What plugin authors import."""

from .hooks import hookimpl, hookspec
from .registry import BackendInfo

__all__ = ["BackendInfo", "hookimpl", "hookspec"]
