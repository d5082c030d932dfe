"""Vector fields written for other tools, as `f(t, u, p)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from .errors import SignatureError
from .registry import registry
from .userfunction import signed

OWN = inspect.signature(lambda t, u, p: None)


@dataclass(frozen=True)
class Adapted:
    """`f(t, u, p)` made of a function with another order of arguments."""

    f: Callable[..., Any]

    __signature__: ClassVar[inspect.Signature] = OWN

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.f

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class _TimeFirst(Adapted):
    """`f(t, y, *args)`."""

    extra: int | None

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        return _array_like(self.f(t, u, *_arguments(p, self.extra)), u)


@dataclass(frozen=True)
class _StateFirst(Adapted):
    """`f(y, t, *args)`."""

    extra: int | None

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        return _array_like(self.f(u, t, *_arguments(p, self.extra)), u)


@dataclass(frozen=True)
class _TimeLast(Adapted):
    """`f(u, p, t)`."""

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        return _array_like(self.f(u, p, t), u)


@dataclass(frozen=True)
class _InPlace(Adapted):
    """`f(du, u, p, t)`, which writes into `du`."""

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        be = registry().backend_for([("u", u)])
        du = be.xp.zeros_like(u)
        self.f(du, u, p, t)
        return du


def from_scipy(f: Callable[..., Any]) -> Adapted:
    """A vector field for `scipy.integrate.solve_ivp`: `f(t, y, *args)`.

    Parameters
    ----------
    f : callable
        What stands in `args` there is `p` here: a tuple or list is spread over the arguments after `y`; so is an array
        if there are several of them; anything else is handed over as one. A list that `f` returns becomes an array.

    Returns
    -------
    callable
        `f(t, u, p)`.

    Raises
    ------
    SignatureError
        `f` cannot be called with time and state.
    """
    return _TimeFirst(f, _extra(f, "from_scipy", "f(t, y, *args)"))


def from_odeint(f: Callable[..., Any]) -> Adapted:
    """A vector field for `scipy.integrate.odeint` (without `tfirst`): `f(y, t, *args)`.

    Parameters
    ----------
    f : callable
        As in `from_scipy`, with the state first.

    Returns
    -------
    callable
        `f(t, u, p)`.

    Raises
    ------
    SignatureError
        `f` cannot be called with state and time.
    """
    return _StateFirst(f, _extra(f, "from_odeint", "f(y, t, *args)"))


def from_torchdiffeq(f: Callable[..., Any]) -> Adapted:
    """A vector field for `torchdiffeq.odeint`: `f(t, y)`, a function or an `nn.Module`.

    Parameters
    ----------
    f : callable
        Its own parameters, and tensors that it closes over, get gradients as with any `f`.

    Returns
    -------
    callable
        `f(t, u, p)`; `p` is not used.

    Raises
    ------
    SignatureError
        `f` cannot be called with time and state.
    """
    extra = _extra(f, "from_torchdiffeq", "f(t, y)", required=True)
    if extra:
        raise SignatureError(f"from_torchdiffeq got a function of {2 + extra} arguments", "torchdiffeq calls f(t, y)",
                             "from_scipy(f) for f(t, y, *args)")
    return _TimeFirst(f, 0)


def from_sciml(f: Callable[..., Any]) -> Adapted:
    """A vector field in the order of Julia's SciML: `f(u, p, t)`, or `f(du, u, p, t)` which fills `du`.

    Parameters
    ----------
    f : callable
        The second form writes in place: PyTorch differentiates that, JAX cannot run it, and in NumPy derivatives of `f`
        are made by differences, with a warning.

    Returns
    -------
    callable
        `f(t, u, p)`.

    Raises
    ------
    SignatureError
        `f` takes neither three nor four arguments.
    """
    extra = _extra(f, "from_sciml", "f(u, p, t)")
    if extra not in (None, 1, 2):
        raise SignatureError(f"from_sciml got a function of {2 + (extra or 0)} arguments",
                             "SciML calls f(u, p, t), or f(du, u, p, t) in place", "def f(u, p, t): ...")
    return _InPlace(f) if extra == 2 else _TimeLast(f)


def _extra(f: Any, name: str, form: str, required: bool = False) -> int | None:
    """How many positional arguments (that have no default, if `required`) follow the first two; None for any number."""
    if not callable(f):
        raise SignatureError(f"{name} got {type(f).__name__}, which cannot be called", "it adapts a vector field",
                             f"sa.{name}(f) with {form}")
    try:
        parameters = inspect.signature(signed(f)).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(q.kind is q.VAR_POSITIONAL for q in parameters):
        return None
    count = sum(q.kind in (q.POSITIONAL_ONLY, q.POSITIONAL_OR_KEYWORD) and not (required and q.default is not q.empty)
                for q in parameters)
    if count < 2:
        raise SignatureError(f"{name} got a function of {count} arguments", "time and state are two",
                             f"sa.{name}(f) with {form}")
    return count - 2


def _arguments(p: Any, extra: int | None) -> Any:
    """What follows time and state."""
    if p is None or extra == 0:
        return ()
    if isinstance(p, tuple | list):
        return p
    if extra is not None and extra > 1 and hasattr(p, "shape"):
        return [p[i] for i in range(extra)]
    return (p,)


def _array_like(out: Any, u: Any) -> Any:
    """A list of numbers, which these tools take, as one array where the state is one."""
    if not (isinstance(out, list | tuple) and hasattr(u, "shape")):
        return out
    be = registry().backend_for([("u", u)])
    return be.xp.stack([be.asarray(x, dtype=u.dtype, device=be.device(u)) for x in out])
