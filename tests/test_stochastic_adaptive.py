"""Adaptive steps on a path: errors that follow the tolerance, and gradients exact for the steps that were taken."""

import importlib
from itertools import pairwise

import numpy as np
import pytest
from stochastic_problems import TIMES, answer, nonlinear, weighted

import sensitivity as sa

ADAPTIVE = {"controller": sa.PIController()}


def halved(f, g, u, W, ts):
    """Heun's method with two half steps between any two of `ts`, independently of the library; `W(t)` is the path."""
    rows = [u]
    for t0, t1 in pairwise(ts):
        h = 0.5 * (t1 - t0)
        for t in (t0, t0 + h):
            dW = W(t + h) - W(t)
            k1 = f(t, u) * h + g(t, u) @ dW
            k2 = f(t + h, u + k1) * h + g(t + h, u + k1) @ dW
            u = u + 0.5 * (k1 + k2)
        rows.append(u)
    return rows


def bare(prob, p):
    """Drift and diffusion of `nonlinear`'s general problem in plain NumPy, complex numbers included."""
    del prob

    def f(t, u):
        x, y = u
        return np.array([y - p["a"] * x**3 + 0.1 * np.sin(t), -x - p["b"] * y])

    def g(t, u):
        (x, y), s = u, p["s"]
        return np.array([[s[0] * np.cos(y), s[1] * x * y, 0.2], [s[1] * x, 0.1 * y, s[0] * x * x]])

    return f, g


def test_the_gradient_is_that_of_the_steps(lab):
    """A loss of all nodes, differentiated by complex steps through an implementation of its own on the mesh taken."""
    prob = nonlinear(lab, "general", "stratonovich")
    tree = sa.VirtualBrownianTree(8, (0.0, 0.6), 0.6 * 2.0**-14)
    prob = prob.remake(brownian=tree)
    options = {"rtol": 3e-2, "atol": 3e-2, "dt": 0.3, "max_steps": 64} | ADAPTIVE
    sol = sa.solve(prob, sa.StochasticHeun(), saveat="steps", **options)
    ts = [0.0, *lab.numpy(sol.t)]
    assert int(sol.stats.nreject) >= 1
    assert len(ts) - 1 == int(sol.stats.naccept)

    def W(t):
        return tree(np.array([t]), 3)[0]

    def end(p, u):
        return halved(*bare(prob, p), u, W, ts)

    p = {"a": 0.5, "b": 0.3, "s": np.array([0.6, 0.4])}
    u0 = np.array([0.8, -0.4])
    np.testing.assert_allclose(lab.numpy(sol.u), np.real(end(p, u0)[1:]), rtol=1e-11)

    def slope(**moved):
        return np.imag(np.sum(end(p | moved, moved.pop("u0", u0) if "u0" in moved else u0)[-1] ** 2)) / 1e-30

    r = sa.gradient(prob, sa.StochasticHeun(), lambda sol: (sol.u**2).sum(), **options)
    unit = 1e-30j * np.eye(2)
    exact = [slope(a=0.5 + 1e-30j), slope(b=0.3 + 1e-30j), slope(s=p["s"] + unit[0]), slope(s=p["s"] + unit[1]),
             *(slope(u0=u0 + unit[i]) for i in range(2))]
    got = [float(r.p["a"]), float(r.p["b"]), *lab.numpy(r.p["s"]), *lab.numpy(r.u0)]
    np.testing.assert_allclose(got, exact, rtol=1e-10)
    attempts = int(sol.stats.naccept) + int(sol.stats.nreject)
    assert (int(r.stats.nfe), int(r.stats.nvjp)) == (6 * attempts, 4 * int(sol.stats.naccept))


@pytest.mark.parametrize("sensealg", [sa.ForwardADSensitivity(), sa.RecursiveCheckpointAdjoint(checkpoints=2),
                                      sa.DirectAdjoint()], ids=lambda a: a.name)
def test_exact_algorithms_agree_on_adaptive_steps(lab, sensealg):
    prob = nonlinear(lab, "diagonal", "stratonovich")

    def gradient(sensealg):
        r = sa.gradient(prob, sa.StochasticHeun(), weighted(lab, lab.xp), saveat=lab.array(TIMES), rtol=1e-2, atol=1e-2,
                        sensealg=sensealg, max_steps=64, **ADAPTIVE)
        return np.array([*lab.numpy(r.u0), float(r.p["a"]), *lab.numpy(r.p["s"])])

    np.testing.assert_allclose(gradient(sensealg), gradient(sa.RecursiveCheckpointAdjoint()), rtol=1e-11,
                               atol=1e-12)


def test_errors_follow_the_tolerance():
    """`X = arctan(p W + tan x)` on 12 paths: the error of a step is of order 3/2 and that of the solve of order 1, so a
    tolerance 100 times smaller makes it 100^(2/3) = 22 times smaller; half of that is asked for. With a path drawn anew
    after a rejection, or with rejections that change its law, no such limit would be found."""
    anp = pytest.importorskip("autograd.numpy")
    p, x0 = 0.8, 0.3
    rms, rejected = [], 0
    for tol in (1e-2, 1e-4):
        errors = []
        for key in range(12):
            path = sa.VirtualBrownianTree(key, (0.0, 1.0), 2.0**-16)
            prob = sa.SDEProblem(lambda t, u, p: 0.0 * u, lambda t, u, p: p * anp.cos(u) ** 2, np.array([x0]),
                                 (0.0, 1.0), np.array(p), interpretation="stratonovich", brownian=path)
            W = path(np.array([1.0]))[0]
            X = np.arctan(p * W + np.tan(x0))
            for sensealg in (sa.auto, sa.InterpolatingAdjoint()):
                r = sa.gradient(prob, sa.StochasticHeun(), lambda sol: anp.sum(sol.u), rtol=tol, atol=tol,
                                sensealg=sensealg, **ADAPTIVE)
                errors.append([float(r.value) - X[0], float(r.p) - (W * np.cos(X) ** 2)[0]])
            rejected += r.stats.nreject
        rms.append(np.sqrt(np.mean(np.square(errors), axis=0)))
    assert rejected > 100
    assert np.all(rms[1] < rms[0] / 11.0)


def test_backends_take_the_same_steps(lab):
    """Adaptive steps without a first one, on the path of a key alone.

    Step sizes differ by round-off, and a path of Brownian motion by the root of that.
    """
    if importlib.util.find_spec("autograd") is None:
        pytest.skip("the vector field is written for autograd's NumPy")
    options = {"rtol": 1e-2, "atol": 1e-2, "saveat": 4, "max_steps": 64} | ADAPTIVE
    here = sa.solve(nonlinear(type(lab)("numpy"), "diagonal", "stratonovich"), sa.StochasticHeun(), **options)
    sol = sa.solve(nonlinear(lab, "diagonal", "stratonovich"), sa.StochasticHeun(), **options)
    assert (int(sol.stats.naccept), int(sol.stats.nreject)) == (here.stats.naccept, here.stats.nreject)
    np.testing.assert_allclose(lab.numpy(sol.u), here.u, rtol=1e-7)


def test_backends_walk_back_the_same_steps(lab):
    """The interpolating adjoint on an adaptive mesh, as closely as in the test before; what it converges to is tested
    above."""
    if importlib.util.find_spec("autograd") is None:
        pytest.skip("the vector field is written for autograd's NumPy")

    def gradient(lab):
        r = sa.gradient(nonlinear(lab, "general", "stratonovich"), sa.StochasticHeun(), weighted(lab, lab.xp),
                        saveat=lab.array(TIMES), rtol=1e-2, atol=1e-2, sensealg=sa.InterpolatingAdjoint(), max_steps=64,
                        **ADAPTIVE)
        return np.array([*lab.numpy(r.u0), float(r.p["a"]), *lab.numpy(r.p["s"])])

    np.testing.assert_allclose(gradient(lab), gradient(type(lab)("numpy")), rtol=1e-7)


@pytest.mark.parametrize("name", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_adaptive_members(request, name):
    """Members of an ensemble take steps of their own, each as it would alone."""
    lab = request.getfixturevalue(f"{name}_lab")
    one = nonlinear(lab, "diagonal", "stratonovich")
    options = {"rtol": 1e-2, "atol": 1e-2, "max_steps": 64} | ADAPTIVE
    sol = sa.solve(sa.EnsembleProblem(one, key=lab.array([3, 4], "int64")), sa.StochasticHeun(), **options)
    for i in range(2):
        alone = sa.solve(one.remake(key=3 + i), sa.StochasticHeun(), **options)
        assert int(alone.stats.naccept) == int(sol.stats.naccept[i])
        np.testing.assert_allclose(lab.numpy(sol.u[i]), lab.numpy(alone.u), rtol=1e-12)


def test_bounds_of_adaptive_steps(numpy_lab):
    """No step is smaller than what the path tells apart; stops and largest steps are as for other problems."""
    prob = nonlinear(numpy_lab, "diagonal", "stratonovich")
    coarse = prob.remake(brownian=sa.VirtualBrownianTree(8, (0.0, 0.6), 0.05))
    with pytest.raises(sa.SolveError, match="too small"):
        sa.solve(coarse, sa.StochasticHeun(), rtol=1e-6, atol=1e-6, **ADAPTIVE)
    sol = sa.solve(prob, sa.StochasticHeun(), rtol=1e-2, atol=1e-2, tstops=[0.2], dtmax=0.1, saveat="steps", **ADAPTIVE)
    assert np.any(np.isclose(sol.t, 0.2, rtol=0, atol=0.0))
    assert np.all(np.diff([0.0, *sol.t]) <= 0.1 + 1e-12)


def test_adaptive_steps_that_cannot_be(numpy_lab):
    prob = nonlinear(numpy_lab, "diagonal")
    with pytest.raises(sa.UnsupportedCombination, match="StochasticHeun"):
        sa.solve(prob, sa.EulerMaruyama(), **ADAPTIVE)
    with pytest.raises(sa.InputError, match="PIController"):
        sa.solve(prob, sa.EulerMaruyama())
    with pytest.raises(sa.UnsupportedCombination, match="number is not known"):
        sa.gradient(prob.remake(interpretation="stratonovich"), sa.StochasticHeun(), lambda sol: sol.u.sum(),
                    sensealg=sa.BacksolveAdjoint(), **ADAPTIVE)


def test_fixed_steps_unless_asked(numpy_lab):
    """`dt` alone means steps of that size."""
    prob = nonlinear(numpy_lab, "diagonal", "stratonovich")
    assert sa.solve(prob, sa.StochasticHeun(), dt=0.1).stats.nfe == 12
    assert answer(numpy_lab, prob, sa.StochasticHeun(), None, sa.auto, dt=0.1).shape == (7,)
