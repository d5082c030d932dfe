"""Implicit methods: order, cost, failure, and the discrete adjoint against complex steps through the same stages.

The reference solves the stage equations in complex arithmetic by its own full Newton iteration, so that the imaginary
part of a result over the step is its derivative (Squire, Trapp 1998).
"""

import numpy as np
import pytest

import sensitivity as sa
from sensitivity import diagonal
from sensitivity.rosenbrock import RODAS5P

METHODS = {"ImplicitEuler": diagonal.IMPLICIT_EULER, "ImplicitMidpoint": diagonal.IMPLICIT_MIDPOINT,
           "Trapezoid": diagonal.TRAPEZOID, "Kvaerno3": diagonal.KVAERNO3, "Kvaerno5": diagonal.KVAERNO5}
U0, P, T0, T1 = np.array([1.0, 0.5]), np.array([6.0, 0.7]), 0.25, 1.0
E = 1e-40
TIMES = [0.5, 0.25, 1.0, 0.61, 0.95]
FIXED = {"controller": sa.FixedStep(), "dt": 0.2}


def field(xp):
    """Nonlinear, with time in it, moderately stiff."""
    return lambda t, u, p: xp.stack([-p[0] * u[0] + xp.cos(p[1] * t) * u[1] ** 2, u[0] * u[1] * p[1] - u[1] ** 3])


def jacobian(t, u, p):
    return np.array([[-p[0], 2 * np.cos(p[1] * t) * u[1]], [u[1] * p[1], u[0] * p[1] - 3 * u[1] ** 2]])


def solved(tab, nodes, u0, p, t0, t1, saveat=None):
    """Rows of `sol.u` for complex inputs over a mesh that moves with `t0` and `t1`."""
    f, a = field(np), np.zeros((tab.stages, tab.stages))
    for i, row in enumerate(tab.inner):
        a[i, :len(row)] = row
    d0, d1 = t0 - nodes[0], t1 - nodes[-1]
    u = np.asarray(u0, dtype=complex)
    rows = {}
    for n in range(len(nodes) - 1):
        last = n == len(nodes) - 2
        t, h = nodes[n] + d0, nodes[n + 1] - nodes[n] + (d1 - d0 if last else 0.0)
        K = np.zeros((tab.stages, 2), dtype=complex)
        for i in range(tab.stages):
            base, c, g = u + h * (a[i, :i] @ K[:i]), t + tab.c[i] * h, h * a[i, i]
            k = f(c, base, p)
            for _ in range(12):
                J = np.eye(2) - g * jacobian(c, base + g * k, p)
                k = k - np.linalg.solve(J, k - f(c, base + g * k, p))
            K[i] = k
        for i, s in enumerate(() if saveat is None else saveat):
            if nodes[n] < s.real <= nodes[n + 1] or (n == 0 and s.real == nodes[0]):
                x = (s - t) / h
                rows[i] = u + h * (np.array([sum(d * x ** (m + 1) for m, d in enumerate(r)) for r in tab.dense]) @ K)
        u = u + h * (np.array(tab.b) @ K)
    return u[None, :] if saveat is None else np.stack([rows[i] for i in range(len(saveat))])


@pytest.mark.parametrize("timed", [False, True], ids=["end", "times"])
@pytest.mark.parametrize("method", METHODS)
def test_discrete_adjoint_is_exact(lab, method, timed):
    tab = METHODS[method]
    prob = sa.ODEProblem(field(lab.xp), lab.array(U0), (lab.array(T0), lab.array(T1)), lab.array(P))
    nodes = [0.25, 0.45, 0.65, 0.85, 1.0]
    weights = np.cos(np.arange(1.0, 1.0 + 2 * (len(TIMES) if timed else 1))).reshape(-1, 2)
    x = {"u0": U0 + 0j, "p": P + 0j, "t0": T0 + 0j, "t1": T1 + 0j}
    if timed:
        x["saveat"] = np.array(TIMES) + 0j
    w = lab.array(weights)
    r = sa.gradient(prob, getattr(sa, method)(), lambda sol: lab.xp.sum(w * sol.u), wrt=tuple(x),
                    saveat=lab.array(TIMES) if timed else None, sensealg=sa.RecursiveCheckpointAdjoint(), **FIXED)
    assert float(r.value) == pytest.approx(np.sum(weights * solved(tab, nodes, **x)).real, rel=1e-13)
    assert r.stats.nvjp == 4 * (tab.stages - tab.fsal) + tab.fsal
    for name, value in x.items():
        flat = np.atleast_1d(value)
        want = []
        for j in range(len(flat)):
            moved = flat.copy()
            moved[j] += 1j * E
            moved = moved if np.ndim(value) else moved[0]
            want.append(np.sum(weights * solved(tab, nodes, **(x | {name: moved}))).imag / E)
        np.testing.assert_allclose(np.atleast_1d(lab.numpy(getattr(r, name))), want, rtol=1e-11, atol=1e-12,
                                   err_msg=name)


def rosenbrock(nodes, u0, p, t0, t1, saveat):
    """As `solved`, for Rodas5P: with `J = f_u` and `f_t` at the start of each step, functions of complex numbers."""
    tab, f, u, rows = RODAS5P, field(np), np.asarray(u0, dtype=complex), {}
    square = lambda m: np.array([[*row, *[0.0] * (tab.stages - len(row))] for row in m])  # noqa: E731
    a, g = square(tab.a), square(tab.g)
    d0, d1 = t0 - nodes[0], t1 - nodes[-1]
    for n in range(len(nodes) - 1):
        last = n == len(nodes) - 2
        t, h = nodes[n] + d0, nodes[n + 1] - nodes[n] + (d1 - d0 if last else 0.0)
        in_time = np.array([-p[1] * np.sin(p[1] * t) * u[1] ** 2, 0.0])
        K = np.zeros((tab.stages, 2), dtype=complex)
        for i in range(tab.stages):
            right = f(t + tab.c[i] * h, u + h * (a[i] @ K), p) + g[i] @ K + h * tab.d[i] * in_time
            K[i] = np.linalg.solve(np.eye(2) - tab.gamma * h * jacobian(t, u, p), tab.gamma * right)
        for i, s in enumerate(saveat):
            if nodes[n] < s.real <= nodes[n + 1] or (n == 0 and s.real == nodes[0]):
                x = (s - t) / h
                rows[i] = u + h * (np.array([sum(d * x ** (m + 1) for m, d in enumerate(r)) for r in tab.dense]) @ K)
        u = u + h * (np.array(tab.b) @ K)
    return np.stack([rows[i] for i in range(len(saveat))])


def test_rosenbrock_adjoint_is_exact(lab):
    prob = sa.ODEProblem(field(lab.xp), lab.array(U0), (lab.array(T0), lab.array(T1)), lab.array(P))
    nodes, weights = [0.25, 0.45, 0.65, 0.85, 1.0], np.cos(np.arange(1.0, 11.0)).reshape(5, 2)
    x = {"u0": U0 + 0j, "p": P + 0j, "t0": T0 + 0j, "t1": T1 + 0j, "saveat": np.array(TIMES) + 0j}
    w = lab.array(weights)
    r = sa.gradient(prob, sa.Rodas5P(), lambda sol: lab.xp.sum(w * sol.u), wrt=tuple(x), saveat=lab.array(TIMES),
                    sensealg=sa.RecursiveCheckpointAdjoint(), **FIXED)
    # On NumPy f_u and f_t of the solve, and on NumPy and PyTorch second derivatives, are central differences.
    tol = 1e-11 if lab.name == "jax" else 1e-8
    assert float(r.value) == pytest.approx(np.sum(weights * rosenbrock(nodes, **x)).real, rel=tol)
    for name, value in x.items():
        flat, want = np.atleast_1d(value), []
        for j in range(len(flat)):
            moved = flat.copy()
            moved[j] += 1j * E
            moved = moved if np.ndim(value) else moved[0]
            want.append(np.sum(weights * rosenbrock(nodes, **(x | {name: moved}))).imag / E)
        np.testing.assert_allclose(np.atleast_1d(lab.numpy(getattr(r, name))), want, rtol=tol, atol=tol, err_msg=name)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_rosenbrock_tangents(lab):
    """Forward mode is the transpose of reverse mode."""
    if lab.name == "numpy":
        pytest.skip("autograd has no forward mode through a solve")
    prob = sa.ODEProblem(field(lab.xp), lab.array(U0), (T0, T1), lab.array(P))
    solve = lambda p: sa.solve(prob.remake(p=p), sa.Rodas5P(), **FIXED).u[-1]  # noqa: E731
    d, w = np.array([0.3, -1.0]), np.array([0.7, 0.2])
    if lab.name == "jax":
        import jax
        forward = jax.jvp(solve, (lab.array(P),), (lab.array(d),))[1]
    else:
        import torch
        forward = torch.func.jvp(solve, (lab.array(P),), (lab.array(d),))[1]
    r = sa.gradient(prob, sa.Rodas5P(), lambda sol: lab.xp.sum(lab.array(w) * sol.u[-1]), wrt="p", **FIXED)
    # Second derivatives are central differences on PyTorch.
    assert np.dot(w, lab.numpy(forward)) == pytest.approx(np.dot(d, lab.numpy(r.p)),
                                                          rel=1e-12 if lab.name == "jax" else 1e-7)


def test_rosenbrock_work_is_counted():
    calls = {"f": 0, "vjp": 0}

    def f(t, u, p):
        calls["f"] += 1
        return field(np)(t, u, p)

    def vjp(t, u, p, lam):
        calls["vjp"] += 1
        return lam @ jacobian(t, u, p), np.array([-lam[0] * u[0], lam[1] * u[0] * u[1]
                                                  - lam[0] * t * np.sin(p[1] * t) * u[1] ** 2])

    prob = sa.ODEProblem(f, U0, (T0, T1), P, vjp=vjp, jac=jacobian)
    r = sa.gradient(prob, sa.Rodas5P(), lambda sol: sol.u.sum(), dloss=lambda sol: np.ones_like(sol.u), probe="off",
                    **FIXED)
    # Two entries of u: two directions for the second derivatives of a step, by central differences.
    assert r.stats.nvjp == calls["vjp"] == 4 * (8 + 2 * 2)
    # f_t takes two more evaluations a step.
    assert r.stats.nfe + 2 * r.stats.naccept == calls["f"]
    assert (r.stats.njac, r.stats.nlu, r.stats.nsolve) == (4, 4, 32)


def test_rosenbrock_adjoint_of_many_entries(lab):
    """From eight entries of u on, second derivatives go along the stages: five copies of a system in one."""
    prob = sa.ODEProblem(field(lab.xp), lab.array(U0), (T0, T1), lab.array(P))

    def many(t, u, p):
        return lab.xp.concatenate([field(lab.xp)(t, u[2 * i:2 * i + 2], p) for i in range(5)])

    r, five = (sa.gradient(q, sa.Rodas5P(), lambda sol: lab.xp.sum(sol.u[-1] ** 2), **FIXED)
               for q in (prob, prob.remake(f=many, u0=lab.array(np.tile(U0, 5)))))
    assert five.stats.nvjp == r.stats.naccept * (8 + 8 * (1 if lab.name == "jax" else 2))
    tol = 1e-12 if lab.name == "jax" else 1e-8  # central differences
    np.testing.assert_allclose(lab.numpy(five.p), 5 * lab.numpy(r.p), rtol=tol)
    np.testing.assert_allclose(lab.numpy(five.u0), np.tile(lab.numpy(r.u0), 5), rtol=tol)


@pytest.mark.parametrize("vjp", [sa.ForwardVJP(), sa.ComplexStepVJP(), sa.FiniteDifferenceVJP()], ids=lambda v: v.name)
def test_every_product(numpy_lab, vjp):
    prob = sa.ODEProblem(field(numpy_lab.xp), U0, (T0, T1), P)
    loss = lambda sol: numpy_lab.xp.sum(sol.u**2)  # noqa: E731
    want = sa.gradient(prob, sa.Kvaerno3(), loss, sensealg=sa.RecursiveCheckpointAdjoint(), **FIXED)
    got = sa.gradient(prob, sa.Kvaerno3(), loss, sensealg=sa.RecursiveCheckpointAdjoint(vjp=vjp), **FIXED)
    # Central differences of f have nine digits.
    rtol = 1e-7 if isinstance(vjp, sa.FiniteDifferenceVJP) else 1e-12
    np.testing.assert_allclose(got.p, want.p, rtol=rtol)
    np.testing.assert_allclose(got.u0, want.u0, rtol=rtol)


@pytest.mark.parametrize("method", [*METHODS, "Rodas5P"])
def test_order(method):
    """The error of the end value and of values inside steps falls as the order says."""
    tab, exact = {**METHODS, "Rodas5P": RODAS5P}[method], lambda t: np.array([np.exp(-t), np.sin(t)])
    prob = sa.ODEProblem(lambda t, u, p: np.array([-u[0] + (u[1] ** 2 - np.sin(t) ** 2), np.cos(t) * u[0] * np.exp(t)]),
                         np.array([1.0, 0.0]), (0.0, 1.0))
    ts = np.array([0.33, 0.77, 1.0])
    errors = []
    for count in (10, 20) if tab.order == 5 else (20, 40):
        sol = sa.solve(prob, getattr(sa, method)(), saveat=ts, controller=sa.FixedStep(), dt=1.0 / count)
        errors.append([np.max(np.abs(sol.u[i] - exact(t))) for i, t in enumerate(ts)])
    rates = np.log2(np.array(errors[0]) / np.array(errors[1]))
    assert rates[-1] == pytest.approx(tab.order, abs=0.3)
    # Inside a step the dense output's own error comes on top.
    assert min(rates) > min(tab.order, tab.dense_order + 1) - 0.5


@pytest.mark.parametrize("method", ["Kvaerno3", "Kvaerno5"])
def test_order_conditions(method):
    """All conditions up to the order for the solution and, up to the dense order, for the dense output."""
    tab = METHODS[method]
    A = np.array([[*row, *[0.0] * (tab.stages - len(row))] for row in tab.inner])
    c, D = np.array(tab.c), np.array(tab.dense)
    np.testing.assert_allclose(A.sum(1), c, atol=1e-13)
    np.testing.assert_allclose(A[-1], tab.b, atol=1e-15)
    conditions = {1: [(np.ones_like(c), 1.0)], 2: [(c, 2.0)], 3: [(c**2, 3.0), (A @ c, 6.0)],
                  4: [(c**3, 4.0), (c * (A @ c), 8.0), (A @ c**2, 12.0), (A @ A @ c, 24.0)],
                  5: [(c**4, 5.0), (A @ c**3, 20.0), (c * (A @ c**2), 15.0), (A @ A @ c**2, 60.0)]}
    for order, pairs in conditions.items():
        for v, gamma in pairs:
            if order <= tab.order:
                assert np.dot(tab.b, v) == pytest.approx(1.0 / gamma, abs=1e-14)
            if order <= tab.order - 1:
                assert np.dot(np.subtract(tab.b, tab.error), v) == pytest.approx(1.0 / gamma, abs=1e-14)
            if order <= tab.dense_order:
                want = [1.0 / gamma if k + 1 == order else 0.0 for k in range(D.shape[1])]
                np.testing.assert_allclose(v @ D, want, atol=1e-13)


def robertson(xp):
    return lambda t, u, p: xp.stack([-p[0] * u[0] + p[2] * u[1] * u[2],
                                     p[0] * u[0] - p[1] * u[1] ** 2 - p[2] * u[1] * u[2], p[1] * u[1] ** 2])


def robertson_jac(t, u, p):
    return np.array([[-p[0], p[2] * u[2], p[2] * u[1]], [p[0], -2 * p[1] * u[1] - p[2] * u[2], -p[2] * u[1]],
                     [0.0, 2 * p[1] * u[1], 0.0]])


def test_work_is_counted():
    """One Jacobian and one factorisation per attempt, one evaluation and one solve per Newton iteration."""
    calls = {"f": 0, "jac": 0}

    def counted(name, g):
        def call(*args):
            calls[name] += 1
            return g(*args)
        return call

    prob = sa.ODEProblem(counted("f", robertson(np)), np.array([1.0, 0.0, 0.0]), (0.0, 1e5), np.array([0.04, 3e7, 1e4]),
                         jac=counted("jac", robertson_jac))
    sol = sa.solve(prob, sa.Kvaerno5(), rtol=1e-6, atol=np.array([1e-8, 1e-12, 1e-8]), probe="off")
    s = sol.stats
    assert calls == {"f": s.nfe, "jac": s.njac}
    assert s.njac == s.nlu == s.naccept + s.nreject
    assert s.nsolve == s.nfe - 2
    # A convergence test scaled with the step needs few steps, and few iterations for each of six stages.
    assert s.naccept < 90
    assert s.nsolve < 6 * 3 * (s.naccept + s.nreject)
    assert float(np.sum(sol.u[-1])) == pytest.approx(1.0, abs=1e-12)


def test_all_frameworks_take_the_same_steps(lab):
    """Robertson's problem: same stages, same iterations, same counts, whatever makes the Jacobian."""
    prob = sa.ODEProblem(robertson(lab.xp), lab.array([1.0, 0.0, 0.0]), (0.0, 40.0), lab.array([0.04, 3e7, 1e4]))
    s = sa.solve(prob, sa.Kvaerno5(), rtol=1e-6, atol=lab.array([1e-8, 1e-12, 1e-8])).stats
    reference = sa.solve(sa.ODEProblem(robertson(np), np.array([1.0, 0.0, 0.0]), (0.0, 40.0),
                                       np.array([0.04, 3e7, 1e4]), jac=robertson_jac), sa.Kvaerno5(), rtol=1e-6,
                         atol=np.array([1e-8, 1e-12, 1e-8])).stats
    assert (s.naccept, s.nreject, s.nsolve) == (reference.naccept, reference.nreject, reference.nsolve)


def test_stiff_transient_is_not_resolved():
    """Prothero and Robinson: `u' = -k (u - cos t) - sin t`; the steps follow cos, not k."""
    k = 1e8
    prob = sa.ODEProblem(lambda t, u, p: -k * (u - np.cos(t)) - np.sin(t), np.array([1.0]), (0.0, 10.0))
    for method in (sa.Kvaerno3(), sa.Kvaerno5(), sa.Rodas5P()):
        sol = sa.solve(prob, method, rtol=1e-6, atol=1e-8)
        assert sol.stats.naccept < 200
        assert float(sol.u[-1, 0]) == pytest.approx(np.cos(10.0), abs=1e-6)


def kinked(xp):
    """No root of the stage equation is where Newton's iteration looks for it: the step must shrink for ever."""
    return lambda t, u, p: xp.where(t > 0.5, xp.sqrt(-1.0 - u**2), -u)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("options", [{}, {"controller": sa.FixedStep(), "dt": 0.1}], ids=["adaptive", "fixed"])
def test_newton_failure(lab, options):
    prob = sa.ODEProblem(kinked(lab.xp), lab.array([1.0]), (0.0, 1.0))
    with pytest.raises(sa.SolveError, match="Newton's iteration for the stages of Kvaerno5 failed") as e:
        sa.solve(prob, sa.Kvaerno5(), probe="off", **options)
    assert e.value.retcode == sa.RetCode.NewtonFailure
    sol = sa.solve(prob, sa.Kvaerno5(), probe="off", on_failure="nan", **options)
    assert np.all(np.isnan(lab.numpy(sol.u)))


def test_a_failed_iteration_shortens_the_step():
    """A stiff switch makes the old Jacobian useless; the iteration fails, and a shorter step succeeds."""
    prob = sa.ODEProblem(lambda t, u, p: -1e4 * np.tanh(50.0 * (u - np.cos(3.0 * t))), np.array([1.5]), (0.0, 2.0))
    sol = sa.solve(prob, sa.Kvaerno5(), rtol=1e-6, atol=1e-9)
    assert sol.stats.nreject > 0
    assert float(sol.u[-1, 0]) == pytest.approx(np.cos(6.0), abs=1e-3)


@pytest.mark.parametrize(("options", "word"), [
    ({"sensealg": sa.DirectAdjoint()}, "RecursiveCheckpointAdjoint"),
    ({"alg": sa.ImplicitMidpoint(), "controller": sa.PIController()}, "FixedStep")])
def test_refused(numpy_lab, options, word):
    prob = sa.ODEProblem(field(numpy_lab.xp), U0, (T0, T1), P)
    with pytest.raises(sa.UnsupportedCombination, match=word):
        sa.gradient(prob, options.pop("alg", sa.Kvaerno3()), lambda sol: sol.u.sum(), **options)


def test_complex_states_are_refused():
    prob = sa.ODEProblem(lambda t, u, p: 1j * u, np.array([1.0 + 0j]), (0.0, 1.0))
    with pytest.raises(sa.UnsupportedCombination, match="complex"):
        sa.solve(prob, sa.Kvaerno5())


def test_jax_transforms():
    """One compiled solve serves `vmap` of `grad`, and forward mode over reverse mode gives the Hessian."""
    jax = pytest.importorskip("jax")
    prob = sa.ODEProblem(field(jax.numpy), jax.numpy.array(U0), (T0, T1), jax.numpy.array(P))

    def loss(p):
        return jax.numpy.sum(sa.solve(prob.remake(p=p), sa.Kvaerno3(), controller=sa.FixedStep(), dt=0.25).u ** 2)

    slope = jax.jit(jax.grad(loss))
    several = np.stack([P, 1.5 * P])
    np.testing.assert_allclose(jax.vmap(slope)(several), [slope(p) for p in several], rtol=1e-12)
    differences = [(slope(P + 1e-5 * d) - slope(P - 1e-5 * d)) / 2e-5 for d in np.eye(2)]
    # e^2 times a third derivative
    np.testing.assert_allclose(jax.hessian(loss)(jax.numpy.array(P)), differences, rtol=1e-7, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_torch_transforms():
    torch = pytest.importorskip("torch")
    prob = sa.ODEProblem(field(torch), torch.tensor(U0), (T0, T1), torch.tensor(P))
    loss = lambda p: (sa.solve(prob.remake(p=p), sa.Kvaerno3()).u ** 2).sum()  # noqa: E731
    several = torch.tensor(np.stack([P, 1.5 * P]))
    rows = torch.func.vmap(torch.func.grad(loss))(several)
    for row, p in zip(rows, several, strict=True):
        leaf = p.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(row, leaf.grad, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("given", [{}, {"jac": jacobian}], ids=["by AD", "jac given"])
def test_second_order(numpy_lab, given):
    """The Hessian along a direction is the difference of two gradients of the computed solution."""
    prob = sa.ODEProblem(field(numpy_lab.xp), U0, (T0, T1), P, **given)
    loss = lambda sol: numpy_lab.xp.sum(sol.u**2)  # noqa: E731
    d, e = np.array([0.3, -1.0]), 1e-5
    h = sa.hessian_vector_product(prob, sa.Kvaerno3(), loss, d, wrt="p", **FIXED)
    rows = [sa.gradient(prob.remake(p=P + s * e * d), sa.Kvaerno3(), loss, wrt="p", **FIXED).p for s in (1.0, -1.0)]
    # e^2 times a third derivative
    np.testing.assert_allclose(getattr(h, "p", h), (rows[0] - rows[1]) / (2.0 * e), rtol=1e-6)


@pytest.mark.parametrize("sensealg", [sa.GaussAdjoint(), sa.QuadratureAdjoint(), sa.BacksolveAdjoint(),
                                      sa.InterpolatingAdjoint(), sa.ForwardSensitivity(), sa.ForwardADSensitivity()],
                         ids=lambda a: a.name)
@pytest.mark.parametrize("method", [sa.Kvaerno3(), sa.Rodas5P()], ids=lambda m: m.name)
def test_every_algorithm(numpy_lab, method, sensealg):
    """The backward solve of a continuous adjoint uses the same implicit method."""
    prob = sa.ODEProblem(field(numpy_lab.xp), U0, (T0, T1), P)
    options = {"rtol": 1e-7, "atol": 1e-8, "saveat": np.array([0.5, 1.0])}
    loss = lambda sol: numpy_lab.xp.sum(sol.u**2)  # noqa: E731
    want = sa.gradient(prob, sa.Dopri8(), loss, **(options | {"rtol": 1e-10, "atol": 1e-11}))
    got = sa.gradient(prob, method, loss, sensealg=sensealg, **options)
    np.testing.assert_allclose(got.p, want.p, rtol=1e-5)
    np.testing.assert_allclose(got.u0, want.u0, rtol=1e-5)


def test_events(numpy_lab):
    """Jumps at events, between steps of an implicit method."""
    prob = sa.ODEProblem(field(numpy_lab.xp), U0, (T0, T1), P)
    event = sa.Event(lambda t, u, p: u[0] - 0.3, affect=lambda t, u, p: u + 0.2)
    loss = lambda sol: numpy_lab.xp.sum(sol.u**2)  # noqa: E731
    a, b = (sa.gradient(prob, m, loss, events=[event], rtol=1e-8, atol=1e-9) for m in (sa.Kvaerno5(), sa.Dopri8()))
    np.testing.assert_allclose(a.p, b.p, rtol=1e-5)
    np.testing.assert_allclose(a.u0, b.u0, rtol=1e-5)


def test_second_derivatives_in_one_loop():
    """NumPy sums the differences of a Rosenbrock step in place: what the plain loop gives, zero directions too."""
    from sensitivity.backend import Backend
    from sensitivity.explicit import adding
    from sensitivity.registry import registry

    be, rng = registry().backend("numpy"), np.random.default_rng(3)

    def pull(t, u, w):
        return w * np.cos(t * u), (np.sin(u) * w, np.sum(u * u * w)), np.sum(w * u)

    u, (K, W), d = rng.normal(size=5), rng.normal(size=(2, 4, 5)), np.array([0.2, 0.0, -0.4, 1.0])
    for slopes in (K, 1e6 * K, 0.0 * K):
        start = (np.ones(5), (np.zeros(5), np.zeros(())), 0.5)
        got, want = (own.bent(be, pull, 1.3, u, (d, slopes, W), start, lambda a, b, *at: adding(be)(
            tuple(np.array(v) for v in a), b, *at)) for own in (type(be), Backend))
        np.testing.assert_array_equal(start[0], 1.0)
        for a, b in zip((got[0], *got[1], got[2]), (want[0], *want[1], want[2]), strict=True):
            # Rounding of central differences with step eps^(1/3).
            np.testing.assert_allclose(a, b, rtol=0.0, atol=2e-10 * max(1.0, np.abs(slopes).max()))
