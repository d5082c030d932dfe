"""The Jacobian `f_u` as implicit methods need it.

`near` steers Newton's iteration, which corrects its errors: differences will do. `exact` stands in the linear
equations of the discrete adjoint, and is as exact as the products with the derivatives of `f` are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from .backend import Array
from .errors import UnsupportedCombination
from .linearsolver import Krylov, wants_products
from .matrices import Entries, Operator, dense, entries_of, is_sparse, scattered
from .sparsity import Pattern, by_columns

LARGEST_DENSE = 2000
FORCING = 1e-4  # of linear equations inside an iteration that corrects their errors
TIGHT, NUMERIC = 1e-12, 1e-8  # of those that nothing corrects, by exact products and by differences


class Undivided(NamedTuple):
    """The Jacobians of f in `u' = M^-1 f`, and M, which is nonsingular."""

    near: Any
    exact: Any
    mass: Any


class Jacobian(NamedTuple):
    """Two functions `(t, u) -> (n, n)`: one to steer Newton's iteration, one for linear equations; either may be None.

    `sparsity` is the pattern, where it is known. `system(t, u, c) -> solve(b, transposed=False)` solves with
    `M - c f_u`, where the structure of the equation offers something better than a factorisation of the whole.
    `solver` is the user's linear solver; `free` says that there are products only, no matrices. `back(t, u, v)` is
    `f_u^T v` where that is cheap beside a factorisation, as `costly` ones are known to be. With a nonsingular mass
    matrix all this is about `M^-1 f`, and `undivided` has what linear systems are made of.
    """

    near: Any
    exact: Any
    sparsity: Any = None
    system: Any = None
    solver: Any = None
    free: bool = False
    back: Any = None
    costly: bool = False
    undivided: Undivided | None = None


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
    be, field, mass = run.be, run.field, run.field.mass
    if not run.method.one_step:
        return given(run, x)
    own = undivided(run)
    known = given(own, x)
    pattern = run.sparsity if run.sparsity is not None and run.sparsity.size == field.u.size else None
    choice = getattr(run.method, "linear_solver", None)
    if run.vjp is not None and (wants_products(choice) or (choice is None and _large(run, known, pattern))):
        return matrix_free(run, x)
    found = made = _matrices(own, x, known, pattern, run.mass or mass)
    costly = pattern is not None and pattern.structure(be) == "sparse"
    matrices = be.sparse_lu and run.products.jac is not None
    if choice == "dense":
        made = Jacobian(lambda *at: dense(be, found.near(*at)), lambda *at: dense(be, found.exact(*at)))
    elif choice not in (None, "sparse"):
        made = made._replace(solver=choice)
    elif (costly or matrices) and run.vjp is not None and run.vjp.transposes:
        pull = run.vjp.pullback(run, x, params=False)
        made = made._replace(back=lambda t, u, v: pull(t, u, v)[0], costly=costly)
    return made if mass is None else _over(be, mass, made)


def undivided(run: Any) -> Any:
    """The run with f in place of `M^-1 f`, and the products that belong to it."""
    if run.field.mass is None:
        return run
    return replace(run, field=replace(run.field, mass=None), products=run.products.undivided)


def _over(be: Any, mass: Any, made: Jacobian) -> Jacobian:
    """The Jacobian of `M^-1 f` from that of f."""
    def divided(jac: Callable) -> Callable[[Any, Array], Array]:
        return lambda t, u: mass.unweigh(be, dense(be, jac(t, u)).T).T

    return made._replace(near=divided(made.near), exact=divided(made.exact),
                         undivided=Undivided(made.near, made.exact, mass))


def _large(run: Any, known: Jacobian | None, pattern: Pattern | None) -> bool:
    """Whether a problem is too large for a dense matrix, has nothing better, and products with `f_u^T` are cheap."""
    unknown = (known is None or known.exact is None) and (pattern is None or pattern.structure(run.be) is None)
    products = run.vjp is not None and run.vjp.transposes
    return unknown and products and run.mass is None and run.field.u.size > LARGEST_DENSE


def matrix_free(run: Any, x: Any) -> Jacobian:
    """The Jacobian by its products: near enough for Newton's iteration, and as exact as the products are."""
    be, least = run.be, 100.0 * run.be.eps(x.u0.dtype)
    rhs, push = run.field.bind(be, x.theta, x.constants), run.vjp.pushes(run, x)
    pull = run.vjp.pullback(run, x, params=False)

    def along(t: Any, u: Array, v: Array) -> Array:
        return push(t, u, v[None, :])[0, :]

    def difference(t: Any, u: Array, v: Array) -> Array:
        size = be.rms(v)
        e = be.eps(u.dtype) ** (1 / 3) * be.greatest(be.rms(u), 1e-3) / be.choose(size > 0.0, size, 1.0)
        return between(rhs, t, u, e * v) / e

    rough = _preconditioner(run, x)

    def operator(rtol: float, product: Callable, strict: bool) -> Callable[[Any, Array], Operator]:
        return lambda t, u: Operator(partial(product, t, u), lambda v: pull(t, u, v)[0], max(rtol, least), strict,
                                     None if rough is None else partial(rough, t, u))

    linear = run.method.exact_jacobian  # no iteration corrects errors
    exact = operator(NUMERIC if run.vjp.numeric else TIGHT, along, True)
    if be.opaque:
        near = operator(NUMERIC if linear else FORCING, difference, False)
    else:
        near = exact if linear else operator(FORCING, along, False)
    return Jacobian(near, exact, free=True)


def _preconditioner(run: Any, x: Any) -> Callable | None:
    """The user's preconditioner of flat states, `(t, u, c) -> solve(b, transposed)`."""
    choice = getattr(run.method, "linear_solver", None)
    if not isinstance(choice, Krylov):
        return None
    be, field = run.be, run.field
    p, opened = field.p.join(be, x.theta[:field.p.count], x.constants), field.u.opener(be)
    return lambda t, u, c: choice.preconditioner(t, opened(u), p, c)


def _matrices(run: Any, x: Any, known: Jacobian | None, pattern: Pattern | None, mass: Any) -> Jacobian:
    """The Jacobian as a matrix, in whatever structure it has."""
    be, field = run.be, run.field
    if known is not None and known.exact is not None and field.p.count == len(x.theta):
        n, user = field.u.size, known.exact

        def jac(t: Any, u: Array) -> Any:
            J = user(t, u)
            if is_sparse(J):
                if not be.sparse_lu:
                    raise UnsupportedCombination(f"a jac that returns SciPy matrices is not available on {be.name}",
                                                 "its loops are compiled", "jac as an array, with jac_sparsity=")
                return scattered(be, J, u, mass)
            J = be.xp.reshape(be.asarray(J, dtype=u.dtype, device=be.device(u)), (n, n))
            return J if pattern is None else entries_of(be, pattern, J)

        return Jacobian(jac, jac)
    if run.vjp is None:
        return of_function(be, field.bind(be, x.theta, x.constants))
    rough = be.opaque or "reverse" not in be.modes
    rhs = field.bind(be, x.theta, x.constants)
    if pattern is not None:
        exact = structured(pattern, run.vjp.entries(run, x, pattern))
        return Jacobian(structured(pattern, compressed_differences(be, rhs, pattern)) if rough else exact, exact)
    exact = run.vjp.jacobian(run, x)
    return Jacobian(differences(be, rhs, run.method.exact_jacobian) if rough else exact, exact)


def structured(pattern: Pattern, entries: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Entries]:
    """`jac(t, u)` from the values of its entries."""
    return lambda t, u: Entries(pattern, entries(t, u))


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


def compressed_differences(be: Any, rhs: Callable[[Any, Array], Array],
                           pattern: Pattern) -> Callable[[Any, Array], Array]:
    """The entries of a pattern by central differences, `2` evaluations for each colour."""
    columns = be.asarray(pattern.columns)

    def entries(t: Any, u: Array) -> Array:
        step = be.eps(u.dtype) ** (1 / 3) * sizes(be, u, 1e-3)

        def along(t: Any, u: Array, masks: Array) -> Array:
            _, rows = be.scan(lambda _, x: (0, between(rhs, t, u, x[0])), 0, (step[None, :] * masks,))
            return be.gathered(rows)

        return by_columns(be, pattern, along)(t, u) / be.xp.take(step, columns)

    return entries


def sizes(be: Any, x: Array, floor: float) -> Array:
    """The size of every entry, at least `floor` times the largest; 1 where that is zero."""
    xp = be.xp
    size = xp.abs(x)
    if floor:
        size = xp.maximum(size, floor * xp.max(size))
    return xp.where(size > 0.0, size, xp.ones_like(size))
