"""The solve as JAX sees it: compiled once per run, with our tangent and its transpose."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from sensitivity.algorithms.base import Outputs, Tangents

from ._linear import linear


@partial(jax.jit, static_argnums=(0, 1))
def plain(algorithm, run, x):
    """A solve that JAX differentiates itself."""
    return algorithm.plain(run, x)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def task(algorithm, name, run, wanted, args):
    """`algorithm.<name>(run, *args, wanted)`, compiled."""
    return getattr(algorithm, name)(run, *args, wanted)


@partial(jax.jit, static_argnums=(0, 1))
def looked(at, run, x):
    """`at(run, x)`, compiled."""
    return at(run, x)


class SolveMap(NamedTuple):
    """The derivative of a solve at its residuals, and the transpose of it."""

    algorithm: Any
    run: Any
    wanted: tuple
    residual_tree: Any
    residuals: int
    tangent_shapes: tuple
    out_tree: Any
    out_shapes: tuple

    def out(self):
        return self.out_shapes

    def apply(self, *flat):
        residuals = jax.tree.unflatten(self.residual_tree, flat[: self.residuals])
        d = self._directions(flat[self.residuals :], residuals)
        du = self.algorithm.tangent(self.run, residuals, d)
        return [x[0] for x in jax.tree.leaves(du if isinstance(du, Outputs) else Outputs(du))]

    def _directions(self, flat, residuals):
        rest = list(flat)
        take = {}
        for name in self.wanted:
            if name == "theta":
                k = len(flat) - len(self.wanted) + 1
                take[name], rest = tuple(v[None] for v in rest[:k]), rest[k:]
            else:
                take[name], rest = rest[0][None], rest[1:]
        x = residuals.x
        zero = lambda v: jnp.zeros((1, *v.shape), v.dtype)  # noqa: E731
        return Tangents(take.get("u0", zero(x.u0)), take.get("theta", tuple(zero(v) for v in x.theta)),
                        take.get("t0"), take.get("t1"), take.get("saveat"))

    def transpose(self, *flat):
        residuals = jax.tree.unflatten(self.residual_tree, flat[: self.residuals])
        ct = jax.tree.unflatten(self.out_tree, flat[self.residuals :])
        bar = self.algorithm.reverse(self.run, residuals, ct, frozenset(self.wanted))
        bad = bar.status != 0
        out = []
        for name in self.wanted:
            out += list(bar.theta) if name == "theta" else [getattr(bar, name)]
        return [jnp.where(bad, jnp.nan, jnp.asarray(v, s.dtype)) for v, s in zip(out, self.tangent_shapes, strict=True)]


@partial(jax.jit, static_argnums=(0, 1))
def attached(algorithm, run, x):
    """A solve with the derivatives of a sensitivity algorithm."""
    names = ("u0", "theta", "t0", "t1") + (("saveat",) if run.saves == "ts" else ())

    @jax.custom_jvp
    def call(diff, rest):
        return algorithm.plain(run, rest._replace(**diff))

    @partial(call.defjvp, symbolic_zeros=True)
    def rule(primals, tangents):
        diff, rest = primals
        moved = tangents[0]
        wanted = tuple(n for n in names if any(not isinstance(t, SymbolicZero) for t in jax.tree.leaves(moved[n])))
        x = rest._replace(**diff)
        if algorithm.closed:
            # Of any order, because the rule uses the solve that it belongs to.
            out, aux = call(diff, rest)
            residuals = algorithm.residuals(run, x, out, aux)
        else:
            out, aux, residuals = algorithm.forward(run, x, frozenset(wanted))
        d = [jnp.zeros_like(v) if isinstance(t, SymbolicZero) else t
             for n in wanted for t, v in zip(jax.tree.leaves(moved[n]), jax.tree.leaves(diff[n]), strict=True)]
        flat, tree = jax.tree.flatten(residuals)
        shapes = tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in d)
        outs, out_tree = jax.tree.flatten(out)
        map_ = SolveMap(algorithm, run, wanted, tree, len(flat), shapes, out_tree,
                        tuple(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in outs))
        d_out = jax.tree.unflatten(out_tree, linear(map_, *flat, *d)) if wanted else jax.tree.map(jnp.zeros_like, out)
        return (out, aux), (d_out, jax.tree.map(_zero_tangent, aux))

    rest = x._replace(u0=None, theta=None, t0=None, t1=None, saveat=None)
    diff = {n: getattr(x, n) for n in names}
    return call(diff, rest)


def _zero_tangent(v):
    v = jnp.asarray(v)
    return jnp.zeros_like(v) if jnp.issubdtype(v.dtype, jnp.inexact) else jnp.zeros(v.shape, jax.dtypes.float0)
