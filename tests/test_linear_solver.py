"""The option `linear_solver` of implicit methods: products alone, the user's own, and what does not fit."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.linalg import splu

import sensitivity as sa
from sensitivity import matrices

N = 12
FIXED = {"controller": sa.FixedStep(), "dt": 0.05}


def problem(lab, n=N, **given):
    """A stiff nonlinear chain in which nothing is symmetric."""
    concat = lab.xp.concatenate if lab.name == "numpy" else lab.xp.concat
    zero = lab.array([0.0])

    def f(t, u, p):
        left, right = concat([zero, u[:-1]]), concat([u[1:], zero])
        return p[0] * (1.2 * left - 2.0 * u + 0.8 * right) - p[1] * u**3 + lab.xp.sin(u * left)

    return sa.ODEProblem(f, lab.array(1.0 + 0.3 * np.cos(np.arange(n))), (0.0, 0.1), lab.array([25.0, 0.6]), **given)


def pattern(n=N):
    return sp.diags_array([np.ones(n - 1), np.ones(n), np.ones(n - 1)], offsets=[-1, 0, 1])


def gradient(lab, prob, method, **options):
    w = lab.array(np.sin(1.0 + np.arange(prob.u0.shape[0])))
    r = sa.gradient(prob, method, lambda sol: lab.xp.sum(w * sol.u[-1] ** 2), **{**FIXED, **options})
    return np.concatenate([lab.numpy(r.p), lab.numpy(r.u0)]), r


class Own:
    """Factors of one's own, in any framework; `wrong` is added to every answer."""

    def __init__(self, lab, wrong=0.0):
        self.lab, self.wrong, self.seen = lab, wrong, []

    def factor(self, A):
        self.seen.append(type(A))
        if sp.issparse(A):
            lu = splu(A)
            return lambda b, transposed: lu.solve(b, "T" if transposed else "N") + self.wrong
        solve = self.lab.xp.linalg.solve
        return lambda b, transposed: solve(A.T if transposed else A, b) + self.wrong


@pytest.mark.parametrize("method", [sa.Kvaerno3, sa.Rodas5P], ids=lambda m: m.__name__)
def test_without_a_matrix(lab, method):
    """The gradient through GMRES, forwards and transposed, is the one through LU; there are no matrices to count."""
    want, dense = gradient(lab, problem(lab), method())
    got, r = gradient(lab, problem(lab), method(linear_solver="krylov"))
    # Equations are solved to 1e-12. A Rosenbrock step multiplies slopes by numbers up to 165, and takes differences for
    # f_u v on NumPy and for second derivatives on NumPy and PyTorch.
    tol = 1e-11 if method is sa.Kvaerno3 else 1e-10 if lab.name == "jax" else 1e-8
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol * np.max(np.abs(want)))
    assert (r.stats.njac, r.stats.nlu) == (0, 0)
    assert dense.stats.nlu > 0
    assert r.stats.nsolve >= 2 * (4 if method is sa.Kvaerno3 else 8)
    assert repr(r.solution.alg) == f"{method.__name__}(linear_solver='krylov')"


class Rough:
    """The inverse of the linear part of the chain, kept as a matrix; counts how often it is applied."""

    def __init__(self, lab, n=N):
        chain = np.diag(np.full(n, -2.0)) + np.diag(np.full(n - 1, 1.2), -1) + np.diag(np.full(n - 1, 0.8), 1)
        self.lab, self.chain, self.applied, self.turned = lab, lab.array(chain), 0, 0

    def __call__(self, t, u, p, c):
        inverse = self.lab.xp.linalg.inv(self.lab.array(np.eye(self.chain.shape[0])) - c * p[0] * self.chain)

        def solve(b, transposed):
            self.applied, self.turned = self.applied + 1, self.turned + bool(transposed)
            return (inverse.T if transposed else inverse) @ b

        return solve


@pytest.mark.parametrize("method", [sa.Kvaerno3, sa.Rodas5P], ids=lambda m: m.__name__)
def test_without_a_matrix_but_with_a_preconditioner(lab, method):
    """The gradient is that of LU, forwards and transposed; the preconditioner serves both."""
    rough = Rough(lab)
    want, _ = gradient(lab, problem(lab), method())
    got, r = gradient(lab, problem(lab), method(linear_solver=sa.Krylov(rough)))
    tol = 1e-11 if method is sa.Kvaerno3 else 1e-10 if lab.name == "jax" else 1e-8
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol * np.max(np.abs(want)))
    assert (r.stats.njac, r.stats.nlu) == (0, 0)
    assert 0 < rough.turned < rough.applied


@pytest.mark.parametrize("method", [sa.Kvaerno3, sa.Rodas5P], ids=lambda m: m.__name__)
def test_a_preconditioner_saves_products(numpy_lab, monkeypatch, method):
    """Counted in GMRES itself, forwards and transposed. One that is far off changes the gradient as little."""
    sizes = []
    gmres = matrices.gmres

    def counted(be, apply, b, rtol):
        count = [0]

        def product(v):
            count[0] += 1
            return apply(v)

        x = gmres(be, product, b, rtol)
        sizes.append(count[0])
        return x

    monkeypatch.setattr(matrices, "gmres", counted)
    found, work = {}, {}
    n = 40
    options = {"dt": 0.1}  # c |f_u| is about 5
    for name, solver in (("plain", "krylov"), ("rough", sa.Krylov(Rough(numpy_lab, n))),
                         ("wrong", sa.Krylov(lambda t, u, p, c: lambda b, transposed: 3.0 * b + np.roll(b, 1)))):
        sizes.clear()
        found[name], _ = gradient(numpy_lab, problem(numpy_lab, n), method(solver), **options)
        work[name] = np.mean(sizes)
    assert work["rough"] < 0.5 * work["plain"]
    # Rodas5P multiplies by up to 165 what differences for f_u v leave, solved to 1e-8.
    atol = (1e-9 if method is sa.Kvaerno3 else 1e-7) * np.max(np.abs(found["plain"]))
    for name in ("rough", "wrong"):
        np.testing.assert_allclose(found[name], found["plain"], rtol=0.0, atol=atol)


def test_preconditioners_see_trees_and_mass_matrices(numpy_lab):
    """u and p as f sees them, b raveled; with M the matrix is `I - c M^-1 f_u`."""
    seen = []

    def preconditioner(t, u, p, c):
        seen.append((sorted(u), sorted(p), float(c)))
        return lambda b, transposed: b / (1.0 + c * np.array([p["k"] / 2.0, 4.0]))

    def f(t, u, p):
        return {"a": -p["k"] * u["a"] + 0.1 * u["b"], "b": -4.0 * u["b"]}

    prob = sa.ODEProblem(f, {"a": np.array([1.0]), "b": np.array([2.0])}, (0.0, 1.0), {"k": np.array(30.0)},
                         mass_matrix=np.diag([2.0, 1.0]))
    want, got = (sa.gradient(prob, sa.Kvaerno3(s), lambda sol: np.sum(sol.u["a"][-1]), rtol=1e-7, atol=1e-9,
                             dloss=lambda sol: {"a": np.ones((1, 1)), "b": np.zeros((1, 1))}).p["k"]
                 for s in (None, sa.Krylov(preconditioner)))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert all(s[:2] == (["a", "b"], ["k"]) for s in seen)
    assert min(s[2] for s in seen) > 0.0


def test_a_preconditioner_that_does_not_fit(numpy_lab):
    with pytest.raises(sa.InputError, match="preconditioner"):
        sa.Krylov(None)
    for owner in (sa.Newton, sa.PseudoTransient, sa.ImplicitAdjoint):
        with pytest.raises(sa.UnsupportedCombination, match="time steps"):
            owner(linear_solver=sa.Krylov(Rough(numpy_lab)))


def singular(n=N):
    """A dense mass matrix of rank n - 3; W^T f_u V is regular along the solution."""
    rng = np.random.default_rng(5)
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    return Q @ np.diag([1.0] * (n - 3) + [0.0] * 3) @ (Q.T + 0.1 * rng.normal(size=(n, n)))


@pytest.mark.parametrize("method", [sa.Kvaerno3, sa.Rodas5P], ids=lambda m: m.__name__)
def test_constraints_without_a_matrix(lab, method):
    """Consistent starts, slopes, stages and all their transposes by GMRES, states at save times too."""
    rough, M = Rough(lab), singular()

    def preconditioner(t, u, p, c):
        inverse = lab.xp.linalg.inv(lab.array(M) - c * p[0] * rough.chain)
        return lambda b, transposed: (inverse.T if transposed else inverse) @ b

    prob, options = problem(lab).remake(mass_matrix=M), {"saveat": [0.03, 0.1], "dt": 0.02}
    want, dense = gradient(lab, prob, method(), **options)
    for solver in (sa.Krylov(preconditioner), "krylov")[:1 if lab.name == "jax" else 2]:  # compiling takes minutes
        got, r = gradient(lab, prob, method(solver), **options)
        # As above; and consistent starts are Newton's, which stops where the next correction is round-off.
        tol = 1e-9 if method is sa.Kvaerno3 else 1e-7
        np.testing.assert_allclose(lab.numpy(r.solution.u), lab.numpy(dense.solution.u), rtol=tol, atol=tol)
        np.testing.assert_allclose(got, want, rtol=0.0, atol=tol * np.max(np.abs(want)))
        assert (r.stats.njac, r.stats.nlu) == (2, 2)  # W^T f_u at both ends, which tells the index
        assert dense.stats.nlu > 8


@pytest.mark.parametrize("sensealg", [sa.GaussAdjoint(), sa.InterpolatingAdjoint(), sa.QuadratureAdjoint(),
                                      sa.ForwardSensitivity(), sa.ForwardADSensitivity()], ids=str)
def test_constraints_without_a_matrix_by_every_algorithm(numpy_lab, sensealg):
    prob = problem(numpy_lab, 4).remake(mass_matrix=singular(4))
    options = {"controller": None, "dt": None, "rtol": 1e-5, "atol": 1e-7, "sensealg": sensealg, "wrt": "p"}
    want, got = (sa.gradient(prob, sa.Rodas5P(s), lambda sol: np.sum(sol.u[-1] ** 2), **options).p
                 for s in (None, "krylov"))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_index_is_told_without_a_matrix(numpy_lab):
    prob = sa.ODEProblem(lambda t, u, p: np.stack([u[1], u[0] - 1.0]), np.array([1.0, 0.0]), (0.0, 1.0),
                         mass_matrix=np.diag([1.0, 0.0]))
    with pytest.raises(sa.IndexTooHigh, match="index 2"):
        sa.solve(prob, sa.Kvaerno5("krylov"))


def test_adaptive_steps_without_a_matrix(lab):
    """Inexact corrections leave the steps what they are."""
    options = {"controller": None, "dt": None, "rtol": 1e-5, "atol": 1e-8}
    want, dense = gradient(lab, problem(lab), sa.Kvaerno3(), **options)
    got, r = gradient(lab, problem(lab), sa.Kvaerno3("krylov"), **options)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.max(np.abs(want)))
    assert abs(r.stats.naccept - dense.stats.naccept) <= 1


@pytest.mark.parametrize("known", [False, True], ids=["array", "pattern"])
def test_ones_own(lab, known):
    """It gets SciPy matrices where the pattern is known, but arrays on JAX, and serves the reverse sweep too."""
    own = Own(lab)
    given = {"jac_sparsity": pattern()} if known else {}
    want, _ = gradient(lab, problem(lab), sa.Kvaerno3())
    got, _ = gradient(lab, problem(lab, **given), sa.Kvaerno3(own))
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12 * np.max(np.abs(want)))
    assert own.seen
    assert all(issubclass(kind, sp.sparray) == (known and lab.name != "jax") for kind in own.seen)


def test_wrong_answers_are_found_out(lab):
    with pytest.raises(sa.SolveError, match="Newton"):
        gradient(lab, problem(lab), sa.Kvaerno3(Own(lab, wrong=1e-3)))


def test_gmres_that_fails_in_the_reverse_sweep_is_no_gradient(numpy_lab, monkeypatch):
    gmres = matrices.gmres
    monkeypatch.setattr(matrices, "gmres", lambda be, apply, b, rtol: gmres(be, apply, b, rtol) * (rtol > 1e-6))
    with pytest.raises(sa.SolveError, match="linear equation of the reverse sweep") as e:
        gradient(numpy_lab, problem(numpy_lab), sa.Kvaerno3("krylov"))
    assert e.value.retcode == sa.RetCode.NewtonFailure


def test_dense_although_a_band_is_known(lab):
    want, _ = gradient(lab, problem(lab), sa.Kvaerno3())
    got, r = gradient(lab, problem(lab, jac_sparsity=pattern()), sa.Kvaerno3("dense"))
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12 * np.max(np.abs(want)))
    assert r.stats.nlu > 0


def test_large_systems_go_without_a_matrix():
    """Beyond 2000 unknowns, where nothing is known of f_u but products."""
    n = 2001

    def f(t, u, p):
        return -p * u**2

    prob = sa.ODEProblem(f, np.linspace(0.5, 1.5, n), (0.0, 1.0), np.array(2.0),
                         vjp=lambda t, u, p, lam: (-2.0 * p * u * lam, -np.sum(lam * u**2)),
                         jvp=lambda t, u, p, du, dp: -2.0 * p * u * du - u**2 * dp)
    r = sa.gradient(prob, sa.Kvaerno3(), lambda sol: np.sum(sol.u[-1]), dloss=lambda sol: np.ones_like(sol.u))
    assert r.stats.nlu == 0
    u = prob.u0 / (1.0 + 2.0 * prob.u0)
    np.testing.assert_allclose(r.solution.u[-1], u, rtol=1e-5)
    np.testing.assert_allclose(r.u0, (u / prob.u0) ** 2, rtol=1e-5)
    np.testing.assert_allclose(r.p, -np.sum(u**2), rtol=1e-5)


def test_steady_states_with_ones_own(lab):
    own, A = Own(lab), lab.array([[-3.0, 0.5], [0.2, -2.0]])
    prob = sa.SteadyStateProblem(lambda t, u, p: p + A @ u - u**3, lab.array([0.3, 0.2]), lab.array([1.0, 2.0]))
    want, got = (sa.gradient(prob, sa.Newton(s), lambda sol: sol.u[0, 0] ** 2, sensealg=sa.ImplicitAdjoint(s), wrt="p")
                 for s in ("dense", own))
    np.testing.assert_allclose(lab.numpy(got.p), lab.numpy(want.p), rtol=1e-12)
    assert own.seen


@pytest.mark.parametrize("choice", ["lu", 3, sp])
def test_there_is_no_such_solver(choice):
    with pytest.raises(sa.InputError, match=r"factor\(A\)"):
        sa.Kvaerno5(linear_solver=choice)


def test_what_does_not_fit(lab):
    prob = problem(lab)
    with pytest.raises(sa.UnsupportedCombination, match="where f_u is zero"):
        sa.solve(prob, sa.Kvaerno5("sparse"))
    if not lab.be.sparse_lu:
        with pytest.raises(sa.UnsupportedCombination, match="narrow"):
            sa.solve(problem(lab, 40, jac_sparsity=np.ones((40, 40))), sa.Kvaerno5("sparse"))


def test_solvers_are_hashed():
    class Unhashable(Own):
        __hash__ = None

    with pytest.raises(sa.InputError, match="hash"):
        sa.Kvaerno5(Unhashable(None))
