"""Vector fields as JAX traces them: known by what they are, with the arrays that they capture taken out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.core import trace_state_clean

from sensitivity.running import RunningField


class Closed(NamedTuple):
    """`f` with time in the state's precision and the result in the state's dtype; equal for equal `f`.

    With `once`, JAX keeps what it traced, so that the user's function runs once for each kind of argument.
    """

    f: Any
    once: bool

    def __call__(self, t, u, p, *captured):
        return _shaped(jax.jit(self.f, inline=True) if self.once else self.f, t, u, p)


class ByIdentity:
    """A callable that cannot be hashed, known by which object it is."""

    def __init__(self, f):
        self.f = f

    def __call__(self, t, u, p):
        return self.f(t, u, p)

    def __hash__(self):
        return id(self.f)

    def __eq__(self, other):
        return isinstance(other, ByIdentity) and other.f is self.f


class ModuleField(NamedTuple):
    """A callable pytree whose arrays were taken out."""

    structure: Any
    rest: tuple

    def __call__(self, t, u, p, *captured):
        arrays = iter(captured)
        leaves = [next(arrays) if kept is None else kept for kept in self.rest]
        return _shaped(jax.tree.unflatten(self.structure, leaves), t, u, p)


class Beside(NamedTuple):
    """A running cost beside a vector field; the first `own` captured arrays belong to `f`."""

    f: Any
    g: Any
    own: int

    def __call__(self, t, y, p, *captured):
        u, q = y
        return [self.f(t, u, p, *captured[: self.own]), 0.0 * q + self.g(t, u, p, *captured[self.own :])]


def _shaped(f, t, u, p):
    leaves = jax.tree.leaves(u)
    kind = leaves[0].dtype
    time_kind = kind if jnp.iscomplexobj(t) else jnp.finfo(kind).dtype
    out = f(jnp.asarray(t, time_kind), u, p)
    return jax.tree.map(lambda x: jnp.asarray(x, kind), out)


def hoisted(be, f, t, u, p):
    """`f` with the arrays that it captures as further arguments, and these arrays."""
    if isinstance(f, RunningField):
        (f, first), (g, second) = hoisted(be, f.f, t, u[0], p), hoisted(be, f.g, t, u[0], p)
        return Beside(f, g, len(first)), (*first, *second)
    leaves, structure = jax.tree.flatten(f)
    if not (len(leaves) == 1 and leaves[0] is f):
        captured = tuple(x for x in leaves if be.is_array(x) and be.is_float(x))
        rest = tuple(None if be.is_array(x) and be.is_float(x) else x for x in leaves)
        return ModuleField(structure, rest), captured
    if type(f).__hash__ is None:
        f = ByIdentity(f)
    once = all(be.is_array(x) for x in jax.tree.leaves(p))
    if trace_state_clean():
        return Closed(f, once), ()
    leaves, inside = jax.tree.flatten((t, u, p))
    arrays = [i for i, x in enumerate(leaves) if be.is_array(x)]

    def flat(*xs):
        full = list(leaves)
        for i, x in zip(arrays, xs, strict=True):
            full[i] = x
        return _shaped(f, *jax.tree.unflatten(inside, full))

    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*(leaves[i] for i in arrays))
    if not any(isinstance(c, jax.core.Tracer) for c in closed.consts):
        return Closed(f, once), ()
    traced = [isinstance(c, jax.core.Tracer) and be.is_float(c) for c in closed.consts]
    captured = tuple(c for c, on in zip(closed.consts, traced, strict=True) if on)
    fixed = [None if on else c for c, on in zip(closed.consts, traced, strict=True)]
    tree = jax.tree.structure(shape)

    def with_values(t, u, p, *values):
        given = jax.tree.leaves((t, u, p))
        rest = iter(values)
        consts = [next(rest) if c is None else c for c in fixed]
        out = jax.core.eval_jaxpr(closed.jaxpr, consts, *(given[i] for i in arrays))
        return jax.tree.unflatten(tree, out)

    return with_values, captured
