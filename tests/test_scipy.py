"""SciPy's solvers as black boxes: plain solves, gradients without their stages, refusals by name."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from scipy.integrate import solve_ivp

import sensitivity as sa
from sensitivity.blackbox import Step

GOLD = {p["id"]: p for p in json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())["problems"]}
METHODS = ["RK45", "DOP853", "Radau", "BDF", "LSODA"]
STIFF = ["Radau", "BDF", "LSODA"]
CONTINUOUS = ["GaussAdjoint", "InterpolatingAdjoint", "QuadratureAdjoint", "BacksolveAdjoint", "ForwardSensitivity"]
TIMES = np.array([1.0, 0.25, 0.0, 2.0, 0.25])


class Pendulum:
    """A damped pendulum driven in time, with its derivatives; counts calls of each."""

    def __init__(self):
        self.f = self.products = self.jacobians = 0

    def rhs(self, t, u, p):
        self.f += 1
        return np.array([u[1], -p[0] * np.sin(u[0]) - p[1] * u[1] + np.cos(t)])

    def jac(self, t, u, p):
        self.jacobians += 1
        return np.array([[0.0, 1.0], [-p[0] * np.cos(u[0]), -p[1]]])

    def vjp(self, t, u, p, lam):
        self.products += 1
        J = np.array([[0.0, 1.0], [-p[0] * np.cos(u[0]), -p[1]]])
        return lam @ J, np.array([-lam[1] * np.sin(u[0]), -lam[1] * u[1]])

    def jvp(self, t, u, p, du, dp):
        return np.array([du[1], -p[0] * np.cos(u[0]) * du[0] - p[1] * du[1] - dp[0] * np.sin(u[0]) - dp[1] * u[1]])

    def problem(self, tspan=(0.0, 2.0), **given):
        return sa.ODEProblem(self.rhs, np.array([0.5, 0.0]), tspan, np.array([2.0, 0.3]), vjp=self.vjp, jvp=self.jvp,
                             **given)


def gradient(prob, method, sensealg=sa.auto, tol=1e-8, **options):
    return sa.gradient(prob, method, lambda sol: (sol.u**2).sum(), dloss=lambda sol: 2.0 * sol.u, sensealg=sensealg,
                       **{"rtol": tol, "atol": tol, "probe": "off"} | options)


@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", METHODS)
def test_solves(method, tspan):
    """The states, `sol(t)`, every step, and the work, as SciPy reports it."""
    counted = Pendulum()
    prob = counted.problem(tspan)
    sol = sa.solve(prob, sa.ScipySolver(method), saveat=TIMES, dense=True, rtol=1e-9, atol=1e-9, probe="off")
    assert sol.retcode == sa.RetCode.Success
    assert sol.stats.nfe == counted.f
    assert sol.sensealg.name == "GaussAdjoint"
    truth = solve_ivp(lambda t, u: Pendulum().rhs(t, u, prob.p), tspan, prob.u0, method=method, dense_output=True,
                      rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sol.u, truth.sol(TIMES).T, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(sol(0.7), truth.sol(0.7), rtol=1e-12)
    assert sol.stats.naccept == len(truth.t) - 1
    steps = sa.solve(prob, sa.ScipySolver(method), saveat="steps", rtol=1e-9, atol=1e-9, probe="off")
    np.testing.assert_allclose(steps.t, truth.t[1:], rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(steps.u, truth.y.T[1:], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(sa.solve(prob, sa.ScipySolver(method), rtol=1e-9, atol=1e-9).u[0], truth.y[:, -1],
                               rtol=1e-12)
    assert (sol.stats.njac > 0) == (method in ("Radau", "BDF"))
    assert (sol.stats.nlu > 0) == (method in ("Radau", "BDF"))


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients(method, name):
    """Of times too, with unsorted and repeated save times; each answer is that of the discrete adjoint of Tsit5."""
    wrt = ("u0", "p", "t0", "t1", "saveat")
    exact = gradient(Pendulum().problem(), sa.Tsit5(), sa.RecursiveCheckpointAdjoint(), 1e-11, saveat=TIMES, wrt=wrt)
    r = gradient(Pendulum().problem(), sa.ScipySolver(method), getattr(sa, name)(), saveat=TIMES, wrt=wrt)
    for part in wrt:
        # BDF and LSODA allow the error of each step the whole tolerance, so a thousand steps exceed it.
        np.testing.assert_allclose(getattr(r, part), getattr(exact, part), rtol=2e-5, atol=2e-6, err_msg=part)


@pytest.mark.parametrize("name", CONTINUOUS[:4])
@pytest.mark.parametrize("jac", [False, True], ids=["rows", "jac"])
@pytest.mark.parametrize("method", ["DOP853", "BDF"])
def test_work_is_counted(method, jac, name):
    counted = Pendulum()
    r = gradient(counted.problem(jac=counted.jac if jac else None), sa.ScipySolver(method), getattr(sa, name)(),
                 saveat=TIMES, wrt=("u0", "p", "t0"), tol=1e-5)
    assert r.stats.nfe == counted.f
    assert r.stats.nvjp == counted.products
    assert (counted.jacobians > 0) == (jac and method == "BDF")
    if jac and method == "BDF":  # backsolve needs second derivatives too, and takes both from differences of products
        made = counted.jacobians
        alone = sa.solve(counted.problem(jac=counted.jac), sa.ScipySolver(method), saveat=TIMES, rtol=1e-5, atol=1e-5,
                         probe="off")
        assert made == (alone.stats.njac if name == "BacksolveAdjoint" else r.stats.njac)


@pytest.mark.parametrize("jac", [False, True], ids=["differences", "jac"])
@pytest.mark.parametrize("method", STIFF)
def test_work_of_tangents_is_counted(method, jac):
    counted = Pendulum()
    r = gradient(counted.problem(jac=counted.jac if jac else None), sa.ScipySolver(method), sa.ForwardSensitivity(),
                 saveat=TIMES, wrt=("u0", "p", "t0"), tol=1e-5)
    assert r.stats.nfe == counted.f


@dataclass(frozen=True)
class Alone(sa.ScipySolver):
    """SciPy without a word about Jacobians."""

    def steps(self, rhs, jac, *rest):
        return super().steps(rhs, None, *rest)


def chain(n=8, **given):
    """A stiff chain of reactions `u_i' = k_i u_(i-1) - k_(i+1) u_i^2 / (1 + u_i)`, with a rate for each link."""

    def loss_rate(u):
        return u * u / (1.0 + u), u * (2.0 + u) / (1.0 + u) ** 2

    def f(t, u, p):
        gone = p[1:] * loss_rate(u)[0]
        return np.concatenate([[p[0]], gone[:-1]]) - gone

    def jac(t, u, p):
        gone = p[1:] * loss_rate(u)[1]
        return np.diag(gone[:-1], -1) - np.diag(gone)

    def vjp(t, u, p, lam):
        value, slope = loss_rate(u)
        moved = np.concatenate([lam[1:], [0.0]]) - lam
        return moved * p[1:] * slope, np.concatenate([[lam[0]], moved * value])

    def jvp(t, u, p, du, dp):
        value, slope = loss_rate(u)
        gone = p[1:] * slope * du + dp[1:] * value
        return np.concatenate([[dp[0]], gone[:-1]]) - gone

    pattern = np.eye(n) + np.eye(n, k=-1)
    given = {name: {"jac": jac, "jac_sparsity": pattern}[name] for name in given}
    return sa.ODEProblem(f, np.linspace(1.0, 2.0, n), (0.0, 1.0), 10.0 ** (5.0 * np.sin(np.arange(n + 1.0))), vjp=vjp,
                         jvp=jvp, **given)


@pytest.mark.parametrize("method", STIFF)
def test_jacobians_of_adjoints_and_tangents_cost_what_f_u_costs(method):
    """Eight states and nine parameters: differences of the whole take 17 products in the reverse solve, and 80
    evaluations for tangents. The numbers are those of the discrete adjoint."""
    exact = gradient(chain(jac=True), sa.Rodas5P(), sa.RecursiveCheckpointAdjoint(), 1e-9, wrt="p")

    def work(name, kind, **given):
        r = gradient(chain(**given), kind(method), getattr(sa, name)(), 1e-6, wrt="p")
        np.testing.assert_allclose(r.p, exact.p, rtol=1e-3, atol=1e-4 * np.abs(exact.p).max(), err_msg=name)
        return r.stats

    rows, pattern, jac = (work("InterpolatingAdjoint", sa.ScipySolver, **given)
                          for given in ({}, {"jac_sparsity": True}, {"jac": True}))
    ahead = sa.solve(chain(jac=True), sa.ScipySolver(method), rtol=1e-6, atol=1e-6, probe="off").stats.njac
    back = jac.njac - ahead
    assert back > 0
    if method != "LSODA":  # which takes other steps with matrices that differ in the last digits
        assert (pattern.nvjp - jac.nvjp, rows.nvjp - jac.nvjp) == (2 * back, 8 * back)
    assert jac.nvjp < work("InterpolatingAdjoint", Alone, jac=True).nvjp - 10 * back
    tangents, alone = (work("ForwardSensitivity", kind, jac=True) for kind in (sa.ScipySolver, Alone))
    assert 0 < tangents.njac == alone.njac
    assert tangents.nfe <= alone.nfe - (80 - 9 - 2) * tangents.njac


@pytest.mark.parametrize("to", [np.asarray, sparse.csc_array])
def test_lsoda_takes_sparse_jacobians_and_first_steps_of_its_own(to):
    """LSODA knows arrays only. It gives up after ten failures, and the last step of the forward solve is a million
    times too long for the layer of the costate. At the end `u0^2 = p0 u1` and `u1 = exp(-10 p1)` up to 1e-7."""
    def jac(t, u, p):
        return to(np.array([[-2e6 * u[0], 1e6 * p[0]], [0.0, -p[1]]]))

    def vjp(t, u, p, lam):
        return jac(t, u, p).T @ lam, np.array([1e6 * lam[0] * u[1], -lam[1] * u[1]])

    prob = sa.ODEProblem(lambda t, u, p: np.array([1e6 * (p[0] * u[1] - u[0] ** 2), -p[1] * u[1]]), np.ones(2),
                         (0.0, 10.0), np.array([1.0, 0.1]), vjp=vjp, jac=jac)
    for sensealg in (sa.GaussAdjoint(), sa.InterpolatingAdjoint()):
        r = gradient(prob, sa.ScipySolver("LSODA"), sensealg, 1e-7, wrt="p")
        np.testing.assert_allclose(r.p, [np.exp(-1.0), -10.0 * np.exp(-1.0) - 20.0 * np.exp(-2.0)], rtol=1e-5)


@pytest.mark.parametrize("checkpoints", [3, "saveat"])
def test_checkpoints(checkpoints):
    dense, stored = (gradient(Pendulum().problem(), sa.ScipySolver("DOP853"), sa.GaussAdjoint(checkpoints=c), 1e-9,
                              saveat=TIMES) for c in (None, checkpoints))
    np.testing.assert_allclose(stored.p, dense.p, rtol=1e-6)


def robertson():
    P = GOLD["ode_robertson"]

    def f(t, u, p):
        a, b, c = p[0] * u[0], p[1] * u[1] ** 2, p[2] * u[1] * u[2]
        return np.array([-a + c, a - b - c, b])

    def jac(t, u, p):
        b, c1, c2 = 2.0 * p[1] * u[1], p[2] * u[2], p[2] * u[1]
        return np.array([[-p[0], c1, c2], [p[0], -b - c1, -c2], [0.0, b, 0.0]])

    def vjp(t, u, p, lam):
        d = lam[1] - lam[0]
        return lam @ jac(t, u, p), np.array([d * u[0], (lam[2] - lam[1]) * u[1] ** 2, -d * u[1] * u[2]])

    prob = sa.ODEProblem(f, np.array([1.0, 0.0, 0.0]), (0.0, 40.0), np.array([0.04, 3e7, 1e4]), vjp=vjp, jac=jac)
    return prob, np.array([1.0, 1e4, 2.0]), np.array([float(P["gradient"][k]) for k in ("k1", "k2", "k3")])


@pytest.mark.parametrize("name", ["GaussAdjoint", "QuadratureAdjoint", "InterpolatingAdjoint"])
@pytest.mark.parametrize("method", STIFF)
def test_stiff_gradients(method, name):
    """Robertson's reaction against 20 digits: a layer at each end, rates apart by nine orders of magnitude."""
    prob, w, exact = robertson()
    r = sa.gradient(prob, sa.ScipySolver(method), lambda sol: sol.u[0] @ w, dloss=lambda sol: w[None, :], wrt="p",
                    rtol=1e-7, atol=1e-11, probe="off", sensealg=getattr(sa, name)())
    # Errors of some hundred steps add up for the multistep methods.
    np.testing.assert_allclose(r.p, exact, rtol=1e-6 if method == "Radau" else 5e-5)


def test_backsolve_of_a_stiff_problem_is_never_silent():
    prob, w, _ = robertson()
    with pytest.raises(sa.SolveError):
        sa.gradient(prob, sa.ScipySolver("BDF"), lambda sol: sol.u[0] @ w, dloss=lambda sol: w[None, :], wrt="p",
                    rtol=1e-6, atol=1e-10, max_steps=1000, probe="off", sensealg=sa.BacksolveAdjoint())


def test_sparse_jacobians():
    """Heat conduction: with a pattern differences need few evaluations, with a sparse `jac` none; also backwards."""
    n = 30
    A = sparse.diags_array([np.ones(n - 1), -2.0 * np.ones(n), np.ones(n - 1)], offsets=[-1, 0, 1]).tocsc() * 50.0
    A[0, 1] = 0.0
    A.eliminate_zeros()

    def build(**given):
        return sa.ODEProblem(lambda t, u, p: p * (A @ u), np.linspace(0.0, 1.0, n), (0.0, 0.3), np.array(1.3),
                             vjp=lambda t, u, p, lam: (p * (A.T @ lam), lam @ (A @ u)), **given)

    rs = [gradient(build(**given), sa.ScipySolver("BDF"), tol=1e-7)
          for given in ({}, {"jac_sparsity": (A != 0).astype(float)}, {"jac": lambda t, u, p: p * A})]
    for r in rs[1:]:
        np.testing.assert_allclose(r.p, rs[0].p, rtol=1e-4)
        np.testing.assert_allclose(r.u0, rs[0].u0, rtol=1e-3, atol=1e-5)
    assert rs[1].stats.nfe < rs[0].stats.nfe - 20
    assert rs[2].stats.nfe < rs[1].stats.nfe


def test_dense_parameters_of_autograd():
    """With derivatives of `f` by AD, and a gradient through the namespace of autograd."""
    autograd = pytest.importorskip("autograd")
    anp = autograd.numpy

    def f(t, u, p):
        return {"x": u["v"], "v": -p["k"] * anp.sin(u["x"])}

    def loss(k):
        prob = sa.ODEProblem(f, {"x": np.array(0.3), "v": np.array(0.0)}, (0.0, 1.0), {"k": k})
        return sa.solve(prob, sa.ScipySolver("LSODA"), rtol=1e-9, atol=1e-9).u["x"][-1] ** 2

    k, e = 1.7, 1e-5
    assert autograd.grad(loss)(k) == pytest.approx((loss(k + e) - loss(k - e)) / (2 * e), rel=1e-5)


def test_a_running_cost():
    """The integral of `u0^2 + p0` as a loss."""
    cost = sa.ContinuousCost(lambda t, u, p: u[0] ** 2 + p[0], dgdu=lambda t, u, p: np.array([2.0 * u[0], 0.0]),
                             dgdp=lambda t, u, p: np.array([1.0, 0.0]))
    exact, r = (sa.gradient(Pendulum().problem(), alg, cost, rtol=1e-9, atol=1e-9, probe="off")
                for alg in (sa.Tsit5(), sa.ScipySolver("DOP853")))
    np.testing.assert_allclose(r.p, exact.p, rtol=1e-6)
    np.testing.assert_allclose(r.u0, exact.u0, rtol=1e-6)


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_failures_have_codes(method):
    alg = sa.ScipySolver(method)

    def code(f, **options):
        prob = sa.ODEProblem(f, np.array([1.0]), (0.0, 2.0))
        with np.errstate(all="ignore"):
            return sa.solve(prob, alg, on_failure="return", **options).retcode

    assert code(lambda t, u, p: -u, max_steps=3, rtol=1e-10, atol=1e-10) == sa.RetCode.MaxSteps
    assert code(lambda t, u, p: np.where(t < 1.0, -u, np.nan * u)) in (sa.RetCode.NonFinite, sa.RetCode.DtMin)


@pytest.mark.filterwarnings("ignore:lsoda")
def test_a_blow_up_raises():
    prob = sa.ODEProblem(lambda t, u, p: u * u, np.array([1.0]), (0.0, 2.0))
    with pytest.raises(sa.SolveError) as e, np.errstate(all="ignore"):
        sa.solve(prob, sa.ScipySolver("RK45"))
    assert e.value.t == pytest.approx(1.0, abs=1e-3)


# -- refused, and chosen -------------------------------------------------------------------------------------------


def test_other_frameworks_are_refused(lab):
    if lab.name == "numpy":
        return
    prob = lab.lotka_volterra()
    with pytest.raises(sa.UnsupportedCombination, match=f"ScipySolver.*{lab.name}"):
        sa.solve(prob, sa.ScipySolver("RK45"))
    with pytest.raises(sa.UnsupportedCombination, match="Dopri5"):
        sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u.sum(), sensealg=sa.GaussAdjoint(alg=sa.ScipySolver()))


@pytest.mark.parametrize("sensealg", [sa.RecursiveCheckpointAdjoint(), sa.DirectAdjoint()], ids=str)
def test_discrete_algorithms_are_refused(sensealg):
    with pytest.raises(sa.UnsupportedCombination, match="GaussAdjoint"):
        gradient(Pendulum().problem(), sa.ScipySolver(), sensealg)


@pytest.mark.parametrize(
    "options",
    [{"tstops": [1.0]}, {"norm": np.linalg.norm}, {"dtmin": 1e-6}, {"controller": sa.PIController()}],
    ids=lambda v: next(iter(v)),
)
def test_options_of_own_steps_are_refused(options):
    with pytest.raises(sa.UnsupportedCombination, match=next(iter(options))):
        sa.solve(Pendulum().problem(), sa.ScipySolver(), **options)


def test_names_are_checked():
    with pytest.raises(sa.InputError, match="LSODA"):
        sa.ScipySolver("dopri5")
    assert sa.ScipySolver("BDF").name == 'ScipySolver("BDF")'


def test_dense_gradients_are_refused_and_dense_solves_are_not():
    with pytest.raises(sa.UnsupportedCombination, match="dense"):
        gradient(Pendulum().problem(), sa.ScipySolver(), dense=True)
    sol = sa.solve(Pendulum().problem(), sa.ScipySolver())
    np.testing.assert_allclose(sol(2.0), sol.u[-1], rtol=1e-12)


def test_steps_and_sizes_are_heeded():
    few = sa.solve(Pendulum().problem(), sa.ScipySolver("RK45"), rtol=1e-3, atol=1e-3)
    many = sa.solve(Pendulum().problem(), sa.ScipySolver("RK45"), rtol=1e-3, atol=1e-3, dtmax=0.01, dt=1e-3)
    assert few.stats.naccept < 20
    assert many.stats.naccept >= 200


def test_backward_solve_by_scipy_forward_by_us():
    exact = gradient(Pendulum().problem(), sa.Tsit5(), sa.RecursiveCheckpointAdjoint(), 1e-10)
    for name in CONTINUOUS[:4]:
        r = gradient(Pendulum().problem(), sa.Tsit5(), getattr(sa, name)(alg=sa.ScipySolver("LSODA")), 1e-9)
        np.testing.assert_allclose(r.p, exact.p, rtol=1e-5)


# -- a stranger's black box ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneShot(sa.BlackBox):
    """A solver that returns nothing but a function of time."""

    @property
    def order(self):
        return 8

    def steps(self, rhs, jac, t0, t1, u0, rtol, atol, first, longest, counts):
        out = solve_ivp(rhs, (t0, t1), u0, "DOP853", dense_output=True, rtol=rtol, atol=atol)
        for t, piece in zip(out.t[1:], out.sol.interpolants, strict=True):
            yield Step(t, piece(t), piece)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_any_black_box_fits(name):
    exact = gradient(Pendulum().problem(), sa.Tsit5(), sa.RecursiveCheckpointAdjoint(), 1e-10, saveat=TIMES)
    r = gradient(Pendulum().problem(), OneShot(), getattr(sa, name)(), 1e-9, saveat=TIMES)
    np.testing.assert_allclose(r.p, exact.p, rtol=1e-6)
    np.testing.assert_allclose(r.u0, exact.u0, rtol=1e-6)
