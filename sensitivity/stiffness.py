"""Probes of a vector field at a few states: how fast it decays, how fast it moves, and what going backwards costs.

With the eigenvalues mu of `f_u`: the spectral radius times the span against the steps that accuracy asks for says
whether stability would limit an explicit method; the integral of max(0, -min Re mu) over the span, divided by ln 10,
is the number of digits that an error gains on the way back. For a large state the norm of `f_u`, from products with a
few vectors (power iteration), stands in for both, as a bound. Source: Hairer, Wanner II, IV.2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .integrate import Run
from .jacobian import between, sizes
from .system import Inputs

DENSE = 30
POINTS = 6
STIFF = 500.0


class Probes(NamedTuple):
    """`rate`: largest |mu|; `decay`: largest -Re mu (at most 0 if nothing decays); `digits` at risk backwards; `bound`
    tells that decay and digits are upper bounds; `evaluations` of `f` made."""

    rate: float
    decay: float
    digits: float
    bound: bool
    span: float
    evaluations: int

    @property
    def stiff(self) -> bool:
        """Whether stability would hold an explicit method to hundreds of steps, because of what decays."""
        return self.decay * self.span > STIFF


def probed(run: Run, x: Inputs, times: list[float], states: list[Any]) -> Probes | None:
    """Probes at these times and states; None where `f` is not finite there."""
    be = run.be
    rhs = run.field.bind(be, x.theta, x.constants)
    span = abs(float(be.concrete(x.t1)) - float(be.concrete(x.t0)))
    n, rates, decays, spent = x.u0.shape[0], [], [], 0
    with be.quiet():
        for t, u in zip(times, states, strict=True):
            at = be.time(be.scalar(be.asarray(t, dtype=be.time_dtype(u.dtype))))
            rate, decay, made = (_eigenvalues if n <= DENSE else _power)(be, rhs, at, u)
            if not math.isfinite(rate):
                return None
            rates.append(rate)
            decays.append(decay)
            spent += made
    held = [max(0.0, d) for d in decays]
    area = held[0] * span if len(held) == 1 else sum(
        0.5 * (a + b) * abs(t2 - t1)
        for a, b, t1, t2 in zip(held, held[1:], times, times[1:], strict=False))
    return Probes(max(rates), max(decays), area / math.log(10.0), n > DENSE, span, spent)


def _eigenvalues(be: Any, rhs: Any, t: Any, u: Any) -> tuple[float, float, int]:
    """Spectral radius and largest decay from all of the Jacobian, by central differences."""
    import numpy as np

    n = u.shape[0]
    moves = be.eps(u.dtype) ** (1 / 3) * sizes(be, u, 1e-3)
    units = be.unit_rows(n, n, 0, u)
    rows = [be.concrete_times(between(rhs, t, u, moves * units[i, :]) / moves[i]) for i in range(n)]
    J = np.array(rows).T
    if not np.isfinite(J).all():
        return math.inf, math.inf, 2 * n
    mu = np.linalg.eigvals(J)
    return float(np.abs(mu).max()), float(-mu.real.min()), 2 * n


def _power(be: Any, rhs: Any, t: Any, u: Any, rounds: int = 4) -> tuple[float, float, int]:
    """The norm of the Jacobian along a direction that a few products have turned towards the fastest one."""
    n, rate = u.shape[0], math.inf
    v = be.vector([math.cos(1.0 + 2.0 * i) for i in range(n)], u)
    step = be.eps(u.dtype) ** (1 / 3) * max(1e-3, float(be.concrete(be.xp.max(be.xp.abs(u)))))
    for _ in range(rounds):
        v = v / float(be.rms(v))
        v = between(rhs, t, u, step * v) / step
        rate = float(be.rms(v))
        if rate == 0.0 or not math.isfinite(rate):
            break
    return rate, rate, 2 * rounds
