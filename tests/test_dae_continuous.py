"""Continuous adjoints and forward sensitivities of differential-algebraic equations, and what they solve."""

import json
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.testing import models

GOLD = {p["id"]: p for p in json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())["problems"]}
CONTINUOUS = ["GaussAdjoint", "QuadratureAdjoint", "InterpolatingAdjoint"]
EVERY = [*CONTINUOUS, "ForwardSensitivity", "ForwardADSensitivity"]
E = 1e-30

# -- a problem with a solution: x' = -a x + z, 0 = b x + c t - z, hidden behind two changes of variables -------------

A = np.array([[2.0, -1.0], [0.5, 1.5]])
B = np.array([[1.0, 0.4], [-0.7, 1.2]])
MASS = A @ np.diag([1.0, 0.0]) @ B
GUESS, SPAN, P = np.array([0.9, -0.4]), (0.2, 1.4), np.array([1.4, 0.5, 0.3])
TIMES = np.array([0.7, 0.2, 1.4, 1.1, 0.7])
WEIGHTS = np.cos(np.arange(1.0, 11.0)).reshape(5, 2)


def field(xp):
    """`A (x', 0) = A g(B v)`, with x and z mixed in both v and the equations."""

    def f(t, v, p):
        x, z = B[0, 0] * v[0] + B[0, 1] * v[1], B[1, 0] * v[0] + B[1, 1] * v[1]
        g, h = z - p[0] * x, p[1] * x + p[2] * t - z
        return xp.stack([A[0, 0] * g + A[0, 1] * h, A[1, 0] * g + A[1, 1] * h])

    return f


def bent(xp):
    """The same with a nonlinear constraint: `x' = -a x + z^2`, `0 = b x + sin t - z - c z^3`."""

    def f(t, v, p):
        x, z = B[0, 0] * v[0] + B[0, 1] * v[1], B[1, 0] * v[0] + B[1, 1] * v[1]
        g, h = z * z - p[0] * x, p[1] * x + xp.sin(t) - z - p[2] * z**3
        return xp.stack([A[0, 0] * g + A[0, 1] * h, A[1, 0] * g + A[1, 1] * h])

    return f


def solution(v0, p, t0, t):
    """State `v(t)` in closed form, and the integral of z from t0 to t."""
    k, x0 = p[1] - p[0], B[0] @ v0
    particular = lambda s: -p[2] * (s / k + 1.0 / k**2)  # noqa: E731
    free, grown = x0 - particular(t0), np.exp(k * (t - t0))
    x = free * grown + particular(t)
    both = free * (grown - 1.0) / k - p[2] * ((t**2 - t0**2) / (2.0 * k) + (t - t0) / k**2)
    return np.linalg.solve(B, np.array([x, p[1] * x + p[2] * t])), p[1] * both + p[2] * (t**2 - t0**2) / 2.0


def derivatives(value, inputs):
    """Complex steps, one entry at a time."""
    out = {}
    for name, at in inputs.items():
        flat = np.atleast_1d(np.asarray(at, dtype=complex))
        rows = []
        for j in range(flat.size):
            moved = flat.copy()
            moved[j] += 1j * E
            rows.append(np.imag(value(**(inputs | {name: moved if np.ndim(at) else moved[0]}))) / E)
        out[name] = np.array(rows)
    return out


def problem(lab, **more):
    return sa.ODEProblem(field(lab.xp), lab.array(GUESS), SPAN, lab.array(P), mass_matrix=MASS, **more)


def close(lab, r, want, **tolerance):
    for name, value in want.items():
        np.testing.assert_allclose(np.ravel(lab.numpy(getattr(r, name))), value, err_msg=name, **tolerance)


def weighted(u0, p, t0, t1, saveat):
    del t1
    return sum(np.sum(w * solution(u0, p, t0, t)[0] ** 2) for w, t in zip(WEIGHTS, saveat, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_algebraic_variables_at_many_times(lab, name):
    """Both ends, a repeated time, and every derivative there is; without the impulse p is wrong in the first digit."""
    w = lab.array(WEIGHTS)
    r = sa.gradient(problem(lab), sa.Kvaerno5(), lambda sol: lab.xp.sum(w * sol.u**2), saveat=lab.array(TIMES),
                    wrt=("u0", "p", "t0", "t1", "saveat"), rtol=1e-8, atol=1e-9, sensealg=getattr(sa, name)())
    want = derivatives(weighted, {"u0": GUESS, "p": P, "t0": SPAN[0], "t1": SPAN[1], "saveat": TIMES})
    # The solution itself has an error of 2e-8.
    close(lab, r, want, rtol=3e-7, atol=3e-7)
    # A guess moved along the null space of M is the same start.
    null = np.linalg.solve(B, [0.0, 1.0])
    assert np.dot(lab.numpy(r.u0), null) == pytest.approx(0.0, abs=1e-12)


def final(u0, p, t0, t1):
    return np.sum(np.array([0.3, -1.0]) * solution(u0, p, t0, t1)[0])


@pytest.mark.parametrize("method", ["Rodas5P", "Kvaerno3"])
@pytest.mark.parametrize("name", EVERY)
def test_other_methods(numpy_lab, name, method):
    r = sa.gradient(problem(numpy_lab), getattr(sa, method)(), lambda sol: (sol.u[-1] * np.array([0.3, -1.0])).sum(),
                    wrt=("u0", "p", "t0", "t1"), rtol=1e-6, atol=1e-7, sensealg=getattr(sa, name)())
    want = derivatives(final, {"u0": GUESS, "p": P, "t0": SPAN[0], "t1": SPAN[1]})
    close(numpy_lab, r, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*CONTINUOUS, "ForwardSensitivity", "RecursiveCheckpointAdjoint"])
def test_algebraic_variables_in_a_running_cost(lab, name):
    """`int z dt` beside a sum over states: one more equation, which is no constraint."""
    first = lambda u: B[1, 0] * u[0] + B[1, 1] * u[1]  # noqa: E731
    cost = sa.ContinuousCost(lambda t, u, p: first(u) + 0.0 * p[0]) + sa.DiscreteCost([0.7, 1.4], None,
                                                                                      g=lambda t, u, p: u[1] ** 2)
    r = sa.gradient(problem(lab), sa.Kvaerno5(), cost, wrt=("u0", "p"), rtol=1e-8, atol=1e-9,
                    sensealg=getattr(sa, name)())

    def value(u0, p):
        return solution(u0, p, *SPAN)[1] + sum(solution(u0, p, SPAN[0], t)[0][1] ** 2 for t in (0.7, 1.4))

    assert float(r.value) == pytest.approx(value(GUESS, P), rel=1e-7)
    close(lab, r, derivatives(value, {"u0": GUESS, "p": P}), rtol=3e-7, atol=3e-7)


def test_running_cost_with_a_regular_mass_matrix(numpy_lab):
    M = np.array([[2.0, 1.0], [0.5, 1.5]])
    xp = numpy_lab.xp
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([p[0] * u[1], -p[1] * u[0]]), np.array([1.0, 0.5]), (0.0, 1.0),
                         np.array([0.7, 1.3]), mass_matrix=M)
    plain = prob.remake(f=lambda t, u, p: np.linalg.inv(M) @ prob.f(t, u, p), mass_matrix=None)
    cost = sa.ContinuousCost(lambda t, u, p: p[0] * u[0] ** 2)
    a, b = (sa.gradient(q, sa.Tsit5(), cost, rtol=1e-9, atol=1e-9) for q in (prob, plain))
    np.testing.assert_allclose(a.p, b.p, rtol=1e-12)


@pytest.mark.parametrize("name", [*CONTINUOUS, "ForwardSensitivity"])
def test_pendulum(numpy_lab, name):
    """The tension of the rod, an algebraic variable, at the end of a swing, from the reference values."""
    reference = GOLD["dae_pendulum_index1"]
    length, angle, speed, g = (float(reference["params"][k]) for k in ("L", "th0", "v0", "g"))
    prob = models.pendulum_dae(numpy_lab.xp, length, angle, speed, g)
    r = sa.gradient(prob, sa.Kvaerno5(), lambda sol: sol.u[-1, 4] + 2.0 * sol.u[-1, 0], rtol=1e-8, atol=1e-9,
                    sensealg=getattr(sa, name)())
    # The initial velocity (v cos th, v sin th) is of norm v; the tension at the start is only a guess.
    along_v = r.u0 @ np.array([0.0, 0.0, np.cos(angle), np.sin(angle), 0.0])
    # The forward solve has an error of 5e-8 at these tolerances, derivatives as much.
    assert float(r.value) == pytest.approx(float(reference["value"]), rel=2e-7)
    np.testing.assert_allclose([r.p[0], along_v], [float(reference["gradient"][k]) for k in ("g", "v0")], rtol=2e-7)
    assert r.u0[4] == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("options", [{}, {"checkpoints": 3}, {"checkpoints": "saveat"}, {"alg": sa.Rodas5P()},
                                     {"rtol": 1e-10, "atol": 1e-11}], ids=str)
@pytest.mark.parametrize("tspan", [(0.25, 1.0), (1.0, 0.4)], ids=["forwards", "backwards"])
def test_agrees_with_the_discrete_adjoint(numpy_lab, options, tspan):
    """Save times as a number, or at every step."""
    prob = sa.ODEProblem(bent(numpy_lab.xp), GUESS, tspan, P, mass_matrix=MASS)
    loss = lambda sol: (sol.u**2 * np.array([0.3, -1.0])).sum()  # noqa: E731
    for saveat, wrt in ((4, ("u0", "p", "t0", "t1")), ("steps", ("u0", "p"))):
        exact, r = (sa.gradient(prob, sa.Kvaerno5(), loss, wrt=wrt, saveat=saveat, rtol=1e-8, atol=1e-9, sensealg=a)
                    for a in (sa.RecursiveCheckpointAdjoint(), sa.GaussAdjoint(**options)))
        for part in wrt:
            np.testing.assert_allclose(getattr(r, part), getattr(exact, part), rtol=1e-6, atol=1e-6, err_msg=part)


def test_taylor_remainders(numpy_lab):
    """Second order, so the gradient is right: no algorithm of this library is the reference here."""
    prob = sa.ODEProblem(bent(numpy_lab.xp), GUESS, SPAN, P, mass_matrix=MASS)
    options = {"saveat": [0.4, 1.4], "rtol": 1e-11, "atol": 1e-12}
    loss = lambda sol: (sol.u**2).sum()  # noqa: E731
    r = sa.gradient(prob, sa.Rodas5P(), loss, wrt="p", sensealg=sa.GaussAdjoint(rtol=1e-9, atol=1e-10), **options)
    d = np.array([0.6, -0.8, 0.5])
    steps = 2.0 ** -np.arange(3.0, 6.0)
    left = [abs(loss(sa.solve(prob.remake(p=prob.p + h * d), sa.Rodas5P(), **options)) - r.value - h * d @ r.p)
            for h in steps]
    np.testing.assert_allclose(np.diff(np.log2(left)), -2.0, atol=0.15)


def robertson_jac(t, u, p):
    return np.array([[-p[0], p[2] * u[2], p[2] * u[1]], [p[0], -2.0 * p[1] * u[1] - p[2] * u[2], -p[2] * u[1]],
                     [1.0, 1.0, 1.0]])


def robertson_paramjac(t, u, p):
    return np.array([[-u[0], 0.0, u[1] * u[2]], [u[0], -u[1] ** 2, -u[1] * u[2]], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("name", EVERY)
def test_robertson(name):
    """The conserved total as a constraint: the derivatives are those of the ordinary equation, known to 20 digits."""
    reference = GOLD["ode_robertson"]
    prob = models.robertson_dae(np).remake(tspan=(0.0, 40.0), jac=robertson_jac, paramjac=robertson_paramjac)
    weights = np.array([1.0, 1e4, 2.0])
    r = sa.gradient(prob, sa.Rodas5P(), lambda sol: sol.u[-1] @ weights, dloss=lambda sol: weights[None, :], wrt="p",
                    rtol=1e-8, atol=np.array([1e-10, 1e-14, 1e-10]), sensealg=getattr(sa, name)())
    assert float(r.value) == pytest.approx(float(reference["value"]), rel=1e-9)
    np.testing.assert_allclose(r.p, [float(reference["gradient"][k]) for k in ("k1", "k2", "k3")], rtol=1e-7)


def test_sensitivities_on_the_constraints(lab):
    """S of every variable at every time; the tangent of the constraint holds to rounding."""
    sol, S = sa.forward_sensitivities(problem(lab), sa.Kvaerno5(), saveat=lab.array([0.2, 0.9, 1.4]), rtol=1e-8,
                                      atol=1e-9)
    for t, row in zip((0.2, 0.9, 1.4), lab.numpy(S), strict=True):
        want = np.array([derivatives(lambda p, i=i, t=t: solution(GUESS, p, SPAN[0], t)[0][i], {"p": P})["p"]
                         for i in range(2)])
        np.testing.assert_allclose(row, want, rtol=1e-6, atol=1e-7)
    u, t = lab.numpy(sol.u)[1], 0.9
    x, z = B @ u
    assert P[1] * x + P[2] * t - z == pytest.approx(0.0, abs=1e-14)


def test_attached_to_the_frameworks_ad(lab):
    """`autograd.grad`, `backward()` and `jax.grad` give what `gradient` gives, from both directions."""
    sensealg = sa.GaussAdjoint()
    options = {"saveat": lab.array([0.7, 1.4]), "rtol": 1e-6, "atol": 1e-7, "sensealg": sensealg}
    prob = problem(lab)
    states = lambda p: sa.solve(prob.remake(p=p), sa.Kvaerno5(), **options).u  # noqa: E731
    loss = lambda p: (states(p) ** 2).sum()  # noqa: E731
    if lab.name == "torch":
        p = lab.array(P).requires_grad_()
        loss(p).backward()
        got = p.grad
    elif lab.name == "jax":
        import jax
        got = jax.jit(jax.grad(loss))(lab.array(P))
    else:
        autograd = pytest.importorskip("autograd")
        got = autograd.grad(loss)(P)
    want = sa.gradient(prob, sa.Kvaerno5(), lambda sol: (sol.u**2).sum(), wrt="p", **options).p
    np.testing.assert_allclose(lab.numpy(got), lab.numpy(want), rtol=1e-9)


# -- what is solved, and how often ---------------------------------------------------------------------------------


class Counted:
    """The first problem with its own derivatives, which count their calls."""

    def __init__(self):
        self.calls = {"f": 0, "vjp": 0, "jac": 0}

    def rhs(self, t, v, p):
        self.calls["f"] += 1
        return field(np)(t, v, p)

    def jac(self, t, v, p):
        self.calls["jac"] += 1
        return A @ np.array([[-p[0], 1.0], [p[1], -1.0]]) @ B

    def vjp(self, t, v, p, lam):
        self.calls["vjp"] += 1
        x = (B @ v)[0]
        g = A.T @ lam
        return B.T @ np.array([[-p[0], 1.0], [p[1], -1.0]]).T @ g, np.array([-g[0] * x, g[1] * x, g[1] * t])


@pytest.mark.parametrize("options", [{}, {"checkpoints": 2}], ids=str)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_work_is_counted(name, options):
    """Evaluations, products and Jacobians, those on the constraints included."""
    if options and name == "QuadratureAdjoint":
        pytest.skip("it keeps the whole solution")
    counted = Counted()
    prob = sa.ODEProblem(counted.rhs, GUESS, SPAN, P, mass_matrix=MASS, jac=counted.jac, vjp=counted.vjp)
    r = sa.gradient(prob, sa.Kvaerno5(), lambda sol: (sol.u**2).sum(), dloss=lambda sol: 2.0 * sol.u,
                    saveat=[0.7, 1.4], rtol=1e-5, atol=1e-6, probe="off", sensealg=getattr(sa, name)(**options))
    assert r.stats.nvjp == counted.calls["vjp"]
    # The check of the index before the solve finds a consistent start, in two iterations, and looks at f_u there.
    assert (r.stats.nfe + 2, r.stats.njac + 3) == (counted.calls["f"], counted.calls["jac"])
    assert r.stats.nlu == r.stats.njac


N = 8


def chain(xp):
    """Diffusion along a line with a reaction, one rate per place."""
    second = np.diag(-2.0 * np.ones(N)) + np.diag(np.ones(N - 1), 1) + np.diag(np.ones(N - 1), -1)
    return lambda t, u, p: 100.0 * (second @ u) - p * u**3


@pytest.mark.parametrize("method", ["Kvaerno5", "Rodas5P"])
@pytest.mark.parametrize("name", [*CONTINUOUS, "BacksolveAdjoint", "ForwardSensitivity"])
def test_factorised_matrices_have_the_size_of_the_state(numpy_lab, monkeypatch, name, method):
    """Not that of the state with costate and parameters, whatever the algorithm integrates."""
    from sensitivity_numpy._backend import NumpyBackend as backend

    prob = sa.ODEProblem(chain(numpy_lab.xp), np.linspace(1.0, 2.0, N), (0.0, 0.01), np.linspace(1.0, 3.0, N))
    loss = lambda sol: (sol.u[-1] ** 2).sum()  # noqa: E731
    want = sa.gradient(prob, sa.Dopri8(), loss, wrt="p", rtol=1e-10, atol=1e-10)
    sizes = []
    factorize = backend.factorize
    monkeypatch.setattr(backend, "factorize", lambda self, A, *args: sizes.append(A.shape) or factorize(self, A, *args))
    r = sa.gradient(prob, getattr(sa, method)(), loss, wrt="p", rtol=1e-7, atol=1e-7, sensealg=getattr(sa, name)())
    assert set(sizes) == {(N, N)}
    assert len(sizes) == r.stats.nlu == r.stats.njac
    np.testing.assert_allclose(r.p, want.p, rtol=1e-5)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_sparse_forwards_and_backwards(numpy_lab, monkeypatch, name):
    """The transposed systems are those of the forward Jacobian, and as sparse."""
    import sensitivity_numpy._backend as backend

    sp = pytest.importorskip("scipy.sparse")
    pattern = sp.diags_array([1.0, 1.0, 1.0], offsets=[-1, 0, 1], shape=(N, N))
    prob = sa.ODEProblem(chain(numpy_lab.xp), np.linspace(1.0, 2.0, N), (0.0, 0.01), np.linspace(1.0, 3.0, N))
    loss = lambda sol: (sol.u[-1] ** 2).sum()  # noqa: E731
    options = {"wrt": "p", "rtol": 1e-6, "atol": 1e-6, "sensealg": getattr(sa, name)()}
    want = sa.gradient(prob, sa.Kvaerno5(), loss, **options)
    kinds = []
    factorize = backend.NumpyBackend.factorize
    monkeypatch.setattr(backend.NumpyBackend, "factorize",
                        lambda self, A, *args: kinds.append(type(A)) or factorize(self, A, *args))
    r = sa.gradient(prob.remake(jac_sparsity=pattern), sa.Kvaerno5(), loss, **options)
    assert np.ndarray not in kinds
    np.testing.assert_allclose(r.p, want.p, rtol=1e-6)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sensealg", "words"), [
    (sa.BacksolveAdjoint(), "integrates the state backwards"),
    (sa.GaussAdjoint(alg=sa.Tsit5()), "the costate has constraints"),
    (sa.GaussAdjoint(alg=sa.ScipySolver("BDF")), "the costate has constraints"),
    (sa.DirectAdjoint(), "RecursiveCheckpointAdjoint"),
    (sa.ForwardOverAdjoint(sa.BacksolveAdjoint()), "BacksolveAdjoint does not go with a singular mass matrix"),
], ids=str)
def test_refused(numpy_lab, sensealg, words):
    with pytest.raises(sa.UnsupportedCombination, match=words):
        sa.gradient(problem(numpy_lab), sa.Kvaerno5(), lambda sol: sol.u.sum(), sensealg=sensealg)


def test_second_derivatives_are_refused(numpy_lab):
    with pytest.raises(sa.UnsupportedCombination, match="singular mass matrix"):
        sa.hessian(problem(numpy_lab), sa.Kvaerno5(), lambda sol: sol.u.sum(), sensealg=sa.InterpolatingAdjoint())
