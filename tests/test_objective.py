"""Objectives for `scipy.optimize`: what they hand over, and fits that come out right."""

import numpy as np
import pytest
from scipy.optimize import check_grad, least_squares, minimize

import sensitivity as sa

TIMES = np.linspace(0.5, 3.0, 6)


def decay(lab):
    """u' = -k u + c from u0, with data of k = 0.8, c = 0.3, u0 = 2 (exact): `(prob, data)`."""
    prob = sa.ODEProblem(lambda t, u, p: p["c"] - p["k"] * u, lab.array([2.0]), (0.0, 3.0),
                         {"c": lab.array(0.1), "k": lab.array(1.0), "name": "decay"})
    return prob, lab.array(0.3 / 0.8 + (2.0 - 0.3 / 0.8) * np.exp(-0.8 * TIMES)[:, None])


def test_minimize(lab):
    prob, data = decay(lab)
    obj = sa.objective(prob, sa.Tsit5(), lambda sol: ((sol.u - data) ** 2).sum(), saveat=lab.array(TIMES), rtol=1e-8)
    np.testing.assert_array_equal(obj.x0, [0.1, 1.0])
    assert obj.unpack(obj.x0)["name"] == "decay"
    np.testing.assert_array_equal(obj.pack(obj.unpack(np.array([0.5, 0.7]))), [0.5, 0.7])
    value, g = obj.fun_and_jac(obj.x0)
    assert isinstance(value, float)
    assert (g.dtype, g.shape) == (np.float64, (2,))
    # Closed form of the gradient with respect to c at k = 1: u = c + (2 - c) e^-t.
    e = np.exp(-TIMES)
    miss = 0.1 + 1.9 * e - lab.numpy(data)[:, 0]
    np.testing.assert_allclose(value, (miss**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(g, [2.0 * (miss * (1.0 - e)).sum(), 2.0 * (miss * (0.1 * e * (1 + TIMES) - 0.1 - 2.0
                               * TIMES * e)).sum()], rtol=1e-6)
    if lab.name != "jax":
        found = minimize(obj.fun_and_jac, obj.x0, jac=True, method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(found.x, [0.3, 0.8], rtol=1e-6)


def test_least_squares(lab):
    prob, data = decay(lab)
    obj = sa.objective(prob, sa.Tsit5(), residuals=lambda sol: sol.u - data, saveat=lab.array(TIMES), rtol=1e-8,
                       wrt=("p", "u0"))
    np.testing.assert_array_equal(obj.x0, [0.1, 1.0, 2.0])
    J = obj.residuals_jac(obj.x0)
    e = np.exp(-TIMES)
    # u = c/k + (u0 - c/k) e^-kt at k = 1
    want = np.stack([1.0 - e, 0.1 * e * (1 + TIMES) - 0.1 - 2.0 * TIMES * e, e], axis=1)
    np.testing.assert_allclose(J, want, rtol=1e-6)
    np.testing.assert_allclose(obj.residuals(obj.x0), 0.1 + 1.9 * e - lab.numpy(data)[:, 0], atol=1e-7)
    if lab.name != "jax":
        found = least_squares(obj.residuals, obj.x0, jac=obj.residuals_jac, xtol=1e-12, ftol=1e-12, gtol=1e-12)
        np.testing.assert_allclose(found.x, [0.3, 0.8, 2.0], rtol=1e-6)


@pytest.mark.parametrize("sensealg", [sa.ForwardSensitivity(), sa.RecursiveCheckpointAdjoint()])
def test_rows_by_any_algorithm(numpy_lab, sensealg):
    """Residuals that use the parameters themselves; against differences of the residuals."""
    prob, data = decay(numpy_lab)
    obj = sa.objective(prob, sa.Tsit5(), saveat=TIMES[:2], rtol=1e-10, atol=1e-12, sensealg=sensealg,
                       residuals=lambda sol: sol.u[:, 0] * sol.prob.p["k"] - data[:2, 0])
    J, e = obj.residuals_jac(obj.x0), 1e-5
    for j in range(2):
        d = e * np.eye(2)[j]
        difference = (obj.residuals(obj.x0 + d) - obj.residuals(obj.x0 - d)) / (2 * e)
        np.testing.assert_allclose(J[:, j], difference, rtol=1e-8)


def test_solves_are_not_repeated(numpy_lab):
    prob, data = decay(numpy_lab)
    losses = []

    def loss(sol):
        losses.append(1)
        return ((sol.u - data) ** 2).sum()

    obj = sa.objective(prob, sa.Tsit5(), loss, saveat=TIMES)
    obj.fun_and_jac(obj.x0)
    losses.clear()
    x = obj.x0.copy()
    obj.fun(x)
    obj.jac(x)
    assert not losses
    x[0] += 0.1  # the optimiser may reuse its array
    obj.fun(x)
    assert len(losses) == 1
    obj.fun(x)
    assert len(losses) == 1
    assert check_grad(obj.fun, obj.jac, x, epsilon=1e-6) < 1e-4


def test_steady_state(numpy_lab):
    anp = numpy_lab.xp
    prob = sa.SteadyStateProblem(lambda t, u, p: p - u**3, np.ones(2), np.array([1.0, 2.0]))
    obj = sa.objective(prob, loss=lambda sol: anp.sum((sol.u - 2.0) ** 2), residuals=lambda sol: sol.u - 2.0)
    assert minimize(obj.fun_and_jac, obj.x0, jac=True).x == pytest.approx([8.0, 8.0], rel=1e-3)
    np.testing.assert_allclose(obj.residuals_jac(np.array([8.0, 27.0])), np.diag([1.0 / 12.0, 1.0 / 27.0]), atol=1e-10)


def test_without_autograd_the_derivative_of_the_loss_is_taken():
    prob = sa.ODEProblem(lambda t, u, p: np.array([-float(p[0]) * float(u[0])]), np.array([1.0]), (0.0, 1.0),
                         np.array([0.5]))
    numeric = sa.RecursiveCheckpointAdjoint(vjp=sa.FiniteDifferenceVJP())
    obj = sa.objective(prob, sa.Tsit5(), lambda sol: float(sol.u[0, 0]), dloss=lambda sol: np.ones_like(sol.u),
                       sensealg=numeric, rtol=1e-9)
    value, g = obj.fun_and_jac(obj.x0)
    assert value == pytest.approx(np.exp(-0.5), rel=1e-8)
    assert g == pytest.approx(-np.exp(-0.5), rel=1e-7)


def test_second_derivatives(lab):
    """Against the closed form of d2/du0 dc and d2/dc2 of sum u^2 at k = 1: u = c + (u0 - c) e^-t."""
    prob, _ = decay(lab)
    obj = sa.objective(prob, sa.Tsit5(), lambda sol: (sol.u**2).sum(), saveat=lab.array(TIMES), rtol=1e-8,
                       wrt=("u0", "p"))
    e = np.exp(-TIMES)
    got = obj.hessp(obj.x0, np.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(got[:2], [2.0 * (e * (1.0 - e)).sum(), 2.0 * ((1.0 - e) ** 2).sum()], rtol=1e-6)


def test_events_that_change_parameters(numpy_lab):
    """A dose at t = 1 doubles the rate: rows through the jump, as by differences."""
    prob, _ = decay(numpy_lab)
    doubled = sa.PresetTimes([1.0], lambda t, u, p: (u, {**p, "k": 2.0 * p["k"]}))
    obj = sa.objective(prob, sa.Tsit5(), residuals=lambda sol: sol.u[:, 0], saveat=TIMES[2:4] + 0.05, events=[doubled],
                       rtol=1e-10, atol=1e-12)
    J, e = obj.residuals_jac(obj.x0), 1e-5
    for j in range(2):
        d = e * np.eye(2)[j]
        difference = (obj.residuals(obj.x0 + d) - obj.residuals(obj.x0 - d)) / (2 * e)
        np.testing.assert_allclose(J[:, j], difference, rtol=1e-7)


def test_second_derivatives_of_a_steady_state():
    """Where u = p^3, the sum of u^2 is p^6."""
    steady = sa.SteadyStateProblem(lambda t, u, p: p**3 - u, np.ones(1), np.array([1.1]))
    obj = sa.objective(steady, None, lambda sol: (sol.u**2).sum())
    np.testing.assert_allclose(obj.hessp(obj.x0, np.array([2.0])), [60.0 * 1.1**4], rtol=1e-9)


def test_what_is_refused(numpy_lab):
    prob, _ = decay(numpy_lab)
    loss = lambda sol: (sol.u**2).sum()  # noqa: E731
    obj = sa.objective(prob, None, loss)
    with pytest.raises(sa.InputError, match="shape"):
        obj.fun(np.ones(5))
    with pytest.raises(sa.InputError, match="residuals="):
        obj.residuals(obj.x0)
    with pytest.raises(sa.InputError, match="loss="):
        sa.objective(prob, None, residuals=lambda sol: sol.u).fun(obj.x0)
    with pytest.raises(sa.InputError, match="neither"):
        sa.objective(prob)
    with pytest.raises(sa.InputError, match="wrt"):
        sa.objective(prob, None, loss, wrt="t0")
    with pytest.raises(sa.InputError, match="no floating-point"):
        sa.objective(prob.remake(p=None), None, loss)
    with pytest.raises(sa.InputError, match="whole numbers"):
        sa.objective(prob.remake(u0=[np.array([1.0]), np.array([2])]), None, loss, wrt="u0")
    with pytest.raises(sa.UnsupportedCombination, match="DirectAdjoint"):
        sa.objective(prob, None, residuals=lambda sol: sol.u, sensealg=sa.DirectAdjoint()).residuals_jac(obj.x0)
    with pytest.raises(sa.UnsupportedCombination, match="complex"):
        sa.objective(prob.remake(p=np.array([1j])), None, loss)
