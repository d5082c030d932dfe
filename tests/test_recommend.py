"""The method where none is named: what is seen of stiffness, at what cost, and that derivatives change nothing."""

import math

import numpy as np
import pytest

import sensitivity as sa
from sensitivity import recommend, rules
from sensitivity.testing import models


def two_rates(lab, fast=1e5):
    """One entry is pulled to `p[1]` at the rate `fast`, the other decays at the rate `p[0]`."""
    xp = lab.xp

    def f(t, u, p):
        return xp.stack([-fast * (u[0] - p[1]), -p[0] * u[1]])

    return sa.ODEProblem(f, lab.array([0.0, 2.0]), (0.0, 1.0), lab.array([0.7, 3.0]))


def counted(prob):
    calls = [0]

    def f(t, u, p):
        calls[0] += 1
        return prob.f(t, u, p)

    return prob.remake(f=f), calls


def ends(sol):
    return sol.u[-1, 0] + sol.u[-1, 1]


def test_stiff_problems_get_an_implicit_method(lab):
    """Closed form: `u0(1) = p1` to round-off, `u1(1) = 2 exp(-p0)`."""
    prob = two_rates(lab)
    sol = sa.solve(prob)
    assert sol.alg == sa.Kvaerno5()
    assert sol.alg.because[0].startswith("stiff: what decays fastest, at a rate of 1e+05")
    r = sa.gradient(prob, None, ends, wrt="p", rtol=1e-8, atol=1e-10)
    assert r.solution.alg == sa.Kvaerno5()
    np.testing.assert_allclose(lab.numpy(r.p), [-2.0 * math.exp(-0.7), 1.0], rtol=1e-7)


def test_others_get_an_explicit_one(lab):
    sol = sa.solve(lab.lotka_volterra(t1=1.0))
    assert sol.alg == sa.Tsit5()
    assert sol.alg.because == ("not stiff at the start: f changes at a rate of 2.5 (5 evaluations of f)",)
    assert sa.solve(lab.lotka_volterra(t1=1.0), sa.Tsit5()).alg.because == ()


@pytest.mark.parametrize(("name", "method"), [
    ("lotka_volterra", sa.Tsit5()), ("brusselator_2d", sa.Tsit5()), ("robertson", sa.Kvaerno5()),
    ("pollu", sa.Kvaerno5()), ("robertson_dae", sa.Kvaerno5()), ("pendulum_dae", sa.Kvaerno5())])
def test_models(name, method):
    pytest.importorskip("autograd")
    import autograd.numpy as anp

    prob = getattr(models, name)(anp)
    assert recommend.method_of(prob, None, {}) == method


def test_constraints_with_exact_jacobians(torch_lab):
    prob = models.pendulum_dae(torch_lab.xp)
    assert recommend.method_of(prob, None, {}) == sa.Rodas5P()
    # No energy is lost, and the speed at the lowest point follows from it.
    sol = sa.solve(prob, saveat=20, rtol=1e-8, atol=1e-8)
    u = torch_lab.numpy(sol.u)
    energy = 0.5 * (u[:, 2] ** 2 + u[:, 3] ** 2) + 9.81 * u[:, 1]
    np.testing.assert_allclose(energy, energy[0], rtol=2e-6)


@pytest.mark.parametrize(("prob", "spent"), [
    ("calm", 5), ("swinging", 5 + 1 + 4), ("fast", 5 + 1 + 4 + 2 + 6 * rules.TRIAL + 4)])
def test_evaluations_are_what_is_said(numpy_lab, prob, spent):
    prob, calls = counted({
        "calm": numpy_lab.lotka_volterra(t1=1.0),
        "swinging": sa.ODEProblem(lambda t, u, p: np.stack([p[0] * u[1], -p[0] * u[0]]), np.array([1.0, 0.0]),
                                  (0.0, 10.0), np.array([100.0])),
        "fast": two_rates(numpy_lab)}[prob])
    run, x = sa.solve.__globals__["prepare"](prob, sa.Tsit5(), probe="off")
    calls[0] = 0
    seen = recommend.decided(run, x)[1].signs
    assert calls[0] == spent == seen.evaluations


def test_a_solve_in_a_loop_pays_five_evaluations(numpy_lab):
    prob, calls = counted(numpy_lab.lotka_volterra(t1=1.0))
    for alg, more in ((sa.Tsit5(), 0), (None, 5)):
        sa.solve(prob, alg)
        calls[0] = 0
        sol = sa.solve(prob, alg)
        assert calls[0] == sol.stats.nfe + more


def test_a_slow_start_hides_nothing_that_the_first_steps_show():
    """Robertson's second species starts at zero, where the Jacobian knows of no rate above 0.04."""
    pytest.importorskip("autograd")
    import autograd.numpy as anp

    seen = recommend.decided(*sa.solve.__globals__["prepare"](models.robertson(anp), sa.Tsit5()))[1].signs
    assert seen.stiff
    assert seen.decay == pytest.approx(2.2e3, rel=0.05)
    assert 1.0 < seen.decay * seen.step < 4.0


def test_what_decays_is_not_stiff_where_accuracy_asks_for_the_steps(numpy_lab):
    """Decay times span is 2000 and more for predator and prey over a long time, and no explicit step is held by it."""
    run, x = sa.solve.__globals__["prepare"](numpy_lab.lotka_volterra(t1=1000.0), sa.Tsit5())
    seen = recommend.decided(run, x)[1].signs
    assert seen.evaluations > rules.TRIAL
    assert not seen.stiff


def test_large_states(numpy_lab):
    """The heat equation on 60 points, by products: `4 / dx^2` is the fastest rate."""
    n, dx = 60, 1.0 / 61
    prob = sa.ODEProblem(lambda t, u, p: (np.roll(u, 1) - 2.0 * u + np.roll(u, -1)) / dx**2, np.sin(np.arange(n)),
                         (0.0, 1.0), None)
    sol = sa.solve(prob)
    assert sol.alg == sa.Kvaerno5()
    run, x = sa.solve.__globals__["prepare"](prob, sa.Tsit5())
    # Eight products of a power iteration see most of it.
    assert 0.7 < recommend.decided(run, x)[1].signs.decay * dx**2 / 4.0 < 1.001


def test_other_answers(numpy_lab):
    prob = two_rates(numpy_lab)
    fixed = sa.solve(prob.remake(tspan=(0.0, 1e-4)), dt=1e-5, controller=sa.FixedStep())
    assert "the steps are fixed" in fixed.alg.because[0]
    jac = lambda t, u, p: np.array([[-1e5, 0.0], [0.0, -p[0]]])  # noqa: E731
    assert sa.solve(prob.remake(jac=jac)).alg == sa.Rodas5P()
    calm = numpy_lab.lotka_volterra(t1=1.0)
    tight = sa.solve(calm, rtol=1e-10, atol=1e-10)
    assert tight.alg == sa.Dopri8()
    assert tight.alg.because[0].startswith("rtol <= 1e-09: high order; not stiff at the start")
    turning = sa.ODEProblem(lambda t, u, p: 1000.0j * u, np.array([1.0 + 0.0j]), (0.0, 0.1), None)
    assert "complex" in sa.solve(turning).alg.because[0]


def test_a_field_with_a_domain(numpy_lab):
    """The square root of what may not be negative, and a field that raises: no reason not to solve."""
    def f(t, u, p):
        if (u < 0.0).any():
            raise ValueError("negative")
        return -np.sqrt(u) * 1e4 * np.array([1.0, 0.0])

    sol = sa.solve(sa.ODEProblem(f, np.array([1.0, 0.0]), (0.0, 1e-4), None))
    assert sol.alg == sa.Tsit5()
    np.testing.assert_allclose(sol.u[-1], [0.25, 0.0], rtol=1e-6)


def test_a_solve_that_stiffness_stops_says_so(lab):
    prob = two_rates(lab)
    with pytest.raises(sa.SolveError, match=r"looks stiff there: .* at a rate of 1e\+05") as e:
        sa.solve(prob, sa.Tsit5(), max_steps=400)
    assert "sa.Kvaerno5()" in str(e.value)
    with pytest.raises(sa.SolveError) as e:
        sa.solve(lab.lotka_volterra(), sa.Tsit5(), max_steps=20)
    assert "stiff" not in str(e.value)


def test_one_method_for_an_objective(numpy_lab):
    """Its functions are of `x` alone: no change of the method on the way of an optimiser."""
    prob = sa.ODEProblem(lambda t, u, p: -p * (u - 1.0), np.array([0.0]), (0.0, 1.0), np.array([1.0]))
    goal = sa.objective(prob, None, lambda sol: sol.u[-1, 0], dloss=lambda sol: np.ones((1, 1)))
    assert goal.alg == sa.Tsit5()
    assert goal.fun(np.array([700.0])) == pytest.approx(1.0, abs=1e-6)
    assert sa.solve(prob.remake(p=np.array([1e4]))).alg == sa.Kvaerno5()
    assert sa.objective(prob.remake(p=np.array([1e4])), None, lambda sol: sol.u[-1, 0]).alg == sa.Kvaerno5()


def test_members_of_an_ensemble_share_a_method(lab):
    prob = two_rates(lab)
    p = lab.array([[0.7, 3.0], [0.9, 2.0]])
    sol = sa.solve(sa.EnsembleProblem(prob, p=p))
    assert sol.alg == sa.Kvaerno5()
    np.testing.assert_allclose(lab.numpy(sol.u)[:, -1, 0], [3.0, 2.0], rtol=1e-6)


def test_derivatives_change_nothing_on_jax(jax_lab):
    import jax

    prob = two_rates(jax_lab)
    seen = []

    def loss(p):
        sol = sa.solve(prob.remake(p=p))
        seen.append(sol.alg)
        return ends(sol)

    jax.grad(loss)(prob.p)
    assert seen == [sa.Kvaerno5()]
    assert seen[0].because == sa.solve(prob).alg.because
    jax.eval_shape(loss, prob.p)
    assert seen[1] == sa.Tsit5()
    assert "inside jit and vmap" in seen[1].because[0]
    assert "alg=sa.Kvaerno5()" in seen[1].because[0]


def test_derivatives_change_nothing_on_torch(torch_lab):
    import torch

    prob = two_rates(torch_lab)
    seen = []

    def loss(p):
        sol = sa.solve(prob.remake(p=p))
        seen.append(sol.alg)
        return ends(sol)

    plain = torch.func.grad(loss)(prob.p)
    p = prob.p.clone().requires_grad_()
    loss(p).backward()
    assert seen == [sa.Kvaerno5()] * 2
    assert seen[0].because == seen[1].because == sa.solve(prob).alg.because
    np.testing.assert_array_equal(plain.numpy(), p.grad.numpy())


def test_derivatives_change_nothing_under_autograd(numpy_lab):
    autograd = pytest.importorskip("autograd")
    prob = two_rates(numpy_lab)
    seen = []

    def loss(p):
        sol = sa.solve(prob.remake(p=p))
        seen.append(sol.alg)
        return ends(sol)

    autograd.grad(loss)(prob.p)
    assert seen == [sa.Kvaerno5()]
    assert seen[0].because == sa.solve(prob).alg.because


def test_the_rules_are_complete():
    assert len({r.id for r in recommend.METHOD_RULES}) == len(recommend.METHOD_RULES)
    assert all(r.question.endswith("?") for r in recommend.METHOD_RULES)
    start = recommend.Start(False, False, False, False, "nothing was looked at", None)
    assert [r.id for r in recommend.METHOD_RULES if r.holds(start)] == ["explicit"]
    assert "nothing was looked at" in recommend.METHOD_RULES[-1].because(start)
