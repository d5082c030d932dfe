"""Delay equations whose `f` takes derivatives itself, by the framework's own AD, of the state and of the past.

The truth has no AD in it: the derivatives in `f` written out by hand, and its products by complex steps, on the same
steps by the same method.
"""

from functools import cache

import numpy as np
import pytest

import sensitivity as sa

U0, P = [0.4, -0.7], [0.9, -0.6, 0.5, 1.1, 0.3, -0.2, 0.55]
ALGORITHMS = {a.name: a for a in (sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(), sa.GaussAdjoint(),
                                  sa.QuadratureAdjoint(), sa.ForwardSensitivity(), sa.ForwardADSensitivity())}
ALGORITHMS["budget"] = sa.RecursiveCheckpointAdjoint(memory="1MB")


def layer(xp, x, p):
    """A layer of two neurons."""
    return xp.tanh(xp.stack([p[0] * x[0] + p[1] * x[1] + p[4], p[2] * x[0] + p[3] * x[1] + p[5]]))


def gradient_inside(lab):
    """`grad(E, x)` of a scalar and `jvp(g, x, v)`, by the framework."""
    if lab.name == "numpy":
        from autograd import grad
        from autograd.differential_operators import make_jvp_reversemode

        return lambda E, x: grad(E)(x), lambda g, x, v: make_jvp_reversemode(g)(x)(v)
    if lab.name == "jax":
        import jax

        return lambda E, x: jax.grad(E)(x), lambda g, x, v: jax.jvp(g, (x,), (v,))[1]
    from torch.func import grad, jvp

    return lambda E, x: grad(E)(x), lambda g, x, v: jvp(g, (x,), (v,))[1]


def nested(lab):
    """Down the gradient of an energy, up that of the past's, and a derivative of a layer of the past along u."""
    xp, (grad, jvp) = lab.xp, gradient_inside(lab)

    def f(t, u, h, p):
        v = h(t - p[6])

        def energy(x):
            return (layer(xp, x, p) ** 2).sum() / 2

        return -grad(energy, u) + 0.5 * grad(energy, v) + jvp(lambda x: layer(xp, x, p), v, u)

    return f


def by_hand(t, u, h, p):
    v = h(t - p[6])
    W = np.stack([np.stack([p[0], p[1]]), np.stack([p[2], p[3]])])

    def down(x):
        g = layer(np, x, p)
        return W.T @ (g * (1.0 - g * g))

    g = layer(np, v, p)
    return -down(u) + 0.5 * down(v) + (1.0 - g * g) * (W @ u)


def solved(lab, f, sensealg, dt=0.2):
    prob = sa.DDEProblem(f, lab.array(U0), lambda t, p: lab.xp.stack([p[0] + 0.0 * t, p[4] * t]), (0.0, 1.6),
                         lab.array(P), lags=lambda p: [p[6]])
    w = lab.array([[1.0, -0.5], [0.3, 2.0]])
    r = sa.gradient(prob, sa.RK4(), lambda sol: (w * sol.u).sum(), dloss=lambda sol: w + 0.0 * sol.u, dt=dt,
                    max_steps=40, saveat=lab.array([0.7, 1.6]), sensealg=sensealg)
    return float(r.value), lab.numpy(r.u0), lab.numpy(r.p)


@cache
def truth(lab, name):
    kind = ALGORITHMS[name]
    own = {"jvp": sa.ComplexStepVJP()} if name == "ForwardSensitivity" else {"vjp": sa.ComplexStepVJP()}
    return solved(lab, by_hand, type(kind)(**own))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # by the first use of torch.func.jvp
@pytest.mark.parametrize("name", ALGORITHMS)
def test_derivatives_inside_f(lab, numpy_lab, name):
    value, u0, p = solved(lab, nested(lab), ALGORITHMS[name])
    want = truth(numpy_lab, name)
    assert value == pytest.approx(want[0], rel=1e-13)
    np.testing.assert_allclose(u0, want[1], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(p, want[2], rtol=1e-12, atol=1e-13)


def test_the_truth_is_the_derivative_of_the_loss(numpy_lab):
    """Central differences of fourth order, in a direction in which u0, the network and the lag all move."""
    value, u0, p = solved(numpy_lab, by_hand, sa.RecursiveCheckpointAdjoint(vjp=sa.ComplexStepVJP()), 0.05)
    d, e = np.cos(np.arange(9.0)), 1e-3

    def at(s):
        prob = sa.DDEProblem(by_hand, np.array(U0) + s * d[:2], lambda t, p: np.stack([p[0] + 0.0 * t, p[4] * t]),
                             (0.0, 1.6), np.array(P) + s * d[2:], lags=lambda p: [p[6]])
        return np.sum([[1.0, -0.5], [0.3, 2.0]] * sa.solve(prob, sa.RK4(), dt=0.05, saveat=[0.7, 1.6]).u)

    assert at(0.0) == pytest.approx(value, rel=1e-14)
    difference = (8 * (at(e) - at(-e)) - (at(2 * e) - at(-2 * e))) / (12 * e)
    # The last step of each piece takes up its length, where the adjoint moves all: an error of the steps apart.
    assert u0 @ d[:2] + p @ d[2:] == pytest.approx(difference, rel=1e-5)
