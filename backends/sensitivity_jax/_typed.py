"""Strong types for what loops carry."""

import jax
import jax.numpy as jnp
from jax import lax


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
