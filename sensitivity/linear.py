"""Linear systems with `A = sigma I - f_u(u)`: by a dense or sparse factorisation, or by products alone.

Newton's method solves `A d = f`, its adjoint `A^T lam = l_u`. Each class below is one way to do both: `at(u, sigma)`
returns `solve(b, transposed=False)`, and `jacobians`, `factorisations` say what one `at` costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .backend import Array
from .errors import UnsupportedCombination
from .integrate import Run
from .linearsolver import DENSE_LIMIT, SOLVERS, refuse_choice
from .matrices import Entries, Operator, entries_of, factorize, is_sparse, scattered, shifted
from .system import Inputs

Solve = Callable[..., Array]


class Products:
    """Products with `A` and its transpose at one time, by the VJP choice of the run."""

    jacobians = factorisations = 0

    def __init__(self, run: Run, x: Inputs, t: Any, solver: Any = None) -> None:
        self.run, self.be, self.x, self.t, self.solver = run, run.be, x, t, solver
        still = tuple(0.0 * v[None, ...] for v in x.theta)
        self.still = still
        self.push = run.vjp.pushforward(run, x, still)
        self.pull = run.vjp.pullback(run, x, params=False)

    def apply(self, u: Array, sigma: Any, v: Array) -> Array:
        """`A v`."""
        return sigma * v - self.push(self.t, u, v[None, :], None)[1][0, :]

    def transposed(self, u: Array, sigma: Any, v: Array) -> Array:
        """`A^T v`."""
        return sigma * v - self.pull(self.t, u, v)[0]


class Dense(Products):
    """LU of the Jacobian, which is the user's `jac` or made column by column; `O(n^3)`."""

    jacobians = factorisations = 1

    def at(self, u: Array, sigma: Any) -> Solve:
        be = self.be
        n = u.shape[0]
        jac = self.run.products.jac
        if jac is not None:
            J = be.asarray(jac(self.t, *_arguments(self.run, self.x, u)), dtype=u.dtype)
        else:
            still = tuple(be.xp.concat([v] * n, axis=0) for v in self.still)
            J = self.run.vjp.pushforward(self.run, self.x, still)(self.t, u, be.unit_rows(n, n, 0, u), None)[1].T
        return factorize(be, shifted(be, J, 1.0, None, sigma), self.solver)


class Sparse(Products):
    """LU of a band or by SuperLU; the Jacobian is the user's `jac`, or made a colour at a time."""

    jacobians = factorisations = 1

    def at(self, u: Array, sigma: Any) -> Solve:
        be, run, pattern = self.be, self.run, self.run.kind.pattern
        if run.products.jac is None:
            J: Any = Entries(pattern, run.vjp.entries(run, self.x, pattern)(self.t, u))
        else:
            J = run.products.jac(self.t, *_arguments(run, self.x, u))
            J = (scattered(be, J, u) if is_sparse(J) else
                 entries_of(be, pattern, be.asarray(J, dtype=u.dtype, device=be.device(u))))
        return factorize(be, shifted(be, J, 1.0, None, sigma), self.solver)


class Krylov(Products):
    """Restarted GMRES on products alone; nothing is stored but its basis."""

    def __init__(self, run: Run, x: Inputs, t: Any, rtol: float) -> None:
        super().__init__(run, x, t)
        self.rtol = rtol

    def at(self, u: Array, sigma: Any) -> Solve:
        return factorize(self.be, Operator(lambda v: self.apply(u, sigma, v), lambda v: self.transposed(u, sigma, v),
                                           self.rtol))


def systems(run: Run, x: Inputs, t: Any, choice: Any, rtol: float) -> Any:
    """The way to solve that `choice` names, or the one that suits the problem; `rtol` is that of `Krylov`."""
    solver = None if choice in SOLVERS else choice
    name = suggested(run) if choice is None else choice
    if name == "krylov":
        return Krylov(run, x, t, rtol)
    if solver is not None:
        name = "sparse" if _structured(run) else "dense"
    return (Sparse if name == "sparse" else Dense)(run, x, t, solver)


def suggested(run: Run) -> str:
    """Sparse where the problem says how, dense up to `DENSE_LIMIT` unknowns, else products alone."""
    if _structured(run):
        return "sparse"
    return "dense" if run.field.u.size <= DENSE_LIMIT else "krylov"


def refuse(run: Run, owner: str, choice: Any) -> None:
    """Refuse a `linear_solver` that this run cannot use."""
    refuse_choice(run.be, owner, choice, run.kind.pattern, run.kind.sparse_jac)
    if choice == "dense" and run.kind.sparse_jac:
        raise UnsupportedCombination(f"{owner}(linear_solver='dense') cannot use a sparse jac", "it factorises arrays",
                                     "linear_solver='sparse', or jac returning an array")


def _structured(run: Run) -> bool:
    """Whether the problem says where `f_u` is zero in a way that the backend can use."""
    kind = run.kind
    return kind.sparse_jac or (kind.pattern is not None and kind.pattern.structure(run.be) is not None)


def _arguments(run: Run, x: Inputs, u: Array) -> tuple[Any, Any]:
    """State and parameters in the user's structures."""
    be, field = run.be, run.field
    state = be.unflatten(field.u.structure, field.u.unravel(be, u))
    return state, field.p.join(be, x.theta[:field.p.count], x.constants)
