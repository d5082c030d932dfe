"""Gauss adjoint: the costate alone by the solver, the parameter integral by Gauss-Legendre quadrature.

    lam' = -f_u(t, u(t), p)^T lam,   dG/dp = int f_p(t, u(t), p)^T lam dt

is a linear equation of the size of the state and an integral that feeds back into nothing. On every accepted step of
the backward solve the integrand is sampled at Gauss nodes of the dense outputs of `lam` and `u`. With m nodes a panel
is exact up to degree 2m - 1; `m = ceil((q + 1) / 2)` for a method of order q leaves an error below that of the steps.
The costate may be smooth where `f_p` is not (a forcing term), so no panel is longer than the forward step at its place.

References: Norcliffe, Deisenroth 2023 (Faster training of neural ODEs using Gauss-Legendre quadrature), section 3;
Cao, Li, Petzold, Serban 2003, eq. (2.12).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

from ..backend import Array, Record, Scalar
from ..estimates import Effort, Work
from .continuous import ContinuousAdjoint
from .costate import Costate
from .points import checked_points
from .walk import Leg, Path, Way, path

PANELS = 100_000


@dataclass(frozen=True)
class GaussAdjoint(ContinuousAdjoint):
    """Continuous adjoint that solves for the costate only; the integral for the parameters is a quadrature.

    The cheapest continuous adjoint for many parameters: their number enters no error norm and no linear algebra.

    Parameters
    ----------
    vjp : VJP, optional
    checkpointing, checkpoints
        As in `InterpolatingAdjoint`.
    alg, rtol, atol : optional
        Method and tolerances of the backward solve; those of the forward solve if not given.

    References: Norcliffe, Deisenroth 2023, section 3.
    """

    checkpointing: Any = "auto"  # type: ignore[misc]
    checkpoints: Any = None  # type: ignore[misc]

    algebraic: ClassVar[bool] = True
    elsewhere: ClassVar[frozenset[str]] = frozenset({"dde"})
    second_order: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("norcliffe2023", "cao2003")

    def __post_init__(self) -> None:
        super().__post_init__()
        points = checked_points(self.name, self.checkpointing, self.checkpoints, ("auto", True, False))
        object.__setattr__(self, "checkpoints", points)

    def work(self, w: Work) -> Effort:
        effort = Effort(0, 0, w.back * w.s + 3 * w.N, w.stored)
        return effort if self.checkpoints is None else effort.within(w)

    def cross(self, way: Way, leg: Leg, t: Scalar, u: Array) -> Leg:
        known, leg = path(way, leg, t, u)
        equation = Costate(way, known)
        sink = None
        if way.params:
            stepper = way.adjoint.method.bind(way.be, None, True)
            sink = way.be.fold(panels(way, known, equation, stepper.interpolate, nodes_for(stepper.order)), (leg.mu, 0))
        last, total, stepper = way.solve(leg, t, equation.rhs, equation.enter(leg), None, sink, jac=equation.jac,
                                         mass=equation.mass)
        before = leg
        leg, count = way.ran(leg, stepper, last)
        mu, nodes = (leg.mu, 0) if total is None else total
        products = count + nodes + equation.rows(before, leg)
        leg = equation.counted(before, leg, count + nodes, nodes)
        return leg._replace(lam=equation.leave(last.u), mu=mu, nvjp=leg.nvjp + products)


class Panel(NamedTuple):
    """How far the quadrature over one step has come."""

    a: Scalar
    mu: Array
    count: Any


def panels(way: Way, known: Path, equation: Costate, interpolate: Callable, m: int) -> Callable:
    """`(mu, count), record -> (mu, count)`: add `-int f_p^T lam` over one backward step."""
    be, pull = way.be, way.pull(True)

    def rate(record: Record, t: Scalar) -> Array:
        u = known.u(t)
        lam = equation.consistent(t, u, interpolate(record, [t])[0, :])
        return way.flat(pull(be.time(t), u, lam)[1], lam)

    return subtracted(be, rate, known.size, m)


def subtracted(be: Any, rate: Callable[[Record, Scalar], Array], size: Callable[[Scalar], Scalar],
               m: int) -> Callable:
    """`(total, count), record -> (total, count)`: less the integral of `rate(record, t)` over a step, by panels of `m`
    Gauss nodes, none longer than `size(t)` at its place."""
    nodes, weights = gauss_legendre(m)

    def fold(total: tuple[Array, Any], record: Record) -> tuple[Array, Any]:
        end = record.t + record.h
        sign = be.choose(record.h >= 0.0, 1.0, -1.0)

        def advance(panel: Panel) -> tuple[Panel, None, bool]:
            a = panel.a
            left = abs(end - a)
            near = be.least(abs(size(a)), left)
            longest = be.least(near, abs(size(a + sign * 0.5 * near)))
            whole = left <= longest * (1.0 + 1e-9)
            h = be.choose(whole, end - a, sign * longest)
            mu, _ = be.scan(lambda mu, x: (mu - (h * x[1]) * rate(record, a + x[0] * h), 0), panel.mu,
                            (nodes, weights))
            return Panel(be.choose(whole, end, a + h), mu, panel.count + m), None, True

        last, _ = be.iterate(advance, Panel(record.t, *total), lambda panel: panel.a != end, PANELS)
        return last.mu, last.count

    return fold


def nodes_for(order: int) -> int:
    """Gauss nodes for a method of this order."""
    return -(-(order + 1) // 2)


@cache
def gauss_legendre(m: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes and weights on [0, 1]."""
    from numpy.polynomial.legendre import leggauss

    x, w = leggauss(m)
    return tuple(float(v) for v in 0.5 * (x + 1.0)), tuple(float(v) for v in 0.5 * w)
