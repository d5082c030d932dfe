"""The costate equation as a method meets it: its right-hand side, its linear systems, its constraints.

Along a known solution of `M u' = f(t, u, p)` the costate obeys (Cao, Li, Petzold, Serban 2003, eq. 2.11; M the identity
unless said)

    M^T lam' = -f_u(t, u(t), p)^T lam.

Its Jacobian is `-f_u^T`, so what an implicit method solves with is the transposed matrix of the forward equation,

    M^T + c f_u^T = (M - (-c) f_u)^T,

and the forward method's own `system` solves it, by whatever structure that has. With the parameter integral
`mu' = -f_p^T lam` beside it the system is block triangular, and one product with `f_p^T` does for the second block.
A method that solves by itself is given the matrix, see `blocks.py`.

With a singular M, `w = M^T lam` is the total derivative with respect to the differential part of the state. It is what
jumps and what is carried from leg to leg; on a leg lam is the solution of

    M^T lam = w,   V^T f_u^T lam = 0,

which are the consistent initial values of the adjoint equation: V^T times the equation is its constraint. What a cost
says of a state at time t is first pulled back to what determines that state there (`consistent.py`),

    nu = -(V^T f_u^T W)^-1 V^T l_u,   w- = w+ + l_u + f_u^T W nu,   dG/dp += f_p^T W nu,

the impulse of the algebraic costate, and its share in the derivative with respect to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Array, Scalar
from ..jacobian import Jacobian
from ..mass import Blocks
from ..matrices import dense
from . import base
from .blocks import field_matrix, triangular
from .walk import Leg, Path, Way


class Costate:
    """The costate equation on one leg."""

    def __init__(self, way: Way, path: Path) -> None:
        self.way, self.be = way, way.be
        self.pull = way.pull(False)
        self.method = method = way.adjoint.method
        self.forward: Any = None
        if method.implicit and method.one_step:
            self.forward = base.bound(base.replace(way.run, method=method), way.x)
        self.path = path
        self.alone = field_matrix(way.run, way.x) if method.implicit and not method.one_step else None

    def state(self, t: Any) -> Array:
        return self.path.u(self.be.scalar(t))

    def rhs(self, t: Any, lam: Array) -> Array:
        return -self.pull(t, self.state(t), lam)[0]

    @property
    def jac(self) -> Jacobian | None:
        """What an implicit method is told of `-f_u^T`."""
        if self.forward is not None:
            return Jacobian(self.transposed, self.transposed, system=self.system)
        return self._given(self.way.x.u0.shape[0])

    def transposed(self, t: Any, lam: Array) -> Array:
        return -dense(self.be, self.forward.jac.near(t, self.state(t))).T

    def system(self, t: Any, lam: Array, c: Scalar) -> Callable:
        return self._system(t, self.state(t), c)

    def _system(self, t: Any, u: Array, c: Scalar) -> Callable:
        solve = self.forward.system(t, u, -c, exact=self.method.exact_jacobian)
        return lambda b, transposed=False: solve(b, transposed=not transposed)

    def _given(self, size: int) -> Jacobian | None:
        """What a method is told that solves by itself, for the costate and what is integrated with it."""
        if self.alone is None:
            return None
        at = self.alone.at

        def jac(t: Any, z: Array) -> Any:
            return triangular(self.be, -at(t, self.state(t)).T, [], size, z)

        return Jacobian(jac, jac)

    def rows(self, before: Leg, leg: Leg) -> Any:
        """How many products went into the Jacobians that a method asked for which solves by itself."""
        return 0 if self.alone is None else self.alone.products * (leg.algebra[0] - before.algebra[0])

    # -- with the parameter integral --------------------------------------------------------------------------------

    def both(self, n: int) -> tuple[Callable, Jacobian | None]:
        """Right-hand side and Jacobian of `(lam, mu)`."""
        way, xp = self.way, self.be.xp
        pull = way.pull(way.params)

        def rhs(t: Any, z: Array) -> Array:
            lam_bar, theta_bar, _ = pull(t, self.state(t), z[:n])
            return -xp.concat([lam_bar, way.flat(theta_bar, z)])

        def system(t: Any, z: Array, c: Scalar) -> Callable:
            u = self.state(t)
            solve = self._system(t, u, c)

            def both(b: Array) -> Array:
                first = solve(b[:n])
                return xp.concat([first, b[n:] - c * way.flat(pull(t, u, first)[1], b)])

            return both

        if self.forward is not None:
            return rhs, Jacobian(self.transposed, self.transposed, system=system)
        size = sum(base.size_of(v) for v in way.x.theta) if way.params else 0
        return rhs, self._given(n + size)

    # -- with constraints -------------------------------------------------------------------------------------------

    @property
    def mass(self) -> Any:
        """The matrix of the equation, if it is singular."""
        return None if self.way.run.mass is None else self.way.run.mass.transposed

    @property
    def wide_mass(self) -> Any:
        """The same with the parameter integral."""
        return None if self.mass is None else Blocks(self.mass)

    def enter(self, leg: Leg) -> Array:
        """The costate at the start of the leg."""
        return leg.lam if self.mass is None else self.forward.costate(self.be.time(leg.t), self.state(leg.t), leg.lam)

    def consistent(self, t: Scalar, u: Array, lam: Array) -> Array:
        """The costate at time t from dense output, less accurate where it is algebraic."""
        return lam if self.mass is None else self.forward.costate(self.be.time(t), u, self.leave(lam))

    def leave(self, lam: Array) -> Array:
        """What the walk carries of the costate at the end of the leg."""
        return lam if self.mass is None else self.mass.weigh(self.be, lam)

    def counted(self, before: Leg, leg: Leg, products: Any, nodes: Any = 0) -> Leg:
        """The leg with what its constraints took: two evaluations for every look at the path, see `walk.path`."""
        if self.mass is None:
            return leg
        looks = products + leg.algebra[0] - before.algebra[0] + 1
        made = looks + nodes + 1
        matrices = made * self.forward.matrices
        return leg.worked((matrices, matrices, 2 * looks + nodes + 1))._replace(nfe=leg.nfe + self.path.cost * looks)
