"""`check_gradient`: right gradients pass, wrong ones are flagged, whatever they agree with."""

import math

import numpy as np
import pytest

import sensitivity as sa


def f(t, u, p):
    return -p * u + u**2 / 10


def vjp(t, u, p, lam):
    return lam * (-p + u / 5), -lam * u


def problem(wrong=1.0):
    def product(t, u, p, lam):
        a, b = vjp(t, u, p, lam)
        return a, wrong * b

    return sa.ODEProblem(f, np.array([1.0, 2.0]), (0.0, 1.0), np.array([0.5, 0.8]), vjp=product)


def loss(sol):
    return (sol.u**2).sum()


def twice(sol):
    return 2.0 * sol.u


def test_right_gradients_pass(lab):
    prob = sa.ODEProblem(f, lab.array([1.0, 2.0]), (0.0, 1.0), lab.array([0.5, 0.8]))
    check = sa.check_gradient(prob, sa.Tsit5(), loss, saveat=lab.array([0.5, 1.0]))
    assert check.ok
    assert [r.sensealg.name for r in check.rows] == ["RecursiveCheckpointAdjoint", "InterpolatingAdjoint",
                                                     "ForwardSensitivity"]
    for r in check.rows:
        assert r.order == pytest.approx(2.0, abs=0.1)
        assert r.error < 1e-6
        assert r.difference < 1e-8
        assert len(r.remainders) == len(check.steps)
    r = sa.gradient(prob, sa.Tsit5(), loss, saveat=lab.array([0.5, 1.0]), rtol=1e-10, atol=1e-12)
    assert check.value == pytest.approx(float(r.value), rel=1e-12)


@pytest.mark.parametrize("wrong", [2.0, 1.05, 1.001, -1.0])
def test_a_wrong_product_is_flagged(wrong):
    """All algorithms use it and agree with each other; the values do not."""
    check = sa.check_gradient(problem(wrong), sa.Tsit5(), loss, dloss=twice)
    assert not check.ok
    assert not any(r.ok for r in check.rows)
    assert all(r.difference < 1e-7 for r in check.rows)
    assert all("UserVJP" in r.name for r in check.rows)
    assert str(check).count("WRONG") == 3
    if abs(wrong - 1.0) > 0.5:
        assert check.rows[0].order == pytest.approx(1.0, abs=0.2)


def test_one_wrong_algorithm_among_right_ones():
    """The problem's product is wrong, differences of f are right."""
    check = sa.check_gradient(problem(2.0), sa.Tsit5(), loss, [
        sa.RecursiveCheckpointAdjoint(vjp=sa.FiniteDifferenceVJP()), sa.RecursiveCheckpointAdjoint()], dloss=twice)
    assert [r.ok for r in check.rows] == [True, False]
    assert check.rows[1].difference > 0.1
    assert not check.ok


def test_a_wrong_loss_derivative_is_flagged():
    assert not sa.check_gradient(problem(), sa.Tsit5(), loss, dloss=lambda sol: 2.1 * sol.u).ok
    assert sa.check_gradient(problem(), sa.Tsit5(), loss, dloss=twice).ok


def test_costs():
    right = sa.ContinuousCost(lambda t, u, p: float(u[0]) ** 2, lambda t, u, p: np.array([2.0 * u[0], 0.0]))
    wrong = sa.ContinuousCost(right.g, lambda t, u, p: np.array([u[0], 0.0]))
    data = sa.DiscreteCost([0.3, 1.0], lambda t, u, p, i: (i + 1) * u, g=lambda t, u, p, i: (i + 1) * (u**2).sum() / 2)
    assert sa.check_gradient(problem(), sa.Tsit5(), right + data).ok
    assert not sa.check_gradient(problem(), sa.Tsit5(), wrong + data).ok
    with pytest.raises(sa.InputError, match="without g"):
        sa.check_gradient(problem(), sa.Tsit5(), sa.DiscreteCost([1.0], lambda t, u, p: u))


def test_fixed_steps_are_checked_to_round_off():
    """The loss is a smooth function of the inputs: a product wrong by 1e-5 shows."""
    for wrong, ok in ((1.0, True), (1.0 + 1e-5, False)):
        check = sa.check_gradient(problem(wrong), sa.RK4(), loss, [sa.RecursiveCheckpointAdjoint()], dloss=twice,
                                  dt=0.1)
        assert check.ok is ok
        assert (check.rows[0].error < 1e-8) is ok


def test_a_linear_loss_has_remainders_of_round_off():
    """G = u0 . e^{-1} is linear in u0."""
    prob = sa.ODEProblem(lambda t, u, p: -u, np.array([1.0, 2.0]), (0.0, 1.0), vjp=lambda t, u, p, lam: (-lam, None))
    check = sa.check_gradient(prob, sa.RK4(), lambda sol: sol.u.sum(), [sa.RecursiveCheckpointAdjoint()],
                              dloss=lambda sol: np.ones_like(sol.u), dt=0.1)
    assert check.ok
    assert check.rows[0].order is None
    assert "round-off" in str(check)


def test_times_and_what_is_refused_in_a_row():
    algorithms = [sa.RecursiveCheckpointAdjoint(), sa.DirectAdjoint(), sa.ForwardSensitivity()]
    check = sa.check_gradient(problem(), sa.Tsit5(), loss, algorithms, wrt=("t0", "t1", "u0"), dloss=None,
                              saveat="steps", max_steps=1000)
    assert [r.refused is None for r in check.rows] == [True, True, False]
    assert "ForwardSensitivity: " in str(check)
    assert sa.check_gradient(problem(), sa.Tsit5(), loss, algorithms[:1], wrt=("t0", "t1", "u0"), dloss=twice).ok


def test_pytrees(lab):
    prob = sa.ODEProblem(lambda t, u, p: {"x": -p["k"] * u["x"]}, {"x": lab.array([[1.0], [0.0]])}, (0.0, 1.0),
                         {"k": lab.array(0.5), "n": 3})
    check = sa.check_gradient(prob, sa.Tsit5(), lambda sol: (sol.u["x"] ** 3).sum(), [sa.RecursiveCheckpointAdjoint()])
    assert check.ok
    assert check.value == pytest.approx(math.exp(-1.5), rel=1e-8)


def test_rich_shows_the_same_table():
    rich = pytest.importorskip("rich.console")
    import io

    out = io.StringIO()
    check = sa.check_gradient(problem(2.0), sa.Tsit5(), loss, [sa.RecursiveCheckpointAdjoint()], dloss=twice)
    rich.Console(file=out, width=140).print(check)
    assert "WRONG" in out.getvalue()
    assert "Taylor order" in out.getvalue()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"wrt": "saveat"}, "saveat"), ({"loss": 1.0}, "callable"), ({"sensealgs": [sa.DirectAdjoint]}, "class")],
)
def test_refused(options, words):
    with pytest.raises(sa.InputError, match=words):
        sa.check_gradient(problem(), sa.Tsit5(), **{"loss": loss, **options})
