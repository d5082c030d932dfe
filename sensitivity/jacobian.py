"""The Jacobian `f_u` as implicit methods need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .backend import Array


class Jacobian(NamedTuple):
    """Two functions `(t, u) -> (n, n)`: one to steer Newton's iteration, one for linear equations; either may be None.

    `sparsity` is the pattern, where it is known.
    """

    near: Callable[[Any, Array], Array] | None
    exact: Callable[[Any, Array], Array] | None
    sparsity: Any = None


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
