"""Quadrature adjoint: the costate by the solver, the parameter integral by adaptive Gauss-Kronrod quadrature.

    lam' = -f_u(t, u(t), p)^T lam,   dG/dp = int f_p(t, u(t), p)^T lam dt

The costate of one leg, between two jumps, is kept dense; then the integral over this leg is made to its own tolerance
with the pair (G7, K15). A panel is accepted when `|K15 - G7|` is below its share of the tolerance, in proportion to its
length, else halved. No panel has more than eight steps of either solve, which would not see a layer that the solvers
saw. Panels are dyadic, `[i, i + 1] 2^-l` of the leg, and doubled again when the next place allows it,
so no list of panels is kept and the same loop can be compiled.

References: Kronrod 1965; Piessens et al. 1983 (QUADPACK), qk15 for nodes and weights; Kim et al. 2021 (Stiff neural
ODEs), section 3 for the algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ..backend import Array, Scalar
from ..errors import InputError
from ..estimates import Effort, Work
from ..retcode import RetCode
from .continuous import ContinuousAdjoint
from .costate import Costate
from .walk import Leg, Way, least, path

PANELS = 100_000
STEPS = 8
HALVINGS = 40

# Nodes on [0, 1] and weights for the integral over [0, 1]; every second node is one of G7.
_X = (0.991455371120812639206854697526329, 0.949107912342758524526189684047851, 0.864864423359769072789712788640926,
      0.741531185599394439863864773280788, 0.586087235467691130294144691693013, 0.405845151377397166906606412076961,
      0.207784955007898467600689403773245, 0.0)
_K = (0.022935322010529224963732008058970, 0.063092092629978553290700663189204, 0.104790010322250183839876322541518,
      0.140653259715525918745189590510238, 0.169004726639267902826583426598550, 0.190350578064785409913256402421014,
      0.204432940075298892414161999234649, 0.209482141084727828012999174891714)
_G = (0.0, 0.129484966168869693270611432679082, 0.0, 0.279705391489276667901467771423780, 0.0,
      0.381830050505118944950369775488975, 0.0, 0.417959183673469387755102040816327)
NODES = tuple(0.5 - 0.5 * x for x in _X) + tuple(0.5 + 0.5 * x for x in _X[-2::-1])
KRONROD = tuple(0.5 * w for w in _K + _K[-2::-1])
GAUSS = tuple(0.5 * w for w in _G + _G[-2::-1])


@dataclass(frozen=True)
class QuadratureAdjoint(ContinuousAdjoint):
    """Continuous adjoint that solves for the costate only, and integrates for the parameters to a tolerance of its own.

    Parameters
    ----------
    vjp : VJP, optional
    quad_rtol, quad_atol : float, optional
        Tolerances of the quadrature; those of the backward solve if not given.
    alg, rtol, atol : optional
        Method and tolerances of the backward solve; those of the forward solve if not given.

    References: Piessens et al. 1983 (QUADPACK), qk15.
    """

    quad_rtol: float | None = None
    quad_atol: float | None = None

    algebraic: ClassVar[bool] = True
    elsewhere: ClassVar[frozenset[str]] = frozenset({"dde"})
    second_order: ClassVar[bool] = True
    references: ClassVar[tuple[str, ...]] = ("kim2021", "piessens1983")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("quad_rtol", "quad_atol"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value > 0.0 and math.isfinite(value)):
                raise InputError(f"{name}={value!r} is not a positive number", "it is the tolerance of the quadrature",
                                 f"{name}=1e-8")

    def work(self, w: Work) -> Effort:
        return Effort(0, 0, w.back * w.s + 7 * w.N, 2 * w.stored)

    def cross(self, way: Way, leg: Leg, t: Scalar, u: Array) -> Leg:
        be = way.be
        known, leg = path(way, leg, t, u)
        equation = Costate(way, known)
        sink = be.store(way.run.capacity) if way.params else None
        before, lam = leg, equation.enter(leg)
        last, log, stepper = way.solve(leg, t, equation.rhs, lam, None, sink, jac=equation.jac, mass=equation.mass)
        leg, count = way.ran(leg, stepper, last)
        leg = leg._replace(lam=equation.leave(last.u), nvjp=leg.nvjp + count + equation.rows(before, leg))
        if log is None:
            return equation.counted(before, leg, count)
        log = be.reopen(log, stepper.restage)
        lam_of, place = be.lookup(stepper.interpolate, log, lam), be.place(log)

        def coarse(a: Scalar, b: Scalar) -> Any:
            return (abs(place(b) - place(a)) > STEPS) | (abs(known.place(b) - known.place(a)) > STEPS)
        both = way.pull(True)

        def rate(t: Scalar) -> Array:
            u = known.u(t)
            lam = equation.consistent(t, u, lam_of(t))
            return way.flat(both(be.time(t), u, lam)[1], lam)

        rtol = least(be, way.rtol) if self.quad_rtol is None else self.quad_rtol
        atol = least(be, way.atol) if self.quad_atol is None else self.quad_atol
        done = be.choose(leg.status == 0, 0.0, 1.0)
        mu, nodes, complete = integral(be, rate, t, before.t, leg.mu, rtol, atol, coarse, done)
        status = be.choose(complete, 0, int(RetCode.MaxSteps))
        leg = equation.counted(before, leg, count + nodes, nodes)
        return leg._replace(mu=mu, nvjp=leg.nvjp + nodes, status=be.greatest(leg.status, status))


class Panels(NamedTuple):
    """The quadrature from 0 to `x` in units of the leg, and the width of the next panel."""

    x: Scalar
    width: Scalar
    total: Array
    count: Any


def integral(be: Any, rate: Callable, a: Scalar, b: Scalar, start: Array, rtol: Any, atol: Any,
             coarse: Callable = lambda a, b: False, done: Scalar = 0.0) -> tuple[Array, Any, Any]:
    """`start + int_a^b rate(t) dt`, how many nodes that took, and whether the tolerance was met."""
    xp, length = be.xp, b - a

    def panel(state: Panels) -> tuple[Panels, None, bool]:
        x, width, total, count = state
        width, _ = be.iterate(lambda width: (0.5 * width, None, True), width,
                              lambda width: coarse(a + x * length, a + (x + width) * length), HALVINGS)

        def add(sums: tuple[Array, Array], node: tuple) -> tuple[tuple[Array, Array], int]:
            place, k, g = node
            value = rate(a + (x + place * width) * length)
            return (sums[0] + k * value, sums[1] + g * value), 0

        (fine, rough), _ = be.scan(add, (0.0 * total, 0.0 * total), (NODES, KRONROD, GAUSS))
        fine, rough = (width * length) * fine, (width * length) * rough
        scale = atol + rtol * xp.maximum(xp.abs(total), xp.abs(total + fine))
        end = x + width
        keep = (be.rms((fine - rough) / scale) <= width) | (width < 0.5**HALVINGS)
        wider = (end % (2.0 * width) == 0.0) & (end + 2.0 * width <= 1.0)
        grown = be.choose(wider, 2.0 * width, width)
        new = Panels(be.choose(keep, end, x), be.choose(keep, grown, 0.5 * width), be.choose(keep, total + fine, total),
                     count + len(NODES))
        return new, None, True

    first = Panels(be.choose(length == 0.0, 1.0, done), 1.0, start, 0)
    last, _ = be.iterate(panel, first, lambda state: state.x < 1.0, PANELS)
    return last.total, last.count, last.x >= 1.0
