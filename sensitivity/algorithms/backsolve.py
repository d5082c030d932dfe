"""Backsolve adjoint: state, costate and parameter integral together, all integrated backwards.

    u' = f(t, u, p),   lam' = -f_u(t, u, p)^T lam,   mu' = -f_p(t, u, p)^T lam,

from the last stop to the start. No forward solution is kept, only states at the stops, from which `u` starts afresh.
What decays forwards grows backwards: an error in `u` by `exp(|a| T)` between stops for the fastest rate `a`. So the
state that arrives at a stop is compared with the one stored there. The result has this mismatch, in tolerances; above
100 a warning names it. If `u` has lost its first digit as well, or is no number, the gradient means nothing, and the
algorithm fails rather than return it.

The error norm is the larger of those of `u` and `lam`; `mu` feeds back into nothing and is left out of it (Kidger,
Chen, Lyons 2021, "Hey, that's not an ODE"), or is a third part of the maximum, never one of a mean over everything.

References: Chen, Rubanova, Bettencourt, Duvenaud 2018, algorithm 1; Kidger, Chen, Lyons 2021.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from ..backend import Array, Scalar
from ..errors import InputError, UnstableSensealgError, UnstableSensealgWarning, UnsupportedCombination
from ..estimates import Effort, Work
from ..implicit import relative
from ..integrate import algebra
from ..jacobian import Jacobian
from ..retcode import RetCode
from . import base
from .blocks import first_columns, triangular
from .continuous import ContinuousAdjoint
from .points import checked_points
from .walk import Leg, Way, least, worst_part

DOUBTFUL = 100.0  # tolerances between the state integrated backwards and the stored one
LOST = 0.1  # relative difference of the two
BEYOND = 1e6  # a state that grew by this factor has left the solution; going on would only cost time


@dataclass(frozen=True)
class BacksolveAdjoint(ContinuousAdjoint):
    """Continuous adjoint that integrates the state backwards too: the least memory, for problems that are not stiff.

    Parameters
    ----------
    vjp : VJP, optional
    checkpointing : bool
        Whether the state starts afresh from what was stored at save times and checkpoints.
    checkpoints : optional
        "saveat": the save times; a number of equal intervals; a list of times; or an amount of memory such as "200MB".
        Not given: the save times, or ten intervals when only the end is saved.
    seminorm : bool
        Whether the parameter integral is left out of the error norm.
    alg, rtol, atol : optional
        Method and tolerances of the backward solve; those of the forward solve if not given.

    Raises
    ------
    UnstableSensealgError
        The state could not be integrated backwards; inside `jax.jit` the gradient is NaN.

    References: Chen et al. 2018, algorithm 1; Kidger, Chen, Lyons 2021 for the seminorm.
    """

    checkpointing: Any = True  # type: ignore[misc]
    checkpoints: Any = None  # type: ignore[misc]
    seminorm: bool = True

    retraces: ClassVar[bool] = True
    keeps: ClassVar[str] = "saves"
    elsewhere: ClassVar[frozenset[str]] = frozenset({"sde"})
    second_order: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("chen2018", "kidger2021")

    def __post_init__(self) -> None:
        super().__post_init__()
        points = checked_points(self.name, self.checkpointing, self.checkpoints, (True, False))
        object.__setattr__(self, "checkpoints", points)
        if not isinstance(self.seminorm, bool):
            raise InputError(f"seminorm={self.seminorm!r} is neither True nor False",
                             "it says whether the parameters count in the error norm", "seminorm=True")

    def work(self, w: Work) -> Effort:
        return Effort(w.back * w.s, 0, w.back * w.s, (2 * w.n + w.P) * (w.s + 3) + w.saves * w.n)

    def refuse(self, run: Any) -> None:
        if run.mass is not None:
            raise UnsupportedCombination("BacksolveAdjoint does not go with a singular mass matrix",
                                         "it integrates the state backwards, where what the constraints damp grows",
                                         "sensealg=GaussAdjoint() or InterpolatingAdjoint(), which keep the forward "
                                         "solution, or RecursiveCheckpointAdjoint()")
        super().refuse(run)

    @property
    def stores(self) -> bool:
        """States at the stops are all that is ever kept."""
        return True

    def points(self, run: Any, x: Any, s: Any) -> Any:
        return super().points(run, x, s) if self.checkpointing else []

    def cross(self, way: Way, leg: Leg, t: Scalar, u: Array) -> Leg:
        be, xp, x = way.be, way.be.xp, way.x
        n = leg.lam.shape[0]
        rhs = way.run.field.bind(be, x.theta, x.constants)
        pull = way.pull(way.params)
        size = be.greatest(be.rms(u), be.rms(leg.u))
        negligible = be.scalar(least(be, x.atol)) / be.greatest(be.scalar(least(be, x.rtol)), be.eps(u.dtype))
        bound = BEYOND * (size + negligible)

        def augmented(t: Any, z: Array) -> Array:
            state = z[:n]
            lam_bar, theta_bar, _ = pull(t, state, z[n:2 * n])
            rate = be.nan_where(be.rms(state) > bound, rhs(t, state))
            return xp.concat([rate, -lam_bar, -way.flat(theta_bar, z)])

        parts = (n, n) if self.seminorm else (n, n, leg.mu.shape[0])
        rtol, atol = (xp.concat([own, 0.0 * leg.lam + shared, 0.0 * leg.mu + shared])
                      if given is None and getattr(own, "ndim", 0) > 0 else shared
                      for given, own, shared in ((self.rtol, x.rtol, way.rtol), (self.atol, x.atol, way.atol)))
        alone = way.adjoint.method.implicit and not way.adjoint.method.one_step
        jac = _matrix(be, augmented, n) if alone else _jacobian(way, pull, n)
        last, _, stepper = way.solve(leg, t, augmented, xp.concat([leg.u, leg.lam, leg.mu]), worst_part(be, parts),
                                     parts=(n, n, leg.mu.shape[0]), rtol=rtol, atol=atol, jac=jac)
        ran, count = way.ran(leg, stepper, last)
        if alone:
            count = count + (n + 1) * (ran.algebra[0] - leg.algebra[0])
        elif jac is not None:  # two matrices for each, and two solves
            ran = ran.worked(algebra(way.adjoint, stepper, last, started=True))
        found = last.u[:n]
        walking = leg.status == 0
        mismatch = be.choose(walking, _known(be, be.rms(be.scaled(
            found - u, u, u, _looser(be, x.rtol, self.rtol), _looser(be, x.atol, self.atol)))), 0.0)
        drift = _known(be, be.rms(found - u) / be.choose(size > 0.0, size, 1.0))
        lost = ((mismatch > DOUBTFUL) & (drift > LOST)) | ((last.status != 0) & (last.status != int(RetCode.MaxSteps)))
        status = be.choose(lost, int(RetCode.Unstable), last.status)
        return ran._replace(lam=last.u[n:2 * n], mu=last.u[2 * n:], u=u if self.checkpointing else found,
                            nvjp=leg.nvjp + count, nfe=leg.nfe + count, status=be.greatest(leg.status, status),
                            mismatch=be.greatest(leg.mismatch, mismatch), drift=be.greatest(leg.drift, drift))

    def measured(self, leg: Leg) -> tuple[Scalar | None, Scalar | None]:
        return leg.mismatch, leg.drift

    def verdict(self, bar: base.Cotangents, status: float | None, mismatch: float | None) -> None:
        """Raise or warn when the state integrated backwards is not the one of the forward solve."""
        if status is None or mismatch is None:
            return
        lost = math.log10(mismatch) if mismatch > 1.0 else 0.0
        what = (f"BacksolveAdjoint: integrated backwards, the state misses the stored one by {mismatch:.1e} tolerances "
                f"({lost:.0f} digits)")
        why = "what decays forwards grows backwards, and with it every error"
        if status == RetCode.Unstable:
            raise UnstableSensealgError(what, why, "sensealg=GaussAdjoint() or InterpolatingAdjoint(), which keep the "
                                        "forward solution; or more checkpoints=", RetCode.Unstable)
        if mismatch > DOUBTFUL and status == RetCode.Success:
            warnings.warn(f"{what}; {why}: more checkpoints= help, sensealg=GaussAdjoint() avoids it",
                          UnstableSensealgWarning, stacklevel=4)


def _jacobian(way: Way, pull: Any, n: int) -> Jacobian | None:
    """Linear systems with the Jacobian of the three equations, block by block, for methods that ask for it:

        (1 - c J) a = r,   (1 + c J^T) b = s - c (f_u^T lam)_u a,   d = q - c ((f_p^T lam)_u a + f_p^T b)
    """
    be, xp, method = way.be, way.be.xp, way.adjoint.method
    if not (method.implicit and method.one_step):
        return None
    forward: Any = base.bound(base.replace(way.run, method=method), way.x)

    def system(t: Any, z: Array, c: Scalar) -> Any:
        u, lam = z[:n], z[n:2 * n]
        ahead, back = (forward.system(t, u, v, exact=method.exact_jacobian) for v in (c, -c))

        def moved(a: Array, e: Scalar) -> tuple:
            lam_bar, theta_bar, _ = pull(t, u + e * a, lam)
            return lam_bar, way.flat(theta_bar, z)

        def solve(r: Array) -> Array:
            a = ahead(r[:n])
            bent, turned = be.directional(lambda e: moved(a, e), relative(be, a, u))
            b = back(r[n:2 * n] - c * bent, transposed=True)
            return xp.concat([a, b, r[2 * n:] - c * (turned + way.flat(pull(t, u, b)[1], z))])

        return solve

    return Jacobian(None, None, system=system)


def _matrix(be: Any, rhs: Any, n: int) -> Jacobian:
    """The Jacobian of the three equations for a method that solves by itself, see `blocks.py`."""

    columns = first_columns(be, rhs, n)

    def jac(t: Any, z: Array) -> Any:
        first = columns(t, z)
        return triangular(be, first, [-first[:n, :].T], z.shape[0], z)

    return Jacobian(jac, jac)


def _looser(be: Any, forward: Any, own: float | None) -> Any:
    """The tolerance that a difference between the two solves is held against."""
    if own is None:
        return forward
    if getattr(forward, "ndim", 0):
        return be.xp.maximum(forward, 0.0 * forward + own)
    return be.greatest(forward, own)


def _known(be: Any, ratio: Scalar) -> Scalar:
    """A ratio of which infinity says that it is no number."""
    return be.choose(be.isfinite(ratio), ratio, math.inf)
