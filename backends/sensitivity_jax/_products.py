"""Matrix products in the reverse pass, in the form that XLA is fast at.

The cotangent of a matrix is a product that contracts the first axes of both factors, `A^T B`. On a CPU, XLA's fast
library takes that of rows with columns only; for others it falls back to one that takes twice as long. So the smaller
factor is transposed beforehand, behind barriers, because XLA would undo it. The derivative of `u @ W` is written by JAX
as the transpose of `ct^T u`, so that swapped factors need no further transpose.
"""

import jax
from jax import lax
from jax.extend.core import Literal

FIRST_AXES = (((0,), (0,)), ((), ()))


def by_rows(pull):
    """`pull` with the products `A^T B` in it written as products of rows with columns."""
    if jax.default_backend() != "cpu":
        return pull

    def call(*args):
        closed, shape = jax.make_jaxpr(pull, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shape), _run(closed, jax.tree.leaves(args)))

    return call


def _run(closed, args):
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]  # noqa: E731
    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, _apply(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _apply(eqn, args):
    name, params = eqn.primitive.name, eqn.params
    if name == "jit":
        return _run(params["jaxpr"], args)
    if name == "dot_general" and params["dimension_numbers"] == FIRST_AXES and all(x.ndim == 2 for x in args):
        a, b = args
        swap = a.shape[1] >= b.shape[1]
        rows, columns = (b, a) if swap else (a, b)
        out = lax.dot_general(lax.optimization_barrier(rows.T), columns, (((1,), (0,)), ((), ())),
                              precision=params["precision"], preferred_element_type=params["preferred_element_type"])
        return [out.T if swap else lax.optimization_barrier(out)]
    bound = eqn.primitive.get_bind_params(params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # a pair before JAX 0.10
    out = eqn.primitive.bind(*functions, *args, **params)
    return out if eqn.primitive.multiple_results else [out]
