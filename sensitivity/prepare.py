"""From what the user wrote to a `Run` and its `Inputs`: backend, flattening, defaults, checks of the arguments."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from . import delayprepare
from . import probe as first_call
from .blackbox import BlackBox
from .control import FixedStep, PIController
from .errors import InputError, TimesError, ToleranceError, UnsupportedCombination
from .events import Watched, watched
from .integrate import Run
from .mass import mass_of, scaled_products
from .methods import Method, Tsit5
from .problems import DDEProblem, ODEProblem
from .registry import registry
from .sparsity import pattern_of
from .stochastic import Pair, SDEProblem, Stochastic, drive
from .stochasticchecks import check_diffusion, check_steps, method_for
from .stochasticmethods import StochasticMethod
from .system import Field, Inputs, Layout, Partition, Products

PROBLEMS: tuple[Any, ...] = (ODEProblem, DDEProblem, SDEProblem)
MAX_STEPS = 100_000
MAX_RECORDED = 4096
MAX_EVENTS = 1000
MAX_RECORDED_EVENTS = 100


def prepare(prob: Any, alg: Any, *, saveat: Any = None, rtol: Any = None, atol: Any = None, dt: Any = None,
            events: Any = None, max_steps: int | None = None, max_events: int | None = None,
            dtmin: float | None = None, dtmax: float | None = None,
            dense: bool = False, backend: str | None = None, device: Any = None, dtype: Any = None,
            progress: Any = False, controller: Any = None, norm: Any = None, tstops: Any = None,
            probe: str = "raise", wrt: tuple[str, ...] | None = None) -> tuple[Run, Inputs]:
    """Check everything that can be checked before work starts, and lay it out flat; `wrt` as in `probe.check`.

    Raises
    ------
    InputError, TimesError, ToleranceError, UnsupportedCombination, and the errors of the first-call check.
    """
    delayed, stochastic = isinstance(prob, DDEProblem), isinstance(prob, SDEProblem)
    if not isinstance(prob, PROBLEMS):
        raise InputError(f"prob is {type(prob).__name__}, not a problem", "f, u0, tspan and p go together",
                         "sa.solve(sa.ODEProblem(f, u0, tspan, p), sa.Tsit5())")
    if isinstance(alg, type):
        raise InputError(f"alg={alg.__name__} is a class, not a method", "methods have options",
                         f"alg={alg.__name__}()")
    if not (alg is None or isinstance(alg, Method)):
        raise InputError(f"alg={alg!r} is not a method", "methods are objects, not names", "alg=sa.Tsit5()")
    if stochastic:
        method: Any = method_for(prob, alg)
        check_steps({"controller": controller, "dt": dt, "dtmin": dtmin, "dtmax": dtmax, "tstops": tstops,
                     "events": events})
    else:
        method = Tsit5() if alg is None else alg
        if isinstance(method, StochasticMethod):
            raise UnsupportedCombination(f"{method.name} is a method for stochastic problems",
                                         f"a {type(prob).__name__} has no noise",
                                         "Tsit5(), or SDEProblem(f, g, u0, tspan, p)")
    _choice("probe", probe, ("raise", "warn", "off"))

    be = registry().backend(backend) if backend else registry().backend_for(_labelled(prob, saveat))
    if missing := method.missing(be):
        raise UnsupportedCombination(f"{method.name} cannot run on the {be.name} backend", missing,
                                     "alg=sa.Tsit5(), or NumPy arrays throughout")
    if isinstance(method, BlackBox):
        method.accept(controller, events=events, norm=norm, tstops=tstops, dtmin=dtmin)
    u_leaves, u_structure = be.flatten(prob.u0)
    if not u_leaves:
        raise InputError(f"u0={prob.u0!r} holds no numbers", "there is nothing to solve for", "u0=np.array([1.0, 0.0])")
    kind = _state_dtype(be, u_leaves, dtype)
    u_leaves = [_state(be, v, kind, device) for v in u_leaves]
    u_layout = Layout(u_structure, tuple(tuple(v.shape) for v in u_leaves))
    u0 = u_layout.ravel(be, u_leaves)
    kind = u0.dtype
    be = be.bound(u0)
    if method.implicit and method.one_step and be.is_complex(u0):
        raise UnsupportedCombination(f"{method.name} cannot solve for a complex state",
                                     "its linear equations are real", "split u into real and imaginary parts")
    mass = None if stochastic else mass_of(prob, method, u_layout.size)
    nonsingular = mass if mass is not None and not mass.singular else None
    if events is not None and mass is not None and mass.singular:
        raise UnsupportedCombination("events do not go with a singular mass matrix", "an affect leaves the constraints",
                                     "a solve for each piece between known times, with remake(u0=...)")
    partition, theta, constants = Partition.of(be, prob.p)
    t0, t1 = (_time(be, v, name, u0) for v, name in zip(prob.tspan, ("tspan[0]", "tspan[1]"), strict=True))
    c0, c1 = (be.concrete(v) for v in prob.tspan)

    u_tree = be.unflatten(u_structure, u_leaves)
    p = partition.join(be, theta, constants)
    f, at = prob.f, u_tree
    special: Any = None
    if delayed:
        f, at, special = delayprepare.opened(be, prob, u_layout, t0, u0, p, method, events, (c0, c1))
    if probe != "off":
        first_call.check(be, prob.remake(f=f), t0, u_tree, p, probe, wrt)
    start = be.time(be.scalar(t0))
    if stochastic:
        t0, t1, saveat = (be.fixed(v, n) for v, n in ((t0, "t0"), (t1, "t1"), (saveat, "saveat")))
        g = be.evaluate(prob.g, start, u_tree, p)
        if probe != "off":
            check_diffusion(be, prob, method, start, u_tree, p)
        f, captured = Pair.hoisted(be, prob, start, u_tree, p)
    else:
        f, captured = be.hoist(f, start, at, p)

    field, theta = Field(f, u_layout, partition, len(captured), nonsingular), (*theta, *captured)
    seen: tuple[Watched, ...] = ()
    changes = False
    if events is not None and not method.one_step:
        raise UnsupportedCombination(f"{method.name} does not go with events", "it takes its steps by itself",
                                     "alg=sa.Tsit5() or another method of this library")
    if events is not None:
        p = partition.join(be, theta[:partition.count], constants)
        seen, theta, constants, changes = watched(be, events, field, be.time(be.scalar(t0)), u_tree, p, theta,
                                                  constants, u0, (c0, c1))
    saves, times = _saves(be, saveat, c0, c1, u0)
    controller, dt = _controller(method, controller, dt, c0, c1)
    rtol, atol = _tolerances(be, rtol, atol, kind, u_layout, u0)
    max_events = _count("max_events", max_events, MAX_RECORDED_EVENTS if be.traced else MAX_EVENTS) if seen else 0
    given = max_steps
    max_steps, capacity = _limits(be, max_steps, controller, dt, c0, c1, max_events)
    if special is not None:
        max_steps, capacity = special.room(be, max_steps, capacity, given)
    if stochastic:
        field, arrays = drive(be, prob, method, field, g, u0, t0, t1, dt, capacity)
        constants, special = (*constants, *arrays), Stochastic(prob.interpretation)
    products = Products() if stochastic else Products(prob.vjp, prob.jvp, prob.jac, prob.paramjac, prob.jac_sparsity)
    sparsity = pattern_of(prob.jac_sparsity, u_layout.size) if method.implicit and method.one_step else None
    if nonsingular is not None:
        sparsity, products = None, scaled_products(be, nonsingular, u_layout, products)
    run = Run(
        be=be, backend=be.name, field=field, method=method, controller=controller, vjp=None,
        products=products, mass=None if nonsingular is not None else mass, sparsity=sparsity, saves=saves,
        dense=bool(dense), dt=dt,
        dtmin=_positive("dtmin", dtmin), dtmax=_positive("dtmax", dtmax), tstops=_stops(tstops, c0, c1),
        max_steps=max_steps, capacity=capacity, norm=norm, progress=_progress(progress), events=seen,
        max_events=max_events, carried=tuple(tuple(v.shape) for v in theta[:partition.count]) if changes else (),
        interpolated=delayed, kind=special,
    )
    return run, Inputs(u0, theta, t0, t1, times, constants, rtol, atol)


def _labelled(prob: ODEProblem, saveat: Any) -> list[tuple[str, Any]]:
    from . import tree

    out = []
    for name, value in (("u0", prob.u0), ("p", prob.p), ("tspan", list(prob.tspan))):
        leaves, _ = tree.flatten(value)
        out += [(name, x) for x in leaves]
    return [*out, ("saveat", saveat)]


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise InputError(f"{name}={value!r} is none of the possible values", f"they are {names}",
                         f"{name}={allowed[0]!r}")


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


def _time(be: Any, t: Any, name: str, like: Any) -> Any:
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


def _saves(be: Any, saveat: Any, t0: float | None, t1: float | None, like: Any) -> tuple[Any, Any]:
    if saveat is None:
        return None, None
    if isinstance(saveat, str):
        _choice("saveat", saveat, ("steps",))
        return "steps", None
    if isinstance(saveat, int) and not isinstance(saveat, bool):
        if saveat < 1:
            raise TimesError(f"saveat={saveat} asks for no output", "an integer is the number of output times",
                             "saveat=None for the end only")
        return saveat, None
    try:
        ts = be.asarray(saveat, dtype=be.time_dtype(like.dtype), device=be.device(like))
    except (TypeError, ValueError) as e:
        raise TimesError(f"saveat={saveat!r} is not a list of times", "it says where the solution is wanted",
                         "saveat=np.linspace(0.0, 10.0, 11), an integer, 'steps' or None") from e
    if ts.ndim != 1 or ts.shape[0] == 0:
        raise TimesError(f"saveat has shape {tuple(ts.shape)}, expected a vector of times",
                         "one row of sol.u belongs to each time", "saveat=[t] for one time, saveat=None for the end")
    if t0 is not None and t1 is not None:
        low, high = min(t0, t1), max(t0, t1)
        slack = 1e-12 * max(abs(low), abs(high)) if be.eps(ts.dtype) < 1e-10 else 1e-6 * max(abs(low), abs(high))
        for i, t in enumerate(be.concrete_times(saveat) or ()):
            if not low - slack <= t <= high + slack:
                fix = f"tspan=({min(low, t):g}, {max(high, t):g})" if math.isfinite(t) else "remove it"
                raise TimesError(f"saveat[{i}]={t:g} lies outside tspan=({t0:g}, {t1:g})",
                                 "the solver does not extrapolate", fix)
    return "ts", ts


def _controller(method: Any, controller: Any, dt: Any, t0: float | None, t1: float | None) -> tuple[Any, float | None]:
    dt = _positive("dt", dt)
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


def _tolerances(be: Any, rtol: Any, atol: Any, dtype: Any, layout: Layout, u0: Any) -> tuple[Any, Any]:
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


def _limits(be: Any, max_steps: Any, controller: Any, dt: float | None, t0: float | None, t1: float | None,
            max_events: int) -> tuple[int, int]:
    """Step limit, and how many accepted steps may be recorded where that must be known beforehand.

    An event splits a fixed step in two.
    """
    _count("max_steps", max_steps, MAX_STEPS)
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


def _count(name: str, value: Any, default: int) -> int:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if value is not None and not (whole and value >= 1):
        raise InputError(f"{name}={value!r} is not a positive integer", "it bounds the work before it starts",
                         f"{name}={default}")
    return default if value is None else int(value)


def _positive(name: str, value: Any) -> float | None:
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


def _stops(tstops: Any, t0: float | None, t1: float | None) -> tuple[float, ...]:
    if tstops is None:
        return ()
    stops = sorted(float(t) for t in tstops)
    if t0 is not None and t1 is not None:
        for t in stops:
            if not min(t0, t1) <= t <= max(t0, t1):
                raise TimesError(f"tstops holds {t:g}, outside tspan=({t0:g}, {t1:g})", "no step goes there",
                                 "leave it out")
        if t1 < t0:
            stops.reverse()
    return tuple(stops)


def _progress(progress: Any) -> Any:
    if not progress:
        return None
    if progress is True:
        from .progress import line

        return line
    if not callable(progress):
        raise InputError(f"progress={progress!r} is neither a bool nor callable", "it is told how far the solve is",
                         "progress=True, or progress=lambda fraction, t: ...")
    return progress
