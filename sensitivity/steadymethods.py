"""Methods for `f(inf, u, p) = 0`: Newton with a line search, and pseudo-transient continuation.

Both stop when a Newton correction is within the tolerances `atol + rtol |u|`, which are those of `u` as in any other
solve: what is left after that correction is smaller by the factor with which Newton's method converges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .backend import Array, Scalar
from .errors import InputError, UnsupportedCombination
from .integrate import Run
from .linear import refuse, systems
from .linearsolver import check_choice
from .methods import Method
from .retcode import RetCode
from .stepper import Stepper
from .system import Inputs

HALVINGS = 30
FORCING = 1e-6


class State(NamedTuple):
    """An iterate: `f` there and its norm, the last correction in tolerances, `1/delta`, counts, and `RetCode` (-1 while
    it runs)."""

    u: Array
    f: Array
    size: Scalar
    correction: Scalar
    sigma: Scalar
    accepted: Any
    rejected: Any
    nfe: Any
    solves: Any
    status: Any


class Found(NamedTuple):
    """Where an iteration ended, and the Jacobians and factorisations that took."""

    end: State
    njac: Any
    nlu: Any


RUNNING = -1


@dataclass(frozen=True)
class SteadyStateMethod(Method):
    """Base of the methods for `SteadyStateProblem`."""

    adaptive: ClassVar[bool] = True

    linear_solver: Any = None

    def __post_init__(self) -> None:
        check_choice(self.name, self.linear_solver)

    def bind(self, be: Any, rhs: Any, dense: bool, jac: Any = None, mass: Any = None) -> Stepper:
        raise UnsupportedCombination(f"{self.name} does not integrate in time", "it solves f(inf, u, p) = 0",
                                     "SteadyStateProblem(f, u0, p), or alg=Tsit5()")

    def refuse(self, run: Run) -> None:
        """Raise `UnsupportedCombination` if this run is beyond the method."""
        refuse(run, self.name, self.linear_solver)

    def iterate(self, run: Run, x: Inputs) -> Found:
        """Solve from the guess `x.u0`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Newton(SteadyStateMethod):
    """Newton's method with a line search: a correction is halved until `|f|` falls (Armijo's rule).

    Parameters
    ----------
    linear_solver : None, "dense", "sparse", "krylov", or an object
        How corrections are found. None: sparse where the problem has `jac_sparsity` or a sparse `jac` that the
        backend can factorise, dense up to 500 unknowns, GMRES on products with the derivative of `f` beyond.
    fallback : PseudoTransient, optional
        What to try from the same guess where Newton's method fails; `alg=None` has one.

    Finds a steady state near the guess, attracting or not. References: Dennis, Schnabel 1983, algorithm A6.3.1; Kelley
    1995, Iterative Methods for Linear and Nonlinear Equations, section 8.1.
    """

    fallback: Any = None

    references: ClassVar[tuple[str, ...]] = ("dennis1983", "kelley1995")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fallback is not None and not isinstance(self.fallback, PseudoTransient):
            raise InputError(f"Newton(fallback={self.fallback!r}) is no method to fall back on",
                             "it takes over where Newton's method fails", "Newton(fallback=PseudoTransient())")

    def refuse(self, run: Run) -> None:
        super().refuse(run)
        if self.fallback is not None:
            self.fallback.refuse(run)

    def iterate(self, run: Run, x: Inputs) -> Found:
        be = run.be
        space = _Space(run, x, self.linear_solver)
        start = space.start(x.u0)

        def step(s: State) -> tuple[State, None, Any]:
            d = space.systems.at(s.u, 0.0)(s.f)
            correction = space.length(d, s.u)
            last = correction <= 1.0

            def shorten(trial: _Trial) -> tuple[_Trial, None, Any]:
                factor = 0.5 * trial.factor
                u = be.combine(s.u, factor, (1.0,), d[None, :])
                f = space.rhs(u)
                return _Trial(factor, u, f, be.rms(f), trial.count + 1), None, False

            def too_long(trial: _Trial) -> Any:
                fell = trial.size <= (1.0 - 1e-4 * trial.factor) * s.size
                return be.choose(fell | (last & be.isfinite(trial.size)), 0, 1) > 0

            first, _, _ = shorten(_Trial(2.0, s.u, s.f, s.size, 0))
            found, _ = be.iterate(shorten, first, lambda t: too_long(t) & be.isfinite(correction), HALVINGS)
            failed = too_long(found) | (be.isfinite(correction) == False)  # noqa: E712
            status = be.choose(failed, int(RetCode.NewtonFailure), be.choose(last, int(RetCode.Success), RUNNING))
            u, f, size = be.choose(failed, (s.u, s.f, s.size), (found.u, found.f, found.size))
            return State(u, f, size, correction, 0.0, s.accepted + be.choose(failed, 0, 1),
                         s.rejected + found.count - be.choose(failed, 0, 1), s.nfe + found.count, s.solves + 1,
                         status), None, False

        end = space.run(step, start)
        found = Found(end, end.solves * space.systems.jacobians, end.solves * space.systems.factorisations)
        return found if self.fallback is None else self._rescued(run, x, found)

    def _rescued(self, run: Run, x: Inputs, found: Found) -> Found:
        """The fallback's result where this method failed; where it did not, the fallback has nothing to do."""
        be, end = run.be, found.end
        failed = end.status != int(RetCode.Success)
        if be.concrete(failed) == 0.0:
            return found
        other = self.fallback.iterate(run, x, failed)
        last = be.choose(failed, other.end, end)._replace(
            accepted=end.accepted + other.end.accepted, rejected=end.rejected + other.end.rejected,
            nfe=end.nfe + other.end.nfe, solves=end.solves + other.end.solves)
        return Found(last, found.njac + other.njac, found.nlu + other.nlu)


@dataclass(frozen=True)
class PseudoTransient(SteadyStateMethod):
    """Pseudo-transient continuation: linearly implicit Euler steps along `u' = f`, longer and longer.

    Parameters
    ----------
    linear_solver : None, "dense", "sparse", "krylov", or an object
        As for `Newton`.
    dt : float, optional
        The first step; chosen from `u0` and `f` there if not given.

    Each step solves `(I/delta - f_u) d = f(u)`. With `q = |f(u + d) - d/delta| / |f(u)|`, what linearising neglects, a
    step is taken if `q <= 1`, and `delta` grows by `sqrt(0.25/q)`, between 0.1 and 10: in the limit these are Newton
    steps. Follows the flow from the guess, so it finds an attracting steady state, from guesses far away too.
    References: Kelley, Keyes 1998, SIAM J. Numer. Anal. 35, 508; Deuflhard 2004, Newton Methods for Nonlinear Problems,
    section 6.4.
    """

    dt: float | None = None

    references: ClassVar[tuple[str, ...]] = ("kelley1998", "deuflhard2004")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dt is not None and not (isinstance(self.dt, int | float) and 0.0 < self.dt < math.inf):
            raise InputError(f"PseudoTransient(dt={self.dt!r}) is not a positive number", "it is the first step",
                             "PseudoTransient(dt=0.1)")

    def iterate(self, run: Run, x: Inputs, wanted: Any = True) -> Found:
        be = run.be
        space = _Space(run, x, self.linear_solver)
        start = space.start(x.u0)
        if self.dt is None:
            # The first trial of Hairer, Norsett, Wanner I, II.4, with a larger factor: an error here is corrected.
            d0, d1 = space.length(x.u0, x.u0), space.length(start.f, x.u0)
            small = (d0 < 1e-5) | (d1 < 1e-5)
            dt = be.choose(small, 1e-3, 0.1 * d0 / be.choose(small, 1.0, d1))
        else:
            dt = self.dt
        status = be.choose(wanted, start.status, int(RetCode.NewtonFailure))
        start = start._replace(sigma=1.0 / dt, status=status, nfe=be.choose(wanted, 1, 0))

        def step(s: State) -> tuple[State, None, Any]:
            d = space.systems.at(s.u, s.sigma)(s.f)
            u = be.combine(s.u, 1.0, (1.0,), d[None, :])
            f = space.rhs(u)
            lag = s.sigma * be.rms(d)
            left = be.rms(be.combine(f, -s.sigma, (1.0,), d[None, :]))
            safe = be.choose(s.size > 0.0, s.size, 1.0)
            q = left / safe
            fine = be.isfinite(q)
            keep = (fine & (q <= 1.0)) | (s.size == 0.0)
            some = be.choose(fine & (q > 2.5e-3), q, 1.0)
            grow = be.choose(fine, be.choose(q > 2.5e-3, (0.25 / some) ** 0.5, 10.0), 0.1)
            grow = be.greatest(0.1, be.choose(keep, grow, be.least(grow, 0.5)))
            correction = space.length(d, s.u)
            done = keep & (correction <= 1.0) & (lag <= 1e-3 * s.size)
            u, f, size = be.choose(keep, (u, f, be.rms(f)), (s.u, s.f, s.size))
            one = be.choose(keep, 1, 0)
            return State(u, f, size, correction, s.sigma / grow, s.accepted + one, s.rejected + 1 - one, s.nfe + 1,
                         s.solves + 1, be.choose(done, int(RetCode.Success), RUNNING)), None, False

        end = space.run(step, start)
        return Found(end, end.solves * space.systems.jacobians, end.solves * space.systems.factorisations)


class _Trial(NamedTuple):
    """A point along a correction: the part of it that is taken, `f` there and its norm, how many were tried."""

    factor: Scalar
    u: Array
    f: Array
    size: Scalar
    count: Any


class _Space:
    """What both methods need of a run: `f`, its linear systems, lengths in tolerances, the loop."""

    def __init__(self, run: Run, x: Inputs, linear_solver: str | None) -> None:
        be = run.be
        t = be.time(be.scalar(x.t0))
        field = run.field.bind(be, x.theta, x.constants)
        self.be, self.x, self.limit = be, x, run.max_steps
        self.rhs: Callable[[Array], Array] = lambda u: field(t, u)
        self.systems = systems(run, x, t, linear_solver, max(FORCING, 100.0 * be.eps(x.u0.dtype)))
        self.norm = run.norm or be.rms

    def length(self, d: Array, u: Array) -> Scalar:
        """A correction measured in tolerances."""
        return self.norm(self.be.scaled(d, u, u, self.x.rtol, self.x.atol))

    def start(self, u: Array) -> State:
        be = self.be
        f = self.rhs(u)
        size = be.rms(f)
        status = be.choose(be.isfinite(size), RUNNING, int(RetCode.NonFinite))
        return State(u, f, size, math.inf, 0.0, 0, 0, 1, 0, status)

    def run(self, step: Callable, start: State) -> State:
        """Iterate until the status says something."""
        be = self.be
        end, _ = be.iterate(step, start, lambda s: s.status == RUNNING, self.limit)
        return end._replace(status=be.choose(end.status == RUNNING, int(RetCode.MaxSteps), end.status))
