"""What every continuous adjoint carries along its walk, and the forward solution that it walks along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..backend import Array, Scalar
from ..integrate import Run, Span, State, algebra, evaluations, integrate, span
from ..stepper import Stepper
from ..system import Inputs
from . import base


class Kept(NamedTuple):
    """What the forward solve leaves: the stops with their states, and with dense output all steps."""

    x: Inputs
    log: Any
    end: State
    ts: Any
    u: Array


class Leg(NamedTuple):
    """Where the walk stands: time, costate, integral for the parameters, state, step sizes to try, and counts.

    With a singular mass matrix `lam` is `M^T` times the costate, see `costate.py`. `algebra` counts Jacobians,
    factorisations and solves. `mismatch` and `drift` compare the state integrated backwards with the stored one: in
    tolerances, and relative.
    """

    t: Scalar
    lam: Array
    mu: Array
    u: Array
    h: Scalar
    ahead: Scalar
    nvjp: Any
    nfe: Any
    status: Any
    mismatch: Scalar
    drift: Scalar
    algebra: tuple[Any, Any, Any] = (0, 0, 0)

    def worked(self, more: tuple[Any, Any, Any]) -> Leg:
        """The leg with more linear algebra behind it."""
        old = self.algebra
        return self._replace(algebra=(old[0] + more[0], old[1] + more[1], old[2] + more[2]))


class Way(NamedTuple):
    """What one reverse pass has at hand on every leg."""

    run: Run
    adjoint: Run
    x: Inputs
    log: Any
    direction: Scalar
    params: bool
    rtol: Any
    atol: Any

    @property
    def be(self) -> Any:
        return self.run.be

    def pull(self, params: bool) -> Callable:
        """Products `(t, u, ct) -> (f_u^T ct, f_p^T ct, 0)`."""
        return self.run.vjp.pullback(self.run, self.x, params=params)

    def flat(self, theta_bar: Sequence[Array], like: Array) -> Array:
        """Cotangents of the parameters as one vector."""
        xp = self.be.xp
        parts = [xp.astype(xp.reshape(v, (-1,)), like.dtype) for v in theta_bar]
        return xp.concat(parts) if len(parts) > 1 else parts[0] if parts else like[:0]

    def backwards(self, leg: Leg, t: Scalar) -> Span:
        return span(self.be, leg.t, t)._replace(direction=-self.direction)

    def solve(self, leg: Leg, t: Scalar, rhs: Callable, z: Array, norm: Callable | None, sink: Any = None,
              parts: Sequence[int] = (), rtol: Any = None, atol: Any = None,
              jac: Any = None, mass: Any = None) -> tuple[State, Any, Stepper]:
        """Integrate `M z' = rhs(t, z)` backwards over one leg; `parts` are the sizes that `norm` keeps apart."""
        known = (jac,) if mass is None else (jac, mass)
        stepper = self.adjoint.method.bind(self.be, rhs, sink is not None, *known)
        rtol, atol = self.rtol if rtol is None else rtol, self.atol if atol is None else atol
        shrink = stepper.dilution(parts)
        if shrink != 1.0:
            rtol, atol = rtol * shrink, atol * shrink
        last, result = integrate(self.adjoint, stepper, self.backwards(leg, t), z, rtol, atol,
                                 norm=norm or self.be.rms, h=leg.h, sink=sink)
        return last, result, stepper

    def ran(self, leg: Leg, stepper: Stepper, last: State) -> tuple[Leg, Any]:
        """The leg after a backward integration over it, and how often its right-hand side was evaluated."""
        count = evaluations(self.adjoint, stepper, last, started=True)
        made = algebra(self.adjoint, stepper, last, started=True)
        return leg.worked(made)._replace(h=last.h, status=self.be.greatest(leg.status, last.status)), count


class Path(NamedTuple):
    """The forward solution on one leg: `u(t)` and what it costs in evaluations of `f`, the size of the forward step
    around `t`, and its number."""

    u: Callable[[Scalar], Array]
    cost: int
    size: Callable[[Scalar], Scalar]
    place: Callable[[Scalar], Any]


def path(way: Way, leg: Leg, t: Scalar, u: Array) -> tuple[Path, Leg]:
    """The forward solution between `t`, where it is `u`, and `leg.t`: kept, or solved once more."""
    be, run, x, log = way.be, way.run, way.x, way.log
    stepper = base.bound(run, x)
    if log is None:
        again = base.replace(run, progress=None)
        u, spent = stepper.start(be.time(t), u)
        last, log = integrate(again, stepper, span(be, t, leg.t)._replace(direction=way.direction), u, x.rtol, x.atol,
                              sink=be.store(run.capacity), h=leg.ahead, limit=run.capacity)
        log = be.reopen(log, stepper.restage)
        matrices = spent * stepper.matrices
        leg = leg.worked(algebra(run, stepper, last, started=True)).worked((matrices, matrices, spent))
        leg = leg._replace(nfe=leg.nfe + evaluations(run, stepper, last, started=True) + spent, ahead=last.h,
                           status=be.greatest(leg.status, last.status))
    between = (t, leg.t) if run.events else None
    size = be.lookup(lambda record, ts: be.vector([record.h], u)[None, :], log, be.vector([leg.t - t], u), between)
    state = dense = be.lookup(stepper.interpolate, log, u, between)
    if stepper.algebraic:
        def state(t: Scalar) -> Array:
            return stepper.corrected(be.time(t), dense(t))
    return Path(state, stepper.corrections, lambda t: be.scalar(size(t)[0]), be.place(log)), leg


def interpolated(run: Run) -> Run:
    """The same run with output between the steps."""
    return base.replace(run, interpolated=True)


def least(be: Any, tolerance: Any) -> Any:
    """A tolerance for costates, which have other units than the states: the smallest of one for each entry."""
    return be.xp.min(tolerance) if getattr(tolerance, "ndim", 0) else tolerance


def worst_part(be: Any, sizes: Sequence[int]) -> Callable[[Array], Any]:
    """The largest of the norms of consecutive parts, so that no long part dilutes the error of a short one."""
    ends = [sum(sizes[:i + 1]) for i in range(len(sizes))]
    pieces = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True) if size]

    def norm(e: Array) -> Any:
        worst = be.rms(e[pieces[0]])
        for piece in pieces[1:]:
            worst = be.greatest(worst, be.rms(e[piece]))
        return worst

    return norm
