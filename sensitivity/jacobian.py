"""The Jacobian `f_u` as implicit methods need it.

`near` steers Newton's iteration, which corrects its errors: differences will do. `exact` stands in the linear
equations of the discrete adjoint, and is as exact as the products with the derivatives of `f` are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .backend import Array
from .sparsity import by_columns, by_rows


class Jacobian(NamedTuple):
    """Two functions `(t, u) -> (n, n)`: one to steer Newton's iteration, one for linear equations; either may be None.

    `sparsity` is the pattern, where it is known. `system(t, u, c) -> solve(b, transposed=False)` solves with
    `M - c f_u`, where the structure of the equation offers something better than a factorisation of the whole.
    """

    near: Any
    exact: Any
    sparsity: Any = None
    system: Any = None


def given(run: Any, x: Any) -> Jacobian | None:
    """What the problem says about the Jacobian of its vector field, on flat states."""
    be, field, products = run.be, run.field, run.products
    jac, sparsity = products.jac, products.sparsity
    if jac is None:
        return None if sparsity is None else Jacobian(None, None, sparsity)
    p = field.p.join(be, x.theta[:field.p.count], x.constants)

    def flat(t: Any, u: Array) -> Array:
        return jac(t, be.unflatten(field.u.structure, field.u.unravel(be, u)), p)

    return Jacobian(flat, flat, sparsity)


def of_field(run: Any, x: Any) -> Jacobian | None:
    """The Jacobian of the user's vector field: given with the problem, by AD, or by differences."""
    be, field, known = run.be, run.field, given(run, x)
    if not run.method.one_step:
        return known
    if known is not None and known.exact is not None and field.p.count == len(x.theta):
        n, user = field.u.size, known.exact

        def jac(t: Any, u: Array) -> Array:
            J = user(t, u)
            if be.sparse and be.is_sparse(J):
                return J
            return be.xp.reshape(be.asarray(J, dtype=u.dtype, device=be.device(u)), (n, n))

        return Jacobian(jac, jac)
    if run.vjp is None:
        return None
    exact = run.vjp.jacobian(run, x)
    rough = be.opaque or "reverse" not in be.modes
    rhs = field.bind(be, x.theta, x.constants)
    if be.sparse and run.sparsity is not None and run.sparsity.size == field.u.size:
        central = partial(between, rhs), lambda u: be.eps(u.dtype) ** (1 / 3) * sizes(be, u, 1e-3)
        near = by_columns(be, run.sparsity, *central)
        if type(run.vjp).__name__ == "FiniteDifferenceVJP":
            return Jacobian(near, near)
        return Jacobian(near, by_rows(be, run.sparsity, run.vjp.pullback(run, x, params=False)))
    return Jacobian(differences(be, rhs, run.method.exact_jacobian) if rough else exact, exact)


def of_function(be: Any, rhs: Callable[[Any, Array], Array]) -> Jacobian:
    """The Jacobian of any right-hand side: by AD where AD traces, else by differences."""
    jac = be.jacobian(rhs) if be.traced else differences(be, rhs)
    return Jacobian(jac, jac)


def usable(be: Any, rhs: Callable[[Any, Array], Array], jac: Jacobian | None) -> Jacobian:
    """What is known of a Jacobian, or what can be made from the right-hand side."""
    return of_function(be, rhs) if jac is None or (jac.near is None and jac.system is None) else jac


def between(rhs: Callable[[Any, Array], Array], t: Any, u: Array, step: Array) -> Array:
    """Central difference of `rhs` along a step."""
    return (rhs(t, u + step) - rhs(t, u - step)) / 2.0


def differences(be: Any, rhs: Callable[[Any, Array], Array], central: bool = False) -> Callable[[Any, Array], Array]:
    """Forward differences with step `sqrt(eps)` times the size of each entry, `n + 1` evaluations; central ones, with
    step `eps^(1/3)`, take `2 n`."""

    def jac(t: Any, u: Array) -> Array:
        n = u.shape[0]
        step = be.eps(u.dtype) ** (1 / 3 if central else 0.5) * sizes(be, u, 1e-3)
        moves = step[:, None] * be.unit_rows(n, n, 0, u)
        f = None if central else rhs(t, u)
        _, rows = be.scan(lambda _, x: (0, rhs(t, u + x[0]) - (rhs(t, u - x[0]) if central else f)), 0, (moves,))
        return (be.gathered(rows) / ((2.0 if central else 1.0) * step[:, None])).T

    return jac


def sizes(be: Any, x: Array, floor: float) -> Array:
    """The size of every entry, at least `floor` times the largest; 1 where that is zero."""
    xp = be.xp
    size = xp.abs(x)
    if floor:
        size = xp.maximum(size, floor * xp.max(size))
    return xp.where(size > 0.0, size, xp.ones_like(size))
