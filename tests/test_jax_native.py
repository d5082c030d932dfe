"""Small loops as one native function on JAX: the numbers of ordinary loops, and only where that is known to work."""

from itertools import pairwise

import numpy as np
import pytest

import sensitivity as sa

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from sensitivity_jax import _native  # noqa: E402

pytestmark = pytest.mark.usefixtures("jax_double")

ATTRIBUTE = "xla_cpu_small_call"
LOOPS = 4  # over the steps and over the save times, forward and reverse
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
    assert loops == LOOPS
    monkeypatch.setattr(_native, "TESTED", False)
    call, args = gradient(renewed(f))
    plain, loops = compiled(call, *args)
    assert loops == 0
    np.testing.assert_allclose(native, plain, rtol=1e-12)


ACTIVATIONS = jnp.tanh, jax.nn.relu, jax.nn.softplus, jax.nn.silu, jax.nn.gelu, jax.nn.softmax


def network(t, u, p):
    *hidden, last = p
    for activation, (w, b) in zip(ACTIVATIONS, hidden, strict=True):
        u = activation(u @ w + b)
    return u @ last[0] + last[1]


@here
@pytest.mark.parametrize("shape", [(3,), (1, 3)], ids=["vector", "row"])
def test_networks(shape, monkeypatch):
    rng = np.random.default_rng(0)
    sizes = (3, 70, 50, 5, 5, 5, 5, 3)
    p = [(jnp.asarray(rng.normal(size=(n, m)) / n**0.5), jnp.asarray(rng.normal(size=m)))
         for n, m in pairwise(sizes)]
    u0 = jnp.asarray(rng.normal(size=shape))
    assert p[1][0].size > _native.SUMS

    def loss(p, u0, f=network):
        return jnp.sum(sa.solve(sa.ODEProblem(f, u0, (0.0, 0.5), p), sa.Tsit5(), rtol=1e-4, atol=1e-4,
                                saveat=[0.1, 0.25], sensealg=sa.RecursiveCheckpointAdjoint()).u ** 2)

    native, loops = compiled(jax.grad(loss, (0, 1)), p, u0)
    assert loops == LOOPS
    monkeypatch.setattr(_native, "TESTED", False)
    plain, loops = compiled(jax.grad(lambda p, u0: loss(p, u0, renewed(network)), (0, 1)), p, u0)
    assert loops == 0
    np.testing.assert_allclose(native, plain, rtol=1e-11, atol=1e-12)


@here
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_matrices(dtype):
    n = int(_native.NUMBERS**0.5)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(n, n)) / n, dtype)

    def sweep(w):
        def step(_, carry):
            w, u = carry
            return w + 0.1 * jnp.outer(u, jnp.tanh(u @ w)) + w.T, jnp.tanh(w @ u)

        return jax.lax.fori_loop(0, 3, step, (w, w[0]))

    native, loops = compiled(lambda w: _native.native(lambda: sweep(w)), w)
    assert loops == 1
    plain, loops = compiled(sweep, w)
    assert loops == 0
    np.testing.assert_allclose(native, plain, rtol=1e-4 if dtype == "float32" else 1e-11, atol=1e-9)


@here
def test_long_products_of_vectors():
    def solved(n):
        w = jnp.full((n,), 1.0 / n)

        def f(t, u, p):
            return -p * jnp.dot(w, jnp.concatenate([u, jnp.zeros(n - 1)])) * u

        def loss(p):
            return sa.solve(sa.ODEProblem(f, jnp.ones(1), (0.0, 1.0), p), sa.Euler(), dt=0.25,
                            controller=sa.FixedStep(), sensealg=sa.RecursiveCheckpointAdjoint()).u[0, 0]

        (slope,), loops = compiled(jax.grad(loss), jnp.asarray(float(n)))
        return slope, loops

    few, one = solved(_native.SUMS)
    many, none = solved(_native.SUMS + 1)
    assert one > 0
    assert none == 0
    np.testing.assert_allclose(few * _native.SUMS, many * (_native.SUMS + 1), rtol=1e-12)


@here
def test_networks_in_lanes_and_second_derivatives():
    rng = np.random.default_rng(0)
    w, u0 = jnp.asarray(rng.normal(size=(50, 50)) / 7.0), jnp.asarray(rng.normal(size=50))

    def loss(a):
        prob = sa.ODEProblem(lambda t, u, a: a * jnp.tanh(u @ w), u0, (0.0, 1.0), a)
        return jnp.sum(sa.solve(prob, sa.Heun(), dt=0.1, controller=sa.FixedStep(), saveat=[0.35, 1.0],
                                sensealg=sa.RecursiveCheckpointAdjoint()).u ** 2)

    slope = jax.jit(jax.grad(loss))
    points = jnp.array([0.4, 0.9])
    assert slope.lower(points[0]).as_text().count(ATTRIBUTE) == LOOPS
    np.testing.assert_allclose(jax.vmap(slope)(points), [slope(a) for a in points], rtol=1e-12)
    h = 1e-5
    centred = (slope(points[0] + h) - slope(points[0] - h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(slope))(points[0]), centred, rtol=1e-8)


@here
def test_single_precision(monkeypatch):
    call, args = gradient(FIELDS["powers"], jnp.float32)
    native, loops = compiled(call, *args)
    assert loops == LOOPS
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
    "matrix": lambda t, u, p: -p * jnp.mean(jnp.ones((2, 3)) * u @ jnp.ones((3, 3)), 0),
    "scatter": lambda t, u, p: -p * jnp.zeros(3).at[jnp.array([1, 2, 0])].set(u[jnp.array([2, 0, 1])]),
    "solve": lambda t, u, p: -p * jnp.linalg.solve(jnp.eye(3) + 0.1, u),
    "callback": lambda t, u, p: -p * u + 0.0 * jax.lax.stop_gradient(
        jax.pure_callback(np.asarray, u, jax.lax.stop_gradient(u), vmap_method="sequential")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operations_stay_in_ordinary_loops(name):
    call, args = gradient(OTHERS[name])
    assert ATTRIBUTE not in jax.jit(call).lower(*args).as_text()


def test_long_bodies_stay_in_ordinary_loops():
    """The reverse pass of a reversible pair writes its stages out."""
    def call(method):
        prob = sa.ODEProblem(lambda t, u, p: -p * u, jnp.ones(2), (0.0, 0.3), 0.7)
        return jax.jit(jax.grad(lambda p: sa.solve(prob.remake(p=p), method, dt=0.1, controller=sa.FixedStep(),
                                                   sensealg=sa.ReversibleAdjoint()).u.sum()))
    short, long = (call(method).lower(0.7).as_text().count(ATTRIBUTE) for method in (sa.Heun(), sa.Dopri8()))
    assert (short, long) == (2, 1)


def test_lengths_of_bodies():
    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda i, y: jax.jit(lambda z: jnp.sin(z) + jnp.cos(z) * 2.0)(y), x)

    inner = jax.make_jaxpr(lambda z: jnp.sin(z) + jnp.cos(z) * 2.0)(1.0).jaxpr
    assert _native.longest(inner) == 4
    assert 4 < _native.longest(jax.make_jaxpr(looped)(1.0).jaxpr) <= 8
    assert _native.longest(jax.make_jaxpr(lambda x: looped(looped(x)))(1.0).jaxpr) <= 8


def test_many_numbers_stay_in_ordinary_loops():
    for f, most in ((lambda u: jnp.sum(u), _native.SUMS), (lambda u: u * u, _native.NUMBERS)):
        assert _native.known(jax.make_jaxpr(f)(jnp.ones(most)).jaxpr)
        assert not _native.known(jax.make_jaxpr(f)(jnp.ones(most + 1)).jaxpr)


def test_products_of_matrices_stay_in_ordinary_loops():
    def known(f, *shapes):
        return _native.known(jax.make_jaxpr(f)(*(jnp.ones(s) for s in shapes)).jaxpr)

    assert known(jnp.matmul, (3,), (3, 4))
    assert known(jnp.matmul, (1, 3), (3, 4))
    assert known(jnp.matmul, (3, 4), (4, 1))
    assert not known(jnp.matmul, (2, 3), (3, 4))
    assert not known(jnp.matmul, (2, 1, 1), (2, 1, 4))
    assert known(jnp.dot, _native.SUMS, _native.SUMS)
    assert not known(jnp.dot, _native.SUMS + 1, _native.SUMS + 1)
    for kind in (int, complex, jnp.bfloat16):
        assert not _native.known(jax.make_jaxpr(jnp.dot)(jnp.ones(3, kind), jnp.ones((3, 4), kind)).jaxpr)


def test_what_is_computed_in_vain_does_not_count():
    def f(u):
        sums = jnp.cumsum(jnp.sort(u))
        return jax.lax.scan(lambda v, x: (v + (x, sums * x)[0], 0), jnp.sin(u), u)[0]

    def spoken(u):
        jax.debug.callback(print, u[0])
        return jnp.sin(u)

    assert _native.known(jax.make_jaxpr(f)(jnp.ones(3)).jaxpr)
    assert not _native.known(jax.make_jaxpr(spoken)(jnp.ones(3)).jaxpr)


@here
def test_a_state_of_many_entries(monkeypatch):
    """As many as sums may have, with stages of eight times as many."""
    def f(t, u, p):
        return -p * u * (1.0 + 0.1 * jnp.roll(u, 1))

    def loss(p):
        u0 = jnp.cos(jnp.arange(float(_native.SUMS)))
        prob = sa.ODEProblem(f, u0, (0.0, 0.3), p)
        return jnp.sum(sa.solve(prob, sa.Tsit5(), sensealg=sa.RecursiveCheckpointAdjoint(), rtol=1e-4).u ** 2)

    native, loops = compiled(jax.grad(loss), jnp.asarray(0.3))
    assert loops == 2
    monkeypatch.setattr(_native, "TESTED", False)
    f = renewed(f)
    plain, _ = compiled(jax.grad(loss), jnp.asarray(0.3))
    np.testing.assert_allclose(native, plain, rtol=1e-12)


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
