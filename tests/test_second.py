"""Second derivatives: `hessian`, `hessian_vector_product`, `ForwardOverAdjoint`, and AD inside the vector field."""

import json
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa

GOLD = {p["id"]: p for p in json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())["problems"]}
LOGISTIC = GOLD["second_order_logistic"]
NAMES = ("r", "K", "u0")
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
INNER = [sa.auto, sa.InterpolatingAdjoint()]


def reference():
    H = np.zeros((3, 3))
    for pair, value in LOGISTIC["hessian"].items():
        i, j = (NAMES.index(n) for n in pair.split(","))
        H[i, j] = H[j, i] = float(value)
    return H


def logistic(lab, **products):
    r, K, u0 = (float(LOGISTIC["params"][n]) for n in NAMES)
    return sa.ODEProblem(lambda t, u, p: p[0] * u * (1 - u / p[1]), lab.array([u0]), (0.0, 2.0), lab.array([r, K]),
                         **products)


def square(sol):
    return sol.u[-1, 0] ** 2


@pytest.mark.parametrize("inner", INNER, ids=["auto", "InterpolatingAdjoint"])
def test_logistic_growth(lab, inner):
    H = lab.numpy(sa.hessian(logistic(lab), sa.Tsit5(), square, wrt=("p", "u0"), sensealg=sa.ForwardOverAdjoint(inner),
                             **TIGHT))
    np.testing.assert_allclose(H, reference(), rtol=1e-8)
    # Symmetric to round-off where it is the second derivative of the computed solution.
    assert np.abs(H - H.T).max() < (1e-13 if inner is sa.auto else 1e-8)


@pytest.mark.parametrize("inner", [sa.GaussAdjoint(), sa.GaussAdjoint(checkpoints=4), sa.QuadratureAdjoint(),
                                   sa.BacksolveAdjoint(), sa.ReversibleAdjoint()], ids=lambda s: s.name)
def test_other_adjoints_inside(lab, inner):
    """Adjoints of the pair of state and tangent, in whatever way they find the states again."""
    options = {"wrt": ("p", "u0"), "saveat": lab.array([0.7, 2.0]), **TIGHT}
    H = lab.numpy(sa.hessian(logistic(lab), sa.Tsit5(), square, sensealg=inner, **options))
    np.testing.assert_allclose(H, reference(), rtol=1e-8)
    assert np.abs(H - H.T).max() < (1e-12 if inner.exact else 1e-8)


def test_stiff_adjoints_inside(numpy_lab):
    """The costate of the pair by an implicit method, with the Jacobian of the pair."""
    inner = sa.GaussAdjoint(alg=sa.Kvaerno5())
    H = sa.hessian(logistic(numpy_lab), sa.Kvaerno5(), square, wrt=("p", "u0"), sensealg=inner, **TIGHT)
    np.testing.assert_allclose(H, reference(), rtol=1e-7)


def test_an_adjoint_stands_for_forward_over_it(lab):
    a, b = (sa.hessian(logistic(lab), sa.Tsit5(), square, sensealg=s, rtol=1e-6)
            for s in (sa.RecursiveCheckpointAdjoint(), sa.auto))
    np.testing.assert_array_equal(lab.numpy(a), lab.numpy(b))
    assert a.shape == (2, 2)


def test_exact_second_derivative_of_the_computed_solution(lab):
    """Coarse fixed steps, far from the continuous solution: the Taylor remainder of the computed loss is of order 3."""
    prob = lab.lotka_volterra(1.5)
    x = np.array([1.0, 1.2, 1.5, 1.0, 3.0, 1.0])
    v = np.array([0.3, -0.5, 0.2, 0.7, -0.4, 0.1])
    options = {"dt": 0.25, "saveat": lab.array([0.6, 1.5])}

    def at(h):
        y = x + h * v
        return prob.remake(u0=lab.array(y[:2]), p=lab.array(y[2:]))

    def loss(sol):
        return (sol.u**3).sum() + sol.u[0, 0] * sol.prob.p[1] ** 2

    def value(h):
        return float(loss(sa.solve(at(h), sa.RK4(), **options)))

    r = sa.gradient(at(0.0), sa.RK4(), loss, **options)
    Hv = sa.hessian_vector_product(at(0.0), sa.RK4(), loss, (lab.array(v[:2]), lab.array(v[2:])), wrt=("u0", "p"),
                                   **options)
    g = np.concatenate([lab.numpy(r.u0), lab.numpy(r.p)])
    Hv = np.concatenate([lab.numpy(part) for part in Hv])
    hs = 0.02 / 2.0 ** np.arange(4)
    rest = [abs(value(h) - value(0.0) - h * (g @ v) - 0.5 * h**2 * (Hv @ v)) for h in hs]
    orders = np.diff(np.log(rest)) / np.diff(np.log(hs))
    np.testing.assert_allclose(orders, 3.0, atol=0.15)


def test_structures(lab):
    """u' = -k u + a, G = u(1)^2 / 2, with a dictionary that holds an integer and a matrix-shaped state."""
    prob = sa.ODEProblem(lambda t, u, p: -p["k"] * u, lab.array([[1.0], [2.0]]), (0.0, 1.0),
                         {"k": lab.array(0.5), "n": 3})

    def loss(sol):
        return (sol.u**2).sum() / 2

    # G = 5/2 e^{-2k}: G_kk = 10 e^{-2k}, G_{k u0} = -2 u0 e^{-2k}, G_{u0 u0} = e^{-2k}.
    e = np.exp(-1.0)
    v = {"k": lab.array(2.0), "n": 3}
    Hv = sa.hessian_vector_product(prob, sa.Tsit5(), loss, v, **TIGHT)
    np.testing.assert_allclose(lab.numpy(Hv["k"]), 20.0 * e, rtol=1e-8)
    assert Hv["n"] == 3
    p_part, u_part = sa.hessian_vector_product(prob, sa.Tsit5(), loss, (v, lab.array([[0.0], [1.0]])),
                                               wrt=("p", "u0"), **TIGHT)
    np.testing.assert_allclose(lab.numpy(p_part["k"]), (20.0 - 4.0) * e, rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(u_part), [[-4.0 * e], [-8.0 * e + e]], rtol=1e-8)
    H = lab.numpy(sa.hessian(prob, sa.Tsit5(), loss, wrt="u0", **TIGHT))
    np.testing.assert_allclose(H, e * np.eye(2), rtol=1e-8, atol=1e-12)


def test_of_costs(lab):
    """G = int u^2 dt + u(1)^2 for u' = -k u on (0, 2)."""
    k, u0, T = 0.8, 1.5, 2.0
    prob = sa.ODEProblem(lambda t, u, p: -p * u, lab.array([u0]), (0.0, T), lab.array([k]))
    cost = sa.ContinuousCost(lambda t, u, p: u[0] ** 2) + sa.DiscreteCost([1.0], lambda t, u, p: 2.0 * u,
                                                                          g=lambda t, u, p: u[0] ** 2)
    H = lab.numpy(sa.hessian(prob, sa.Tsit5(), cost, wrt=("u0", "p"), **TIGHT))
    e, a = np.exp(-2 * k * T), np.exp(-2 * k)
    by_k = 2 * T * e / k - (1 - e) / k**2
    by_kk = -4 * T**2 * e / k - 4 * T * e / k**2 + 2 * (1 - e) / k**3
    expected = [[(1 - e) / k + 2 * a, u0 * by_k - 4 * u0 * a], [u0 * by_k - 4 * u0 * a, u0**2 * (by_kk / 2 + 4 * a)]]
    np.testing.assert_allclose(H, expected, rtol=1e-8)
    with pytest.raises(sa.InputError, match="without g"):
        sa.hessian(prob, sa.Tsit5(), sa.DiscreteCost([1.0], lambda t, u, p: u))


def test_without_any_ad():
    """A black box with its own products and dloss: differences of exact derivatives, with a warning for each."""
    def f(t, u, p):
        return np.array([float(p[0]) * float(u[0]) * (1 - float(u[0]) / float(p[1]))])

    def vjp(t, u, p, lam):
        return lam * p[0] * (1 - 2 * u / p[1]), np.array([lam[0] * u[0] * (1 - u[0] / p[1]),
                                                          lam[0] * p[0] * u[0] ** 2 / p[1] ** 2])

    prob = sa.ODEProblem(f, np.array([0.1]), (0.0, 2.0), np.array([1.1, 1.2]), vjp=vjp)
    with pytest.warns(sa.NumericalDerivativeWarning) as seen:
        H = sa.hessian(prob, sa.Tsit5(), lambda sol: float(sol.u[-1, 0]) ** 2, dloss=lambda sol: 2.0 * sol.u,
                       wrt=("p", "u0"), **TIGHT)
    assert {"UserVJP" in str(w.message) for w in seen} == {True, False}
    np.testing.assert_allclose(H, reference(), rtol=1e-7)
    with pytest.raises(sa.UnsupportedCombination, match="dloss"), pytest.warns(sa.NumericalDerivativeWarning):
        sa.hessian(prob, sa.Tsit5(), lambda sol: float(sol.u[-1, 0]) ** 2)


def test_ad_is_preferred_to_differences_of_user_products(lab):
    prob = logistic(lab, vjp=lambda t, u, p, lam: (lam * p[0] * (1 - 2 * u / p[1]), lab.array([
        0.0, 0.0]) + lam[0] * u[0]))  # wrong in p, so the numbers show which was used
    np.testing.assert_allclose(lab.numpy(sa.hessian(prob, sa.Tsit5(), square, wrt=("p", "u0"), **TIGHT)), reference(),
                               rtol=1e-8)


def test_differences_on_request(lab):
    """The same number by another way of making products."""
    sensealg = sa.RecursiveCheckpointAdjoint(vjp=sa.FiniteDifferenceVJP())
    with pytest.warns(sa.NumericalDerivativeWarning, match="FiniteDifferenceVJP"):
        H = sa.hessian(logistic(lab), sa.Tsit5(), square, wrt=("p", "u0"), sensealg=sensealg, **TIGHT)
    # Differences of differences: about five digits.
    np.testing.assert_allclose(lab.numpy(H), reference(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"wrt": "t1"}, sa.UnsupportedCombination, "t1"),
        ({"sensealg": sa.ForwardSensitivity()}, sa.UnsupportedCombination, "RecursiveCheckpointAdjoint"),
        ({"sensealg": sa.DirectAdjoint()}, sa.UnsupportedCombination, "RecursiveCheckpointAdjoint"),
        ({"dense": True}, sa.UnsupportedCombination, "dense"),
        ({"events": sa.Event(lambda t, u, p: u[0] - 0.5)}, sa.UnsupportedCombination, "without events"),
        ({"v": np.ones(3)}, sa.InputError, r"expected \[\(2,\)\]"),
        ({"loss": 3.0}, sa.InputError, "callable"),
        ({"max_steps": 2}, sa.SolveError, "max_steps=2"),
    ],
)
def test_refused(numpy_lab, options, error, words):
    options = {"loss": square, "v": np.ones(2), **TIGHT, **options}
    with pytest.raises(error, match=words):
        sa.hessian_vector_product(logistic(numpy_lab), sa.Tsit5(), **options)


def test_inner_is_an_algorithm():
    with pytest.raises(sa.InputError, match="inner"):
        sa.ForwardOverAdjoint("backsolve")
    assert sa.ForwardOverAdjoint(sa.auto) == sa.ForwardOverAdjoint()


def test_in_solve_it_is_its_inner_algorithm(lab):
    a, b = (sa.gradient(logistic(lab), sa.Tsit5(), square, sensealg=s)
            for s in (sa.ForwardOverAdjoint(), sa.RecursiveCheckpointAdjoint()))
    np.testing.assert_allclose(lab.numpy(a.p), lab.numpy(b.p), rtol=1e-13)


def test_jax_agrees_with_its_own_hessian():
    jax = pytest.importorskip("jax")
    prob = sa.ODEProblem(lambda t, u, p: p[0] * u * (1 - u / p[1]), jax.numpy.array([0.1]), (0.0, 2.0),
                         jax.numpy.array([1.1, 1.2]))

    def loss(p):
        return square(sa.solve(prob.remake(p=p), sa.Tsit5(), sensealg=sa.ForwardOverAdjoint(), **TIGHT))

    np.testing.assert_allclose(jax.hessian(loss)(prob.p), sa.hessian(prob, sa.Tsit5(), square, **TIGHT), rtol=1e-11)


# -- AD inside the vector field ---------------------------------------------------------------------------------------

W = np.array([[0.6, -0.4], [0.3, 0.9], [-0.7, 0.2]])


def energy(xp, u, W):
    return xp.tanh(W @ u).sum() + 0.5 * (u**2).sum()


def hamiltonian(lab, nested):
    """u' = J grad H with H a small network; `nested` differentiates it inside, else the gradient is written out."""
    xp = lab.xp

    def slope(u, W):
        if not nested:
            return W.T @ (1.0 - xp.tanh(W @ u) ** 2) + u
        if lab.name == "torch":
            return xp.autograd.grad(energy(xp, u, W), u, create_graph=True)[0]
        if lab.name == "jax":
            import jax

            return jax.grad(lambda u: energy(xp, u, W))(u)
        import autograd

        return autograd.grad(lambda u: energy(xp, u, W))(u)

    def f(t, u, p):
        g = slope(u, p)
        return xp.stack([g[1], -g[0]])

    return sa.ODEProblem(f, lab.array([0.5, -0.3]), (0.0, 1.0), lab.array(W))


@pytest.mark.parametrize("sensealg", [sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(),
                                      sa.ForwardSensitivity(), sa.ForwardADSensitivity(), sa.DirectAdjoint()],
                         ids=lambda s: s.name)
def test_a_gradient_inside_the_field(lab, sensealg):
    """The gradient of a network inside f: second derivatives of the network, against the derivative written out."""
    limits = {"max_steps": 64} if lab.name == "jax" and isinstance(sensealg, sa.DirectAdjoint) else {}
    a, b = (sa.gradient(hamiltonian(lab, nested), sa.Tsit5(), lambda sol: (sol.u**2).sum(), sensealg=sensealg,
                        rtol=1e-6, atol=1e-8, **limits) for nested in (True, False))
    for name in ("value", "u0", "p"):
        np.testing.assert_allclose(lab.numpy(getattr(a, name)), lab.numpy(getattr(b, name)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inner", INNER, ids=["auto", "InterpolatingAdjoint"])
def test_second_derivatives_with_a_gradient_inside_the_field(lab, inner):
    """Third derivatives of the network."""
    v = lab.array(np.linspace(-1.0, 1.0, 6).reshape(3, 2))
    a, b = (sa.hessian_vector_product(hamiltonian(lab, nested), sa.Tsit5(), lambda sol: (sol.u**2).sum(), v,
                                      sensealg=sa.ForwardOverAdjoint(inner), rtol=1e-6, atol=1e-8)
            for nested in (True, False))
    np.testing.assert_allclose(lab.numpy(a), lab.numpy(b), rtol=1e-9, atol=1e-11)
    assert np.abs(lab.numpy(a)).max() > 0.01
