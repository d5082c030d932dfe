"""Budgets with implicit and Rosenbrock methods: steps are taken again as they were, equations and all."""

import tracemalloc

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.algorithms.base import Tangents
from sensitivity.checkpoint import advances
from sensitivity.testing.harness import Harness

ALL = ("u0", "p", "t0", "t1", "saveat")
TIMES = [0.45, 0.3, 0.3, 0.12]
METHODS = {"Kvaerno3": (sa.Kvaerno3(), {"rtol": 1e-3}), "Rodas5P": (sa.Rodas5P(), {"rtol": 1e-4}),
           "Trapezoid": (sa.Trapezoid(), {"rtol": 1e-2}), "ImplicitEuler": (sa.ImplicitEuler(), {"dt": 0.05}),
           "ImplicitMidpoint": (sa.ImplicitMidpoint(), {"dt": 0.05})}
FIXED = {"controller": sa.FixedStep()}


def reaction(lab, constrained=False, calls=None):
    """Three species; `constrained` gives the last from a sum that moves."""
    xp, one = lab.xp, lab.array(1.0)

    def f(t, u, p):
        if calls is not None:
            calls.append(1)
        made = 5.0 * u[1] * u[2] - p[0] * u[0]
        rest = u[0] + u[1] + u[2] - p[2] * xp.cos(one * t) - 1.2 if constrained else u[1] ** 2 - p[2] * u[2]
        return xp.stack([made + xp.cos(p[1] * t), -made - 3.0 * u[1] ** 2, rest])

    return sa.ODEProblem(f, lab.array([1.0, 0.2, 0.3]), (0.05, 0.5), lab.array([0.5, 1.0, 0.3]),
                         mass_matrix=np.diag([1.0, 1.0, 0.0]) if constrained else None)


def loss(sol):
    return (sol.u ** 3).sum()


def both(lab, method, budget, at=TIMES, constrained=False):
    alg, options = METHODS[method]
    if "dt" in options:
        options = {**options, **FIXED}
    options = {**options, "saveat": lab.array(at) if isinstance(at, list) else at,
               "wrt": ALL if isinstance(at, list) else ALL[:4]}
    return [sa.gradient(reaction(lab, constrained), alg, loss=loss, sensealg=s, **options)
            for s in (sa.RecursiveCheckpointAdjoint(), sa.RecursiveCheckpointAdjoint(**budget))]


@pytest.mark.parametrize("constrained", [False, True], ids=["ode", "dae"])
@pytest.mark.parametrize("method", METHODS)
def test_numpy_gradient_is_the_same_to_the_last_bit(numpy_lab, method, constrained):
    if constrained and method == "ImplicitMidpoint":
        with pytest.raises(sa.UnsupportedCombination, match="singular mass matrix"):
            both(numpy_lab, method, {"checkpoints": 2}, None, constrained)
        return
    for budget, at in (({"checkpoints": 2}, TIMES), ({"memory": 6000}, 3), ({"spill": True}, "steps"),
                       ({"checkpoints": 1}, None)):
        whole, few = both(numpy_lab, method, budget, at, constrained)
        assert few.value == whole.value
        for name in ALL if at is TIMES else ALL[:4]:
            np.testing.assert_array_equal(getattr(few, name), getattr(whole, name), err_msg=f"{name} {budget}")
        assert few.stats.nvjp == whole.stats.nvjp
        if "memory" not in budget and whole.stats.naccept > 2:
            assert few.stats.nfe > whole.stats.nfe
            assert few.stats.nlu > whole.stats.nlu


@pytest.mark.parametrize("constrained", [False, True], ids=["ode", "dae"])
@pytest.mark.parametrize("method", ["Kvaerno3", "Rodas5P"])
def test_implicit_gradient_is_that_of_keeping_everything(lab, method, constrained):
    whole, few = both(lab, method, {"checkpoints": 2}, constrained=constrained)
    for name in ALL:
        np.testing.assert_allclose(lab.numpy(getattr(few, name)), lab.numpy(getattr(whole, name)), rtol=1e-13,
                                   atol=1e-14, err_msg=name)
    assert few.stats.nfe > whole.stats.nfe


@pytest.mark.parametrize("method", ["Kvaerno3", "Rodas5P"])
def test_tangents_are_the_transpose(numpy_lab, method):
    """`<reverse(ct), d> == <ct, tangent(d)>`, both through steps taken again."""
    h, (alg, options) = Harness("numpy"), METHODS[method]
    prob, wanted = reaction(numpy_lab, constrained=True), frozenset({"u0", "theta", "t0", "t1"})
    worker, run, x = h.prepared(prob, alg, sa.RecursiveCheckpointAdjoint(checkpoints=2, vjp=h.vjp()), saveat=3,
                                **options)
    rng = np.random.default_rng(0)
    with h.be.quiet():
        out, _, residuals = worker.forward(run, x, wanted)
        ct = rng.normal(size=(3, 3))
        bar = worker.reverse(run, residuals, out._replace(u=ct), wanted)
        d = Tangents(rng.normal(size=(1, 3)), (rng.normal(size=(1, 3)),), np.array([0.4]), np.array([0.7]), None)
        moved = worker.tangent(run, residuals, d)
    left = bar.u0 @ d.u0[0] + bar.theta[0] @ d.theta[0][0] + bar.t0 * 0.4 + bar.t1 * 0.7
    # The Rosenbrock transpose has second derivatives by central differences.
    np.testing.assert_allclose(left, (ct * moved[0]).sum(), rtol=1e-7 if method == "Rodas5P" else 1e-11)


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_counts_are_those_of_theory(numpy_lab, slots):
    """20 steps of known number: t(20, c) of them are taken again, with as many factorisations and iterations."""
    again = advances(20, slots)
    options = {"dt": 0.45 / 20, "loss": loss, "probe": "off", **FIXED}
    few = sa.RecursiveCheckpointAdjoint(checkpoints=slots, vjp=sa.ReverseVJP())
    r = sa.gradient(reaction(numpy_lab), sa.Rodas5P(), sensealg=few, **options)
    assert r.stats.naccept == 20
    assert r.stats.nfe == 8 * (20 + again)
    assert (r.stats.njac, r.stats.nlu, r.stats.nsolve) == (20 + again, 20 + again, 8 * (20 + again))
    # An iteration of a fixed step is one evaluation and one factorisation; a linear equation takes two, the second to
    # see that it is solved.
    prob = sa.ODEProblem(lambda t, u, p: -p * u, np.array([1.0]), (0.0, 0.45), np.array([0.7]))
    whole, r = (sa.gradient(prob, sa.ImplicitEuler(), sensealg=s, **options)
                for s in (sa.RecursiveCheckpointAdjoint(), few))
    assert (whole.stats.nfe, whole.stats.nlu) == (1 + 2 * 20, 2 * 20)
    assert r.stats.nfe - whole.stats.nfe == r.stats.nlu - whole.stats.nlu == 2 * again


def test_evaluations_are_counted(numpy_lab):
    """Steps taken again, with error control: a counter agrees."""
    def counted(sensealg):
        calls = []
        r = sa.gradient(reaction(numpy_lab, calls=calls).remake(jac=jac), sa.Kvaerno3(), loss=loss, rtol=1e-4,
                        probe="off", sensealg=sensealg)
        return r, len(calls)

    def jac(t, u, p):
        return np.array([[-p[0], 5.0 * u[2], 5.0 * u[1]], [p[0], -5.0 * u[2] - 6.0 * u[1], -5.0 * u[1]],
                         [0.0, 2.0 * u[1], -p[2]]])

    (whole, calls), (few, more) = (counted(sa.RecursiveCheckpointAdjoint(vjp=sa.ReverseVJP(), **budget))
                                   for budget in ({}, {"checkpoints": 2}))
    assert few.stats.nfe - whole.stats.nfe == more - calls > 0


def diffusion(n, sparse):
    """A ring of cells with a stiff exchange, its products and its Jacobian."""
    from scipy.sparse import csc_array

    i = np.arange(n)
    rows, columns = np.r_[i, i, i], np.r_[i, (i + 1) % n, (i - 1) % n]

    def exchange(u):
        return 100.0 * (np.roll(u, 1) - 2.0 * u + np.roll(u, -1))

    def vjp(t, u, p, lam):
        return p[0] * exchange(lam) - 3.0 * u**2 * lam, np.array([lam @ exchange(u)])

    def jac(t, u, p):
        values = np.r_[-200.0 * p[0] - 3.0 * u**2, np.full(2 * n, 100.0 * p[0])]
        J = csc_array((values, (rows, columns)), shape=(n, n))
        return J if sparse else J.toarray()

    return sa.ODEProblem(lambda t, u, p: p[0] * exchange(u) - u**3 + np.sin(t), np.sin(6.28 / n * i), (0.0, 1.0),
                         np.array([0.9]), vjp=vjp, jac=jac)


@pytest.mark.parametrize(("method", "n", "sparse", "budget"), [
    ("Rodas5P", 60, False, 1_000_000), ("Rodas5P", 1200, True, 4_000_000), ("Kvaerno3", 1200, True, 2_000_000)],
    ids=["dense", "SuperLU", "SuperLU-Kvaerno3"])
def test_memory_is_respected(method, n, sparse, budget):
    """The peak of all that NumPy and Python allocate, factors included: those of 100 steps are far more."""
    prob, peaks, grads, alg = diffusion(n, sparse), [], [], METHODS[method][0]
    options = {"loss": lambda sol: 0.0, "dloss": lambda sol: np.ones_like(sol.u), "dt": 0.01, **FIXED}
    for sensealg in (sa.RecursiveCheckpointAdjoint(memory=budget), sa.RecursiveCheckpointAdjoint()):
        sa.gradient(prob.remake(tspan=(0.0, 0.02)), alg, sensealg=sensealg, **options)
        tracemalloc.start()
        grads.append(sa.gradient(prob, alg, sensealg=sensealg, **options))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < budget < 2 * budget < peaks[1]
    # The factors of a step taken again are those that it was taken with; others are made anew.
    np.testing.assert_allclose(grads[0].u0, grads[1].u0, rtol=1e-12)
    np.testing.assert_allclose(grads[0].p, grads[1].p, rtol=1e-12)
    assert grads[0].stats.nlu > grads[1].stats.nlu


def test_memory_too_little_for_a_matrix():
    with pytest.raises(sa.InputError, match="too little for 60 unknowns"):
        sa.gradient(diffusion(60, False), sa.Rodas5P(), lambda sol: 0.0, dloss=lambda sol: sol.u, dt=0.1,
                    sensealg=sa.RecursiveCheckpointAdjoint(memory="100KB"), **FIXED)
