"""Probes of a vector field at a few states: how fast it decays, how fast it moves, and what going backwards costs.

With the eigenvalues mu of `f_u`: the spectral radius times the span against the steps that accuracy asks for says
whether stability would limit an explicit method; the integral of max(0, -min Re mu) over the span, divided by ln 10,
is the number of digits that an error gains on the way back. For a large state a few products with `f_u` (power
iteration) stand in: their norm, as a bound, for the radius and the digits, and the Rayleigh quotient for the decay.
Source: Hairer, Wanner II, IV.2.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from .control import PIController
from .integrate import Run, integrate, span
from .jacobian import between, differences, sizes
from .methods import Tsit5
from .rules import LONG_TRIAL, TRIAL, stiff_from
from .system import Inputs

DENSE = 30
POINTS = 6
ROUNDS = 8
GLANCE = 5
# Where the stability of Tsit5 ends on the negative real axis.
LIMIT = 3.5


class Probes(NamedTuple):
    """`rate`: largest |mu|; `decay`: largest -Re mu (at most 0 if nothing decays); `digits` at risk backwards, None
    without a span; `bound` tells that rate and digits are bounds and decay an estimate; `evaluations` of `f` made;
    `stiff` whether stability would hold an explicit method to more work than an implicit one takes; `lipschitz` the
    largest norm of `f_u`; for states that are not large also `growth`, the largest Re mu, and `density`, the share of
    entries of `f_u` that are not zero everywhere."""

    rate: float
    decay: float
    digits: float | None
    bound: bool
    span: float
    evaluations: int
    stiff: bool
    lipschitz: float
    growth: float | None
    density: float | None


class Signs(NamedTuple):
    """What the start of a solution says: `stiff`, fastest `rate` and `decay`, the `step` of an explicit method, how
    much of the span was `left` where it was seen, and the evaluations of `f` that it took."""

    stiff: bool
    rate: float
    decay: float
    step: float
    left: float
    evaluations: int


def probed(run: Run, x: Inputs, points: list[Inputs], steps: int, length: float | None) -> Probes | None:
    """Probes at these points (their `t0` and `u0`) of a solve that took `steps` over a span of this `length`, which a
    steady state has not; None where `f` is not finite."""
    be = run.be
    n, found = x.u0.shape[0], []
    for point in points:
        seen = _extremes(be.look(spectrum, run, point), n, run.mass)
        if seen is None:
            return None
        found.append(seen)
    rates, decays, bounds, norms, growths, patterns = zip(*found, strict=True)
    fastest, digits = max(decays), None
    if length is not None:
        held = [max(0.0, d) for d in bounds]
        times = [float(be.concrete(point.t0)) for point in points]
        area = held[0] * length if len(held) == 1 else sum(
            0.5 * (a + b) * abs(t2 - t1)
            for a, b, t1, t2 in zip(held, held[1:], times, times[1:], strict=False))
        digits = area / math.log(10.0)
    stiff = length is not None and fastest * length > max(stiff_from(n), 1.0 * steps)
    density = None if patterns[0] is None else float(sum(patterns).astype(bool).mean())
    return Probes(max(rates), fastest, digits, n > DENSE, length or math.inf, len(points) * _cost(n), stiff, max(norms),
                  None if growths[0] is None else max(growths), density)


def signs(run: Run, x: Inputs) -> Signs | None:
    """What can be seen from the start, for few evaluations of `f`: five where nothing is fast; None where `f` fails.

    If something is fast, all of `f_u` behind the first explicit step says whether it decays; and if it does, a trial
    with an explicit method says whether its steps, beyond the first transient, are held to what is stable.
    """
    be, n = run.be, x.u0.shape[0]
    t0, t1 = float(be.concrete(x.t0)), float(be.concrete(x.t1))
    left = abs(t1 - t0)
    try:
        seen, spent = be.look(glance, run, x), GLANCE
        if seen is None or not math.isfinite(seen[0]):
            return None
        rate = seen[0]
        if rate * left <= 0.5 * stiff_from(n):
            return Signs(False, rate, 0.0, math.inf, left, spent)
        numbers = be.look(ahead, run, x)
        found, spent = _extremes(numbers, n), spent + 1 + _cost(n)
        if found is None or found.decay * left <= stiff_from(n):
            return None if found is None else Signs(False, max(rate, found.rate), found.decay, math.inf, left, spent)
        for attempt, steps in ((trial, TRIAL), (long_trial, LONG_TRIAL)):
            if steps > TRIAL and found.decay * left < 10.0 * LIMIT * steps:
                break
            t, h, attempts, *numbers = be.look(attempt, run, x)
            found, spent = _extremes(numbers, n), spent + 2 + (Tsit5.base.stages - 1) * int(attempts) + _cost(n)
            if found is None:
                return None
            rate, decay = found.rate, found.decay
            h, left = abs(h), abs(t1 - t)
            stiff = h * decay > 1.0 and decay * left > stiff_from(n)
            if stiff or not left:
                break
    except Exception:  # whatever f raises at a state that no solve may ever reach
        return None
    return Signs(stiff, rate, decay, h, left, spent)


def stuck(run: Run, x: Inputs, t: float, h: float, u: Any) -> Signs | None:
    """Whether an explicit solve that ended at time `t` with steps `h` was held by stability; None if unknown."""
    be = run.be
    try:
        found = _extremes(be.look(spectrum, run, placed(run, x, t, u)), x.u0.shape[0])
    except Exception:  # f may not bear the state where a solve failed
        return None
    if found is None:
        return None
    left = abs(float(be.concrete(x.t1)) - t)
    stiff = h * found.decay > 1.0 and found.decay * left > stiff_from(x.u0.shape[0])
    return Signs(stiff, found.rate, found.decay, h, left, _cost(x.u0.shape[0]))


def glance(run: Run, x: Inputs) -> Any:
    """The fastest change of `f` along four directions at the start, `(1,)`: those that `f` itself takes, and a fixed
    one with what `f` makes of it."""
    be, rhs, t = run.be, run.field.bind(run.be, x.theta, x.constants), run.be.time(run.be.scalar(x.t0))
    f = rhs(t, x.u0)
    u = _euler(run, x, f)
    here, fastest = rhs(t, u), be.scalar(0.0)
    small = be.eps(u.dtype) ** 0.5
    moved, change = u - x.u0, here - f
    for first in (None, _generic(be, u)):
        if first is not None:
            moved = small * first
            change = rhs(t, u + moved) - here
        fastest = be.greatest(fastest, _ratio(be, change, moved))
        size = be.rms(change)
        still = size <= 0.0
        moved = change * (be.choose(still, 0.0, small * be.rms(sizes(be, u, 1e-3))) / be.choose(still, 1.0, size))
        change = rhs(t, u + moved) - here
        fastest = be.greatest(fastest, _ratio(be, change, moved))
    return be.vector([fastest], x.u0)


def ahead(run: Run, x: Inputs) -> Any:
    """`spectrum` behind a first small explicit step: a state that starts at zero may hide what is fast."""
    f = run.field.bind(run.be, x.theta, x.constants)(run.be.time(run.be.scalar(x.t0)), x.u0)
    return spectrum(run, x._replace(u0=_euler(run, x, f)))


def trial(run: Run, x: Inputs, steps: int = TRIAL) -> Any:
    """Attempted explicit steps: time, step size and attempts, then `spectrum` where they end."""
    be = run.be
    plain = replace(run, events=(), progress=None, tstops=(), method=Tsit5(), controller=PIController(), mass=None)
    stepper = plain.method.bind(be, run.field.bind(be, x.theta, x.constants), False)
    end, _ = integrate(plain, stepper, span(be, x.t0, x.t1), x.u0, x.rtol, x.atol, limit=steps)
    attempts = 1.0 * (end.accepted + end.rejected)
    seen = spectrum(run, x._replace(u0=end.u), end.t)
    return be.xp.concat([be.vector([end.t, end.h, be.scalar(attempts)], x.u0), seen])


def long_trial(run: Run, x: Inputs) -> Any:
    """`trial` of more steps: with tight tolerances, a first transient takes more than a hundred."""
    return trial(run, x, LONG_TRIAL)


def spectrum(run: Run, x: Inputs, t: Any = None) -> Any:
    """What `_extremes` reads at `(t0, u0)`: all of `f_u` by central differences, `(n*n,)` (of a complex state real
    parts, then imaginary ones), or for a large state the norm and the Rayleigh quotient of the last of a few products,
    `(2,)`."""
    be, u = run.be, x.u0
    rhs = run.field.bind(be, x.theta, x.constants)
    t, n = be.time(be.scalar(x.t0) if t is None else t), u.shape[0]
    if n <= DENSE:
        J = be.xp.reshape(differences(be, rhs, True)(t, u), (n * n,))
        return be.xp.concat([be.xp.real(J), be.xp.imag(J)]) if be.is_complex(u) else J
    step = be.eps(u.dtype) ** (1 / 3) * be.rms(sizes(be, u, 1e-3))

    def turned(carry: tuple[Any, Any, Any], _: Any) -> tuple[tuple[Any, Any, Any], Any]:
        v = carry[0]
        size = be.rms(v)
        v = v / be.choose(size > 0.0, size, 1.0)
        w = between(rhs, t, u, step * v) / step
        return (w, be.rms(w), -be.dot(v, w) / n), be.rms(w)

    start = (_generic(be, u), be.scalar(0.0), be.scalar(0.0))
    (_, rate, decay), _ = be.scan(turned, start, (be.vector([0.0] * ROUNDS, u),))
    return be.vector([rate, decay], u)


class Extremes(NamedTuple):
    """Of one `f_u`: spectral radius, largest decay and a bound for it, norm, growth, and which entries are not zero."""

    rate: float
    decay: float
    bound: float
    norm: float
    growth: float | None
    pattern: Any


def _extremes(numbers: list[float] | None, n: int, mass: Any = None) -> Extremes | None:
    """What `spectrum` says, with a singular mass matrix of the eigenvalues that are finite; None if it is not."""
    import numpy as np

    if numbers is None or not np.isfinite(numbers).all():
        return None
    if n > DENSE:
        return Extremes(numbers[0], numbers[1], numbers[0], numbers[0], None, None)
    J = np.reshape(numbers, (-1, n, n))
    J = J[0] + 1j * J[1] if len(J) == 2 else J[0]
    if mass is None:
        mu = np.linalg.eigvals(J)
    else:
        # Finite eigenvalues of the pencil are the reciprocals of those of J^-1 M that are not zero.
        inverse = np.linalg.eigvals(np.linalg.solve(J, mass.values))
        mu = 1.0 / inverse[np.abs(inverse) > 1e-10 * max(np.abs(inverse).max(), 1e-300)]
    decay = float(-mu.real.min()) if mu.size else 0.0
    growth, rate = (float(mu.real.max()), float(np.abs(mu).max())) if mu.size else (0.0, 0.0)
    return Extremes(rate, decay, decay, float(np.linalg.norm(J, 2)), growth, np.abs(J) > 1e-9 * np.abs(J).max())


def _cost(n: int) -> int:
    return 2 * n if n <= DENSE else 2 * ROUNDS


def placed(run: Run, x: Inputs, t: float, u: Any) -> Inputs:
    """The inputs with another start."""
    return x._replace(u0=u, t0=run.be.asarray(t, dtype=run.be.time_dtype(u.dtype), device=run.be.device(u)))


def _euler(run: Run, x: Inputs, f: Any) -> Any:
    """The first trial point of the automatic step size (Hairer, Norsett, Wanner I, II.4)."""
    be = run.be
    s = span(be, x.t0, x.t1)
    d0, d1 = (be.rms(be.scaled(v, x.u0, x.u0, x.rtol, x.atol)) for v in (x.u0, f))
    small = be.least(d0, d1) < 1e-5
    h = be.least(be.choose(small, 1e-6, 0.01 * d0 / be.choose(small, 1.0, d1)), abs(s.t1 - s.t0))
    return be.combine(x.u0, s.direction * h, (1.0,), f[None, :])


def _generic(be: Any, u: Any) -> Any:
    """A fixed direction that is orthogonal to nothing in particular, in the sizes of the entries."""
    return sizes(be, u, 1e-3) * be.vector([math.cos(1.0 + 2.0 * i) for i in range(u.shape[0])], u)


def _ratio(be: Any, change: Any, moved: Any) -> Any:
    """How much larger a change is than the move that made it; 0 where one of them is nothing or not finite."""
    a, b = be.rms(change), be.rms(moved)
    fine = be.isfinite(a) & (b > 0.0)
    return be.choose(fine, a, 0.0) / be.choose(fine, b, 1.0)
