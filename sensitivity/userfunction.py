"""A user's function seen from outside: its parameters, where it stands, where in it an error arose."""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import sys
import types
from typing import Any


def accepts(f: Any, e: Exception) -> bool:
    """Whether the signature admits three positional arguments; without one, whether the call got inside `f`."""
    try:
        inspect.signature(signed(f)).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # no signature
        return e.__traceback__ is not None and e.__traceback__.tb_next is not None
    return True


def signed(f: Any) -> Any:
    """What carries the signature: `forward` of a module whose `__call__` takes anything."""
    return f.forward if callable(getattr(f, "forward", None)) else f


def parameter_names(f: Any) -> list[str] | None:
    """Names of the positional parameters, None if unknown."""
    f = signed(f)
    if type(f) is types.FunctionType:
        return list(f.__code__.co_varnames[: f.__code__.co_argcount])
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):
        return None
    return [q.name for q in parameters if q.kind in (q.POSITIONAL_ONLY, q.POSITIONAL_OR_KEYWORD)]


def unwrapped(f: Any) -> Any:
    """The Python function behind partials, decorators, methods, modules and callable objects."""
    for _ in range(20):
        if isinstance(f, functools.partial):
            f = f.func
        elif isinstance(f, types.MethodType):
            f = f.__func__
        elif hasattr(f, "__wrapped__"):
            f = f.__wrapped__
        elif isinstance(f, types.FunctionType):
            break
        else:
            owner = getattr(type(f), "forward", None) or type(f).__call__
            if not isinstance(owner, types.FunctionType):
                break
            f = owner
    return f


def location(f: Any) -> str:
    """`name (file.py:12)`."""
    inner = unwrapped(f)
    code = getattr(inner, "__code__", None)
    if code is None:
        return getattr(inner, "__name__", None) or type(f).__name__
    return f"{code.co_qualname.split('<locals>.')[-1]} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"


def location_of_error(e: BaseException, f: Any) -> str:
    """`name (file.py:14): source line`, the innermost line of the user's file that `e` passed through."""
    code = getattr(unwrapped(f), "__code__", None)
    found, step = None, e.__traceback__
    while step is not None:
        if code is not None and step.tb_frame.f_code.co_filename == code.co_filename:
            found = step
        step = step.tb_next
    if found is None:
        return location(f)
    file, number = found.tb_frame.f_code.co_filename, found.tb_lineno
    source = linecache.getline(file, number).strip()
    name = found.tb_frame.f_code.co_name
    return f"{name} ({os.path.basename(file)}:{number})" + (f": {source}" if source else "")


def calling_depth() -> int:
    """`stacklevel`, for the caller, of the frame that called this package."""
    root, frame, depth, found = os.path.dirname(__file__), sys._getframe(1), 1, 1
    while frame.f_back is not None:
        found = depth + 1 if frame.f_code.co_filename.startswith(root) else found
        frame, depth = frame.f_back, depth + 1
    return found
