"""What must know about `vmap`: a loop over several lanes ends when all are done, and finished lanes stand still.

Alone, a lane needs no masks: `active` is constant True and `any_lane` the identity. Under `vmap` the custom
batching rules put the masks in, while loop counters and write positions stay common to all lanes, so that a record
is written by one slice update and not by a scatter over whole buffers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap


@custom_vmap
def any_lane(x):
    """Whether any lane says so; the same for all lanes."""
    return x


@any_lane.def_vmap
def _(axis_size, in_batched, x):
    del axis_size
    return (any_lane(jnp.any(x, axis=0)) if in_batched[0] else any_lane(x)), False


@custom_vmap
def active(x):
    """`x` as a mask where lanes differ; True for a lane alone, whose loop would have ended."""
    return jnp.ones_like(x)


@active.def_vmap
def _(axis_size, in_batched, x):
    del axis_size
    return x, in_batched[0]


def select(mask, new, old):
    """Leaves of `new` where the scalar `mask` holds, else of `old`."""
    return jax.tree.map(lambda a, b: lax.select(jnp.broadcast_to(mask, jnp.shape(a)), a, b), new, old)


def in_lanes(x):
    """Whether `vmap` is known to hold several of these; inside a `jit` it holds, it cannot be told."""
    sizes = []

    @custom_vmap
    def look(x):
        return x

    @look.def_vmap
    def _(axis_size, in_batched, x):
        sizes.append(axis_size)
        return x, in_batched[0]

    if isinstance(x, jax.core.Tracer):
        look(lax.stop_gradient(x))
    return bool(sizes)
