"""Jacobians with a known pattern: coloured products, bands, SuperLU, and factorisations that the reverse sweep finds
again."""

import numpy as np
import pytest
import scipy.sparse as sp

import sensitivity as sa
from sensitivity import banded, lapack, matrices, sparsity
from sensitivity.registry import registry
from sensitivity.sparsity import pattern_of
from sensitivity.testing import models

N = 4


def brusselator(xp=np):
    """The Brusselator with diffusion on a periodic N x N grid; both rates of every cell are parameters."""
    def laplacian(w):
        around = xp.roll(w, 1, 0) + xp.roll(w, -1, 0) + xp.roll(w, 1, 1) + xp.roll(w, -1, 1)
        return 0.02 * N * N * (around - 4.0 * w)

    def f(t, u, p):
        x, y = xp.reshape(u, (2, N, N))
        a, b = xp.reshape(p, (2, N, N))
        return xp.reshape(xp.stack([a - (b + 1.0) * x + x * x * y + laplacian(x), b * x - x * x * y + laplacian(y)]),
                          (-1,))

    return f


def laplacian_matrix():
    ring = sp.diags_array([1.0, 1.0, 1.0, 1.0], offsets=[1, -1, N - 1, 1 - N], shape=(N, N))
    eye = sp.eye_array(N)
    return 0.02 * N * N * (sp.kron(ring, eye) + sp.kron(eye, ring) - 4.0 * sp.eye_array(N * N))


LAPLACIAN = laplacian_matrix()


def jac(t, u, p):
    (x, y), b = u.reshape(2, -1), p.reshape(2, -1)[1]
    L, d = LAPLACIAN, sp.diags_array
    return sp.csc_array(sp.block_array([[d(-(b + 1.0) + 2.0 * x * y) + L, d(x * x)],
                                        [d(b - 2.0 * x * y), d(-x * x) + L]]))


def vjp(t, u, p, lam):
    x, (first, second) = u.reshape(2, -1)[0], lam.reshape(2, -1)
    return lam @ jac(t, u, p), np.concatenate([first, (second - first) * x])


def problem(**given):
    rng = np.random.default_rng(0)
    u0 = np.concatenate([1.0 + rng.uniform(size=N * N), 3.0 + rng.uniform(size=N * N)])
    p = np.concatenate([np.full(N * N, 1.0), np.full(N * N, 3.4)])
    return sa.ODEProblem(given.pop("f", brusselator()), u0, (0.0, 0.5), p, **given)


def gradient(prob, method, **options):
    return sa.gradient(prob, method, lambda sol: np.sum(sol.u[-1] ** 2), dloss=lambda sol: 2.0 * sol.u, rtol=1e-7,
                       atol=1e-8, **options)


PATTERN = abs(jac(0.0, np.ones(2 * N * N), np.ones(2 * N * N))) > 0


@pytest.fixture(scope="module")
def dense():
    prob = problem(vjp=vjp, jac=lambda t, u, p: jac(t, u, p).toarray())
    return {m.name: gradient(prob, m) for m in (sa.Kvaerno5(), sa.Rodas5P())}


@pytest.mark.parametrize("method", [sa.Kvaerno5(), sa.Rodas5P()], ids=lambda m: m.name)
@pytest.mark.parametrize("given", [{"jac": jac, "vjp": vjp}, {"jac_sparsity": PATTERN, "vjp": vjp},
                                   {"jac_sparsity": PATTERN.toarray(), "vjp": vjp}],
                         ids=["jac", "pattern", "dense pattern"])
def test_gradients_of_sparse_and_dense_agree(dense, method, given):
    r, want = gradient(problem(**given), method), dense[method.name]
    # Rodas5P's stages contain the Jacobian, here once a central difference.
    tol = 1e-9 if method.name == "Rodas5P" else 1e-10
    np.testing.assert_allclose(r.p, want.p, rtol=tol, atol=tol * np.max(np.abs(want.p)))
    np.testing.assert_allclose(r.u0, want.u0, rtol=tol, atol=tol * np.max(np.abs(want.u0)))
    assert r.solution.n_steps == want.solution.n_steps


def test_directional_derivative(dense):
    d, e = np.cos(np.arange(2.0 * N * N)), 1e-4
    prob = problem(jac=jac, vjp=vjp)
    values = [float(np.sum(sa.solve(prob.remake(p=prob.p + s * e * d), sa.Kvaerno5(), rtol=1e-9, atol=1e-10).u ** 2))
              for s in (1.0, -1.0)]
    # The gradient is that of a solve to 1e-7, and this sum of its entries is smaller than they are.
    scale = np.max(np.abs(dense["Rodas5P"].p))
    assert d @ dense["Rodas5P"].p == pytest.approx((values[0] - values[1]) / (2.0 * e), abs=1e-5 * scale)


@pytest.mark.parametrize("given", [{"jac": jac}, {"jac_sparsity": PATTERN}], ids=["jac", "pattern"])
@pytest.mark.parametrize("method", [sa.Rodas5P(), sa.Kvaerno5()], ids=lambda m: m.name)
def test_the_reverse_sweep_factorises_nothing(monkeypatch, method, given):
    """Each step's factorisation is kept with its record, so the gradient has as many as the solve."""
    monkeypatch.setattr(sparsity, "NARROW", 0)
    calls = []
    factorize = lapack.superlu
    monkeypatch.setattr(lapack, "superlu", lambda *a: calls.append(1) or factorize(*a))
    r = gradient(problem(vjp=vjp, **given), method)
    assert len(calls) == r.stats.nlu == r.stats.naccept + r.stats.nreject
    be = registry().backend("numpy")
    del r
    assert (be._kept, be._kept_bytes) == ({}, 0)


def test_colours():
    """No two columns of one colour share a row; a five-point stencil of two species needs few."""
    pattern = pattern_of(PATTERN, 2 * N * N)
    A = PATTERN.toarray().astype(int)
    for M, colours in ((A, pattern.column_colours), (A.T, pattern.row_colours)):
        for c in set(colours):
            assert np.max(M[:, colours == c].sum(axis=1)) == 1
    assert len(set(pattern.column_colours)) <= 14


@pytest.mark.parametrize("given", [np.eye(3), "abc", sp.eye_array(5)])
def test_bad_patterns(given):
    with pytest.raises(sa.InputError, match="jac_sparsity"):
        sa.solve(problem(jac_sparsity=given), sa.Kvaerno5())


def test_constraints_with_a_sparse_jacobian():
    """An index-1 problem with a sparse Jacobian equals the one with a dense one."""
    f = lambda t, u, p: np.array([-u[0] + u[1], u[0] ** 2 - p[0] * u[1]])  # noqa: E731
    J = lambda t, u, p: np.array([[-1.0, 1.0], [2.0 * u[0], -p[0]]])  # noqa: E731
    prob = sa.ODEProblem(f, np.array([0.5, 0.0]), (0.0, 1.0), np.array([2.0]), mass_matrix=np.diag([1.0, 0.0]), jac=J)
    want = sa.solve(prob, sa.Kvaerno5()).u
    got = sa.solve(prob.remake(jac=lambda *a: sp.csc_array(J(*a))), sa.Kvaerno5()).u
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_constraints_with_a_mass_matrix_where_the_jacobian_has_no_entries():
    """The matrix of a step has the entries of both."""
    f = lambda t, u, p: np.array([-u[0], p[0] * u[1] - u[2], 1.0 - u[2]])  # noqa: E731
    J = lambda t, u, p: np.array([[-1.0, 0.0, 0.0], [0.0, p[0], -1.0], [0.0, 0.0, -1.0]])  # noqa: E731
    prob = sa.ODEProblem(f, np.array([0.5, 1.0, 0.0]), (0.0, 1.0), np.array([-2.0]), jac=J,
                         mass_matrix=np.array([[1.0, 0.3, 0.0], [0.2, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    want = sa.solve(prob, sa.Kvaerno5()).u
    got = sa.solve(prob.remake(jac=lambda *a: sp.csr_array(J(*a))), sa.Kvaerno5()).u
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_sparse_jac_may_change_its_pattern():
    """Entries that are zero may be left out, stand twice, or in rows."""
    f = lambda t, u, p: np.array([-p[0] * u[0] * u[1], p[0] * u[0] * u[1] - 40.0 * (t > 0.5) * u[1], u[1]])  # noqa: E731

    def J(t, u, p):
        return np.array([[-p[0] * u[1], -p[0] * u[0], 0.0], [p[0] * u[1], p[0] * u[0] - 40.0 * (t > 0.5), 0.0],
                         [0.0, 1.0, 0.0]])

    def halves(t, u, p):
        row, column = np.nonzero(J(t, u, p))
        values = J(t, u, p)[row, column] / 2.0
        return sp.coo_array((np.tile(values, 2), (np.tile(row, 2), np.tile(column, 2))), shape=(3, 3)).tocsr()

    prob = sa.ODEProblem(f, np.array([1.0, 0.0, 0.0]), (0.0, 1.0), np.array([2.0]), jac=J)
    prob = prob.remake(u0=np.array([1.0, 0.5, 0.0]))
    options = {"tstops": [0.5], "rtol": 1e-6}
    want = sa.solve(prob, sa.Kvaerno5(), **options).u
    np.testing.assert_allclose(sa.solve(prob.remake(jac=halves), sa.Kvaerno5(), **options).u, want, rtol=1e-10)


@pytest.mark.parametrize("symmetric", [True, False])
def test_factors_in_an_order_found_once(symmetric):
    """Both solves, of one vector and of rows, whatever the values are; NaN where there is no inverse."""
    rng = np.random.default_rng(1)
    A = sp.random_array((60, 60), density=0.05, rng=rng) + sp.eye_array(60)
    A = (A + A.T if symmetric else A).toarray()
    pattern, values = sparsity.entries_in(sp.csr_array(A))
    assert pattern.symmetric == symmetric
    b = rng.normal(size=(3, 60))
    for factor in (values, values * rng.uniform(0.5, 2.0, values.shape)):
        A = pattern.matrix(factor).toarray()
        solve = lapack.superlu(factor, pattern)
        np.testing.assert_allclose(solve(b), np.linalg.solve(A, b.T).T, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(solve(b[0], transposed=True), np.linalg.solve(A.T, b[0]), rtol=1e-9, atol=1e-9)
        assert solve(b.astype(np.float32)).dtype == np.float32
    assert np.all(np.isnan(lapack.superlu(np.where(pattern.rows == 7, 0.0, values), pattern)(b)))


# -- bands and other patterns, on every backend -----------------------------------------------------------------------


def chain_problem(lab, order=None, n=24, wide=0):
    """A stiff chain of n cells with two species in a given order, with the pattern of its Jacobian.

    With `wide`, cell i also feels cell `wide i + 3`, counted around.
    """
    order = np.arange(2 * n) if order is None else order
    place = np.argsort(order)
    J = np.zeros((2 * n, 2 * n))
    for i in range(n):
        J[2 * i:2 * i + 2, 2 * i:2 * i + 2] = [[-2.0, 1.0], [0.0, -2.0]]
        for k in {i - 1, i + 1} | ({(wide * i + 3) % n} if wide else set()):
            if 0 <= k < n and k != i:
                J[2 * i, 2 * k] += 1.0
                J[2 * i + 1, 2 * k + 1] += 1.0
                J[2 * i, 2 * i] -= bool(wide)
                J[2 * i + 1, 2 * i + 1] -= bool(wide)
    feed = np.zeros((2 * n, 2 * n))
    feed[1::2, ::2] = np.eye(n)
    turned = lambda M: lab.array(M[np.ix_(order, order)])  # noqa: E731
    L, F = turned(J), turned(feed)

    def f(t, u, p):
        return p[0] * (L @ u) + p[1] * (F @ lab.xp.sin(u)) + lab.xp.cos(t) - 0.5 * u

    pattern = ((J != 0) | (feed != 0) | np.eye(2 * n, dtype=bool))[np.ix_(order, order)]
    u0 = 1.0 + 0.5 * np.sin(np.arange(2 * n))[order]
    return sa.ODEProblem(f, lab.array(u0), (0.0, 0.05), lab.array([40.0, 0.7])), pattern, place


def gradients(lab, prob, method, **options):
    weights = lab.array(np.cos(np.arange(prob.u0.shape[0])))
    r = sa.gradient(prob, method, lambda sol: lab.xp.sum(weights * sol.u[-1] ** 2), rtol=1e-4, atol=1e-6, **options)
    return np.concatenate([lab.numpy(r.p), lab.numpy(r.u0)]), r


def agree(got, want, tol):
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol * np.max(np.abs(want)))


@pytest.mark.parametrize("method", [sa.Kvaerno3(), sa.Rodas5P()], ids=lambda m: m.name)
def test_a_band_changes_nothing(lab, method):
    """The gradient with a declared band is the one without, whichever way the states are numbered."""
    prob, pattern, _ = chain_problem(lab)
    want, plain = gradients(lab, prob, method)
    known = pattern_of(pattern, 48)
    assert (known.lower, known.upper, known.structure(lab.be)) == (2, 2, "banded")
    got, r = gradients(lab, prob.remake(jac_sparsity=sp.csr_array(pattern)), method)
    # Rosenbrock steps have derivatives of the Jacobian, central differences but on JAX, and on NumPy f_u is one itself.
    agree(got, want, 1e-8 if lab.name != "jax" and method.name == "Rodas5P" else 1e-11)
    assert (r.stats.naccept, r.stats.nlu, r.stats.njac) == (plain.stats.naccept, plain.stats.nlu, plain.stats.njac)


def test_a_band_in_another_order(lab):
    """States numbered at random: the order that makes the band narrow is found, and the answer does not change."""
    prob, pattern, _ = chain_problem(lab)
    want, _ = gradients(lab, prob.remake(jac_sparsity=pattern), sa.Kvaerno3())
    order = np.random.default_rng(3).permutation(48)
    mixed, pattern, place = chain_problem(lab, order)
    known = pattern_of(pattern, 48)
    assert known.order is not None
    assert max(known.lower, known.upper) <= 3
    weights = lab.array(np.cos(np.arange(48))[order])
    r = sa.gradient(mixed.remake(jac_sparsity=pattern), sa.Kvaerno3(),
                    lambda sol: lab.xp.sum(weights * sol.u[-1] ** 2), rtol=1e-4, atol=1e-6)
    got = np.concatenate([lab.numpy(r.p), lab.numpy(r.u0)[place]])
    # Sums in another order change step sizes in their last digits, and the error of the solve is not zero.
    agree(got, want, 1e-8)


def test_a_pattern_that_is_no_band(lab):
    """SuperLU on NumPy and PyTorch; JAX has no sparse factorisation, so it fills an array."""
    prob, pattern, _ = chain_problem(lab, n=60, wide=7)
    known = pattern_of(pattern, 120)
    assert min(known.lower, known.upper) > 32
    assert known.structure(lab.be) == (None if lab.name == "jax" else "sparse")
    want, _ = gradients(lab, prob, sa.Kvaerno3())
    got, _ = gradients(lab, prob.remake(jac_sparsity=pattern), sa.Kvaerno3())
    agree(got, want, 1e-11)


def test_a_stage_that_refinement_does_not_reach_has_its_own_factors(numpy_lab, monkeypatch):
    """With factors of something else in place of those of the step, the gradient is what it was."""
    prob, pattern, _ = chain_problem(numpy_lab, n=60, wide=7)
    prob, calls = prob.remake(jac_sparsity=pattern), []
    want, _ = gradients(numpy_lab, prob, sa.Kvaerno3())
    be, factorize = registry().backend("numpy"), lapack.superlu
    monkeypatch.setattr(lapack, "superlu", lambda *a: calls.append(1) or factorize(*a))
    monkeypatch.setattr(type(be), "kept", lambda self, K: lambda b, transposed: 0.01 * b)
    got, r = gradients(numpy_lab, prob, sa.Kvaerno3())
    agree(got, want, 1e-12)
    assert len(calls) == r.stats.nlu + 3 * r.stats.naccept


def test_a_sparse_jac(torch_lab):
    """PyTorch takes SciPy matrices from `jac`, as NumPy does."""
    prob, _, _ = chain_problem(torch_lab)
    J = torch_lab.xp.autograd.functional.jacobian
    want, _ = gradients(torch_lab, prob, sa.Kvaerno3())
    sparse = prob.remake(jac=lambda t, u, p: sp.csc_array(J(lambda u: prob.f(t, u, p), u.detach()).numpy()))
    got, _ = gradients(torch_lab, sparse, sa.Kvaerno3())
    agree(got, want, 1e-11)


def test_a_sparse_jac_is_refused(jax_lab):
    """JAX has no sparse factorisation: the message says what to give instead."""
    prob = sa.ODEProblem(lambda t, u, p: -u, jax_lab.array([1.0, 2.0]), (0.0, 1.0), jac=lambda *a: sp.eye_array(2))
    with pytest.raises(sa.UnsupportedCombination, match="jac_sparsity"):
        sa.solve(prob, sa.Kvaerno3())


def test_products_are_counted_by_colours():
    """Each Jacobian of the reverse sweep takes one product for each colour, those of the solve two evaluations."""
    n, calls = 30, {"f": 0, "vjp": 0}
    J = -2.0 * np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1)

    def f(t, u, p):
        calls["f"] += 1
        return p * (J @ u)

    def vjp(t, u, p, lam):
        calls["vjp"] += 1
        return p * (lam @ J), np.sum(lam * (J @ u))

    prob = sa.ODEProblem(f, np.ones(n), (0.0, 0.2), np.array(30.0), vjp=vjp, jac_sparsity=J)
    r = sa.gradient(prob, sa.Kvaerno3(), lambda sol: np.sum(sol.u), dloss=lambda sol: np.ones_like(sol.u), probe="off",
                    rtol=1e-4, atol=1e-6)
    s = r.stats
    assert calls["f"] == s.nfe + 2 * 3 * s.njac
    assert calls["vjp"] == s.nvjp + 3 * 3 * s.naccept


@pytest.mark.parametrize(("n", "lower", "upper"), [(1, 0, 0), (5, 0, 0), (7, 0, 3), (16, 2, 0), (17, 1, 1), (40, 3, 1),
                                                   (50, 20, 17), (64, 2, 2)])
def test_band_solvers(lab, n, lower, upper):
    """LAPACK's and the one of array operations, which every backend has: vectors, rows, and the transpose."""
    rng = np.random.default_rng(n)
    A = np.triu(np.tril(rng.standard_normal((n, n)), upper), -lower) + 4.0 * np.diag(rng.choice([-1.0, 1.0], n))
    bands = np.zeros((lower + upper + 1, n))
    for i in range(n):
        for j in range(max(0, i - lower), min(n, i + upper + 1)):
            bands[upper + i - j, j] = A[i, j]
    b = rng.standard_normal((3, n))
    for way in (lab.be.factorize_banded, lambda *a: banded.factorize(lab.be, *a)):
        solve = way(lab.array(bands), lower, upper)
        for transposed in (False, True):
            want = np.linalg.solve(A.T if transposed else A, b.T).T
            np.testing.assert_allclose(lab.numpy(solve(lab.array(b), transposed)), want, rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(lab.numpy(solve(lab.array(b[0]), transposed)), want[0], rtol=1e-11, atol=1e-12)


def test_a_singular_band_is_nan(lab):
    solve = lab.be.factorize_banded(lab.array(np.zeros((3, 4))), 1, 1)
    assert not np.isfinite(lab.numpy(solve(lab.array(np.ones(4))))).any()


def test_badly_scaled_bands(lab):
    """Reactions with rates over ten orders of magnitude beside diffusion: as accurate as dense LU."""
    n, rng = 60, np.random.default_rng(1)
    J = np.zeros((n, n))
    for i in range(0, n, 3):
        k, m = np.array([0.04, 3e7 * 1e-5, 1e4]) * rng.uniform(0.5, 2.0, 3), np.array([1.0, 1e-5, 0.3])
        J[i:i + 3, i:i + 3] = [[-k[0], k[2] * m[2], k[2] * m[1]], [k[0], -2 * k[1] * m[1] - k[2] * m[2], -k[2] * m[1]],
                               [0.0, 2 * k[1] * m[1], 0.0]]
    J += np.diag(np.full(n - 3, 1e3), 3) + np.diag(np.full(n - 3, 1e3), -3) - 2e3 * np.eye(n)
    pattern = pattern_of(J, n)
    for c in (1e-3, 1.0, 1e5):
        A, b = np.eye(n) - c * J, rng.standard_normal(n)
        M = matrices.entries_of(lab.be, pattern, lab.array(J))
        solve = matrices.factorize(lab.be, matrices.shifted(lab.be, M, lab.be.scalar(lab.array(c))))
        for transposed, M in ((False, A), (True, A.T)):
            x = lab.numpy(solve(lab.array(b), transposed))
            assert np.linalg.norm(M @ x - b) <= 1e-13 * np.linalg.norm(M, 2) * np.linalg.norm(x)
            np.testing.assert_allclose(x, np.linalg.solve(M, b), rtol=1e-9, atol=1e-12 * np.max(np.abs(x)))


def test_entries(lab):
    """A matrix by its entries, its transpose, and its array."""
    A = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 5.0, 4.0]])
    M = matrices.entries_of(lab.be, pattern_of(A != 0, 3), lab.array(A))
    moved = matrices.shifted(lab.be, M, 2.0)
    for got, want in ((M, A), (matrices.transpose(lab.be, M), A.T), (moved, np.eye(3) - 2.0 * A)):
        np.testing.assert_array_equal(lab.numpy(matrices.dense(lab.be, got)), want)
    assert isinstance(M, matrices.Entries)
    assert M.shape == (3, 3)


def test_constraints_with_a_band(lab):
    """An index-1 problem in which the pattern of the Jacobian lacks an entry of the mass matrix."""
    M = np.diag([1.0, 0.0, 1.0, 0.0])
    M[0, 2] = 0.5

    def f(t, u, p):
        return lab.xp.stack([-u[0] + u[1], u[0] ** 2 - p[0] * u[1], -3.0 * u[2] + u[3], p[1] * u[2] - u[3]])

    prob = sa.ODEProblem(f, lab.array([0.5, 0.0, 1.0, 0.0]), (0.0, 1.0), lab.array([2.0, 0.4]), mass_matrix=M)
    pattern = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    want, _ = gradients(lab, prob, sa.Kvaerno3())
    got, _ = gradients(lab, prob.remake(jac_sparsity=pattern), sa.Kvaerno3())
    agree(got, want, 1e-11)


def test_the_model(lab):
    """The diffusing Brusselator as the textbook has it: the same with and without its pattern."""
    prob = models.brusselator_1d(lab.xp, 20).remake(tspan=(0.0, 0.2))
    ends = [lab.numpy(sa.solve(q, sa.Kvaerno5(), rtol=1e-7, atol=1e-9).u[-1])
            for q in (prob, prob.remake(jac_sparsity=None))]
    np.testing.assert_allclose(*ends, rtol=1e-8)
    v, w = prob.u0[:, 0], prob.u0[:, 1]
    np.testing.assert_allclose(lab.numpy(v)[:3], 1.0 + np.sin(2.0 * np.pi * np.arange(1, 4) / 21.0))
    np.testing.assert_array_equal(lab.numpy(w), np.full(20, 3.0))


def test_a_pattern_that_lacks_entries(lab):
    """It is compared with f once, at the start; the message names the row."""
    prob, pattern, _ = chain_problem(lab)
    wrong = pattern.copy()
    wrong[7, 5] = False
    with pytest.raises(sa.InputError, match="row 7"):
        sa.solve(prob.remake(jac_sparsity=wrong), sa.Kvaerno3())
    with pytest.warns(sa.ProbeWarning, match="row 7"):
        sa.solve(prob.remake(jac_sparsity=wrong), sa.Kvaerno3(), probe="warn")
    steady = sa.SteadyStateProblem(lambda t, u, p: p - 2.0 * u + 0.3 * u[0], prob.u0, lab.array(1.0),
                                   jac_sparsity=np.eye(48))
    with pytest.raises(sa.InputError, match="row"):
        sa.solve(steady)


def test_patterns_are_compared_once():
    calls = []

    def f(t, u, p):
        calls.append(1)
        return -p * u

    prob = sa.ODEProblem(f, np.ones(3), (0.0, 1.0), np.array(2.0), jac_sparsity=np.eye(3))
    first, second = sa.solve(prob, sa.Kvaerno3(), dt=0.5, controller=sa.FixedStep()), len(calls)
    sa.solve(prob, sa.Kvaerno3(), dt=0.5, controller=sa.FixedStep())
    assert second - (len(calls) - second) >= 4
    assert len(calls) - second >= first.stats.nfe


@pytest.mark.slow
def test_a_band_under_transforms(jax_lab):
    """`vmap` of `grad` is one solve for each member, and `hessian` goes through the band solver."""
    import jax

    prob = models.brusselator_1d(jax_lab.xp, 6).remake(tspan=(0.0, 0.1))

    def loss(p, prob=prob):
        return (sa.solve(prob.remake(p=p), sa.Kvaerno3(), controller=sa.FixedStep(), dt=0.05).u[-1] ** 2).sum()

    slope, several = jax.jit(jax.grad(loss)), np.array([[1.0, 3.0, 0.02], [1.1, 2.8, 0.03]])
    np.testing.assert_allclose(jax.vmap(slope)(several), [slope(p) for p in several], rtol=1e-11)
    plain = jax.hessian(lambda p: loss(p, prob.remake(jac_sparsity=None)))(several[0])
    np.testing.assert_allclose(jax.hessian(loss)(several[0]), plain, rtol=1e-9)


def test_a_band_in_single_precision(lab):
    prob, pattern, _ = chain_problem(lab)
    single = lambda x: lab.array(lab.numpy(x), "float32")  # noqa: E731
    small = sa.ODEProblem(lambda t, u, p: -p * u * (1.0 + u), single(prob.u0), (0.0, 0.1), single(prob.p)[0])
    ends = [sa.solve(small.remake(jac_sparsity=given), sa.Kvaerno3()).u[-1] for given in (None, pattern)]
    assert str(ends[1].dtype).endswith("float32")
    np.testing.assert_allclose(*map(lab.numpy, ends), rtol=1e-5)  # rounding of Newton's corrections, in float32
