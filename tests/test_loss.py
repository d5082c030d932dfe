"""What a loss may use of the solution, and what becomes of it when the solve fails."""

import numpy as np
import pytest

import sensitivity as sa

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
ALGORITHMS = [sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(), sa.ForwardSensitivity(), sa.DirectAdjoint()]
K = 0.5


def decay(lab):
    return sa.ODEProblem(lambda t, u, p: -p * u, lab.array([1.0]), (0.0, 1.0), lab.array([K]))


def limits(lab, sensealg):
    # JAX differentiates a loop of this many steps backwards.
    return {"max_steps": 128} if lab.name == "jax" and isinstance(sensealg, sa.DirectAdjoint) else {}


@pytest.mark.parametrize("sensealg", ALGORITHMS, ids=lambda s: s.name)
def test_a_loss_of_the_times_themselves(lab, sensealg):
    """d/ds (s u(s)) = u + s u'."""
    s = np.array([0.5, 1.0])
    r = sa.gradient(decay(lab), sa.Tsit5(), lambda sol: (sol.u[:, 0] * sol.t).sum(), saveat=lab.array(s),
                    wrt=("saveat", "p"), sensealg=sensealg, **TIGHT, **limits(lab, sensealg))
    np.testing.assert_allclose(lab.numpy(r.saveat), np.exp(-K * s) * (1 - K * s), rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.p), [(-(s**2) * np.exp(-K * s)).sum()], rtol=1e-8)


@pytest.mark.parametrize("sensealg", ALGORITHMS, ids=lambda s: s.name)
def test_a_loss_of_the_problem_itself(lab, sensealg):
    def loss(sol):
        prob = sol.prob
        return sol.u[0, 0] + 3.0 * prob.u0[0] + 5.0 * prob.p[0] ** 2 + 7.0 * prob.tspan[1] * sol.t[0] - prob.tspan[0]

    r = sa.gradient(decay(lab), sa.Tsit5(), loss, wrt=("u0", "p", "t0", "t1"), sensealg=sensealg, **TIGHT,
                    **limits(lab, sensealg))
    u = np.exp(-K)
    np.testing.assert_allclose(lab.numpy(r.u0), [u + 3.0], rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.p), [-u + 10.0 * K], rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.t0), K * u - 1.0, rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.t1), -K * u + 14.0, rtol=1e-8)


@pytest.mark.parametrize("sensealg", ALGORITHMS[:3], ids=lambda s: s.name)
@pytest.mark.parametrize("saveat", [None, [0.01, 1.0]], ids=["end", "times"])
def test_a_failed_solve_has_no_gradient(lab, sensealg, saveat):
    r = sa.gradient(decay(lab), sa.Tsit5(), lambda sol: sol.u.sum(), saveat=saveat, sensealg=sensealg, on_failure="nan",
                    max_steps=2, **TIGHT)
    assert r.solution.retcode == sa.RetCode.MaxSteps
    for value in (r.value, r.p, r.u0, r.solution.u):
        assert np.isnan(lab.numpy(value)).all()


def test_differences_of_a_loss_fit_the_size_of_the_state():
    """A loss that leaves the AD, of a state far below 1: G = log u(1), dG/dk = -1."""
    prob = sa.ODEProblem(lambda t, u, p: -p * u, np.array([1e-7]), (0.0, 1.0), np.array([K]),
                         vjp=lambda t, u, p, lam: (-p * lam, -u * lam))
    with pytest.warns(sa.NumericalDerivativeWarning, match="dloss"):
        r = sa.gradient(prob, sa.Tsit5(), lambda sol: float(np.log(np.asarray(sol.u, dtype=float)).sum()), rtol=1e-10,
                        atol=1e-17)
    np.testing.assert_allclose(r.p, [-1.0], rtol=1e-8)
