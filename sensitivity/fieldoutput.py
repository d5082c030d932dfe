"""What `f` returned, held against what `u` is."""

from __future__ import annotations

import math
import warnings
from typing import Any

from .errors import CapturedValueError, OutputError, ProbeWarning
from .userfunction import calling_depth, location, parameter_names


def check_output(be: Any, f: Any, args: tuple[Any, Any, Any], like: list[Any], out: Any,
                  first: bool) -> list[Any]:
    """The leaves of an output that has structure, shapes and kind of the state."""
    if out is None:
        raise OutputError(f"f returned None, at {location(f)}", "a vector field returns du/dt",
                          "end f with return dudt" + adapter("from_sciml"))
    leaves = leaves_of(be, out)
    if not _alike(be, args[1], out):
        raise _wrong_structure(be, f, args[1], out, leaves)
    for x, v in zip(leaves, like, strict=True):
        if not be.is_array(x):
            _check_foreign(be, f, x, v, bare=out is x)
        shape, wanted = getattr(x, "shape", ()), v.shape
        if shape != wanted:
            shape, wanted = tuple(shape), tuple(wanted)
            what = f"f returned shape {shape}, u has shape {wanted}, at {location(f)}"
            if first and not be.traced and _fits_swapped(be, f, *args):
                raise swapped(f, what, "f(u, t, p) would have the right shape: time seems to come second")
            alike = math.prod(shape) == math.prod(wanted)
            raise OutputError(what, "du/dt has one entry for each entry of u",
                              f"return dudt.reshape({wanted})" if alike else f"return an array of shape {wanted}")
        if be.is_array(x) and x.dtype != v.dtype:
            _check_dtype(be, f, be.asarray(x) if be.traced else x, v, first)
    return leaves


def _alike(be: Any, a: Any, b: Any) -> bool:
    return (be.is_array(a) and be.is_array(b)) or be.flatten(a)[1] == be.flatten(b)[1]


def _wrong_structure(be: Any, f: Any, u: Any, out: Any, leaves: list[Any]) -> OutputError:
    what = f"f returned {_described(out)}, u is {_described(u)}, at {location(f)}"
    if hasattr(u, "shape"):
        fix = "return one array"
        if isinstance(out, list | tuple):
            numbers = all(isinstance(x, int | float | complex) for x in leaves)
            fix += f": {be.array_call}([...])" if numbers else f": {be.namespace}.stack([...])"
        return OutputError(what, "the output has the structure of u", fix)
    fix = f"return a {type(u).__name__} like u"
    if hasattr(out, "shape") and isinstance(u, list | tuple):
        fix = f"make u0 one array: u0={be.array_call}([...]); or {fix}"
    return OutputError(what, "the output has the structure of u: same containers, same keys", fix)


def _described(x: Any) -> str:
    if hasattr(x, "shape"):
        return f"one array of shape {tuple(x.shape)}"
    if isinstance(x, dict):
        return f"a dict with keys {', '.join(map(repr, x))}"
    return f"a {type(x).__name__} of {len(x)}" if isinstance(x, list | tuple) else f"a {type(x).__name__}"


def _check_foreign(be: Any, f: Any, x: Any, like: Any, bare: bool) -> None:
    """A leaf that is no array of this backend: a number, an array of another framework, or a box around an array."""
    from .registry import registry

    wanted = f"u has an array of shape {tuple(like.shape)}"
    if isinstance(x, int | float | complex):
        try:
            be.xp.reshape(x, (-1,))
        except Exception:
            bare = False
        if not bare:
            fix = f"{be.namespace}.full_like(u, x)"
            raise OutputError(f"f returned the number {x!r} where {wanted}, at {location(f)}",
                              "the output has the structure of u", f"return an array: {fix}")
        return
    other = registry().kind_of(x)
    if other in (None, be.name):
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return
        raise OutputError(f"f returned a {type(x).__name__} where {wanted}, at {location(f)}",
                          "the output has the structure of u", f"return shape {tuple(like.shape)}")
    if other == "autograd":
        raise CapturedValueError(f"f closes over a value that autograd is differentiating, at {location(f)}",
                                 "what f closes over cannot be reached under autograd",
                                 "pass the value through p: ODEProblem(f, u0, tspan, p)")
    raise OutputError(f"f returned an array of {other} where u is an array of {be.name}, at {location(f)}",
                      "one solve runs in one framework, so that its AD sees all of f",
                      f"compute with {be.name} operations from u to the result")


def _check_dtype(be: Any, f: Any, x: Any, like: Any, first: bool) -> None:
    name, wanted = (str(v.dtype).removeprefix("torch.") for v in (x, like))
    what = f"f returned dtype {name}, u has {wanted}, at {location(f)}"
    if name == "object":
        raise OutputError(what, "NumPy makes such arrays of entries that are no plain numbers",
                          "stack arrays of one shape; with autograd, import autograd.numpy as np")
    if not be.is_float(x):
        raise OutputError(what, "the derivative of a floating-point state is a floating-point number",
                          "write 1.0 instead of 1 in constants, and dtype=u.dtype where f makes arrays")
    if be.is_complex(x) and not be.is_complex(like):
        raise OutputError(what, "the imaginary part would be lost", "u0 complex, or return the real part")
    if be.is_complex(like) and not be.is_complex(x):
        if not be.traced:
            raise OutputError(what, "the steps add it to a complex state in place", "return dudt + 0j")
    elif first and x.dtype != like.dtype:
        warnings.warn(f"{what}; the solve goes on in {wanted}. Constants in f may have another precision than u0",
                      ProbeWarning, stacklevel=calling_depth())


def _fits_swapped(be: Any, f: Any, t: Any, u: Any, p: Any) -> bool:
    """Whether `f(u, t, p)` looks like `u`; tried only after `f(t, u, p)` did not."""
    try:
        out = f(copied(be, u), t, p)
        return _alike(be, u, out) and all(
            tuple(x.shape) == tuple(v.shape) for x, v in zip(leaves_of(be, out), leaves_of(be, u), strict=True))
    except Exception:
        return False


def swapped(f: Any, what: str, why: str) -> OutputError:
    wrapper = "from_sciml" if (parameter_names(f) or [])[2:3] in (["t"], ["time"]) else "from_odeint"
    return OutputError(what, f"{why}, but f is called as f(t, u, p)",
                       "reorder them: def f(t, u, p): ..." + adapter(wrapper))


def adapter(name: str) -> str:
    """Mention of a function of this library that wraps a vector field of another one."""
    return f"; or wrap f: sa.{name}(f)"


def leaves_of(be: Any, tree: Any) -> list[Any]:
    return [tree] if be.is_array(tree) else be.flatten(tree)[0]


def copied(be: Any, tree: Any) -> Any:
    if be.is_array(tree):
        return be.copy(tree)
    leaves, structure = be.flatten(tree)
    return be.unflatten(structure, copies_of(be, leaves))


def copies_of(be: Any, leaves: list[Any]) -> list[Any]:
    return leaves if be.traced else [be.copy(x) if be.is_array(x) else x for x in leaves]
