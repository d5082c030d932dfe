"""One primitive: a linear map that knows its transpose.

`custom_jvp` gives a solve its tangent; for reverse mode JAX must transpose that tangent, and `linear_p` says how.
So `jvp`, `vjp`, `vmap` and their nestings all work on one solve, and a transposed solve can be pushed forward again.
A map object provides `apply(*flat)` on residuals followed by tangents, `transpose(*residuals, *cotangents)`,
`residuals` (how many) and `out(avals)`; it is hashable.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

linear_p = Primitive("sensitivity_linear")
linear_p.multiple_results = True


class Batched(NamedTuple):
    """A map over a leading axis of some residuals and of all tangents."""

    inner: Any
    size: int
    mapped: tuple

    @property
    def residuals(self):
        return self.inner.residuals

    def apply(self, *flat):
        return jax.vmap(self.inner.apply, self.mapped, 0, axis_size=self.size)(*flat)

    def transpose(self, *flat):
        axes = (*self.mapped[: self.residuals], *(0,) * (len(flat) - self.residuals))
        return jax.vmap(self.inner.transpose, axes, 0, axis_size=self.size)(*flat)

    def out(self):
        return tuple(jax.ShapeDtypeStruct((self.size, *x.shape), x.dtype) for x in self.inner.out())

    def __hash__(self):
        return hash((self.inner, self.size, self.mapped))


@partial(jax.jit, static_argnums=0)
def _apply(map_, *flat):
    return map_.apply(*flat)


@partial(jax.jit, static_argnums=0)
def _transpose(map_, *flat):
    return map_.transpose(*flat)


def linear(map_, *flat):
    """Bind the primitive."""
    return linear_p.bind(*flat, map_=map_)


@linear_p.def_impl
def _(*flat, map_):
    return _apply(map_, *flat)


@linear_p.def_abstract_eval
def _(*avals, map_):
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in map_.out()]


mlir.register_lowering(
    linear_p, mlir.lower_fun(lambda *flat, map_: list(map_.apply(*flat)), multiple_results=True))


def _jvp(primals, tangents, *, map_):
    out = linear_p.bind(*primals, map_=map_)
    k = map_.residuals
    if all(type(t) is ad.Zero for t in tangents[:k]):
        moved = [ad.instantiate_zeros(t) for t in tangents[k:]]
        return out, linear_p.bind(*primals[:k], *moved, map_=map_)
    dots = [jnp.zeros(p.shape, jax.dtypes.float0) if type(t) is ad.Zero and not _inexact(p) else ad.instantiate_zeros(t)
            for p, t in zip(primals, tangents, strict=True)]
    return out, jax.jvp(lambda *flat: list(_apply(map_, *flat)), primals, tuple(dots))[1]


def _inexact(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _transpose_rule(cts, *flat, map_):
    k = map_.residuals
    cts = [ad.instantiate_zeros(ct) for ct in cts]
    bars = _transpose(map_, *flat[:k], *cts)
    return [None] * k + list(bars)


def _batch(args, dims, *, map_):
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    k = map_.residuals
    moved, mapped = [], []
    for i, (x, d) in enumerate(zip(args, dims, strict=True)):
        if d is not None:
            x = jnp.moveaxis(x, d, 0)
        elif i >= k:
            x = jnp.broadcast_to(x, (size, *x.shape))
        moved.append(x)
        mapped.append(None if d is None and i < k else 0)
    out = linear_p.bind(*moved, map_=Batched(map_, size, tuple(mapped)))
    return out, [0] * len(out)


ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose_rule
batching.primitive_batchers[linear_p] = _batch
