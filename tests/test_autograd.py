"""autograd's boxes through a solve: `autograd.grad`, containers, times, closures, second derivatives."""

import numpy as np
import pytest

autograd = pytest.importorskip("autograd")
import autograd.numpy as anp  # noqa: E402

import sensitivity as sa  # noqa: E402

P = np.array([1.5, 1.0, 3.0, 1.0])
TS = np.arange(1.0, 11.0)
GRAD_P = np.array([-7.5558620739812871820, -16.824915246868327154, 5.1114038569799057827, -37.335193444966730494])
GRAD_U0 = np.array([-7.4651778929941023335, -1.9371334661489880546])
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def lotka_volterra(t, u, p):
    x, y = u[0], u[1]
    a, b, c, d = p
    return anp.stack([a * x - b * x * y, -c * y + d * x * y])


def decay(t, u, p):
    return -p * u


def total(p, u0, sensealg):
    prob = sa.ODEProblem(lotka_volterra, u0, (0.0, 10.0), p)
    return anp.sum(sa.solve(prob, sa.Tsit5(), saveat=TS, sensealg=sensealg, **TIGHT).u)


@pytest.mark.parametrize(
    "sensealg",
    [sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(), sa.ForwardSensitivity(), sa.DirectAdjoint()],
    ids=lambda s: s.name,
)
def test_grad_has_the_known_digits(sensealg):
    by_p, by_u0 = autograd.grad(lambda x: total(x[0], x[1], sensealg))((P, np.ones(2)))
    np.testing.assert_allclose(by_p, GRAD_P, rtol=2e-9)
    np.testing.assert_allclose(by_u0, GRAD_U0, rtol=2e-9)


def test_jacobian_has_one_row_per_output():
    prob = sa.ODEProblem(decay, np.array([1.0, 2.0]), (0.0, 1.0), np.array([0.5, 0.7]))
    J = autograd.jacobian(lambda p: sa.solve(prob.remake(p=p), sa.Tsit5(), **TIGHT).u[0])(prob.p)
    np.testing.assert_allclose(J, np.diag([-np.exp(-0.5), -2.0 * np.exp(-0.7)]), rtol=1e-9, atol=1e-12)


def test_parameters_in_a_dict():
    prob = sa.ODEProblem(lambda t, u, p: -p["k"] * u, np.array([1.0]), (0.0, 2.0), {"k": np.array(0.5), "n": 3})
    g = autograd.grad(lambda p: sa.solve(prob.remake(p={"k": p["k"], "n": 3}), sa.Tsit5(), **TIGHT).u[0, 0])({"k": 0.5})
    np.testing.assert_allclose(g["k"], -2.0 * np.exp(-1.0), rtol=1e-9)


@pytest.mark.parametrize("sensealg", [sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(), sa.DirectAdjoint()])
def test_times(sensealg):
    def end(times):
        prob = sa.ODEProblem(decay, np.array([1.3]), (times[0], times[1]), np.array([0.7]))
        return sa.solve(prob, sa.Tsit5(), sensealg=sensealg, **TIGHT).u[0, 0]

    value = 0.7 * 1.3 * np.exp(-0.7 * 1.5)
    np.testing.assert_allclose(autograd.grad(end)(np.array([0.5, 2.0])), [value, -value], rtol=1e-8)


def test_a_closed_over_value_is_named():
    def end(k):
        return sa.solve(sa.ODEProblem(lambda t, u, p: -k * u, np.array([1.0]), (0.0, 1.0), P)).u[0, 0]

    # The state is plain, so nothing but f's result shows that autograd is at work.
    with pytest.raises(sa.SensitivityError, match="through p"):
        autograd.grad(end)(0.5)


def test_second_derivatives_run_directly_and_are_refused_otherwise():
    def end(k, sensealg):
        prob = sa.ODEProblem(decay, np.array([1.0]), (0.0, 2.0), k)
        return sa.solve(prob, sa.RK4(), dt=0.01, sensealg=sensealg).u[0, 0]

    twice = autograd.grad(autograd.grad(lambda k: end(k, sa.DirectAdjoint())))
    np.testing.assert_allclose(twice(0.5), 4.0 * np.exp(-1.0), rtol=1e-8)
    with pytest.raises(sa.UnsupportedCombination, match="DirectAdjoint"):
        autograd.grad(autograd.grad(lambda k: end(k, sa.RecursiveCheckpointAdjoint())))(0.5)


def test_a_field_that_ignores_the_state_has_zero_derivatives_and_no_noise():
    prob = sa.ODEProblem(lambda t, u, p: p * anp.ones(2), np.array([1.0, 2.0]), (0.0, 2.0), np.array(0.5))
    r = sa.gradient(prob, sa.Tsit5(), lambda sol: anp.sum(sol.u**2))
    np.testing.assert_allclose(r.u0, [4.0, 6.0], rtol=1e-12)
    np.testing.assert_allclose(r.p, 2 * 2.0 * (2.0 + 3.0), rtol=1e-12)


def test_a_plain_solve_evaluates_f_no_more_often_than_it_says():
    calls = []

    def f(t, u, p):
        calls.append(t)
        return -p * u

    prob = sa.ODEProblem(f, np.array([1.0, 2.0]), (0.0, 1.0), np.array(0.5))
    sol = sa.solve(prob, sa.Tsit5(), probe="off")
    assert len(calls) == sol.stats.nfe
    calls.clear()
    sa.solve(prob, sa.Tsit5())
    assert len(calls) == sol.stats.nfe + 2
