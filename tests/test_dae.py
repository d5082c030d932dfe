"""Mass matrices: differential-algebraic equations of index 1 against reference values and complex steps."""

import json
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa
from sensitivity import diagonal

GOLD = {p["id"]: p for p in json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())["problems"]}
E = 1e-40


def setup(lab, name):
    """Problem with its parameters as `p`, the loss, and initial values as a function of the parameters."""
    P, xp = GOLD[name], lab.xp
    rhs, cost, start = eval(P["code"]["rhs"]), eval(P["loss"]["code"]), eval(P["code"]["u0"])
    names = list(P["params"])
    p = lab.array([float(P["params"][k]) for k in names])
    mass = np.array(P["code"]["mass"], dtype=float)
    integrand = eval(P["loss"]["integral"]) if "integral" in P["loss"] else None
    if integrand is not None:
        mass = np.block([[mass, np.zeros((len(mass), 1))], [np.zeros((1, len(mass))), np.ones((1, 1))]])

    def named(p):
        return {k: p[i] for i, k in enumerate(names)}

    def f(t, u, p):
        out = rhs(t, u, named(p), xp)
        return xp.stack([*out, integrand(t, u, named(p), xp)] if integrand else out)

    def initial(p):
        out = [x + 0.0 * p[0] for x in start(named(p), np)]
        return np.array([*out, 0.0 * p[0]] if integrand else out)

    def loss(sol):
        u = sol.u[-1]
        return cost([u], None, xp) + (u[-1] if integrand else 0.0)

    want = np.array([float(P["gradient"][k]) for k in names])
    numbers = np.array([float(P["params"][k]) for k in names])
    prob = sa.ODEProblem(f, lab.array(initial(numbers)), tuple(map(float, P["tspan"])), p, mass_matrix=mass)
    # The chain rule through the initial values, which depend on the parameters.
    chain = np.array([initial(numbers + 1j * E * d).imag / E for d in np.eye(len(names))])
    return prob, loss, chain, float(P["value"]), want


@pytest.mark.parametrize("name", ["dae_linear_semiexplicit", "dae_pendulum_index1", "mass_nonsingular"])
def test_reference_values(lab, name):
    prob, loss, chain, value, want = setup(lab, name)
    r = sa.gradient(prob, sa.Kvaerno5(), loss, rtol=1e-10, atol=1e-11)
    assert float(r.value) == pytest.approx(value, rel=1e-8)
    np.testing.assert_allclose(lab.numpy(r.p) + chain @ lab.numpy(r.u0), want, rtol=1e-7)


@pytest.mark.parametrize("name", ["dae_linear_semiexplicit", "dae_pendulum_index1"])
def test_rosenbrock(numpy_lab, name):
    prob, loss, chain, value, want = setup(numpy_lab, name)
    r = sa.gradient(prob, sa.Rodas5P(), loss, rtol=1e-9, atol=1e-10)
    assert float(r.value) == pytest.approx(value, rel=1e-8)
    np.testing.assert_allclose(r.p + chain @ r.u0, want, rtol=1e-6)


@pytest.mark.parametrize("sensealg", [sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(),
                                      sa.ForwardSensitivity()], ids=lambda a: a.name)
def test_a_nonsingular_mass_goes_with_everything(lab, sensealg):
    prob, loss, chain, value, want = setup(lab, "mass_nonsingular")
    r = sa.gradient(prob, sa.Dopri8(), loss, rtol=1e-10, atol=1e-11, sensealg=sensealg)
    assert float(r.value) == pytest.approx(value, rel=1e-8)
    np.testing.assert_allclose(lab.numpy(r.p) + chain @ lab.numpy(r.u0), want, rtol=1e-7)


def test_the_users_products_of_a_nonsingular_mass():
    M = np.array([[2.0, 1.0], [0.5, 1.5]])
    calls = []

    def vjp(t, u, p, lam):
        calls.append(t)
        return p[0] * lam * np.cos(u), np.array([np.dot(lam, np.sin(u))])

    f = lambda t, u, p: p[0] * np.sin(u)  # noqa: E731
    jac, paramjac = (lambda t, u, p: p[0] * np.diag(np.cos(u))), (lambda t, u, p: np.sin(u)[:, None])
    loss, ones = (lambda sol: np.sum(sol.u)), (lambda sol: np.ones_like(sol.u))
    plain = sa.ODEProblem(lambda t, u, p: np.linalg.solve(M, f(t, u, p)), np.array([1.0, 0.5]), (0.0, 1.0),
                          np.array([0.7]))
    want = sa.gradient(plain, sa.Tsit5(), loss, dloss=ones, sensealg=sa.RecursiveCheckpointAdjoint(
        vjp=sa.FiniteDifferenceVJP()))
    for given in ({"vjp": vjp}, {"jac": jac, "paramjac": paramjac}):
        prob = plain.remake(f=f, mass_matrix=M, **given)
        r = sa.gradient(prob, sa.Tsit5(), loss, dloss=ones)
        assert r.sensealg.vjp == sa.UserVJP()
        # The differences that the products are compared with have nine digits.
        np.testing.assert_allclose(r.p, want.p, rtol=1e-7)
        np.testing.assert_allclose(r.u0, want.u0, rtol=1e-7)
    assert calls


# -- exactness for the computed solution --------------------------------------------------------------------------

M = np.array([[1.0, 0.5, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # dense and singular
P0, GUESS, T0, T1 = np.array([1.3, 0.8]), np.array([1.0, 0.4, -0.5]), 0.25, 1.0
TIMES = [0.25, 0.3, 0.61, 1.0]


def field(xp):
    """The constraint `2 f_0 = f_1` is nonlinear, depends on time and parameters, and no variable is algebraic alone."""
    return lambda t, u, p: xp.stack([
        -p[0] * u[0] + u[1] * u[2], -u[0] + p[1] * xp.sin(t) + 0.3 * u[1] ** 3 + 2.0 * u[1], -u[2] + u[0] * p[0]])


def jacobian(t, u, p):
    return np.array([[-p[0], u[2], u[1]], [-1.0, 0.9 * u[1] ** 2 + 2.0, 0.0], [p[0], 0.0, -1.0]])


V = np.array([0.5, -1.0, 0.0]) / np.sqrt(1.25)
W = np.array([2.0, -1.0, 0.0]) / np.sqrt(5.0)


def solved(tab, nodes, u0, p, t0, t1):
    """The computed end value for complex inputs over a mesh that moves with `t0` and `t1`: full Newton iterations."""
    f, u = field(np), u0.astype(complex)
    for _ in range(20):
        u = u - V * (W @ f(t0, u, p)) / (W @ jacobian(t0, u, p) @ V)
    A, PW = np.array([[*row, *[0.0] * (tab.stages - len(row))] for row in tab.inner]), np.outer(W, W)
    # Of the slope at the start only M k matters for the end value.
    k = np.linalg.solve(M + PW @ jacobian(t0, u, p), f(t0, u, p) - PW @ f(t0, u, p))
    for n in range(len(nodes) - 1):
        last = n == len(nodes) - 2
        t, h = nodes[n] + (t0 - nodes[0]), nodes[n + 1] - nodes[n] + (((t1 - nodes[-1]) - (t0 - nodes[0])) * last)
        K = np.zeros((tab.stages, 3), dtype=complex)
        K[0] = k
        for i in range(1, tab.stages):
            base, c, g = u + h * (A[i, :i] @ K[:i]), t + tab.c[i] * h, h * A[i, i]
            z = np.zeros(3, dtype=complex)
            for _ in range(30):
                z = z - np.linalg.solve(M - g * jacobian(c, base + z, p), M @ z - g * f(c, base + z, p))
            K[i] = z / g
        u, k = u + h * (np.array(tab.b) @ K), K[-1]
    return u


@pytest.mark.parametrize("method", ["Kvaerno3", "ImplicitEuler"])
def test_discrete_adjoint_is_exact(lab, method):
    tab = {"Kvaerno3": diagonal.KVAERNO3, "ImplicitEuler": diagonal.IMPLICIT_EULER}[method]
    prob = sa.ODEProblem(field(lab.xp), lab.array(GUESS), (lab.array(T0), lab.array(T1)), lab.array(P0), mass_matrix=M)
    weights = np.array([0.3, -1.0, 0.7])
    w = lab.array(weights)
    r = sa.gradient(prob, getattr(sa, method)(), lambda sol: lab.xp.sum(w * sol.u[-1]), wrt=("u0", "p", "t0", "t1"),
                    controller=sa.FixedStep(), dt=0.2)
    x = {"u0": GUESS + 0j, "p": P0 + 0j, "t0": T0 + 0j, "t1": T1 + 0j}
    nodes = [0.25, 0.45, 0.65, 0.85, 1.0]
    assert float(r.value) == pytest.approx((weights @ solved(tab, nodes, **x)).real, rel=1e-12)
    for name, value in x.items():
        flat = np.atleast_1d(value)
        want = []
        for j in range(len(flat)):
            moved = flat.copy()
            moved[j] += 1j * E
            moved = moved if np.ndim(value) else moved[0]
            want.append((weights @ solved(tab, nodes, **(x | {name: moved}))).imag / E)
        np.testing.assert_allclose(np.atleast_1d(lab.numpy(getattr(r, name))), want, rtol=1e-10, atol=1e-11,
                                   err_msg=name)
    # Moving the guess along the null space of M changes nothing.
    assert float(np.dot(V, lab.numpy(r.u0))) == pytest.approx(0.0, abs=1e-13)


def test_outputs_between_steps(lab):
    """Central differences of the computed solution, algebraic variables and the first step included."""
    w = np.cos(np.arange(1.0, 1.0 + 3 * len(TIMES))).reshape(-1, 3)
    options = {"saveat": lab.array(TIMES), "controller": sa.FixedStep(), "dt": 0.2}
    prob = sa.ODEProblem(field(lab.xp), lab.array(GUESS), (T0, T1), lab.array(P0), mass_matrix=M)
    weights = lab.array(w)
    r = sa.gradient(prob, sa.Kvaerno5(), lambda sol: lab.xp.sum(weights * sol.u), **options)

    def value(p):
        return float(np.sum(w * lab.numpy(sa.solve(prob.remake(p=lab.array(p)), sa.Kvaerno5(), **options).u)))

    for j, unit in enumerate(np.eye(2)):
        differences = (value(P0 + 1e-4 * unit) - value(P0 - 1e-4 * unit)) / 2e-4
        # e^2 times a third derivative; the slope at the start has eleven digits where f is differentiated numerically.
        assert float(r.p[j]) == pytest.approx(differences, rel=1e-6)


def test_constraints_hold(lab):
    prob = sa.ODEProblem(field(lab.xp), lab.array(GUESS), (T0, T1), lab.array(P0), mass_matrix=M)
    sol = sa.solve(prob, sa.Kvaerno5(), saveat="steps", rtol=1e-8, atol=1e-10)
    u = lab.numpy(sol.u)
    assert max(abs(W @ field(np)(t, v, P0)) for t, v in zip(lab.numpy(sol.t), u, strict=True)) < 1e-9
    start = lab.numpy(sa.solve(prob, sa.Kvaerno5(), saveat=lab.array([T0])).u[0])
    assert W @ field(np)(T0, start, P0) == pytest.approx(0.0, abs=1e-13)
    np.testing.assert_allclose(M @ start, M @ GUESS, rtol=1e-13)
    # Dense output has algebraic variables to five digits here; what is returned is moved onto the constraints.
    between = lab.numpy(sa.solve(prob, sa.Kvaerno5(), saveat=lab.array(TIMES), rtol=1e-5, atol=1e-6).u)
    assert max(abs(W @ field(np)(t, v, P0)) for t, v in zip(TIMES, between, strict=True)) < 1e-13


def test_dense_output_is_on_the_constraints(lab):
    """As states at save times are; and so are its derivatives, where a framework makes them."""
    options = {"rtol": 1e-5, "atol": 1e-6}
    ts = lab.array([0.3, 0.61])

    def solved(p, **more):
        prob = sa.ODEProblem(field(lab.xp), lab.array(GUESS), (T0, T1), p, mass_matrix=M)
        return sa.solve(prob, sa.Kvaerno5(), **options, **more)

    sol = solved(lab.array(P0), dense=True, saveat=ts)
    want = sol.u
    # Two corrections with one Jacobian leave about the cube of what was off. On JAX the stages of dense output are made
    # anew, to rounding; those of the solve are as good as Newton's iteration, a hundredth of rtol.
    tol = 1e-7 if lab.name == "jax" else 1e-9
    np.testing.assert_allclose(lab.numpy(sol(ts)), lab.numpy(want), rtol=tol, atol=tol)
    np.testing.assert_allclose(lab.numpy(sol(0.61)), lab.numpy(want)[1], rtol=tol, atol=tol)
    W = np.array([2.0, -1.0, 0.0])
    assert max(abs(W @ field(np)(t, v, P0)) for t, v in zip([0.3, 0.61], lab.numpy(sol(ts)), strict=True)) < 1e-8
    if lab.name == "torch":
        p = lab.array(P0).requires_grad_()
        (got,) = lab.xp.autograd.grad((solved(p, dense=True)(ts) ** 2).sum(), p)
        (want,) = lab.xp.autograd.grad((solved(p, saveat=ts).u ** 2).sum(), p)
        np.testing.assert_allclose(lab.numpy(got), lab.numpy(want), rtol=1e-6)


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"alg": sa.Tsit5()}, {"alg": sa.ImplicitMidpoint(), "dt": 0.1},
                                     {"sensealg": sa.DirectAdjoint()}], ids=str)
def test_refused(numpy_lab, options):
    prob = sa.ODEProblem(field(numpy_lab.xp), GUESS, (T0, T1), P0, mass_matrix=M)
    with pytest.raises(sa.UnsupportedCombination, match=r"Kvaerno5|RecursiveCheckpointAdjoint"):
        sa.gradient(prob, options.pop("alg", sa.Kvaerno3()), lambda sol: sol.u.sum(), **options)


def test_events_are_refused():
    prob = sa.ODEProblem(field(np), GUESS, (T0, T1), P0, mass_matrix=M)
    with pytest.raises(sa.UnsupportedCombination, match="singular mass matrix"):
        sa.solve(prob, sa.Kvaerno5(), events=[sa.Event(lambda t, u, p: u[0])])


def test_index_two(lab):
    """Position constrained, velocity the variable that has to see to it."""
    prob = sa.ODEProblem(lambda t, u, p: lab.xp.stack([u[1], u[0] - 1.0]), lab.array([1.0, 0.0]), (0.0, 1.0),
                         mass_matrix=np.diag([1.0, 0.0]))
    with pytest.raises(sa.IndexTooHigh, match="index 2"):
        sa.solve(prob, sa.Kvaerno5())


@pytest.mark.parametrize(("mass", "word"), [(np.eye(3), "shape"), (np.diag([1.0, np.nan]), "finite"),
                                            ("abc", "constant")])
def test_bad_mass_matrices(mass, word):
    prob = sa.ODEProblem(lambda t, u, p: -u, np.array([1.0, 2.0]), (0.0, 1.0), mass_matrix=mass)
    with pytest.raises(sa.InputError, match=word):
        sa.solve(prob, sa.Kvaerno5())


def test_sparse_mass_matrices(numpy_lab):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    prob = sa.ODEProblem(field(numpy_lab.xp), GUESS, (T0, T1), P0, mass_matrix=M)
    a = sa.solve(prob, sa.Kvaerno5())
    b = sa.solve(prob.remake(mass_matrix=scipy_sparse.csr_array(M)), sa.Kvaerno5())
    np.testing.assert_array_equal(a.u, b.u)


def test_attached_to_the_frameworks_ad(lab):
    """`autograd.grad`, `backward()` and `jax.grad` give what `gradient` gives."""
    prob = sa.ODEProblem(field(lab.xp), lab.array(GUESS), (T0, T1), lab.array(P0), mass_matrix=M)
    options = {"controller": sa.FixedStep(), "dt": 0.25}
    loss = lambda p: (sa.solve(prob.remake(p=p), sa.ImplicitEuler(), **options).u ** 2).sum()  # noqa: E731
    if lab.name == "torch":
        p = lab.array(P0).requires_grad_()
        loss(p).backward()
        got = p.grad
    elif lab.name == "jax":
        import jax
        got = jax.jit(jax.grad(loss))(lab.array(P0))
    else:
        autograd = pytest.importorskip("autograd")
        got = autograd.grad(loss)(P0)
    want = sa.gradient(prob, sa.ImplicitEuler(), lambda sol: (sol.u**2).sum(), wrt="p", **options).p
    np.testing.assert_allclose(lab.numpy(got), lab.numpy(want), rtol=1e-12)
