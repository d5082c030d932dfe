"""Mass matrices with an inverse: linear systems keep the structure of M and f_u, and nothing else changes."""

import numpy as np
import pytest
import scipy.sparse as sp

import sensitivity as sa
from sensitivity import lapack
from sensitivity.mass import Mass

N = 40
BAND = sp.diags_array([1.0, 1.0, 1.0], offsets=[-1, 0, 1], shape=(N, N))
STIFFNESS = (3.0 * sp.eye_array(N) - BAND).toarray()
MASSES = {
    "diagonal": np.diag(1.0 + np.arange(N) / N),
    "elements": ((BAND + 3.0 * sp.eye_array(N)) / 6.0).toarray(),
    "one-sided": np.eye(N) + 0.4 * np.eye(N, k=3),
}


def diffusion(lab, M=None):
    """Nonlinear diffusion by finite elements, `M u' = f`; without M what is to be divided by one."""
    K = lab.array(STIFFNESS)

    def f(t, u, p):
        return p[1] * lab.xp.cos(t) - p[0] * (K @ u) - u**3

    u0 = lab.array(1.0 + 0.5 * np.sin(np.arange(N)))
    return sa.ODEProblem(f, u0, (0.0, 0.4), lab.array([8.0, 0.5]), mass_matrix=M)


def divided(lab, M):
    """The same problem as `u' = M^-1 f`."""
    prob, inverse = diffusion(lab), lab.array(np.linalg.inv(M))
    return prob.remake(f=lambda t, u, p: inverse @ prob.f(t, u, p))


def gradient(lab, prob, method, **options):
    weights = lab.array(np.cos(np.arange(N)))
    r = sa.gradient(prob, method, lambda sol: lab.xp.sum(weights * sol.u[-1] ** 2), **options)
    return np.concatenate([lab.numpy(r.p), lab.numpy(r.u0)]), r


def agree(got, want, tol):
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol * np.max(np.abs(want)))


FIXED = {"dt": 0.1, "controller": sa.FixedStep()}


@pytest.mark.parametrize("mass", MASSES)
def test_the_discrete_gradient_is_that_of_the_divided_equation(lab, mass):
    """Stages of fixed steps are exact to rounding, so the two agree to it, with a pattern and without."""
    want, _ = gradient(lab, divided(lab, MASSES[mass]), sa.Kvaerno3(), **FIXED)
    prob = diffusion(lab, MASSES[mass])
    for given in ({}, {"jac_sparsity": BAND}):
        agree(gradient(lab, prob.remake(**given), sa.Kvaerno3(), **FIXED)[0], want, 1e-12)


def known():
    """The user's products of f, not of `M^-1 f`."""
    def jac(t, u, p):
        return sp.csc_array(-p[0] * STIFFNESS - 3.0 * np.diag(u**2))

    def vjp(t, u, p, lam):
        return lam @ jac(t, u, p), np.array([-lam @ (STIFFNESS @ u), np.sum(lam) * np.cos(t)])

    return {"jac": jac, "vjp": vjp}


@pytest.mark.parametrize("sensealg", [sa.RecursiveCheckpointAdjoint(), sa.GaussAdjoint(), sa.BacksolveAdjoint(),
                                      sa.ForwardSensitivity()], ids=lambda a: a.name)
def test_every_algorithm_with_given_products(numpy_lab, sensealg):
    """A sparse `jac` is that of f; what each algorithm makes of it is what it makes of the divided equation."""
    M, options = MASSES["elements"], {"rtol": 1e-7, "atol": 1e-7, "sensealg": sensealg}
    want, _ = gradient(numpy_lab, divided(numpy_lab, M), sa.Rodas5P(), **options)
    got, r = gradient(numpy_lab, diffusion(numpy_lab, M).remake(**known()), sa.Rodas5P(), **options)
    assert r.sensealg.vjp == sa.UserVJP()
    # Jacobians of the divided equation are central differences, which Rosenbrock steps contain.
    agree(got, want, 1e-7)


@pytest.mark.parametrize("given", ["jac", "pattern"])
def test_nothing_dense_is_factorised(numpy_lab, monkeypatch, given):
    """One band for each step, and one of M for all evaluations."""
    bands, factorize = [], lapack.band_lu
    monkeypatch.setattr(lapack, "lu", None)
    monkeypatch.setattr(lapack, "band_lu", lambda b, *a: bands.append(b) or factorize(b, *a))
    products = known() if given == "jac" else {"jac_sparsity": BAND, "vjp": known()["vjp"]}
    prob = diffusion(numpy_lab, sp.csr_array(MASSES["elements"])).remake(**products)
    _, r = gradient(numpy_lab, prob, sa.Rodas5P(), rtol=1e-5)
    kept = r.stats.naccept + r.stats.nreject  # the reverse sweep finds the factors again
    assert r.stats.nlu == kept
    assert len(bands) == kept + 1


def test_products_alone(numpy_lab):
    """GMRES needs no matrix, so M^-1 f has none to lose."""
    prob = diffusion(numpy_lab, MASSES["elements"])
    want, _ = gradient(numpy_lab, prob, sa.Kvaerno3(), rtol=1e-5, atol=1e-5)
    got, r = gradient(numpy_lab, prob, sa.Kvaerno3("krylov"), rtol=1e-5, atol=1e-5)
    agree(got, want, 1e-5)
    assert r.stats.nlu == 0


@pytest.mark.parametrize("mass", MASSES)
def test_products_with_the_matrix_and_its_inverse(lab, mass):
    """For vectors and rows, transposed or not, in the precision of what they are applied to."""
    M = MASSES[mass]
    known, rows = Mass(M), np.random.default_rng(0).normal(size=(2, N))
    assert not known.singular
    for name, A in (("weigh", M), ("unweigh", np.linalg.inv(M))):
        for transposed, B in ((False, A), (True, A.T)):
            for z in (rows, rows[0]):
                got = getattr(known, name)(lab.be, lab.array(z), transposed)
                np.testing.assert_allclose(lab.numpy(got), z @ B.T, rtol=1e-12, atol=1e-12)
            single = getattr(known, name)(lab.be, lab.array(rows, "float32"), transposed)
            assert single.dtype == lab.array(rows, "float32").dtype


@pytest.mark.parametrize(("least", "singular"), [(1e-10, False), (1e-14, True), (0.0, True)])
@pytest.mark.parametrize("size", [3, 50])
def test_which_matrices_have_an_inverse(least, singular, size):
    """The ratio of singular values decides, whether or not they had to be computed."""
    Q, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(size, size)))
    known = Mass(Q @ np.diag([1.0] * (size - 1) + [least]) @ Q.T)
    assert known.singular == singular
    assert Mass(np.diag([2.0] * (size - 1) + [least])).singular == singular
