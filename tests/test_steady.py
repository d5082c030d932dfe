"""Steady states and their derivatives: closed forms, matrices written by hand, every way to solve linear systems."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import solve_banded
from scipy.sparse import csc_array, diags_array

import sensitivity as sa
from sensitivity import krylov, linear, matrices

GOLD = {p["id"]: p for p in json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())["problems"]}
SOLVERS = ["dense", "sparse", "krylov"]


# -- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alg", "solver"),
    [(None, None), (sa.Newton(), "krylov"), (sa.PseudoTransient(), "dense"), (sa.Newton("krylov"), None),
     (sa.PseudoTransient("krylov"), "krylov"), (sa.Newton("dense"), "dense")],
    ids=["auto", "mixed-1", "mixed-2", "mixed-3", "mixed-4", "mixed-5"],
)
def test_linear(lab, alg, solver):
    """A u = q: one Newton step, and the gradients by two lines of algebra."""
    P = GOLD["steady_linear"]
    rhs, cost = eval(P["code"]["rhs"]), eval(P["loss"]["code"])
    p = {k: lab.array(float(v)) for k, v in P["params"].items()}
    prob = sa.SteadyStateProblem(lambda t, u, p: lab.xp.stack(rhs(t, u, p, lab.xp)), lab.array([0.0, 0.0]), p)
    r = sa.gradient(prob, alg, lambda sol: cost([sol.u[0, :]], p, lab.xp), rtol=1e-9,
                    sensealg=sa.ImplicitAdjoint(solver))
    assert float(r.value) == pytest.approx(float(P["value"]), rel=1e-12)
    for k, v in P["gradient"].items():
        assert float(r.p[k]) == pytest.approx(float(v), rel=1e-9 if solver == "krylov" else 1e-12), k
    np.testing.assert_array_equal(lab.numpy(r.u0), [0.0, 0.0])
    assert r.solution.retcode == sa.RetCode.Success
    np.testing.assert_array_equal(lab.numpy(r.solution.t), [np.inf])


def brusselator(lab, guess=(1.5, 2.0), dtype="float64"):
    """x' = a + x^2 y - (b + 1) x, y' = b x - x^2 y: the steady state is x = a, y = b / a."""

    def f(t, u, p):
        x, y = u["x"], u["y"]
        return {"x": p[0] + x * x * y - (p[1] + 1.0) * x, "y": p[1] * x - x * x * y}

    u0 = {"x": lab.array(guess[0], dtype), "y": lab.array(guess[1], dtype)}
    return sa.SteadyStateProblem(f, u0, lab.array([1.3, 1.7], dtype))


@pytest.mark.parametrize("alg", [None, sa.Newton(), sa.PseudoTransient()])
def test_brusselator(lab, alg):
    a, b = 1.3, 1.7
    # Pseudo-transient steps end with corrections of a thousandth of the tolerance.
    r = sa.gradient(brusselator(lab), alg, lambda sol: sol.u["x"][0] ** 2 + 3.0 * sol.u["y"][0], rtol=1e-10, atol=1e-12)
    assert float(r.value) == pytest.approx(a * a + 3.0 * b / a, rel=1e-12)
    np.testing.assert_allclose(lab.numpy(r.p), [2.0 * a - 3.0 * b / a**2, 3.0 / a], rtol=1e-11)
    assert lab.tree(r.u0) == {"x": 0.0, "y": 0.0}
    assert r.sensealg.name == "ImplicitAdjoint"
    assert any("implicit function" in s for s in r.sensealg.because)


def test_single_precision(lab):
    r = sa.gradient(brusselator(lab, dtype="float32"), None, lambda sol: sol.u["x"][0] ** 2 + 3.0 * sol.u["y"][0])
    np.testing.assert_allclose(lab.numpy(r.p), [2.6 - 5.1 / 1.69, 3.0 / 1.3], rtol=2e-5)
    assert str(r.p.dtype).endswith("float32")


def test_far_away(lab):
    """From a guess where Newton's method finds another root, the flow leads to the attracting steady state."""
    prob = sa.SteadyStateProblem(lambda t, u, p: u - u**3 + p, lab.array([-0.1]), lab.array(0.0))
    assert float(sa.solve(prob, sa.Newton()).u[0, 0]) == pytest.approx(0.0, abs=1e-9)
    assert float(sa.solve(prob, sa.PseudoTransient()).u[0, 0]) == pytest.approx(-1.0, rel=1e-6)
    assert float(sa.solve(prob, sa.PseudoTransient(dt=0.01)).u[0, 0]) == pytest.approx(-1.0, rel=1e-6)


def test_fallback(lab):
    """Where full corrections fly off the line search helps, where it gets stuck the fallback does."""
    steep = sa.SteadyStateProblem(lambda t, u, p: -lab.xp.arctan(u - p), lab.array([20.0]), lab.array(1.0))
    sol = sa.solve(steep, sa.Newton())
    assert sol.stats.nreject > 0
    assert float(sol.u[0, 0]) == pytest.approx(1.0, rel=1e-12)

    def dip(t, u, p):  # |f| has a minimum that is no root at sqrt(2/3), where the line search ends
        return -(u**3) + 2.0 * u - 2.0 + p

    prob = sa.SteadyStateProblem(dip, lab.array([1.0]), lab.array(0.0))
    with pytest.raises(sa.SolveError, match="PseudoTransient"):
        sa.solve(prob, sa.Newton())
    sol = sa.solve(prob)
    assert sol.alg == sa.Newton(fallback=sa.PseudoTransient())
    d = np.sqrt(1.0 - 8.0 / 27.0)
    assert float(sol.u[0, 0]) == pytest.approx(np.cbrt(-1.0 + d) + np.cbrt(-1.0 - d), rel=1e-9)


# -- many unknowns ------------------------------------------------------------------------------------------------


def chain(lab, n, dtype="float64", **given):
    """u_i' = p_i - 3 u_i - u_i^3 + u_{i-1} + 0.5 u_{i+1}, with the derivatives to be had by hand."""
    xp = lab.xp
    zero = lab.array([0.0], dtype)
    concat = xp.concatenate if lab.name == "numpy" else xp.concat

    def f(t, u, p):
        return p - 3.0 * u - u**3 + concat([zero, u[:-1]]) + 0.5 * concat([u[1:], zero])

    p = 1.0 + 0.5 * np.sin(np.arange(n))
    return sa.SteadyStateProblem(f, lab.array(np.zeros(n), dtype), lab.array(p, dtype), **given), p


def bands(u):
    """f_u in the form of `solve_banded`."""
    n = len(u)
    return np.stack([np.r_[0.0, np.full(n - 1, 0.5)][:n], -3.0 - 3.0 * u**2, np.r_[np.full(n - 1, 1.0), 0.0][:n]])


def truth(p):
    """Steady state and gradient of sum(w u) by banded Newton steps and one banded transposed solve."""
    u, n = np.zeros_like(p), len(p)
    for _ in range(30):
        f = p - 3.0 * u - u**3 + np.r_[0.0, u[:-1]] + 0.5 * np.r_[u[1:], 0.0]
        u = u - solve_banded((1, 1), bands(u), f)
    w = np.cos(np.arange(n))
    transposed = bands(u)
    transposed = np.stack([np.r_[0.0, np.full(n - 1, 1.0)][:n], transposed[1], np.r_[np.full(n - 1, 0.5), 0.0][:n]])
    return u, w, -solve_banded((1, 1), transposed, w)


def pattern(n):
    return diags_array([np.ones(n - 1), np.ones(n), np.ones(n - 1)], offsets=[-1, 0, 1])


def check_chain(lab, n, alg=None, solver=None, **given):
    # GMRES stops at 1e-10 of the norm of the right-hand side; single entries are ten times worse.
    rtol = 1e-11 if solver in ("dense", "sparse") or given or (n <= linear.DENSE_LIMIT and solver is None) else 1e-8
    prob, p = chain(lab, n, **given)
    u, w, want = truth(p)
    weights = lab.array(w)
    r = sa.gradient(prob, alg, lambda sol: (sol.u[0, :] * weights).sum(), sensealg=sa.ImplicitAdjoint(solver), wrt="p")
    np.testing.assert_allclose(lab.numpy(r.solution.u)[0], u, rtol=1e-10)
    np.testing.assert_allclose(lab.numpy(r.p), want, rtol=rtol, atol=rtol * abs(want).max())
    return r


@pytest.mark.parametrize("n", [2, 39, 40, 41, 49, 50, 51, 200])
def test_sizes(lab, n):
    """Around the restart of GMRES (40) and where others switch (50): the three ways agree with the truth."""
    for solver in SOLVERS:
        given = {"jac_sparsity": pattern(n)} if solver == "sparse" else {}
        check_chain(lab, n, sa.Newton(solver), solver, **given)


@pytest.mark.parametrize("n", [linear.DENSE_LIMIT - 1, linear.DENSE_LIMIT, linear.DENSE_LIMIT + 1])
def test_around_the_switch(lab, n):
    r = check_chain(lab, n)
    dense = n <= linear.DENSE_LIMIT
    assert (r.stats.nlu > 0) == dense
    assert (r.stats.njac > 0) == dense


def test_ten_thousand_without_a_matrix(lab):
    check_chain(lab, 10_000)


def test_ten_thousand_sparse(lab):
    r = check_chain(lab, 10_000, jac_sparsity=pattern(10_000))
    assert r.stats.njac == r.stats.nlu > 0


def test_ten_thousand_with_own_products():
    """Nothing but the user's products and jac: no AD, no differences."""
    n = 10_000
    p = 1.0 + 0.5 * np.sin(np.arange(n))
    u, w, want = truth(p)

    def f(t, u, p):
        return p - 3.0 * u - u**3 + np.r_[0.0, u[:-1]] + 0.5 * np.r_[u[1:], 0.0]

    def vjp(t, u, p, lam):
        return (-3.0 - 3.0 * u**2) * lam + np.r_[lam[1:], 0.0] + 0.5 * np.r_[0.0, lam[:-1]], lam

    def jvp(t, u, p, du, dp):
        return (-3.0 - 3.0 * u**2) * du + np.r_[0.0, du[:-1]] + 0.5 * np.r_[du[1:], 0.0] + dp

    def jac(t, u, p):
        return diags_array([np.full(n - 1, 1.0), -3.0 - 3.0 * u**2, np.full(n - 1, 0.5)], offsets=[-1, 0, 1])

    for given, sparse in (({"vjp": vjp, "jvp": jvp}, False), ({"vjp": vjp, "jac": jac}, True)):
        prob = sa.SteadyStateProblem(f, np.zeros(n), p, **given)
        r = sa.gradient(prob, None, lambda sol: (sol.u[0] * w).sum(), dloss=lambda sol: w[None, :], wrt="p")
        np.testing.assert_allclose(r.p, want, rtol=1e-8, atol=1e-8 * abs(want).max())
        np.testing.assert_allclose(r.solution.u[0], u, rtol=1e-10)
        assert (r.stats.nlu > 0) == sparse


def test_krylov_alone():
    """GMRES against LU: normal, skew (no descent in the first direction), defective, singular."""
    from sensitivity.registry import registry

    be = registry().backend("numpy")
    rng = np.random.default_rng(0)
    n = 60
    for A in (np.eye(n) + 0.1 * rng.standard_normal((n, n)), np.array([[0.0, 1.0], [-1.0, 0.0]]),
              np.roll(np.eye(30), 1, 0), np.array([[3.0]])):
        b = rng.standard_normal(len(A))
        x = krylov.gmres(be, lambda v, A=A: A @ v, b, 1e-12)
        np.testing.assert_allclose(A @ x, b, atol=1e-11 * np.linalg.norm(b))
    np.testing.assert_array_equal(krylov.gmres(be, lambda v: 2.0 * v, np.zeros(3), 1e-12), np.zeros(3))
    x = krylov.gmres(be, lambda v: np.array([v[0], 0.0]), np.array([1.0, 1.0]), 1e-12)
    assert abs(np.array([1.0 - x[0], 1.0])).max() >= 0.9  # no solution: the residual stays, and says so


def test_factorize(lab):
    """One vector or rows, the matrix or its transpose; NaN where there is no answer."""
    from sensitivity.backend import Backend

    A, b = np.array([[4.0, 1.0, 0.0], [2.0, 5.0, 1.0], [0.0, 1.0, 3.0]]), np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    ways = [lab.be.factorize(lab.array(A))]
    if lab.name == "numpy":
        ways.append(Backend.factorize(lab.be, A))
    for solve in ways:
        for rhs in (b, b[0]):
            got = lab.numpy(solve(lab.array(rhs)))
            np.testing.assert_allclose(got, np.linalg.solve(A, rhs.T).T, rtol=1e-13)
            got = lab.numpy(solve(lab.array(rhs), transposed=True))
            np.testing.assert_allclose(got, np.linalg.solve(A.T, rhs.T).T, rtol=1e-13)
    singular = np.array([[1.0, 0.0], [0.0, 0.0]])
    for factorize in (lab.be.factorize, lambda A: Backend.factorize(lab.be, A)):
        assert not np.isfinite(lab.numpy(factorize(lab.array(singular))(lab.array([1.0, 1.0])))).all()


# -- what is counted ----------------------------------------------------------------------------------------------


def test_counts(numpy_lab):
    calls = {"f": 0, "jac": 0, "vjp": 0}

    def f(t, u, p):
        calls["f"] += 1
        return p - u**3

    def jac(t, u, p):
        calls["jac"] += 1
        return np.diag(-3.0 * u**2)

    def vjp(t, u, p, lam):
        calls["vjp"] += 1
        return -3.0 * u**2 * lam, lam

    prob = sa.SteadyStateProblem(f, np.array([1.0, 3.0]), np.array([8.0, 27.0]), jac=jac, vjp=vjp)
    for alg in (sa.Newton("dense"), sa.PseudoTransient("dense")):
        sa.solve(prob, alg)
        calls.update(f=0, jac=0, vjp=0)
        sol = sa.solve(prob, alg, probe="off")
        calls["jac"] -= 1  # once to see whether it is sparse
        s = sol.stats
        assert (s.nfe, s.njac, s.nlu, s.nsolve) == (calls["f"], calls["jac"], s.njac, s.njac)
        if alg.name == "Newton":
            assert s.nfe == 1 + s.naccept + s.nreject
            assert s.nsolve == s.naccept
        else:
            assert s.nsolve == s.nfe - 1 == s.naccept + s.nreject
        calls.update(f=0, jac=0, vjp=0)
        r = sa.gradient(prob, alg, lambda sol: sol.u.sum(), dloss=lambda sol: np.ones((1, 2)), wrt="p", probe="off")
        assert r.stats.nvjp == calls["vjp"] == 3
        assert (r.stats.njac, r.stats.nlu, r.stats.nsolve) == (s.njac + 1, s.nlu + 1, s.nsolve + 2)
        assert r.stats.njac == calls["jac"] - 1
        assert r.stats.nfe == calls["f"]
        np.testing.assert_allclose(r.p, [1.0 / 12.0, 1.0 / 27.0], rtol=1e-8)


def test_differences_are_said_aloud():
    prob = sa.SteadyStateProblem(lambda t, u, p: p - np.array([float(u[0]) ** 3]), np.array([1.0]), np.array([8.0]))
    with pytest.warns(sa.NumericalDerivativeWarning):
        sol = sa.solve(prob)
    assert sol.u[0, 0] == pytest.approx(2.0, rel=1e-9)
    with pytest.warns(sa.NumericalDerivativeWarning):
        r = sa.gradient(prob, None, lambda sol: sol.u.sum(), dloss=lambda sol: np.ones((1, 1)))
    assert r.p[0] == pytest.approx(1.0 / 12.0, rel=1e-7)
    r = sa.gradient(prob, None, lambda sol: sol.u.sum(), dloss=lambda sol: np.ones((1, 1)),
                    sensealg=sa.ImplicitAdjoint(vjp=sa.FiniteDifferenceVJP()))
    assert r.p[0] == pytest.approx(1.0 / 12.0, rel=1e-7)


def test_ad_that_misses_one_entry_of_many_is_found_out(numpy_lab):
    """Beyond 256 unknowns AD and differences are compared along a few directions; one wrong entry shows."""
    anp = numpy_lab.xp
    hidden = np.zeros(300)
    hidden[7] = 1.0

    def f(t, u, p):
        return p - u - hidden * getattr(u, "_value", u)

    prob = sa.SteadyStateProblem(f, np.zeros(300), np.ones(300))
    with pytest.warns(sa.NumericalDerivativeWarning, match="disagrees"):
        assert sa.solve(prob).u[0, 7] == pytest.approx(0.5)
    plain = sa.SteadyStateProblem(lambda t, u, p: p - anp.exp(u), np.zeros(300), np.ones(300))
    assert "reverse-mode" in sa.solve(plain).sensealg.because[-1]


def test_many_unknowns_without_transposed_products():
    """GMRES for the adjoint by differences would take thousands of evaluations per product: refused, not slow."""
    prob = sa.SteadyStateProblem(lambda t, u, p: p - u, np.zeros(600), np.ones(600))
    numeric = sa.ImplicitAdjoint(vjp=sa.FiniteDifferenceVJP())
    with pytest.raises(sa.UnsupportedCombination, match="jac_sparsity"):
        sa.solve(prob, sensealg=numeric)
    assert sa.solve(prob.remake(jac_sparsity=np.eye(600)), sensealg=numeric).success


# -- second derivatives ------------------------------------------------------------------------------------------


def test_second_derivatives(lab):
    """Of the Brusselator's steady state (a, b/a), in closed form; the guess does not move it."""
    xp, a, b = lab.xp, 1.3, 1.7
    prob = sa.SteadyStateProblem(
        lambda t, u, p: xp.stack([p[0] + u[0] ** 2 * u[1] - (p[1] + 1.0) * u[0], p[1] * u[0] - u[0] ** 2 * u[1]]),
        lab.array([1.5, 2.0]), lab.array([a, b]))

    def loss(sol):
        return sol.u[0, 0] ** 2 + 3.0 * sol.u[0, 1] * sol.prob.p[1] + sol.prob.p[0] ** 3

    second = [[2.0 + 6.0 * b**2 / a**3 + 6.0 * a, -6.0 * b / a**2], [-6.0 * b / a**2, 6.0 / a]]
    H = lab.numpy(sa.hessian(prob, loss=loss, rtol=1e-9))
    np.testing.assert_allclose(H, second, rtol=1e-12)
    given = [0.3, -0.7]
    v = lab.array(given), lab.array([1.0, 2.0])
    p_part, u_part = sa.hessian_vector_product(prob, sa.PseudoTransient(), loss, v, wrt=("p", "u0"), rtol=1e-11)
    np.testing.assert_allclose(lab.numpy(p_part), np.array(second) @ given, rtol=1e-9)
    np.testing.assert_array_equal(lab.numpy(u_part), [0.0, 0.0])


@pytest.mark.parametrize("solver", [None, "sparse", "krylov"])
def test_second_derivatives_by_every_linear_solver(numpy_lab, solver):
    """A ring of cells, against differences of the gradient."""
    xp, n = numpy_lab.xp, 30
    i = np.arange(n)
    ring = np.eye(n) + np.eye(n)[:, np.roll(i, 1)] + np.eye(n)[:, np.roll(i, -1)]

    def f(t, u, p):
        return p[0] * (xp.roll(u, 1) - 2.0 * u + xp.roll(u, -1)) - u**3 + p[1:] * xp.sin(i + p[0])

    prob = sa.SteadyStateProblem(f, np.zeros(n) + 0.1, np.linspace(0.5, 1.5, n + 1), jac_sparsity=ring)
    sensealg, v = sa.ImplicitAdjoint(solver), np.cos(np.arange(n + 1.0))
    options = {"loss": lambda sol: (sol.u**4).sum(), "rtol": 1e-12, "atol": 1e-13, "sensealg": sensealg}
    Hv = sa.hessian_vector_product(prob, v=v, **options)
    g = [sa.gradient(prob.remake(p=prob.p + s * v), **options).p for s in (1e-4, -1e-4, 2e-4, -2e-4)]
    want = (8.0 * (g[0] - g[1]) - (g[2] - g[3])) / 12e-4
    np.testing.assert_allclose(Hv, want, rtol=1e-7, atol=1e-9 * np.abs(want).max())


def test_second_derivatives_factorise_once(numpy_lab):
    """One Jacobian beside those of Newton's iteration serves the tangent and both adjoint equations."""
    calls = []

    def jac(t, u, p):
        calls.append(1)
        return np.array([[-3.0 * u[0] ** 2, p[0]], [p[0], -2.0]])

    xp = numpy_lab.xp
    prob = sa.SteadyStateProblem(lambda t, u, p: xp.stack([p[0] * u[1] - u[0] ** 3 + 1.0, p[0] * u[0] - 2.0 * u[1]]),
                                 np.array([1.0, 1.0]), np.array([0.7]), jac=jac)
    found = sa.solve(prob, sa.Newton(), rtol=1e-9)
    calls.clear()
    sa.hessian_vector_product(prob, sa.Newton(), lambda sol: (sol.u**2).sum(), np.array([1.0]), rtol=1e-9, probe="off")
    assert len(calls) == found.stats.njac + 2  # the first call sees what jac returns


def test_second_derivatives_of_no_isolated_state(numpy_lab):
    xp = numpy_lab.xp
    conserved = sa.SteadyStateProblem(lambda t, u, p: xp.stack([p[0] * u[1] - u[0], u[0] - p[0] * u[1]]),
                                      np.array([1.0, 0.0]), np.array([2.0]))
    with pytest.raises(sa.SolveError, match="f_u at the steady state could not be solved"):
        sa.hessian(conserved, sa.PseudoTransient(), lambda sol: sol.u[0, 0] ** 2)


def test_second_derivatives_refused(numpy_lab):
    prob = sa.SteadyStateProblem(lambda t, u, p: p - u, np.array([1.0]), np.array([2.0]))
    with pytest.raises(sa.UnsupportedCombination, match="ImplicitAdjoint"):
        sa.hessian(prob, loss=lambda sol: sol.u.sum(), sensealg=sa.ForwardOverAdjoint())


# -- frameworks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jax_steady():
    """A loss of the Brusselator's steady state with the derivatives that it has: `(make, p, first, second)`."""
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    prob = sa.SteadyStateProblem(
        lambda t, u, p: jnp.stack([p[0] + u[0] ** 2 * u[1] - (p[1] + 1.0) * u[0], p[1] * u[0] - u[0] ** 2 * u[1]]),
        jnp.array([1.5, 2.0]), jnp.array([1.3, 1.7]))
    a, b = 1.3, 1.7

    def make(solver):
        def loss(p):
            u = sa.solve(prob.remake(p=p), sa.Newton(solver), sensealg=sa.ImplicitAdjoint(solver), rtol=1e-9).u[0]
            return u[0] ** 2 + 3.0 * u[1]

        return loss

    first = np.array([2.0 * a - 3.0 * b / a**2, 3.0 / a])
    second = np.array([[2.0 + 6.0 * b / a**3, -3.0 / a**2], [-3.0 / a**2, 0.0]])
    return make, prob, first, second


def test_jax_transforms(jax_steady):
    import jax
    import jax.numpy as jnp

    make, prob, first, second = jax_steady
    p, loss = prob.p, make("dense")
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(p), first, rtol=1e-11)
    np.testing.assert_allclose(jax.jvp(loss, (p,), (jnp.array([0.3, -0.7]),))[1], first @ [0.3, -0.7], rtol=1e-11)
    np.testing.assert_allclose(jax.hessian(loss)(p), second, rtol=1e-10, atol=1e-10)
    batch = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([p, p + 0.2]))
    np.testing.assert_allclose(batch[0], first, rtol=1e-11)
    np.testing.assert_allclose(batch[1], [3.0 - 5.7 / 2.25, 2.0], rtol=1e-11)
    zero = jax.grad(lambda u0: sa.solve(prob.remake(u0=u0)).u.sum())(prob.u0)
    np.testing.assert_array_equal(zero, [0.0, 0.0])


@pytest.mark.slow
def test_jax_transforms_by_products(jax_steady):
    """The same through GMRES, which JAX differentiates as the linear solve that it is, and in other orders."""
    import jax
    import jax.numpy as jnp

    make, prob, first, second = jax_steady
    p, loss = prob.p, make("krylov")
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([p, p]))[1], first, rtol=1e-9)
    np.testing.assert_allclose(jax.jvp(loss, (p,), (jnp.array([0.3, -0.7]),))[1], first @ [0.3, -0.7], rtol=1e-9)
    for twice in (jax.hessian(loss), jax.jacrev(jax.grad(loss)), jax.jacfwd(jax.jacfwd(loss))):
        np.testing.assert_allclose(twice(p), second, rtol=1e-8, atol=1e-8)


def test_jax_failure_inside_jit():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    prob = sa.SteadyStateProblem(lambda t, u, p: u**2 + p, jnp.array([1.0]), jnp.array(1.0))
    sol = jax.jit(lambda p: sa.solve(prob.remake(p=p)))(prob.p)
    assert int(sol.retcode) in (int(sa.RetCode.NewtonFailure), int(sa.RetCode.MaxSteps))
    assert np.isnan(sol.u).all()
    conserved = sa.SteadyStateProblem(lambda t, u, p: jnp.stack([p * u[1] - u[0], u[0] - p * u[1]]),
                                      jnp.array([1.0, 0.0]), jnp.array(2.0))
    g = jax.jit(jax.grad(lambda p: sa.solve(conserved.remake(p=p), sa.PseudoTransient()).u[0, 0]))(conserved.p)
    assert np.isnan(g)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_torch_transforms():
    torch = pytest.importorskip("torch")

    def f(t, u, p):
        return torch.stack([p[0] + u[0] ** 2 * u[1] - (p[1] + 1.0) * u[0], p[1] * u[0] - u[0] ** 2 * u[1]])

    u0, p = torch.tensor([1.5, 2.0], dtype=torch.float64), torch.tensor([1.3, 1.7], dtype=torch.float64)
    first = [2.6 - 5.1 / 1.69, 3.0 / 1.3]

    def loss(p):
        u = sa.solve(sa.SteadyStateProblem(f, u0, p), rtol=1e-9).u[0]
        return u[0] ** 2 + 3.0 * u[1]

    leaf, start = p.clone().requires_grad_(), u0.clone().requires_grad_()
    u = sa.solve(sa.SteadyStateProblem(f, start, leaf), rtol=1e-9).u[0]
    (u[0] ** 2 + 3.0 * u[1]).backward()
    np.testing.assert_allclose(leaf.grad.numpy(), first, rtol=1e-11)
    np.testing.assert_array_equal(start.grad.numpy(), [0.0, 0.0])
    np.testing.assert_allclose(torch.func.grad(loss)(p).numpy(), first, rtol=1e-11)
    v = torch.tensor([0.3, -0.7], dtype=torch.float64)
    np.testing.assert_allclose(float(torch.func.jvp(loss, (p,), (v,))[1]), 0.3 * first[0] - 0.7 * first[1], rtol=1e-10)
    batch = torch.func.vmap(torch.func.grad(loss))(torch.stack([p, p + 0.2]))
    np.testing.assert_allclose(batch[1].numpy(), torch.func.grad(loss)(p + 0.2).numpy(), rtol=1e-11)
    a, b = 1.3, 1.7
    second = [[2.0 + 6.0 * b / a**3, -3.0 / a**2], [-3.0 / a**2, 0.0]]
    np.testing.assert_allclose(torch.func.hessian(loss)(p).numpy(), second, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(torch.autograd.functional.hessian(loss, p).numpy(), second, rtol=1e-12, atol=1e-13)


def test_torch_module():
    """A deep equilibrium layer: the parameters of the module get gradients, as by differences."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, t, u, p):
            return torch.tanh(self.mix(u)) + p - 2.0 * u

    layer, x = Layer(), torch.tensor([0.1, -0.4, 0.8], dtype=torch.float64)

    def loss():
        return (sa.solve(sa.SteadyStateProblem(layer, torch.zeros(3, dtype=torch.float64), x), rtol=1e-10).u ** 2).sum()

    loss().backward()
    weight = layer.mix.weight
    with torch.no_grad():
        for i, j in ((0, 0), (1, 2)):
            kept, ends = weight[i, j].item(), []
            for e in (1e-6, -1e-6):
                weight[i, j] = kept + e
                ends.append(float(loss()))
            weight[i, j] = kept
            assert float(weight.grad[i, j]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-7)


def test_autograd():
    autograd = pytest.importorskip("autograd")
    anp = autograd.numpy

    def loss(p):
        prob = sa.SteadyStateProblem(lambda t, u, p: anp.stack([p[0] - u[0] ** 3, u[0] - p[1] * u[1]]), np.ones(2), p)
        return anp.sum(sa.solve(prob, rtol=1e-9).u)

    g = autograd.grad(loss)(np.array([8.0, 2.0]))
    np.testing.assert_allclose(g, [1.0 / 12.0 * 1.5, -0.5], rtol=1e-11)


def test_autograd_says_when_a_system_is_singular():
    autograd = pytest.importorskip("autograd")
    anp = autograd.numpy

    def loss(p):
        prob = sa.SteadyStateProblem(lambda t, u, p: anp.stack([p * u[1] - u[0], u[0] - p * u[1]]),
                                     np.array([1.0, 0.0]), p)
        return sa.solve(prob, sa.PseudoTransient()).u[0, 0]

    with pytest.raises(sa.SolveError, match="not isolated"):
        autograd.grad(loss)(2.0)


# -- failures -----------------------------------------------------------------------------------------------------


def test_failures_name_what_happened(lab):
    none = sa.SteadyStateProblem(lambda t, u, p: u**2 + p, lab.array([1.0]), lab.array(1.0))
    for alg in (sa.Newton(), sa.PseudoTransient()):
        with pytest.raises(sa.SolveError) as e:
            sa.solve(none, alg, max_steps=30)
        assert e.value.retcode.name in ("NewtonFailure", "MaxSteps")
        assert all(word in str(e.value) for word in ("|f| =", "iterations", "tolerances", "fix"))
        assert e.value.solution.retcode == e.value.retcode
    sol = sa.solve(none, sa.Newton(), on_failure="nan", max_steps=30)
    assert np.isnan(lab.numpy(sol.u)).all()
    assert not sol.success
    assert np.isfinite(lab.numpy(sa.solve(none, sa.Newton(), on_failure="return", max_steps=30).u)).all()
    with pytest.raises(sa.SolveError, match="max_steps=2") as e:
        sa.solve(brusselator(lab, (30.0, 5.0)), sa.Newton(), max_steps=2)
    assert e.value.retcode == sa.RetCode.MaxSteps
    timed = sa.SteadyStateProblem(lambda t, u, p: lab.xp.sin(p * t) - u, lab.array([1.0]), lab.array(1.0))
    with np.errstate(invalid="ignore"), pytest.raises(sa.SolveError, match="t = inf") as e:
        sa.solve(timed, probe="off")
    assert e.value.retcode == sa.RetCode.NonFinite


@pytest.mark.parametrize("solver", ["dense", "krylov"])
def test_a_singular_system_is_never_a_number(lab, solver):
    """a <-> b: the total is conserved, so the steady states form a line and have no derivative."""
    xp = lab.xp
    prob = sa.SteadyStateProblem(lambda t, u, p: xp.stack([p * u[1] - u[0], u[0] - p * u[1]]), lab.array([1.0, 0.0]),
                                 lab.array(2.0))
    sol = sa.solve(prob, sa.PseudoTransient())
    np.testing.assert_allclose(lab.numpy(sol.u)[0], [2.0 / 3.0, 1.0 / 3.0], rtol=1e-6)
    for loss in (lambda sol: sol.u[0, 0], lambda sol: sol.u[0, 0] - 2.0 * sol.u[0, 1]):
        with pytest.raises(sa.SolveError, match="not isolated"):
            sa.gradient(prob, sa.PseudoTransient(), loss, sensealg=sa.ImplicitAdjoint(solver))


def test_a_solver_that_lies_is_found_out(numpy_lab, monkeypatch):
    """What a linear solver returns is checked by products that it did not make."""
    monkeypatch.setattr(matrices, "gmres", lambda be, apply, b, rtol: 0.0 * b)
    prob, _ = chain(numpy_lab, 60)
    with pytest.raises(sa.SolveError, match="linear system"):
        sa.gradient(prob, sa.Newton("dense"), lambda sol: sol.u.sum(), sensealg=sa.ImplicitAdjoint("krylov"))


def test_times_have_no_meaning(lab):
    prob = brusselator(lab)
    for option in ({"saveat": [1.0]}, {"dt": 0.1}, {"dense": True}, {"tstops": [1.0]}, {"events": []},
                   {"controller": sa.FixedStep()}, {"progress": True}):
        with pytest.raises(sa.InputError, match="no times"):
            sa.solve(prob, **option)
    for name in ("t0", "t1", "saveat"):
        with pytest.raises(sa.InputError, match="no times"):
            sa.gradient(prob, None, lambda sol: sol.u["x"][0], wrt=("p", name))
    with pytest.raises(sa.InputError):
        sa.solve(prob)(1.0)


# -- refusals -----------------------------------------------------------------------------------------------------

ALGORITHMS = [getattr(sa, n) for n in sa.__all__
              if isinstance(getattr(sa, n), type) and issubclass(getattr(sa, n), sa.SensitivityAlgorithm)
              and n != "SensitivityAlgorithm"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_who_serves_whom(algorithm):
    """Each algorithm serves steady states or evolutions, and refuses the other before `f` is called by a solver."""
    steady = sa.SteadyStateProblem(lambda t, u, p: p - u, np.array([1.0]), np.array(2.0))
    ode = sa.ODEProblem(steady.f, steady.u0, (0.0, 1.0), steady.p)
    serves_steady = algorithm is sa.ImplicitAdjoint
    for prob, serves in ((steady, serves_steady), (ode, not serves_steady)):
        if serves and prob is ode:
            continue  # that they do is tested where they are
        if serves:
            r = sa.gradient(prob, None, lambda sol: sol.u.sum(), dloss=lambda sol: np.ones((1, 1)),
                            sensealg=algorithm(vjp=sa.FiniteDifferenceVJP()))
            assert r.p == pytest.approx(1.0)
            continue
        for call in (lambda prob=prob: sa.solve(prob, sensealg=algorithm()),
                     lambda prob=prob: sa.gradient(prob, None, lambda sol: sol.u.sum(), sensealg=algorithm())):
            with pytest.raises(sa.UnsupportedCombination, match="does not go with") as e:
                call()
            assert ("ImplicitAdjoint" if prob is steady else "auto") in str(e.value)


@pytest.mark.parametrize("alg", [sa.Newton(), sa.PseudoTransient()])
def test_methods_keep_to_their_problems(alg):
    steady = sa.SteadyStateProblem(lambda t, u, p: p - u, np.array([1.0]), np.array(2.0))
    with pytest.raises(sa.UnsupportedCombination, match="SteadyStateProblem"):
        sa.solve(sa.ODEProblem(steady.f, steady.u0, (0.0, 1.0), steady.p), alg)
    with pytest.raises(sa.UnsupportedCombination, match=r"Newton\(\)"):
        sa.solve(steady, sa.Tsit5())
    with pytest.raises(sa.InputError, match="class"):
        sa.solve(steady, type(alg))


def test_costs_over_time_are_refused(lab):
    prob = brusselator(lab)
    for cost in (sa.ContinuousCost(lambda t, u, p: u["x"]), sa.DiscreteCost([1.0], g=lambda u, p, t, i: u["x"],
                                                                            dgdu=lambda u, p, t, i: u)):
        with pytest.raises(sa.UnsupportedCombination, match="over time"):
            sa.gradient(prob, None, cost)


def test_linear_solvers_that_do_not_fit(lab):
    prob, _ = chain(lab, 5)
    for make in (sa.Newton, sa.PseudoTransient, sa.ImplicitAdjoint):
        with pytest.raises(sa.InputError, match="linear_solver"):
            make("lu")
    with pytest.raises(sa.UnsupportedCombination, match="sparse"):
        sa.solve(prob, sa.Newton("sparse"))
    with pytest.raises(sa.UnsupportedCombination, match="sparse"):
        sa.solve(prob, sensealg=sa.ImplicitAdjoint("sparse"))
    if lab.be.sparse_lu:
        given = prob.remake(jac=lambda t, u, p: csc_array(np.eye(5)))
        with pytest.raises(sa.UnsupportedCombination, match="sparse jac"):
            sa.solve(given, sa.Newton("dense"))
    else:
        with pytest.raises(sa.UnsupportedCombination, match="narrow"):
            sa.solve(chain(lab, 40)[0].remake(jac_sparsity=np.ones((40, 40))), sa.Newton("sparse"))
    with pytest.raises(sa.InputError, match="shape"):
        sa.solve(prob.remake(jac_sparsity=pattern(4)))
    with pytest.raises(sa.InputError, match="fall back"):
        sa.Newton(fallback=sa.Newton())
    with pytest.raises(sa.InputError, match="positive"):
        sa.PseudoTransient(dt=-1.0)
    with pytest.raises(sa.UnsupportedCombination, match="complex"):
        sa.solve(sa.SteadyStateProblem(lambda t, u, p: -u, np.array([1.0 + 1j])))
    with pytest.raises(sa.SignatureError):
        sa.SteadyStateProblem(3, np.array([1.0]))
    with pytest.raises(sa.InputError, match="tspan"):
        prob.remake(tspan=(0.0, 1.0))


def test_the_limit_of_an_evolution(lab):
    """An evolution that an event ends where nothing moves any more has the gradient of the steady state."""
    xp, p = lab.xp, lab.array([1.3, 1.7])

    def f(t, u, p):
        x, y = u[0], u[1]
        return xp.stack([p[0] + x * x * y - (p[1] + 1.0) * x, p[1] * x - x * x * y])

    still = sa.Event(lambda t, u, p: xp.log(xp.sum(f(t, u, p) ** 2)) + 42.0, terminal=True, direction=-1)
    evolution = sa.ODEProblem(f, lab.array([1.4, 1.2]), (0.0, 1e4), p)
    r = sa.gradient(evolution, sa.Tsit5(), lambda sol: sol.u[-1, 0] ** 2 + 3.0 * sol.u[-1, 1], events=[still],
                    rtol=1e-10, atol=1e-12, sensealg=sa.RecursiveCheckpointAdjoint())
    assert float(lab.numpy(r.solution.t)[-1]) < 200.0
    # The speed at the end is exp(-21), and what is left falls like it, times the time that it took.
    np.testing.assert_allclose(lab.numpy(r.p), [2.6 - 5.1 / 1.69, 3.0 / 1.3], rtol=1e-6)
    np.testing.assert_allclose(lab.numpy(r.u0), 0.0, atol=1e-6)
