"""Small loops as one native function on JAX: the numbers of ordinary loops, and only where that is known to work."""

import numpy as np
import pytest

import sensitivity as sa

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from sensitivity_jax import _native  # noqa: E402

pytestmark = pytest.mark.usefixtures("jax_double")

ATTRIBUTE = "xla_cpu_small_call"
FIELDS = {
    "powers": lambda t, u, p: (-p * jnp.sqrt(u) * u**1.3 + u**3 - u**-2 + jnp.cbrt(u) - u ** u[::-1]
                               + jnp.exp(-u) * jnp.log(u + t) + jnp.expm1(-u) - jnp.log1p(u) - jnp.exp2(-u) * u**2),
    "angles": lambda t, u, p: (p * jnp.sin(u) * jnp.cos(t * u) - jnp.tan(0.3 * u) + jnp.tanh(u) - jnp.arctan(u)
                               - jnp.arctan2(u, u[::-1]) + jnp.sinh(-u) / jnp.cosh(u) - jnp.arcsinh(u)
                               + jnp.arcsin(u / 9) * jnp.arccos(u / 9) - jnp.arctanh(u / 9)),
    "pieces": lambda t, u, p: (jnp.where(u > 1.0, -p * u, u) - jnp.clip(u, 0.0, 1.0) - jnp.abs(u) * jnp.sign(u - t)
                               + jnp.maximum(u, 1.2) * jnp.minimum(u, 1.3) - u * jnp.floor(u) - u % 0.7 - jnp.round(u)
                               + jnp.where(jnp.isfinite(u) & (u > 0.0), -u, u)),
    "shapes": lambda t, u, p: (-p * jnp.roll(u, 1) + jnp.concatenate([u[1:], u[:1]]) - jnp.sum(u) * u + u * jnp.prod(u)
                               + jnp.stack([u[2], -u[0], u[1]]) - jnp.max(u) - jnp.pad(u, 1)[:-2]
                               - (u[:, None] * u[None, :]).sum(1) * jnp.arange(3.0)),
}


def gradient(f, dtype=jnp.float64, **options):
    u0, p = jnp.array([1.1, 1.5, 0.8], dtype), jnp.asarray(0.3, dtype)

    def loss(u0, p):
        options.setdefault("saveat", [0.1, 0.25])
        return jnp.sum(sa.solve(sa.ODEProblem(f, u0, (0.0, 0.3), p), sa.Tsit5(), rtol=1e-4, atol=1e-4,
                                sensealg=sa.RecursiveCheckpointAdjoint(), **options).u ** 2)

    return jax.grad(loss, (0, 1)), (u0, p)


def compiled(f, *args):
    """The values of a function, and how many loops became one function."""
    lowered = jax.jit(f).lower(*args)
    out = lowered.compile()(*args)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(out)]), lowered.as_text().count(ATTRIBUTE)


def renewed(f):
    """Another function that does the same, so that nothing compiled for the first serves it."""
    return lambda t, u, p: f(t, u, p)


here = pytest.mark.skipif(not _native.TESTED, reason="loops are ordinary ones with this jaxlib or processor")


@here
@pytest.mark.parametrize("name", FIELDS)
def test_known_operations(name, monkeypatch):
    f = FIELDS[name]
    call, args = gradient(f)
    native, loops = compiled(call, *args)
    assert loops == 2
    monkeypatch.setattr(_native, "TESTED", False)
    call, args = gradient(renewed(f))
    plain, loops = compiled(call, *args)
    assert loops == 0
    np.testing.assert_allclose(native, plain, rtol=1e-12)


@here
def test_single_precision(monkeypatch):
    call, args = gradient(FIELDS["powers"], jnp.float32)
    native, loops = compiled(call, *args)
    assert loops == 2
    monkeypatch.setattr(_native, "TESTED", False)
    plain, _ = compiled(gradient(renewed(FIELDS["powers"]), jnp.float32)[0], *args)
    np.testing.assert_allclose(native, plain, rtol=1e-5)  # a few units in the last place, over 20 steps


@here
def test_what_a_field_does_not_use():
    def loss(u0, p):
        return sa.solve(sa.ODEProblem(lambda t, u, p: -u, u0, (0.0, 1.0), p), sa.Tsit5(), rtol=1e-9, atol=1e-9,
                        sensealg=sa.RecursiveCheckpointAdjoint()).u[0, 0]

    values, loops = compiled(jax.grad(loss, (0, 1)), jnp.ones(1), jnp.ones(1))
    assert loops == 2
    np.testing.assert_allclose(values, [np.exp(-1.0), 0.0], rtol=1e-8)


OTHERS = {
    "matrix": lambda t, u, p: -p * jnp.ones((3, 3)) @ u,
    "scatter": lambda t, u, p: -p * u[jnp.array([1, 2, 0])],
    "solve": lambda t, u, p: -p * jnp.linalg.solve(jnp.eye(3) + 0.1, u),
    "callback": lambda t, u, p: -p * u + 0.0 * jax.lax.stop_gradient(
        jax.pure_callback(np.asarray, u, jax.lax.stop_gradient(u), vmap_method="sequential")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operations_stay_in_ordinary_loops(name):
    call, args = gradient(OTHERS[name])
    assert ATTRIBUTE not in jax.jit(call).lower(*args).as_text()


def test_many_numbers_stay_in_ordinary_loops():
    few = jax.make_jaxpr(lambda u: jnp.sum(u * u))(jnp.ones(_native.NUMBERS))
    many = jax.make_jaxpr(lambda u: jnp.sum(u * u))(jnp.ones(_native.NUMBERS + 1))
    assert _native.known(few.jaxpr)
    assert not _native.known(many.jaxpr)


def test_lanes_and_second_derivatives():
    def f(t, u, p):
        return jnp.stack([-p * u[0] * u[1], u[0] - u[1], -u[2] * u[1] * u[1]])

    call, (u0, p) = gradient(f)
    rates = jnp.array([0.2, 0.3, 0.5])
    lanes, loops = compiled(jax.vmap(jax.jit(call), (None, 0)), u0, rates)
    assert loops == 0
    one = jax.jit(call)
    alone = [one(u0, rate) for rate in rates]
    np.testing.assert_allclose(lanes, np.concatenate([np.ravel(jnp.stack(x)) for x in zip(*alone, strict=True)]),
                               rtol=1e-12)
    h = 1e-5
    second = jax.jit(jax.jacfwd(lambda p: call(u0, p)[1]))(p)
    centred = (one(u0, p + h)[1] - one(u0, p - h)[1]) / (2 * h)
    np.testing.assert_allclose(second, centred, rtol=1e-5)  # steps are frozen in one and chosen anew in the other
