"""Budgets of memory inside compiled solves."""

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.checkpoint import advances, split

jax = pytest.importorskip("jax")
jnp = jax.numpy
pytest.importorskip("sensitivity_jax")

U0, P = jnp.array([1.0, 0.5]), jnp.array([1.5, 0.7])
TIMES = jnp.array([1.0, 0.2, 2.0, 0.7, 0.2])
FEW = sa.RecursiveCheckpointAdjoint(checkpoints=3)


def f(t, u, p):
    return jnp.stack([p[0] * u[1] + jnp.cos(p[1] * t), -u[0] * p[1] - t * u[1] * u[0]])


def loss(p, sensealg, u0=U0):
    sol = sa.solve(sa.ODEProblem(f, u0, (0.0, 2.0), p), sa.Tsit5(), saveat=TIMES, rtol=1e-8, max_steps=64,
                   sensealg=sensealg)
    return (sol.u**3).sum()


def test_vmapped_lanes_of_different_length():
    """Each lane has its own number of steps, its own states and its own schedule."""
    p = P * jnp.array([[1.0], [3.0], [0.3]])
    whole, few = (jax.jit(jax.vmap(jax.grad(lambda p, s=s: loss(p, s))))(p)
                  for s in (sa.RecursiveCheckpointAdjoint(), FEW))
    np.testing.assert_allclose(few, whole, rtol=1e-12)
    np.testing.assert_allclose(few[1], jax.jit(jax.grad(lambda p: loss(p, FEW)))(p[1]), rtol=1e-12)


def test_forward_mode_and_second_order():
    """Tangents through the steps taken once more; forward over reverse through the recomputation."""
    d = jnp.array([0.3, -1.0])
    tangent = jax.jit(lambda p: jax.jvp(lambda p: loss(p, FEW), (p,), (d,))[1])(P)
    gradient, curvature = jax.jit(lambda p: jax.jvp(jax.grad(lambda p: loss(p, FEW)), (p,), (d,)))(P)
    np.testing.assert_allclose(tangent, gradient @ d, rtol=1e-12)
    _, whole = jax.jit(lambda p: jax.jvp(jax.grad(lambda p: loss(p, sa.RecursiveCheckpointAdjoint())), (p,), (d,)))(P)
    np.testing.assert_allclose(curvature, whole, rtol=1e-11)


@pytest.mark.parametrize("slots", [1, 4])
def test_evaluations_are_those_of_theory(slots):
    """35 fixed steps: the reverse pass takes t(35, c) of them again, as on the backends that run eagerly."""
    r = sa.gradient(sa.ODEProblem(f, U0, (0.25, 2.0), P), sa.RK4(), dt=0.05, loss=lambda sol: (sol.u**2).sum(),
                    sensealg=sa.RecursiveCheckpointAdjoint(checkpoints=slots))
    assert r.stats.naccept == 35
    assert r.stats.nfe == 4 * (35 + advances(35, slots))
    assert r.stats.nvjp == 4 * 35


def test_split_is_the_one_of_the_schedule():
    from sensitivity_jax._checkpoints import _split

    steps, slots = np.meshgrid(np.r_[2:60, 1000, 4096, 99_999], np.r_[2:12, 40, 1000])
    slots = np.minimum(slots, steps)
    got = jax.vmap(_split)(jnp.asarray(steps.ravel(), jnp.int32), jnp.asarray(slots.ravel(), jnp.int32))
    assert got.tolist() == [split(int(a), int(b)) for a, b in zip(steps.ravel(), slots.ravel(), strict=True)]


def test_memory_is_respected():
    """What the compiled gradient needs beside its arguments and results, as XLA counts it."""
    n, steps = 2000, 1000

    def chain(t, u, p):
        return p[0] * jnp.roll(u, 1) - u + jnp.sin(t)

    def temporary(sensealg):
        def total(u0, p):
            prob = sa.ODEProblem(chain, u0, (0.0, 10.0), p)
            return sa.solve(prob, sa.Tsit5(), max_steps=steps, sensealg=sensealg).u.sum()

        compiled = jax.jit(jax.grad(total, (0, 1))).lower(jnp.linspace(-1.0, 1.0, n), jnp.array([0.9])).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(sa.RecursiveCheckpointAdjoint(memory="4MB")) < 4e6 + 16 * steps
    assert temporary(sa.RecursiveCheckpointAdjoint()) > 20e6
