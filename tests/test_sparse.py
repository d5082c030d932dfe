"""Sparse Jacobians on NumPy: coloured products, SuperLU, and factorisations that the reverse sweep finds again."""

import numpy as np
import pytest
import scipy.sparse as sp

import sensitivity as sa
from sensitivity.registry import registry
from sensitivity.sparsity import pattern_of

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


def test_the_reverse_sweep_factorises_nothing(monkeypatch):
    """Each step's factorisation is kept with its record, so the gradient has as many as the solve."""
    from sensitivity_numpy import _sparse

    calls = []
    factorize = _sparse.factorize
    monkeypatch.setattr(_sparse, "factorize", lambda A: calls.append(1) or factorize(A))
    r = gradient(problem(jac=jac, vjp=vjp), sa.Rodas5P())
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
            assert np.max(M[:, np.array(colours) == c].sum(axis=1)) == 1
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
