"""The models of `sensitivity.testing.models` give the numbers that are known of them.

Losses are `sum (1 - u)^2 / 2` over save times and components, computed once with SciPy at tolerances of 1e-12 from a
second implementation of the models.
"""

from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import solve_ivp

import sensitivity as sa
from sensitivity.testing import models

EVERY = {"lotka_volterra": models.lotka_volterra, "robertson": models.robertson, "robertson_dae": models.robertson_dae,
         "pollu": models.pollu, "pkpd": lambda xp: models.pkpd(xp).prob, "brusselator_2d": models.brusselator_2d,
         "pendulum_dae": models.pendulum_dae}

# Test set for initial value problem solvers (Mazzia, Magherini): POLLU at t = 60; Robertson at t = 40.
POLLU_60 = [
    0.5646255480022769e-1, 0.1342484130422339, 0.4139734331099427e-8, 0.5523140207484359e-2, 0.2018977262302196e-6,
    0.1464541863493966e-6, 0.7784249118997964e-1, 0.3245075353396018, 0.7494013383880406e-2, 0.1622293157301561e-7,
    0.1135863833257075e-7, 0.2230505975721359e-2, 0.2087162882798630e-3, 0.1396921016840158e-4, 0.8964884856898295e-2,
    0.4352846369330103e-17, 0.6899219696263405e-2, 0.1007803037365946e-3, 0.1772146513969984e-5, 0.5682943292316392e-4]
ROBERTSON_40 = [0.7158270687193941, 9.185534764557338e-6, 0.2841637457458413]


def loss(u):
    return float(((1.0 - np.asarray(u)) ** 2).sum() / 2.0)


def stiff(prob, ts):
    """States at times by an implicit method of SciPy."""
    shape = prob.u0.shape
    done = solve_ivp(lambda t, u: prob.f(t, u.reshape(shape), prob.p).ravel(), (0.0, ts[-1]), prob.u0.ravel(),
                     method="Radau", t_eval=ts, rtol=1e-11, atol=1e-18)
    return done.y.T


def test_lotka_volterra():
    sol = sa.solve(models.lotka_volterra(np), sa.Dopri8(), saveat=np.arange(0.0, 10.1, 0.5), rtol=1e-12, atol=1e-12)
    assert loss(sol.u) == pytest.approx(102.04210862116219, rel=1e-10)


def test_robertson():
    u = stiff(models.robertson(np), np.array([40.0, 1e5]))
    np.testing.assert_allclose(u[0], ROBERTSON_40, rtol=1e-9)
    np.testing.assert_allclose(u[1], [0.017865921142099277, 7.274751468436254e-08, 0.982134006110384], rtol=1e-9)
    dae = models.robertson_dae(np)
    np.testing.assert_array_equal(dae.mass_matrix, np.diag([1.0, 1.0, 0.0]))
    for row in u:
        du, plain = dae.f(0.0, row, dae.p), models.robertson(np).f(0.0, row, dae.p)
        np.testing.assert_array_equal(du[:2], plain[:2])
        assert du[2] == pytest.approx(0.0, abs=1e-10)


def test_pollu():
    prob = models.pollu(np)
    u = stiff(prob, np.arange(0.0, 60.1, 0.5))
    np.testing.assert_allclose(u[-1], POLLU_60, rtol=1e-9)
    assert loss(u) == pytest.approx(1142.5283569073467, rel=1e-10)


def test_pkpd():
    prob, times, affect = models.pkpd(np)
    assert times == (24.0, 48.0)
    rows, u, edges = [], prob.u0, (0.0, *times, 50.0)
    for start, stop in pairwise(edges):
        u = affect(start, u, prob.p) if start else u
        ts = np.arange(start, stop + 0.1, 0.5)
        part = sa.solve(prob.remake(u0=u, tspan=(start, stop)), sa.Dopri8(), saveat=ts, rtol=1e-12, atol=1e-12).u
        u = part[-1]
        rows.append(part[1:] if start else part)
    assert loss(np.concatenate(rows)) == pytest.approx(200131.94773367478, rel=1e-10)


def test_brusselator():
    prob = models.brusselator_2d(np)
    sol = sa.solve(prob, sa.Dopri8(), saveat=np.arange(0.0, 1.05, 0.1), rtol=1e-11, atol=1e-12)
    assert loss(sol.u) == pytest.approx(296.82365391996, rel=1e-10)
    large = models.brusselator_2d(np, 20)
    assert large.u0.shape == (2, 20, 20)
    assert large.p.shape == (4, 20, 20)
    # Only late, and only in the fed cells, is there more of the first species.
    fed = large.f(1.2, large.u0, large.p) - large.f(1.0, large.u0, large.p)
    assert (fed[1] == 0.0).all()
    x = np.linspace(0.0, 1.0, 20)
    inside = (x[:, None] - 0.3) ** 2 + (x[None, :] - 0.6) ** 2 <= 0.01
    np.testing.assert_allclose(fed[0], 5.0 * inside, atol=1e-9)
    assert inside.any()


def test_pendulum():
    """In the angle it is th'' = -(g/L) sin th; the constraint and the tension follow."""
    prob = models.pendulum_dae(np)
    np.testing.assert_allclose(prob.f(0.0, prob.u0, prob.p)[4], 0.0, atol=1e-12)
    assert np.hypot(*prob.u0[:2]) == pytest.approx(1.2)
    assert prob.u0[:2] @ prob.u0[2:4] == pytest.approx(0.0, abs=1e-15)
    done = solve_ivp(lambda t, v: [v[1], -9.81 / 1.2 * np.sin(v[0])], (0.0, 1.5), [0.9, 0.4 / 1.2], rtol=1e-12,
                     atol=1e-12, dense_output=True)
    for t in (0.4, 1.5):
        th, w = done.sol(t)
        u = np.array([1.2 * np.sin(th), -1.2 * np.cos(th), 1.2 * w * np.cos(th), 1.2 * w * np.sin(th),
                      w * w + 9.81 / 1.2 * np.cos(th)])
        du = prob.f(t, u, prob.p)
        assert du[4] == pytest.approx(0.0, abs=1e-11)
        np.testing.assert_allclose(du[2:4], [1.2 * (-9.81 / 1.2 * np.sin(th) * np.cos(th) - w * w * np.sin(th)),
                                             1.2 * (-9.81 / 1.2 * np.sin(th) ** 2 + w * w * np.cos(th))], atol=1e-11)


@pytest.mark.parametrize("name", EVERY)
def test_every_framework_computes_the_same(lab, name):
    prob, plain = EVERY[name](lab.xp), EVERY[name](np)
    for field in ("u0", "p"):
        np.testing.assert_array_equal(lab.numpy(getattr(prob, field)), getattr(plain, field))
    moved = plain.u0 * 1.1 + 0.01
    got = lab.numpy(prob.f(lab.be.time(lab.be.scalar(1.2)), lab.array(moved), prob.p))
    np.testing.assert_allclose(got, plain.f(1.2, moved, plain.p), rtol=1e-13, atol=1e-13 * abs(got).max())
    assert prob.f(1.0, lab.array(moved), prob.p).shape == got.shape
