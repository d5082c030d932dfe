"""Strong types for what loops carry."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun


def arrays(tree):
    """Python numbers to strongly typed arrays, so that loop carries keep their types."""

    def convert(x):
        if isinstance(x, bool):
            return jnp.array(x)
        if isinstance(x, int):
            return jnp.array(x, jnp.int32)
        if isinstance(x, float):
            return jnp.array(x, jnp.result_type(float))
        return lax.convert_element_type(x, x.dtype)

    return jax.tree.map(convert, tree)


def like(new, old):
    """`new` with the dtypes of `old`."""
    return jax.tree.map(lambda a, b: lax.convert_element_type(a, b.dtype), new, old)


class once:
    """A step function traced once; later calls evaluate its jaxpr."""

    def __init__(self, step, state):
        closed, self.shapes = jax.make_jaxpr(lambda s: _typed(step(s)), return_shape=True)(state)
        self.call = jaxpr_as_fun(closed)
        self.tree = jax.tree.structure(self.shapes)

    def __call__(self, state):
        return jax.tree.unflatten(self.tree, self.call(*jax.tree.leaves(state)))


def _typed(result):
    state, record, keep = result
    return arrays(state), arrays(record), jnp.asarray(keep, bool)
