"""Matrix products of the reverse pass on JAX in the form that XLA is fast at: the same numbers."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from sensitivity_jax._backend import JaxBackend  # noqa: E402
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


def test_sums_of_cotangents_are_vectorised():
    """A loop's kernel that is nothing but a sum has no vector instructions; ours is a sum and a choice."""
    be = JaxBackend()
    shape = (30, 50)
    rng = np.random.default_rng(0)
    total, bar = (jnp.asarray(rng.normal(size=shape)) for _ in range(2))

    def many(add):
        return jax.jit(lambda total, bar: jax.lax.fori_loop(0, 7, lambda _, x: add(x, bar * x[0, 0]), total))

    def ours(total, bar):
        return be.add((total,), (bar,))[0]

    np.testing.assert_array_equal(many(ours)(total, bar), many(jnp.add)(total, bar))
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(ours(x, bar) ** 2))(total), 2.0 * (total + bar))
    np.testing.assert_array_equal(jax.vmap(ours, (None, 0))(total, jnp.stack([bar, total]))[1], 2.0 * total)
    if jax.default_backend() == "cpu":
        lone = "wrapped_add_computation"
        plain, chosen = (jax.jit(lambda total, bar, add=add: jax.lax.fori_loop(
            0, 7, lambda _, c: (add(*c), c[1]), (total, bar))).lower(total, bar).compile().as_text()
            for add in (jnp.add, ours))
        wide = f"-> f64[{shape[0]},{shape[1]}]"
        found = [any(lone in line and wide in line for line in text.splitlines()) for text in (plain, chosen)]
        if found[0]:  # else XLA has changed
            assert not found[1]
