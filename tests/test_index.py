"""Constraints that cease to determine the algebraic variables on the way: the solve says so, and where."""

import numpy as np
import pytest

import sensitivity as sa

M = np.diag([1.0, 0.0])
HIGH = sa.RetCode.IndexTooHigh


def problem(lab, name, tspan=(0.0, 2.0)):
    """Three that are singular at t = 1, where they are known before it."""
    xp = lab.xp
    f, u0 = {
        "pole": (lambda t, u, p: xp.stack([-u[0], (p[0] - t) * u[1] - u[0]]), [1.0, 0.8]),  # z = exp(-t) / (1 - t)
        "turn": (lambda t, u, p: xp.stack([0.0 * u[0] - p[0], u[0] - u[1] ** 2]), [1.0, 0.9]),  # z = sqrt(1 - t)
        "cross": (lambda t, u, p: xp.stack([2.0 * (t - p[0]) + 0.0 * u[0], u[0] - u[1] ** 2]), [1.0, 0.9]),  # 1 - t
    }[name]
    return sa.ODEProblem(f, lab.array(u0), tspan, lab.array([1.0]), mass_matrix=M)


def before(name, t):
    """z and its derivative in p."""
    return {"pole": (np.exp(-t) / (1.0 - t), -np.exp(-t) / (1.0 - t) ** 2),
            "turn": (np.sqrt(1.0 - t), -0.5 * t / np.sqrt(1.0 - t)),
            "cross": (1.0 - t, -t / (1.0 - t))}[name]


@pytest.mark.parametrize("name", ["pole", "turn", "cross"])
def test_healthy_before(lab, name):
    r = sa.gradient(problem(lab, name, (0.0, 0.8)), sa.Rodas5P(), lambda sol: sol.u[-1, 1], wrt="p", rtol=1e-9,
                    atol=1e-9)
    value, slope = before(name, 0.8)
    assert float(r.value) == pytest.approx(value, rel=1e-7)
    assert float(lab.numpy(r.p)[0]) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", ["pole", "turn"])
def test_singular_on_the_way(lab, name):
    """A pole of the algebraic variable, and a turning point that no solution goes beyond."""
    for method in (sa.Rodas5P(), sa.Kvaerno3()) if lab.name == "numpy" else (sa.Rodas5P(),):
        with pytest.raises(sa.SolveError, match=r"cease to determine.* at t=1 of 2 \(condition .*e\+") as e:
            sa.solve(problem(lab, name), method, rtol=1e-5)
        assert e.value.retcode == HIGH
        assert e.value.t == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("sensealg", [sa.RecursiveCheckpointAdjoint(), sa.GaussAdjoint(), sa.ForwardSensitivity()],
                         ids=str)
def test_no_gradient_either(numpy_lab, sensealg):
    with pytest.raises(sa.SolveError, match="cease to determine") as e:
        sa.gradient(problem(numpy_lab, "turn"), sa.Kvaerno3(), lambda sol: sol.u[-1, 0], sensealg=sensealg)
    assert e.value.retcode == HIGH


@pytest.mark.parametrize(("name", "dt"), [("pole", 0.3), ("cross", 0.15)])
def test_jumped_over(lab, name, dt):
    """Steps that pass the singular point: finite numbers, and determinants of opposite signs."""
    with pytest.raises(sa.SolveError, match="opposite signs") as e:
        sa.solve(problem(lab, name), sa.Trapezoid(), controller=sa.FixedStep(), dt=dt)
    assert e.value.retcode == HIGH


def test_a_save_time_where_nothing_is_determined(numpy_lab):
    """`(1 - t)^2 (z - sin t) = 0` is no constraint at t = 1 alone."""
    prob = sa.ODEProblem(lambda t, u, p: np.stack([u[1], (1.0 - t) ** 2 * (u[1] - np.sin(t))]), np.array([0.0, 0.0]),
                         (0.0, 2.0), mass_matrix=M)
    assert sa.solve(prob, sa.Kvaerno5(), saveat=[0.5, 2.0]).u[0, 1] == pytest.approx(np.sin(0.5), rel=1e-9)
    with pytest.raises(sa.SolveError, match="a save time") as e:
        sa.solve(prob, sa.Kvaerno5(), saveat=[0.5, 1.0, 2.0])
    assert e.value.retcode == HIGH


def test_compiled(jax_lab):
    """Where nothing can be raised the code says it, and results are NaN."""
    import jax

    def ended(u0, p):
        sol = sa.solve(problem(jax_lab, "turn").remake(u0=u0, p=p), sa.Rodas5P(), on_failure="nan", rtol=1e-4)
        return sol.retcode, sol.u

    code, u = jax.jit(jax.vmap(ended))(np.array([[1.0, 0.9], [3.0, 1.0]]), np.ones((2, 1)))
    np.testing.assert_array_equal(code, [int(HIGH), int(sa.RetCode.Success)])
    assert np.all(np.isnan(u[0]))
    np.testing.assert_allclose(u[1, -1], [1.0, 1.0], rtol=1e-3)
    code, _ = jax.jit(jax.vmap(ended))(np.array([[0.0, 0.0], [3.0, 1.0]]), np.ones((2, 1)))  # z^2 = 0 at the start
    assert int(code[0]) == HIGH


# -- no false alarm ----------------------------------------------------------------------------------------------------


def test_a_blow_up_is_no_question_of_the_index(numpy_lab):
    prob = sa.ODEProblem(lambda t, u, p: np.stack([u[0] * u[1], u[1] - u[0]]), np.array([1.0, 1.0]), (0.0, 2.0),
                         mass_matrix=M)
    with pytest.raises(sa.SolveError) as e, np.errstate(all="ignore"):
        sa.solve(prob, sa.Kvaerno5())
    assert e.value.retcode in (sa.RetCode.DtMin, sa.RetCode.NewtonFailure, sa.RetCode.MaxSteps)


def test_a_jump_of_the_constraint_may_change_its_sign(numpy_lab):
    """`z = y` before t = 1 and `-z = -y` after it."""
    prob = sa.ODEProblem(lambda t, u, p: np.stack([-u[1], (1.0 if t < 1.0 else -1.0) * (u[1] - u[0])]),
                         np.array([1.0, 1.0]), (0.0, 2.0), mass_matrix=M)
    assert sa.solve(prob, sa.Kvaerno5(), tstops=[1.0]).u[-1, 1] == pytest.approx(np.exp(-2.0), rel=1e-5)


def test_the_look_is_counted(numpy_lab):
    """Two Jacobians for a solve, at its start and its end."""
    calls = []

    def jac(t, u, p):
        calls.append(t)
        return np.array([[0.0, 0.0], [1.0, -2.0 * u[1]]])

    sol = sa.solve(problem(numpy_lab, "turn", (0.0, 0.5)).remake(jac=jac), sa.Rodas5P(), probe="off")
    assert len(calls) - sol.stats.njac == 5  # before the solve: Newton's iteration from the guess, and the first check
    assert calls.count(0.5) == 1
