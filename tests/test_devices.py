"""Arrays stay on their device, or go where `device=` says; a path is the same everywhere."""

import os
import subprocess
import sys

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.testing import models

TWO_PROCESSORS = """
import jax
import jax.numpy as jnp
import numpy as np

import sensitivity as sa
from sensitivity.testing import models

jax.config.update("jax_enable_x64", True)
first, second = jax.devices()
ode = models.lotka_volterra(jnp).remake(tspan=(0.0, 0.5))
sde = sa.SDEProblem(lambda t, u, p: p[0] * u, lambda t, u, p: p[1] * jnp.sin(u), jnp.array([1.0, 2.0]),
                    (0.0, 0.5), jnp.array([-0.5, 0.3]), key=3)
CASES = (ode, sa.Tsit5(), {"saveat": jnp.array([0.1, 0.4])}), (sde, sa.EulerMaruyama(), {"dt": 0.1})
for prob, alg, options in CASES:
    seen = []
    for device in (first, second):
        here = prob.remake(u0=jax.device_put(prob.u0, device), p=jax.device_put(prob.p, device))
        r = sa.gradient(here, alg, lambda sol: (sol.u**2).sum(), **options)
        results = (r.solution.u, r.solution.t, r.value, r.u0, r.p)
        assert all(x.devices() == {device} for x in results)
        seen.append([np.asarray(x) for x in results])
    for a, b in zip(*seen):
        np.testing.assert_array_equal(a, b)
for device in (second, "cpu:1"):
    assert sa.solve(ode, sa.Tsit5(), device=device).u.devices() == {second}
try:
    sa.solve(ode, sa.Tsit5(), device="cuda:7")
except sa.InputError as e:
    assert "device='cuda:7' cannot be used with jax" in str(e)
else:
    raise AssertionError("a device that is not there was accepted")
"""


def test_two_processors_on_jax():
    """In a process with two of them: results stay where the arrays are, and are equal to the last bit."""
    pytest.importorskip("jax")
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", TWO_PROCESSORS], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_device_that_is_not_there(lab):
    prob = models.lotka_volterra(lab.xp).remake(tspan=(0.0, 0.1))
    with pytest.raises(sa.InputError, match=f"device='nowhere' cannot be used with {lab.name}"):
        sa.solve(prob, sa.Tsit5(), device="nowhere")


def test_the_processor_by_name(lab):
    prob = models.lotka_volterra(lab.xp).remake(tspan=(0.0, 0.1))
    there, here = (sa.solve(prob, sa.Tsit5(), **where).u for where in ({"device": "cpu"}, {}))
    np.testing.assert_array_equal(lab.numpy(there), lab.numpy(here))


def gpu(name):
    """Arrays of a framework on its first GPU, or a skipped test."""
    if name == "torch":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch sees no GPU here")
        return torch, lambda x: torch.tensor(x, device="cuda")
    jax = pytest.importorskip("jax")
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("JAX sees no GPU here")
    return jax.numpy, lambda x: jax.device_put(jax.numpy.asarray(x), device)


@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_a_gpu_agrees_with_the_processor(name, kind):
    """Solutions, gradients and paths, to round-off of the functions that a path is made with."""
    xp, array = gpu(name)
    if kind == "ode":
        prob = sa.ODEProblem(lambda t, u, p: p[0] * xp.sin(u) + p[1], None, (0.0, 1.0))
    else:
        prob = sa.SDEProblem(lambda t, u, p: p[0] * u, lambda t, u, p: p[1] * u, None, (0.0, 1.0), key=3)
    steps = {"dt": 0.1} if kind == "sde" else {"rtol": 1e-8}
    seen = []
    for put in (xp.asarray, array):
        here = prob.remake(u0=put([1.0, 2.0]), p=put([-0.5, 0.3]))
        r = sa.gradient(here, None, lambda sol: (sol.u**2).sum(), saveat=5, **steps)
        seen.append([np.asarray(x.cpu() if hasattr(x, "cpu") else x) for x in (r.solution.u, r.u0, r.p)])
    for one, other in zip(*seen, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-11)
