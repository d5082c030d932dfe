"""Matrix products of the reverse pass on JAX in the form that XLA is fast at: the same numbers."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from sensitivity_jax._products import FIRST_AXES, by_rows  # noqa: E402

pytestmark = pytest.mark.usefixtures("jax_double")

SHAPES = {"wide": (5, 3, 7), "narrow": (5, 7, 3), "square": (4, 4, 4), "one row": (1, 3, 7)}


def layer(u, w):
    return jnp.tanh(jax.jit(jnp.matmul)(u, w)) * jnp.sum(w)


def slow(jaxpr):
    """How many products contract the first axes of two matrices."""
    count = sum(e.primitive.name == "dot_general" and e.params["dimension_numbers"] == FIRST_AXES for e in jaxpr.eqns)
    return count + sum(slow(e.params["jaxpr"].jaxpr) for e in jaxpr.eqns if e.primitive.name == "jit")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="products are left as they are")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_same_cotangents_without_slow_products(shape):
    batch, n, m = shape
    rng = np.random.default_rng(0)
    u, w, ct, d = (jnp.asarray(rng.normal(size=s)) for s in ((batch, n), (n, m), (batch, m), (n, m)))

    def pulls(w):
        pull = jax.vjp(layer, u, w)[1]
        return pull, by_rows(pull)

    plain, suited = pulls(w)
    assert slow(jax.make_jaxpr(plain)(ct).jaxpr) == 1
    assert slow(jax.make_jaxpr(suited)(ct).jaxpr) == 0
    for a, b in zip(plain(ct), suited(ct), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-13)
    along = [jax.jvp(lambda w, i=i: pulls(w)[i](ct)[1], (w,), (d,))[1] for i in (0, 1)]
    np.testing.assert_allclose(along[1], along[0], rtol=1e-12)
    lanes = jnp.stack([ct, 2.0 * ct])
    np.testing.assert_allclose(jax.vmap(suited)(lanes)[1], jax.vmap(plain)(lanes)[1], rtol=1e-13)
