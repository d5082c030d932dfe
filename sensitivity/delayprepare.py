"""From a `DDEProblem` to what its solve needs: checks of history and lags, and the kind of the run."""

from __future__ import annotations

import inspect
import math
from typing import Any

from . import probe as first_call
from .backend import Array
from .delay import Delayed, DelayedModule, Delays, Lags, Past, Setting, StateLags
from .errors import CapturedValueError, InputError, SignatureError, TimesError, UnsupportedCombination
from .kinds import Ordinary, Start
from .system import Layout
from .userfunction import location, signed


class Retarded(Ordinary):
    """A `DDEProblem` on its way to a `Run`."""

    interpolated = True

    def function(self, start: Start, method: Any, events: Any, probe: str,
                 wrt: tuple[str, ...] | None) -> tuple[Any, tuple[Array, ...]]:
        be = start.be
        f, past, self.special = opened(be, self.prob, start.layout, start.t0, start.u0, start.p, method, events,
                                       start.span)
        if probe != "off":
            first_call.check(be, self.prob.remake(f=f), start.t0, start.u, start.p, probe, wrt)
        return be.hoist(f, start.time, past, start.p)

    def room(self, be: Any, max_steps: int, capacity: int, given: int | None) -> tuple[int, int]:
        return self.special.room(be, max_steps, capacity, given)


def opened(be: Any, prob: Any, layout: Layout, t0: Any, u0: Array, p: Any, method: Any, events: Any,
           span: tuple[float | None, float | None]) -> tuple[Any, Past, Delays]:
    """`f` and history of a problem as one function of `(t, u, p)`, its `u` at the start, and the kind of the run.

    Raises
    ------
    InputError, TimesError, SignatureError, UnsupportedCombination, CapturedValueError
    """
    _check_signature(prob.f, "f", "f(t, u, h, p)", 4)
    _check_signature(prob.history, "history", "history(t, p)", 2)
    if not method.one_step:
        raise UnsupportedCombination(f"{method.name} does not go with a DDEProblem",
                                     "stages look up the dense output of earlier steps, which it does not hand out",
                                     "sa.Tsit5(), or sa.Kvaerno5() for a stiff equation")
    if events is not None:
        raise UnsupportedCombination("events do not go with a DDEProblem", "an event would be a break point, which is "
                                     "not tracked", "split the solve at known times with remake")
    c0, c1 = span
    if c0 is not None and c1 is not None and not c0 < c1:
        raise TimesError(f"tspan=({c0:g}, {c1:g}) does not run forwards", "the past of a delay equation is known, not "
                         "its future", f"tspan=({min(c0, c1):g}, {max(c0, c1):g})")
    through = be.differentiable()
    setting = Setting(through, layout, max(be.eps(u0.dtype), be.eps(be.time_dtype(u0.dtype))))
    own = any(be.is_array(x) for x in be.flatten((prob.f, prob.history))[0])
    f = (DelayedModule if own else Delayed)(prob.f, prob.history, setting)
    given = _given(be, prob.lags)
    here, u = be.time(be.scalar(t0)), be.unflatten(layout.structure, layout.unravel(be, u0))
    lags, captured = be.hoist(Lags(given, through), here, u, p)
    if captured:
        raise CapturedValueError("lags closes over a value that is differentiated", "its derivative would be lost",
                                 "pass it through p: lags=lambda p: [p['tau']]")
    with be.quiet():
        tau = lags(here, u, p)
        _check_lags(be, tau)
        _check_history(be, prob, setting, here, tau, p)
        count, times = int(tau.shape[0]), be.scalars(tau)
    now, zeros, tracked = be.scalar(t0), [0.0 * u0] * int(tau.shape[0]), method.base.order + 1
    past = Past(u, [now - times[i] for i in range(count)], zeros, zeros, [be.truth(True)] * count, now - times[0],
                be.scalar(math.inf))
    return f, past, Delays(lags, count, not isinstance(given, tuple), combinations(count, tracked), setting,
                           prob.history, isinstance(given, StateLags))


def combinations(count: int, generations: int, most: int = 1000) -> tuple[tuple[int, ...], ...]:
    """How often each lag is taken, for all sums of at most `generations` lags; fewer generations if there are many
    lags."""
    while generations > 2 and math.comb(generations + count, count) > most:
        generations -= 1
    out: list[tuple[int, ...]] = [(0,) * count]
    known = set(out)
    for c in out:
        for i in range(count):
            new = (*c[:i], c[i] + 1, *c[i + 1:])
            if sum(new) <= generations and new not in known:
                known.add(new)
                out.append(new)
    return tuple(out[1:])


def _arguments(lags: Any) -> int:
    """How many arguments a function needs; one if it does not say."""
    try:
        return sum(q.default is q.empty and q.kind in (q.POSITIONAL_ONLY, q.POSITIONAL_OR_KEYWORD)
                   for q in inspect.signature(signed(lags)).parameters.values())
    except (TypeError, ValueError):
        return 1


def of_the_state(lags: Any) -> bool:
    """Whether lags are given as a function of time, state and parameters."""
    return callable(lags) and _arguments(lags) == 3


def _given(be: Any, lags: Any) -> Any:
    """The lags as a tuple of floats or as `lags(p)`."""
    if callable(lags):
        if of_the_state(lags):
            return StateLags(lags)
        if _arguments(lags) != 1:
            raise SignatureError(f"lags takes {_arguments(lags)} arguments, at {location(lags)}",
                                 "lags are functions of the parameters, or of time, state and parameters",
                                 "lags=lambda p: [p['tau']], or lags=lambda t, u, p: [...]")
        return lags
    try:
        items = list(lags)
    except TypeError:
        items = [lags]
    if not items:
        raise InputError("lags is empty", "an equation without delays is an ODE", "sa.ODEProblem(f, u0, tspan, p)")
    values = [be.concrete(v) for v in items]
    if any(v is None for v in values) or any(getattr(v, "requires_grad", False) for v in items):
        raise InputError("lags holds a value that is differentiated or traced", "break points would not move with it",
                         "pass it through p: lags=lambda p: [p['tau']]")
    return tuple(float(v) for v in values)


def _check_lags(be: Any, tau: Any) -> None:
    if tau.ndim != 1 or tau.shape[0] == 0:
        raise InputError(f"lags returned shape {tuple(tau.shape)}", "lags are a list of numbers",
                         "lags=lambda p: [p['tau']]")
    for i, v in enumerate(be.concrete_times(tau) or ()):
        if not math.isfinite(v) or v <= 0.0:
            raise InputError(f"lags[{i}]={v:g} is not a positive number",
                             "a lag of zero is no delay, and a negative one asks for the future",
                             "positive lags; to keep a fitted one positive use lags=lambda p: [exp(p['log_tau'])]")


def _check_history(be: Any, prob: Any, setting: Setting, t0: Any, tau: Any, p: Any) -> None:
    """The history has the shapes of `u0` and is defined one lag before the start."""
    far = t0 - be.xp.max(tau) if not be.traced else t0
    tree = be.evaluate(lambda t, u, p: prob.history(t, p), far, (), p) if be.traced else prob.history(far, p)
    leaves, shapes = be.flatten(tree)[0], setting.layout.shapes
    sizes = [math.prod(getattr(x, "shape", ())) for x in leaves]
    if sizes != [math.prod(s) for s in shapes]:
        found = [tuple(getattr(x, "shape", ())) for x in leaves]
        raise InputError(f"history returned shapes {found}, u0 has {list(shapes)}, at {location(prob.history)}",
                         "the history is the state before t0", "return the structure of u0")
    if be.traced:
        return
    for x in leaves:
        if not bool(be.xp.all(be.xp.isfinite(be.asarray(x)))):
            raise InputError(f"history is not finite at t={be.scalar(far):g}, the start minus the largest lag",
                             "the solve needs it from there on", "a history defined on [t0 - max(lags), t0]")


def _check_signature(f: Any, name: str, wanted: str, count: int) -> None:
    try:
        signature = inspect.signature(signed(f))
    except (TypeError, ValueError):
        return
    names = list(signature.parameters)
    if name == "f" and names[:1] in (["u"], ["y"], ["x"]) and {"t", "time"} & set(names[1:4]):
        raise SignatureError(f"f takes ({', '.join(names[:4])}), at {location(f)}", "by these names time is not first",
                             "f(t, u, h, p), with h(s) the state at time s")
    try:
        signature.bind(*[None] * count)
    except TypeError:
        raise SignatureError(f"{name}{signature} cannot be called as {wanted}, at {location(f)}",
                             "a delay equation sees time, state, past and parameters" if name == "f"
                             else "the history is a function of time and parameters",
                             f"def {wanted}: ...") from None
