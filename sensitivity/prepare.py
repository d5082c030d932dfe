"""From what the user wrote to a `Run` and its `Inputs`: backend, flattening, defaults, checks of the arguments."""

from __future__ import annotations

from typing import Any

from .arguments import (
    MAX_EVENTS,
    MAX_RECORDED_EVENTS,
    choice,
    controlled,
    count,
    laid_out,
    limits,
    positive,
    progressed,
    saves,
    stops,
    time,
    tolerances,
)
from .blackbox import BlackBox
from .delayprepare import Retarded
from .errors import InputError, UnsupportedCombination
from .events import Watched, watched
from .integrate import Run
from .jacobian import undivided
from .kinds import Ordinary, Start
from .linearsolver import fitting
from .mass import Mass, mass_of, scaled_products
from .methods import Method
from .probe import identity
from .problems import DDEProblem, ODEProblem
from .promise import check_pattern
from .registry import registry
from .sparsity import pattern_of
from .stochastic import SDEProblem
from .stochasticprepare import Noisy
from .system import Field, Inputs, Partition

KINDS: dict[Any, type[Ordinary]] = {ODEProblem: Ordinary, DDEProblem: Retarded, SDEProblem: Noisy}
PROBLEMS = tuple(KINDS)


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
    kind = _kind(prob, alg)
    method = kind.method(alg, {"controller": controller, "dt": dt, "dtmin": dtmin, "dtmax": dtmax, "tstops": tstops,
                               "events": events})
    choice("probe", probe, ("raise", "warn", "off"))
    be = registry().backend(backend) if backend else registry().backend_for(_labelled(prob, saveat))
    _check_method(be, method, controller=controller, events=events, norm=norm, tstops=tstops, dtmin=dtmin)
    be, u_layout, u0 = laid_out(be, prob.u0, dtype, device)
    mass = _mass(prob, method, be, u0, events)
    nonsingular = mass if mass is not None and not mass.singular else None
    partition, theta, constants = Partition.of(be, prob.p)
    t0, t1 = (time(be, v, name, u0) for v, name in zip(prob.tspan, ("tspan[0]", "tspan[1]"), strict=True))
    span = c0, c1 = be.concrete(prob.tspan[0]), be.concrete(prob.tspan[1])
    u, p = u_layout.opener(be)(u0), partition.join(be, theta, constants)
    start = Start(be, u_layout, t0, be.time(be.scalar(t0)), u0, u, p, span)

    f, captured = kind.function(start, method, events, probe, wrt)
    t0, t1, saveat = kind.times(be, t0, t1, saveat)
    start = start._replace(t0=t0)
    field, theta = Field(f, u_layout, partition, len(captured), nonsingular), (*theta, *captured)
    seen: tuple[Watched, ...] = ()
    changes = False
    if events is not None:
        p = partition.join(be, theta[:partition.count], constants)
        seen, theta, constants, changes = watched(be, events, field, start.time, start.u, p, theta, constants, u0, span)
    where, times = saves(be, saveat, c0, c1, u0)
    controller, dt = controlled(method, kind.controller(controller), dt, c0, c1)
    rtol, atol = tolerances(be, rtol, atol, u0.dtype, u_layout, u0)
    max_events = count("max_events", max_events, MAX_RECORDED_EVENTS if be.traced else MAX_EVENTS) if seen else 0
    most, capacity = limits(be, max_steps, controller, dt, c0, c1, max_events)
    most, capacity = kind.room(be, most, capacity, max_steps)
    field, arrays = kind.driven(start, method, field, t1, None if controller.adaptive else dt, capacity)
    products = kind.products()
    sparsity = None
    if method.implicit and method.one_step:
        sparsity = pattern_of(prob.jac_sparsity, u_layout.size, None if mass is None else mass.values)
        fitting(be, method, sparsity, prob.jac is not None, None if nonsingular is not None else mass)
    if nonsingular is not None:
        products = scaled_products(be, nonsingular, u_layout, products)
    if kind.special is None:
        be = be.suited(field.bind(be, theta, constants), start.time, u0)
    run = Run(
        be=be, backend=be.name, field=field, method=method, controller=controller, vjp=None,
        products=products, mass=None if nonsingular is not None else mass, sparsity=sparsity, saves=where,
        dense=bool(dense), dt=dt,
        dtmin=positive("dtmin", dtmin), dtmax=positive("dtmax", dtmax), tstops=stops(tstops, c0, c1),
        max_steps=most, capacity=capacity, norm=norm, progress=progressed(progress), events=seen,
        max_events=max_events, carried=tuple(tuple(v.shape) for v in theta[:partition.count]) if changes else (),
        interpolated=kind.interpolated, kind=kind.special,
    )
    x = Inputs(u0, theta, t0, t1, times, (*constants, *arrays), rtol, atol)
    if sparsity is not None and probe != "off":
        check_pattern(undivided(run), x, identity(be, prob.f)[0], probe)
    return kind.finished(run), x


def _kind(prob: Any, alg: Any) -> Ordinary:
    """What knows how to prepare this problem, after a look at what `alg` is."""
    if not isinstance(prob, PROBLEMS):
        raise InputError(f"prob is {type(prob).__name__}, not a problem", "f, u0, tspan and p go together",
                         "sa.solve(sa.ODEProblem(f, u0, tspan, p), sa.Tsit5())")
    if isinstance(alg, type):
        raise InputError(f"alg={alg.__name__} is a class, not a method", "methods have options",
                         f"alg={alg.__name__}()")
    if not (alg is None or isinstance(alg, Method)):
        raise InputError(f"alg={alg!r} is not a method", "methods are objects, not names", "alg=sa.Tsit5()")
    return next(kind for problem, kind in reversed(KINDS.items()) if isinstance(prob, problem))(prob)


def _check_method(be: Any, method: Any, **options: Any) -> None:
    if missing := method.missing(be):
        raise UnsupportedCombination(f"{method.name} cannot run on the {be.name} backend", missing,
                                     "alg=sa.Tsit5(), or NumPy arrays throughout")
    if isinstance(method, BlackBox):
        method.accept(options.pop("controller"), **options)
    if options["events"] is not None and not method.one_step:
        raise UnsupportedCombination(f"{method.name} does not go with events", "it takes its steps by itself",
                                     "alg=sa.Tsit5() or another method of this library")


def _mass(prob: Any, method: Any, be: Any, u0: Any, events: Any) -> Mass | None:
    if method.implicit and method.one_step and be.is_complex(u0):
        raise UnsupportedCombination(f"{method.name} cannot solve for a complex state",
                                     "its linear equations are real", "split u into real and imaginary parts")
    mass = None if isinstance(prob, SDEProblem) else mass_of(prob, method, u0.shape[0])
    if events is not None and mass is not None and mass.singular:
        raise UnsupportedCombination("events do not go with a singular mass matrix", "an affect leaves the constraints",
                                     "a solve for each piece between known times, with remake(u0=...)")
    return mass


def _labelled(prob: ODEProblem, saveat: Any) -> list[tuple[str, Any]]:
    from . import tree

    out = []
    for name, value in (("u0", prob.u0), ("p", prob.p), ("tspan", list(prob.tspan))):
        leaves, _ = tree.flatten(value)
        out += [(name, x) for x in leaves]
    return [*out, ("saveat", saveat)]
