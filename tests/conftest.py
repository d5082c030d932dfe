"""One small laboratory per backend: the namespace for `f`, arrays in, NumPy arrays out."""

import gc
import importlib
import os
import sys

os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from sensitivity.registry import registry

# Backend name -> where its users' functions live.
NAMESPACES = {"numpy": "autograd.numpy", "torch": "torch", "jax": "jax.numpy"}


class Lab:
    """What the tests need to speak one framework."""

    def __init__(self, name):
        self.name = name
        self.xp = importlib.import_module(NAMESPACES[name])
        self.be = registry().backend(name)

    def __repr__(self):
        return self.name

    def array(self, x, dtype="float64"):
        """An array of the framework."""
        if self.name == "torch":
            return self.xp.asarray(np.asarray(x), dtype=getattr(self.xp, dtype))
        return self.xp.array(x, dtype=dtype)

    def numpy(self, x):
        """A NumPy array of whatever the library gave."""
        return x.detach().numpy() if self.name == "torch" and hasattr(x, "detach") else np.asarray(x)

    def tree(self, x):
        """A pytree of NumPy arrays."""
        leaves, structure = self.be.flatten(x)
        return self.be.unflatten(structure, [self.numpy(v) if self.be.is_array(v) else v for v in leaves])

    def lotka_volterra(self, t1=10.0, dtype="float64"):
        import sensitivity as sa

        xp = self.xp

        def f(t, u, p):
            x, y = u[0], u[1]
            return xp.stack([p[0] * x - p[1] * x * y, -p[2] * y + p[3] * x * y])

        return sa.ODEProblem(f, self.array([1.0, 1.0], dtype), (0.0, t1), self.array([1.5, 1.0, 3.0, 1.0], dtype))


def available(name):
    return name in registry().backends and importlib.util.find_spec(NAMESPACES[name].split(".")[0]) is not None


@pytest.fixture(scope="session", params=sorted(NAMESPACES))
def lab(request):
    if not available(request.param):
        pytest.skip(f"the {request.param} backend is not there")
    return Lab(request.param)


@pytest.fixture(scope="session")
def numpy_lab():
    return Lab("numpy")


@pytest.fixture(scope="module")
def jax_double():
    """JAX with 64 bits, as the tests of a module want it, and as it was afterwards."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="session")
def torch_lab():
    if not available("torch"):
        pytest.skip("the torch backend is not there")
    return Lab("torch")


@pytest.fixture(scope="session")
def jax_lab():
    if not available("jax"):
        pytest.skip("the jax backend is not there")
    return Lab("jax")


# Compiling is what takes the time on JAX; one case of each kind stays among the quick tests.
SLOW_ON_JAX = (
    "divided_equation[jax-diagonal",
    "divided_equation[jax-one-sided",
    "test_equals_direct",
    "DirectAdjoint",
    "steps-adaptive",
    "ForwardSensitivity",
    "test_loss_of",
    "ForwardADSensitivity",
    "test_the_discrete_tangent_is",
    "test_dense_output_by_both",
    "BacksolveAdjoint",
    "GaussAdjoint",
    "QuadratureAdjoint",
    "test_residuals",
    "test_every_product",
    "test_times_are_differentiated",
    "test_dose_at",
    "test_state_at_a_terminal",
    "gauss",
    "quadrature",
    "backsolve",
    "tangents",
    "test_gradient_is_that_of_keeping_everything",
    "test_discrete_adjoint_is_exact",
    "test_stiff_problems",
    "jax-dae_",
    "test_constraints_hold",
    "test_outputs_between",
    "test_attached_to_the",
    "mixed-",
    "test_ten_thousand",
    "test_sizes",
    "test_around_the_switch",
    "test_in_every_framework[jax-Heun",
    "test_tangents_are_the_transpose",
    "test_solving_alone",
    "pathwise",
    "test_undone_steps",
    "are_the_transpose",
    "test_order_and_company",
    "test_forward_mode",
    "test_trees_and_batches",
    "test_dense_output[jax]",
    "test_continuous_gradients_are",
    "test_interpolating_within",
    "test_discrete_gradient_within",
    "test_single_precision_of_continuous",
    "test_backends_walk_back",
    "test_constraints_with_a_band",
    "test_a_pattern_that_is_no_band",
    "test_a_band_",
    "test_band_solvers[jax-",
    "test_the_model",
    "without_a_matrix",
    "test_ones_own",
    "test_exact_for_an_implicit",
    "test_exact_for_a_rosen",
    "test_ensembles_of_paths[jax-R",
    "test_gradients_of_ensembles",
    "test_exact_algorithms_agree_on",
    "test_backends_take_the_same_steps",
    "the_limit_of_an",
    "lag_by_stiff_methods",
    "in_a_running_cost",
    "test_sensitivities_on_the",
    "inside_f[jax-I",
    "inside_f[jax-b",
    "over_a_limit_cycle",
    "ensembles_of_shadows",
    "implicit_gradient_is_that",
    "event_gradient_is_that",
    "other_adjoints_inside",
)
QUICK_ON_JAX = (
    "ode_exp_decay",
    "None-Tsit5-fixed",
    "jax-Kvaerno3-times",
    "[jax-ImplicitEuler]",
    "mixed-1",
    "jax-501",
    "sde_nonlinear_2d_pathwise-StochasticHeun",
    "undone_steps[jax-ts]",
    "jax-diagonal-stratonovich-steps-InterpolatingAdjoint",
    "changes_nothing[jax-Kvaerno3]",
    "test_without_a_matrix[jax-Kvaerno3]",
    "ones_own[jax-pattern]",
    "limit_cycle[jax-NILSAS]",
    "solve[jax-AdjointLSS]",
    "keeping_everything[jax-Kvaerno3-dae]",
    "keeping_everything[jax-bounces]",
    "other_adjoints_inside[jax-Q",
)


def pytest_runtest_teardown(item, nextitem):
    """Compiled programs hold memory mappings, of which a process may have 65,530 only: let go of them in time."""
    del item, nextitem
    if "jax" in sys.modules and mappings() > 20_000:
        sys.modules["jax"].clear_caches()
        gc.collect()


def mappings():
    """How many memory mappings this process has; 0 where that cannot be told."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return 0


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "callspec", None) is None or "lab" not in item.callspec.params:
            continue
        if item.callspec.params["lab"] != "jax" or any(word in item.name for word in QUICK_ON_JAX):
            continue
        if any(word in item.name for word in SLOW_ON_JAX):
            item.add_marker(pytest.mark.slow)
