"""Checks of the arguments of `solve`, one function each: what comes out is what the solve works with."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from .control import FixedStep, PIController
from .errors import InputError, TimesError, ToleranceError, UnsupportedCombination
from .system import Layout

MAX_STEPS = 100_000
MAX_RECORDED = 2048
MAX_EVENTS = 1000
MAX_RECORDED_EVENTS = 100


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise InputError(f"{name}={value!r} is none of the possible values", f"they are {names}",
                         f"{name}={allowed[0]!r}")


def laid_out(be: Any, u0: Any, dtype: Any, device: Any) -> tuple[Any, Layout, Any]:
    """The backend bound to the state's device and dtype, the shapes of the state, and the state flat."""
    leaves, structure = be.flatten(u0)
    if not leaves:
        raise InputError(f"u0={u0!r} holds no numbers", "there is nothing to solve for", "u0=np.array([1.0, 0.0])")
    kind = _state_dtype(be, leaves, dtype)
    if device is not None:
        _check_device(be, device)
    leaves = [_state(be, v, kind, device) for v in leaves]
    layout = Layout(structure, tuple(tuple(v.shape) for v in leaves))
    flat = layout.ravel(be, leaves)
    return be.bound(flat), layout, flat


def _check_device(be: Any, device: Any) -> None:
    try:
        be.asarray(0.0, device=device)
    except Exception as e:  # frameworks raise whatever they like for a device that is not there
        raise InputError(f"device={device!r} cannot be used with {be.name} ({e})", "arrays are to be put there",
                         f"a device that {be.name} knows, or no device= to stay where u0 is") from e


def _state_dtype(be: Any, leaves: list[Any], dtype: Any) -> Any:
    """The common floating dtype of the state; whole numbers become the backend's default float."""
    if dtype is not None:
        return dtype
    kinds = [be.asarray(x).dtype for x in leaves if be.is_array(x) and be.is_float(x)]
    if kinds:
        return kinds[0] if len(kinds) == 1 else be.xp.result_type(*kinds)
    return be.xp.complex128 if any(isinstance(x, complex) for x in leaves) else be.default_float()


def _state(be: Any, x: Any, dtype: Any, device: Any) -> Any:
    try:
        return be.asarray(x, dtype=dtype, device=device)
    except (TypeError, ValueError) as e:
        raise InputError(f"u0 holds a {type(x).__name__}, which is no array", "a state consists of numbers",
                         "u0=np.array([1.0, 0.0])") from e


def time(be: Any, t: Any, name: str, like: Any) -> Any:
    """A time as a 0-d array of the backend."""
    try:
        t = be.asarray(t, dtype=be.time_dtype(like.dtype), device=be.device(like))
    except (TypeError, ValueError) as e:
        raise TimesError(f"{name}={t!r} is not a number", "a solve starts and ends at numbers",
                         "tspan=(0.0, 10.0)") from e
    if t.ndim:
        raise TimesError(f"{name} has shape {tuple(t.shape)}, expected a scalar", "all entries of u share one time",
                         "tspan=(0.0, 10.0)")
    value = be.concrete(t)
    if value is not None and not math.isfinite(value):
        raise TimesError(f"{name}={value} is not finite", "a solve ends after finitely many steps", "tspan=(0.0, 10.0)")
    return t


def instants(be: Any, name: str, times: Any, like: Any, why: str, fix: str) -> Any:
    """Several times as a vector of the backend."""
    try:
        ts = be.asarray(times, dtype=be.time_dtype(like.dtype), device=be.device(like))
    except (TypeError, ValueError) as e:
        raise TimesError(f"{name}={times!r} is not a list of times", why, fix) from e
    if ts.ndim != 1 or ts.shape[0] == 0:
        raise TimesError(f"{name} has shape {tuple(ts.shape)}, expected a vector of times", why, fix)
    return ts


def saves(be: Any, saveat: Any, t0: float | None, t1: float | None, like: Any) -> tuple[Any, Any]:
    if saveat is None:
        return None, None
    if isinstance(saveat, str):
        choice("saveat", saveat, ("steps",))
        return "steps", None
    if isinstance(saveat, int) and not isinstance(saveat, bool):
        if saveat < 1:
            raise TimesError(f"saveat={saveat} asks for no output", "an integer is the number of output times",
                             "saveat=None for the end only")
        return saveat, None
    ts = instants(be, "saveat", saveat, like, "one row of sol.u belongs to each time",
                  "saveat=[t] for one time, saveat=np.linspace(0.0, 10.0, 11), an integer, 'steps' or None")
    if t0 is not None and t1 is not None:
        low, high = min(t0, t1), max(t0, t1)
        slack = 1e-12 * max(abs(low), abs(high)) if be.eps(ts.dtype) < 1e-10 else 1e-6 * max(abs(low), abs(high))
        for i, t in enumerate(be.concrete_times(saveat) or ()):
            if not low - slack <= t <= high + slack:
                fix = f"tspan=({min(low, t):g}, {max(high, t):g})" if math.isfinite(t) else "remove it"
                raise TimesError(f"saveat[{i}]={t:g} lies outside tspan=({t0:g}, {t1:g})",
                                 "the solver does not extrapolate", fix)
    return "ts", ts


def controlled(method: Any, controller: Any, dt: Any, t0: float | None, t1: float | None) -> tuple[Any, float | None]:
    dt = positive("dt", dt)
    if controller is None:
        controller = PIController() if method.adaptive else FixedStep()
    if controller.adaptive and not method.adaptive:
        raise UnsupportedCombination(f"{method.name} has no error estimate to control steps with", "it has one formula",
                                     "controller=FixedStep() with dt=, or Tsit5()")
    if not controller.adaptive and dt is None:
        why = "FixedStep needs a size" if method.adaptive else "there is no error estimate"
        raise InputError(f"{method.name} takes fixed steps and dt was not given", why,
                         "dt=0.01, or an adaptive method: Tsit5()")
    return controller, dt


def tolerances(be: Any, rtol: Any, atol: Any, dtype: Any, layout: Layout, u0: Any) -> tuple[Any, Any]:
    eps = be.eps(dtype)
    double = eps < 1e-10
    out = []
    for name, value, default in (("rtol", rtol, 1e-6 if double else 1e-4), ("atol", atol, 1e-9 if double else 1e-6)):
        value = default if value is None else value
        if not isinstance(value, int | float):
            leaves, _ = be.flatten(value)
            try:
                leaves = [be.asarray(v, dtype=be.real_dtype(dtype), device=be.device(u0)) for v in leaves]
            except (TypeError, ValueError) as e:
                raise ToleranceError(f"{name}={value!r} is not a number", "errors are compared with it",
                                     f"{name}={default:g}, or one number per entry of u0") from e
            if len(leaves) == 1 and leaves[0].ndim == 0:
                value = be.concrete(leaves[0])
                if value is None:
                    out.append(leaves[0])
                    continue
            else:
                if tuple(tuple(v.shape) for v in leaves) != layout.shapes:
                    raise ToleranceError(f"{name} has other shapes than u0", "each entry of u has its own",
                                         f"{name}=1e-8, or one number per entry")
                least = [be.concrete(be.xp.min(v)) for v in leaves]
                if not all(v is None or v >= 0.0 for v in least):
                    raise ToleranceError(f"{name} holds a number that is not positive", "errors are compared with it",
                                         f"{name}={default:g}, or one positive number per entry of u0")
                out.append(layout.ravel(be, leaves))
                continue
        value = float(value)
        if not value >= 0.0 or not math.isfinite(value):
            raise ToleranceError(f"{name}={value:g} is not a positive number", "errors are compared with it",
                                 f"{name}={default:g}")
        if name == "rtol" and 0.0 < value < 100.0 * eps:
            raise ToleranceError(
                f"rtol={value:g} cannot be met in {str(dtype).removeprefix('torch.')} (machine epsilon {eps:.1e})",
                "the step size would shrink without end",
                f"rtol>={100.0 * eps:.1e}" + ("" if double else ", or a float64 state (JAX: jax_enable_x64 first)"))
        out.append(value)
    if all(isinstance(v, float) and v == 0.0 for v in out):
        raise ToleranceError("rtol and atol are both zero", "no step could be accepted", "rtol=1e-6")
    return out[0], out[1]


def limits(be: Any, max_steps: Any, controller: Any, dt: float | None, t0: float | None, t1: float | None,
            max_events: int) -> tuple[int, int]:
    """Step limit, and how many accepted steps may be recorded where that must be known beforehand.

    An event splits a fixed step in two.
    """
    count("max_steps", max_steps, MAX_STEPS)
    capacity = MAX_RECORDED if max_steps is None else int(max_steps)
    if not be.traced:
        capacity = MAX_STEPS if max_steps is None else int(max_steps)
    limit = MAX_STEPS if max_steps is None else int(max_steps)
    if not controller.adaptive and t0 is not None and t1 is not None:
        assert dt is not None
        needed = max(1, math.ceil(abs(t1 - t0) / dt * (1 - 1e-9))) + max_events
        if max_steps is None:
            return max(limit, needed), needed
        return limit, min(capacity, needed)
    return limit, capacity


def count(name: str, value: Any, default: int) -> int:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if value is not None and not (whole and value >= 1):
        raise InputError(f"{name}={value!r} is not a positive integer", "it bounds the work before it starts",
                         f"{name}={default}")
    return default if value is None else int(value)


def positive(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as e:
        raise InputError(f"{name}={value!r} is not a number known before the solve", "it steers the steps, underived",
                         f"{name}=0.01") from e
    if not number > 0.0 or not math.isfinite(number):
        raise InputError(f"{name}={number:g} is not positive", "the direction comes from tspan",
                         f"{name}={abs(number) or 0.01:g}")
    return number


def stops(tstops: Any, t0: float | None, t1: float | None) -> tuple[float, ...]:
    if tstops is None:
        return ()
    out = sorted(float(t) for t in tstops)
    if t0 is not None and t1 is not None:
        for t in out:
            if not min(t0, t1) <= t <= max(t0, t1):
                raise TimesError(f"tstops holds {t:g}, outside tspan=({t0:g}, {t1:g})", "no step goes there",
                                 "leave it out")
        if t1 < t0:
            out.reverse()
    return tuple(out)


def progressed(progress: Any) -> Any:
    if not progress:
        return None
    if progress is True:
        from .progress import line

        return line
    if not callable(progress):
        raise InputError(f"progress={progress!r} is neither a bool nor callable", "it is told how far the solve is",
                         "progress=True, or progress=lambda fraction, t: ...")
    return progress
