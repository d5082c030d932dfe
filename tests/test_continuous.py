"""The continuous adjoints: right, cheap as theory says, with memory as promised, and never silently wrong."""

import json
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.algorithms.quadrature import GAUSS, KRONROD, NODES, integral

GOLD = {p["id"]: p for p in json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())["problems"]}
FOUR = ["BacksolveAdjoint", "InterpolatingAdjoint", "GaussAdjoint", "QuadratureAdjoint"]
CHECKPOINTED = ["InterpolatingAdjoint", "GaussAdjoint"]
TIMES = np.array([1.5, 0.3, 0.0, 1.1, 1.1, 2.0])
EVERYTHING = ("u0", "p", "t0", "t1", "saveat")


def beat(t):
    return 1.0 + 0.3 * np.cos(t)


class Counted:
    """Lotka-Volterra with time in it, and its product, both counting their calls."""

    def __init__(self):
        self.f = self.products = 0

    def rhs(self, t, u, p):
        self.f += 1
        return np.array([p[0] * u[0] - p[1] * u[0] * u[1] * beat(t), -p[2] * u[1] + p[3] * u[0] * u[1]])

    def vjp(self, t, u, p, lam):
        self.products += 1
        c = beat(t)
        J = np.array([[p[0] - p[1] * u[1] * c, -p[1] * u[0] * c], [p[3] * u[1], p[3] * u[0] - p[2]]])
        return lam @ J, np.array([lam[0] * u[0], -lam[0] * u[0] * u[1] * c, -lam[1] * u[1], lam[1] * u[0] * u[1]])

    def problem(self, tspan=(0.0, 2.0)):
        return sa.ODEProblem(self.rhs, np.array([1.0, 1.2]), tspan, np.array([1.5, 1.0, 3.0, 1.0]), vjp=self.vjp)


def squares(sol):
    return (sol.u**2).sum()


def twice(sol):
    return 2.0 * sol.u


def entries(r):
    """All derivatives of a result as one vector."""
    parts = [r.u0, r.p, r.t0, r.t1, r.saveat]
    return np.concatenate([np.ravel(v) for v in parts if v is not None])


def gradient(prob, algorithm, alg=None, **options):
    options = {"rtol": 1e-10, "atol": 1e-11, "probe": "off"} | options
    return sa.gradient(prob, alg or sa.Tsit5(), squares, dloss=twice, sensealg=algorithm, **options)


# -- right ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("saveat", [None, 5, 1, TIMES, [2.0], [0.0]], ids=str)
@pytest.mark.parametrize("name", FOUR)
def test_agrees_with_the_discrete_adjoint(name, saveat, tspan):
    """Unsorted and repeated save times, both ends, an integer number of them, time running backwards."""
    prob = Counted().problem(tspan)
    wrt = EVERYTHING if isinstance(saveat, np.ndarray | list) else EVERYTHING[:-1]
    exact = gradient(prob, sa.RecursiveCheckpointAdjoint(), saveat=saveat, wrt=wrt)
    r = gradient(prob, getattr(sa, name)(), saveat=saveat, wrt=wrt)
    assert r.value == exact.value
    # Both are wrong by a multiple of rtol = 1e-10, and the slope of the interpolant, for saveat, by one order more.
    np.testing.assert_allclose(entries(r), entries(exact), rtol=1e-7, atol=1e-8 * abs(entries(exact)).max())


@pytest.mark.parametrize("name", FOUR)
def test_every_step_as_output(name):
    prob = Counted().problem()
    options = {"saveat": "steps", "wrt": ("u0", "p")}
    exact, r = (gradient(prob, a, **options) for a in (sa.RecursiveCheckpointAdjoint(), getattr(sa, name)()))
    np.testing.assert_allclose(entries(r), entries(exact), rtol=1e-8)
    with pytest.raises(sa.UnsupportedCombination, match="RecursiveCheckpointAdjoint"):
        gradient(prob, getattr(sa, name)(), saveat="steps", wrt="t1")


@pytest.mark.parametrize("name", FOUR)
def test_reference_to_ten_digits(name):
    """The floor of the tests of the field: Lotka-Volterra at tolerances near round-off."""
    P = GOLD["ode_lotka_volterra"]

    def vjp(t, u, p, lam):
        x, y = u
        J = np.array([[p[0] - p[1] * y, -p[1] * x], [p[3] * y, p[3] * x - p[2]]])
        return lam @ J, np.array([lam[0] * x, -lam[0] * x * y, -lam[1] * y, lam[1] * x * y])

    value = {k: float(v) for k, v in P["params"].items()}
    u0 = eval(P["code"]["u0"])(value, np)

    def f(t, u, p):
        return np.array([p[0] * u[0] - p[1] * u[0] * u[1], -p[2] * u[1] + p[3] * u[0] * u[1]])

    prob = sa.ODEProblem(f, np.array(u0), (0.0, 10.0), np.array([value[k] for k in "abcd"]), vjp=vjp)
    r = sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u.sum(), dloss=lambda sol: np.ones_like(sol.u),
                    saveat=np.arange(1.0, 11.0), rtol=1e-12, atol=1e-12, probe="off", sensealg=getattr(sa, name)())
    exact = np.array([float(P["gradient"][k]) for k in "abcd"])
    np.testing.assert_allclose(r.p, exact, rtol=1e-10)


@pytest.mark.parametrize("vjp", ["ReverseVJP", "ForwardVJP", "FiniteDifferenceVJP", "ComplexStepVJP", "UserVJP"])
@pytest.mark.parametrize("name", FOUR)
def test_every_product(numpy_lab, name, vjp):
    prob = numpy_lab.lotka_volterra(t1=1.0)
    if vjp == "UserVJP":
        prob = Counted().problem((0.0, 1.0))
    exact, r = (gradient(prob, a, rtol=1e-7, atol=1e-7)
                for a in (sa.RecursiveCheckpointAdjoint(), getattr(sa, name)(vjp=getattr(sa, vjp)())))
    np.testing.assert_allclose(entries(r), entries(exact), rtol=1e-5)


@pytest.mark.parametrize("name", FOUR)
def test_trees(lab, name):
    """Nested states of several shapes, nested parameters with a constant, a scalar among them."""
    xp = lab.xp

    def f(t, u, p):
        return {"a": -p["k"][0] * u["a"] * u["b"], "b": xp.sum(u["a"]) * p["k"][1] * p["n"] - u["b"]}

    u0 = {"a": lab.array([[0.5, 0.2], [0.1, 0.4]]), "b": lab.array(1.0)}
    prob = sa.ODEProblem(f, u0, (0.0, 1.0), {"k": (lab.array(0.7), lab.array(1.3)), "n": 2})
    options = {"rtol": 1e-9, "atol": 1e-9, "saveat": lab.array([0.5, 1.0])}
    rs = [sa.gradient(prob, sa.Dopri5(), lambda sol: (sol.u["a"] ** 2).sum() + sol.u["b"][0], sensealg=a, **options)
          for a in (sa.RecursiveCheckpointAdjoint(), getattr(sa, name)())]
    for part in ("u0", "p"):
        old, new = (lab.be.flatten(getattr(r, part))[0] for r in rs)
        for a, b in zip(old, new, strict=True):
            if lab.be.is_array(a):
                np.testing.assert_allclose(lab.numpy(b), lab.numpy(a), rtol=1e-6)


@pytest.mark.parametrize("name", FOUR)
def test_without_parameters(name):
    """`u' = -u cos t`: nothing to integrate but the costate."""
    prob = sa.ODEProblem(lambda t, u, p: -u * np.cos(t), np.array([2.0]), (0.0, 1.5),
                         vjp=lambda t, u, p, lam: (-lam * np.cos(t), None))
    r = gradient(prob, getattr(sa, name)(), wrt=("u0", "t0", "t1"))
    u = 2.0 * np.exp(-np.sin(1.5))
    np.testing.assert_allclose(r.u0, [u * u], rtol=1e-8)
    np.testing.assert_allclose([r.t0, r.t1], [2.0 * u * u, -2.0 * u * u * np.cos(1.5)], rtol=1e-8)


@pytest.mark.parametrize("name", FOUR)
def test_parameters_that_only_force(name):
    """The costate of `u' = p cos(20 t)` is constant, so its steps say nothing about the integral."""
    prob = sa.ODEProblem(lambda t, u, p: p * np.cos(20.0 * t), np.array([0.0]), (0.0, 2.0), np.array([1.3]),
                         vjp=lambda t, u, p, lam: (0.0 * lam, lam * np.cos(20.0 * t)))
    r = gradient(prob, getattr(sa, name)())
    np.testing.assert_allclose(r.p, [2.0 * 1.3 * (np.sin(40.0) / 20.0) ** 2], rtol=1e-6)


@pytest.mark.parametrize("name", FOUR)
def test_own_method_and_tolerances(name):
    prob, exact = Counted().problem(), gradient(Counted().problem(), sa.RecursiveCheckpointAdjoint())
    errors = []
    few = {"checkpoints": 1} if name == "BacksolveAdjoint" else {}
    for tol in (1e-2, 1e-4, 1e-6):
        r = gradient(prob, getattr(sa, name)(alg=sa.BS3(), rtol=tol, atol=tol, **few))
        errors.append(abs(entries(r) - entries(exact)).max() / abs(entries(exact)).max())
    assert errors[0] > 10.0 * errors[1] > 100.0 * errors[2]
    assert errors[2] < 1e-5


def test_quadrature_has_tolerances_of_its_own():
    counted = Counted()
    loose, tight = (gradient(counted.problem(), sa.QuadratureAdjoint(quad_rtol=tol, quad_atol=tol), rtol=1e-8,
                             atol=1e-8) for tol in (1e-3, 1e-10))
    assert loose.stats.nvjp < tight.stats.nvjp
    np.testing.assert_allclose(loose.u0, tight.u0, rtol=1e-14)
    np.testing.assert_allclose(loose.p, tight.p, rtol=1e-2)


@pytest.mark.parametrize("name", FOUR)
def test_a_tolerance_for_each_entry(name):
    """A vector for the states; costates and parameters take its smallest entry."""
    exact = gradient(Counted().problem(), sa.RecursiveCheckpointAdjoint())
    r = gradient(Counted().problem(), getattr(sa, name)(), atol=np.array([1e-10, 1e-11]))
    np.testing.assert_allclose(entries(r), entries(exact), rtol=1e-7)


@pytest.mark.parametrize("name", FOUR)
def test_fixed_steps_converge_at_the_order_of_the_method(name):
    exact = gradient(Counted().problem(), sa.RecursiveCheckpointAdjoint(), alg=sa.Dopri8())
    errors = [abs(entries(gradient(Counted().problem(), getattr(sa, name)(), alg=sa.RK4(), dt=dt, rtol=1e-6,
                                   atol=1e-6)) - entries(exact)).max() for dt in (0.05, 0.025)]
    # The cubic Hermite interpolant is of order 4 as the method is.
    assert 3.5 < np.log2(errors[0] / errors[1]) < 5.0


# -- as much work as theory says -----------------------------------------------------------------------------------


@pytest.mark.parametrize("saveat", [None, TIMES, "steps"], ids=["end", "times", "steps"])
@pytest.mark.parametrize(
    "algorithm",
    [sa.BacksolveAdjoint(), sa.BacksolveAdjoint(checkpointing=False), sa.BacksolveAdjoint(seminorm=False),
     sa.InterpolatingAdjoint(), sa.InterpolatingAdjoint(checkpoints=3), sa.GaussAdjoint(),
     sa.GaussAdjoint(checkpointing=True), sa.GaussAdjoint(alg=sa.RK4()), sa.QuadratureAdjoint()],
    ids=["backsolve", "no-checkpoints", "no-seminorm", "interpolating", "interpolating-3", "gauss", "gauss-stops",
         "rk4", "quadrature"],
)
def test_work_is_counted(algorithm, saveat):
    counted = Counted()
    fixed = {"alg": sa.RK4(), "dt": 0.1} if isinstance(algorithm.alg, sa.RK4) else {}
    wrt = ("u0", "p") if isinstance(saveat, str) else ("u0", "p", "t0", "t1")
    r = gradient(counted.problem(), algorithm, saveat=saveat, wrt=wrt, **fixed)
    assert r.stats.nfe == counted.f
    assert r.stats.nvjp == counted.products


def test_gauss_nodes_by_theory():
    """A constant costate is solved in a few long steps; its quadrature has three nodes for each forward step."""
    def build():
        return sa.ODEProblem(lambda t, u, p: p * np.cos(9.0 * t), np.array([1.0]), (0.0, 3.0), np.array([2.0]),
                             vjp=lambda t, u, p, lam: (0.0 * lam, lam * np.cos(9.0 * t)))

    forward = sa.solve(build(), sa.Tsit5(), saveat=[3.0], rtol=1e-6, atol=1e-8, probe="off").stats.naccept
    r = gradient(build(), sa.GaussAdjoint(), rtol=1e-6, atol=1e-8)
    costate = sa.gradient(build(), sa.Tsit5(), squares, dloss=twice, wrt="u0", rtol=1e-6, atol=1e-8, probe="off",
                          sensealg=sa.GaussAdjoint()).stats.nvjp
    assert 3 * forward <= r.stats.nvjp - costate <= 3 * (2 * forward)


def test_seminorm_saves_steps_where_parameters_are_rough():
    """`mu` of a rough forcing needs short steps; without it in the norm, only u and lam do."""
    def build():
        return sa.ODEProblem(lambda t, u, p: -u + 0.0 * p[0] * np.sin(200.0 * t), np.array([1.0]), (0.0, 1.0),
                             np.array([1.0]), vjp=lambda t, u, p, lam: (-lam, lam * np.sin(200.0 * t)))

    few, many = (gradient(build(), sa.BacksolveAdjoint(seminorm=on), rtol=1e-6, atol=1e-8) for on in (True, False))
    assert few.stats.nvjp < many.stats.nvjp


def test_kronrod_rule():
    """Exact for polynomials: degree 22 for K15, degree 13 for G7."""
    x, k, g = np.array(NODES), np.array(KRONROD), np.array(GAUSS)
    for degree in range(23):
        assert k @ x**degree == pytest.approx(1.0 / (degree + 1), abs=2e-16 * 8)
        if degree < 14:
            assert g @ x**degree == pytest.approx(1.0 / (degree + 1), abs=2e-16 * 8)
    assert abs(g @ x**14 - 1.0 / 15.0) > 1e-10


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
def test_adaptive_quadrature(numpy_lab, ends):
    """`int 1 / (1e-4 + (t - 0.3)^2)`, a peak that one panel misses."""
    a, b = ends
    peak = 0.01
    value, count, done = integral(numpy_lab.be, lambda t: np.array([1.0 / (peak**2 + (t - 0.3) ** 2)]), a, b,
                                  np.array([0.0]), 1e-10, 1e-12)
    exact = (np.arctan((b - 0.3) / peak) - np.arctan((a - 0.3) / peak)) / peak
    assert done
    assert count > 15 * 10
    assert count % 15 == 0
    np.testing.assert_allclose(value, [exact], rtol=1e-10)


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoints", [4, [0.5, 1.7], "saveat", "1kB"], ids=str)
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoints_do_not_change_the_gradient(name, checkpoints):
    dense, stored = (gradient(Counted().problem(), getattr(sa, name)(checkpoints=c), saveat=TIMES)
                     for c in (None, checkpoints))
    np.testing.assert_allclose(entries(stored), entries(dense), rtol=1e-8)
    assert stored.stats.nfe > dense.stats.nfe


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoints_need_less_memory(name):
    """Peak of what NumPy and Python hold: one interval of 10 and a few states, against all steps."""
    n = 2000
    w = np.linspace(1.0, 2.0, n)
    prob = sa.ODEProblem(lambda t, u, p: p * w * np.cos(5.0 * t) * u, np.ones(n), (0.0, 4.0), np.array(0.3),
                         vjp=lambda t, u, p, lam: (p * w * np.cos(5.0 * t) * lam, np.cos(5.0 * t) * (lam @ (w * u))))
    peaks, results = [], []
    for algorithm in (getattr(sa, name)(), getattr(sa, name)(checkpoints=10)):
        tracemalloc.start()
        results.append(gradient(prob, algorithm, rtol=1e-9, atol=1e-9))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    np.testing.assert_allclose(results[1].p, results[0].p, rtol=1e-7)
    assert peaks[1] < 0.3 * peaks[0]


def test_residuals_are_states_at_the_stops(lab):
    """What waits between forward and reverse pass is a row for each checkpoint, not the steps."""
    prob = lab.lotka_volterra(t1=3.0)
    from sensitivity.choose import choose
    from sensitivity.solve import prepare_options

    sizes = []
    for algorithm in (sa.GaussAdjoint(), sa.GaussAdjoint(checkpoints=5), sa.BacksolveAdjoint()):
        run, x = prepare_options(prob, sa.Tsit5(), {"rtol": 1e-9, "max_steps": 512})
        bound, run = choose(run, x, algorithm)
        kept = bound.forward(run, x, frozenset({"u0", "theta"}))[2]
        logs = [v for v in lab.be.flatten(list(kept.log or ()))[0] if lab.be.is_array(v)]
        sizes.append((kept.u.shape[0], sum(int(np.prod(v.shape)) for v in logs)))
    assert sizes[0][0] == 1
    assert sizes[0][1] > 200
    assert sizes[1:] == [(5, 0), (10, 0)]


def test_lorenz_with_checkpoints():
    """Chaos doubles an error every 0.8 time units: u is lost backwards unless it starts afresh."""
    def f(t, u, p):
        x, y, z = u
        return np.array([p[0] * (y - x), x * (p[1] - z) - y, x * y - p[2] * z])

    def vjp(t, u, p, lam):
        x, y, z = u
        J = np.array([[-p[0], p[0], 0.0], [p[1] - z, -1.0, -x], [y, x, -p[2]]])
        return lam @ J, np.array([lam[0] * (y - x), lam[1] * x, -lam[2] * z])

    prob = sa.ODEProblem(f, np.array([1.0, 0.0, 0.0]), (0.0, 10.0), np.array([10.0, 28.0, 8.0 / 3.0]), vjp=vjp)
    options = {"saveat": np.linspace(0.0, 10.0, 101), "rtol": 1e-8, "atol": 1e-9}
    known = gradient(prob, sa.InterpolatingAdjoint(), **options)
    r = gradient(prob, sa.BacksolveAdjoint(), **options)
    # The gradient grows to 1e5 and its error with it; both solves are at 1e-8.
    np.testing.assert_allclose(r.p, known.p, rtol=1e-4)
    again = gradient(prob, sa.InterpolatingAdjoint(checkpointing=True), **options)
    np.testing.assert_allclose(again.p, known.p, rtol=1e-4)
    with pytest.raises(sa.SolveError):
        gradient(prob, sa.BacksolveAdjoint(checkpointing=False), **options)


def test_long_horizon_with_checkpoints(numpy_lab):
    """Over 40 time constants the state integrated backwards is lost without checkpoints, and exact with them."""
    xp = numpy_lab.xp

    def f(t, u, p):
        return xp.stack([-u[0] + xp.tanh(p[0] * u[1]), -u[1] + p[1] * xp.cos(t) * u[0] + 1.0])

    prob = sa.ODEProblem(f, np.array([1.0, -0.5]), (0.0, 40.0), np.array([0.8, 0.6]))
    options = {"saveat": np.linspace(0.0, 40.0, 41), "rtol": 1e-11, "atol": 1e-11}

    def loss(sol):
        return ((sol.u - 1.0) ** 2).sum()

    known = sa.gradient(prob, sa.Dopri8(), loss, sensealg=sa.InterpolatingAdjoint(), **options)
    r = sa.gradient(prob, sa.Dopri8(), loss, sensealg=sa.BacksolveAdjoint(), **options)
    np.testing.assert_allclose(r.p, known.p, rtol=1e-10)
    with pytest.raises(sa.UnstableSensealgError):
        sa.gradient(prob, sa.Dopri8(), loss, sensealg=sa.BacksolveAdjoint(checkpointing=False), **options)


def test_complex_states(torch_lab):
    """The costate of a complex state, against the discrete adjoint."""
    xp = torch_lab.xp

    def f(t, u, p):
        return p * u + 0.1 * xp.sin(t) * u**2

    def start(values):
        return torch_lab.array(values, "complex128")

    prob = sa.ODEProblem(f, start([1.0 + 0.5j, 0.3 - 0.2j]), (0.0, 1.0), start([-0.5 + 1j, 0.2 - 2j]))
    found = [sa.gradient(prob, sa.Tsit5(), lambda sol: (abs(sol.u) ** 2).sum() + sol.u[0, 1].real, sensealg=a,
                         rtol=1e-10, atol=1e-10)
             for a in (sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(), sa.GaussAdjoint(),
                       sa.QuadratureAdjoint(), sa.BacksolveAdjoint())]
    for r in found[1:]:
        np.testing.assert_allclose(torch_lab.numpy(r.u0), torch_lab.numpy(found[0].u0), rtol=1e-8)
        np.testing.assert_allclose(torch_lab.numpy(r.p), torch_lab.numpy(found[0].p), rtol=1e-8)


# -- never silently wrong ------------------------------------------------------------------------------------------


def stiff(lab, rate):
    xp = lab.xp
    return sa.ODEProblem(lambda t, u, p: -p * (u - xp.cos(t * xp.ones_like(u))), lab.array([1.0]), (0.0, 1.0),
                         lab.array(rate))


def final(sol):
    return sol.u[-1, 0]


def relaxed(k):
    """d/dk of u(1) for `u' = -k (u - cos t)`, u(0) = 1, by a complex step in the closed form."""
    k = complex(k, 1e-20)
    a = 1.0 + k * k
    return ((k * k * np.cos(1.0) + k * np.sin(1.0)) / a + (1.0 - k * k / a) * np.exp(-k)).imag / 1e-20


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("rate", [30.0, 100.0, 400.0, 1000.0])
def test_a_decaying_state_gives_a_warning_or_an_error_or_the_truth(numpy_lab, rate, checkpointing):
    prob = stiff(numpy_lab, rate)
    truth = relaxed(rate)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        options = {"rtol": 1e-10, "atol": 1e-10, "wrt": "p",
                   "sensealg": sa.BacksolveAdjoint(checkpointing=checkpointing)}
        if rate * (0.1 if checkpointing else 1.0) >= 30.0:
            with pytest.raises(sa.UnstableSensealgError, match="GaussAdjoint") as e:
                sa.gradient(prob, sa.Dopri5(), final, **options)
            assert e.value.retcode == sa.RetCode.Unstable
            return
        r = sa.gradient(prob, sa.Dopri5(), final, **options)
    error = abs(float(r.p) / truth - 1.0)
    told = [w for w in seen if issubclass(w.category, sa.UnstableSensealgWarning)]
    assert bool(told) == (r.stats.mismatch > 100.0)
    assert error < 1e-6 * max(1.0, r.stats.mismatch)


def test_the_warning_carries_the_number(numpy_lab):
    with pytest.warns(sa.UnstableSensealgWarning, match="tolerances") as seen:
        r = sa.gradient(stiff(numpy_lab, 100.0), sa.Dopri5(), final, rtol=1e-8, atol=1e-8,
                        sensealg=sa.BacksolveAdjoint())
    assert f"{r.stats.mismatch:.1e} tolerances" in str(seen[0].message)
    assert "GaussAdjoint" in str(seen[0].message)
    assert 100.0 < r.stats.mismatch < 1e6
    assert 0.0 < r.stats.drift < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        more = sa.gradient(stiff(numpy_lab, 100.0), sa.Dopri5(), final, rtol=1e-8, atol=1e-8,
                           sensealg=sa.BacksolveAdjoint(checkpoints=100))
    assert more.stats.mismatch < 100.0


def test_nonsense_is_refused_in_every_framework(lab):
    """The stiff case for which others return -4e15."""
    prob = stiff(lab, 1e3)
    algorithm = sa.BacksolveAdjoint()
    if lab.name == "jax":
        import jax

        def loss(p):
            return sa.solve(prob.remake(p=p), sa.Dopri5(), sensealg=algorithm).u[-1, 0]

        assert np.isnan(jax.jit(jax.grad(loss))(prob.p))
    elif lab.name == "torch":
        p = prob.p.clone().requires_grad_()
        with pytest.raises(sa.UnstableSensealgError):
            sa.solve(prob.remake(p=p), sa.Dopri5(), sensealg=algorithm).u[-1, 0].backward()
    else:
        import autograd

        with pytest.raises(sa.UnstableSensealgError):
            autograd.grad(lambda p: sa.solve(prob.remake(p=p), sa.Dopri5(), sensealg=algorithm).u[-1, 0])(1e3)
    with pytest.raises(sa.UnstableSensealgError, match="digits"):
        sa.gradient(prob, sa.Dopri5(), final, sensealg=algorithm)
    r = sa.gradient(prob, sa.Dopri5(), final, sensealg=algorithm, on_failure="nan")
    assert np.all(np.isnan(lab.numpy(r.p)))
    assert float(r.stats.mismatch) > 1e6


@pytest.mark.parametrize("name", FOUR[1:])
def test_the_others_are_right_there(numpy_lab, name):
    r = sa.gradient(stiff(numpy_lab, 1e3), sa.Dopri5(), final, wrt="p", rtol=1e-9, atol=1e-9,
                    sensealg=getattr(sa, name)())
    # Cancellation in the integral takes three digits, the rate k.
    np.testing.assert_allclose(float(r.p), relaxed(1e3), rtol=1e-4)


def test_a_reverse_solve_without_steps_fails():
    prob = Counted().problem()
    steps = sa.solve(prob, sa.Tsit5(), rtol=1e-6, atol=1e-6).stats.naccept
    with pytest.raises(sa.SolveError, match="MaxSteps"):
        gradient(prob, sa.InterpolatingAdjoint(rtol=1e-12, atol=1e-12), rtol=1e-6, atol=1e-6, max_steps=2 * steps)


# -- in each framework ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm",
    [sa.BacksolveAdjoint(), sa.GaussAdjoint(checkpoints=3),
     pytest.param(sa.QuadratureAdjoint(), marks=pytest.mark.slow),
     pytest.param(sa.InterpolatingAdjoint(checkpoints=3), marks=pytest.mark.slow)],
    ids=lambda a: a.name,
)
def test_transforms_of_jax(algorithm):
    jax = pytest.importorskip("jax")
    prob = sa.ODEProblem(lambda t, u, p: -p * u + jax.numpy.sin(t), jax.numpy.array([1.0, 0.5]), (0.0, 1.0), 0.7)
    ts = jax.numpy.array([0.3, 1.0])

    def loss(p, u0, sensealg=algorithm):
        sol = sa.solve(prob.remake(p=p, u0=u0), sa.Dopri5(), saveat=ts, sensealg=sensealg, rtol=1e-8, atol=1e-8,
                       max_steps=256)
        return (sol.u**2).sum()

    p, u0 = jax.numpy.array([0.7, 1.1, 5.0]), jax.numpy.array([1.0, 0.5])
    exact = jax.vmap(jax.grad(lambda p: loss(p, u0, sa.RecursiveCheckpointAdjoint())))(p)
    batch = jax.jit(jax.vmap(jax.grad(lambda p: loss(p, u0))))
    np.testing.assert_allclose(batch(p), exact, rtol=1e-6)
    forward = jax.jvp(lambda p: loss(p, u0), (p[1],), (1.0,))[1]
    np.testing.assert_allclose(forward, exact[1], rtol=1e-7)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", FOUR)
def test_autograd_of_torch(name):
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    net = torch.nn.Linear(2, 2).double()
    u0 = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, u, p):
            return torch.tanh(self.net(u)) * torch.cos(t)

    grads = []
    for algorithm in (sa.RecursiveCheckpointAdjoint(), getattr(sa, name)()):
        net.zero_grad()
        u0.grad = None
        sol = sa.solve(sa.ODEProblem(Field(), u0, (0.0, 1.0)), sa.Dopri5(), saveat=[0.4, 1.0], sensealg=algorithm,
                       rtol=1e-10, atol=1e-10)
        (sol.u**2).sum().backward()
        grads.append([u0.grad.clone(), *(v.grad.clone() for v in net.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-8)
    directions = torch.func.jvp(
        lambda u: sa.solve(sa.ODEProblem(lambda t, u, p: -u * u, u, (0.0, 1.0)), sa.Dopri5(), rtol=1e-9, atol=1e-9,
                           sensealg=getattr(sa, name)()).u[-1], (u0.detach(),), (torch.ones(2, dtype=torch.float64),))
    torch.testing.assert_close(directions[1], 1.0 / (1.0 + u0.detach()) ** 2, rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("name", FOUR)
def test_grad_of_autograd(numpy_lab, name):
    autograd = pytest.importorskip("autograd")
    prob = numpy_lab.lotka_volterra(t1=1.0)
    value = [autograd.grad(lambda p, a=a: (sa.solve(prob.remake(p=p), sa.Dopri5(), rtol=1e-9, atol=1e-9,
                                                    sensealg=a).u ** 2).sum())(prob.p)
             for a in (sa.RecursiveCheckpointAdjoint(), getattr(sa, name)())]
    np.testing.assert_allclose(value[1], value[0], rtol=1e-7)


@pytest.mark.parametrize("name", FOUR)
def test_single_precision(lab, name):
    r, exact = (sa.gradient(lab.lotka_volterra(t1=1.0, dtype=dtype), sa.Dopri5(), lambda sol: (sol.u**2).sum(),
                            sensealg=a, rtol=tol, atol=tol)
                for dtype, tol, a in (("float32", 2e-5, getattr(sa, name)()),
                                      ("float64", 1e-9, sa.RecursiveCheckpointAdjoint())))
    assert str(r.p.dtype).removeprefix("torch.") == "float32"
    np.testing.assert_allclose(lab.numpy(r.p), lab.numpy(exact.p), rtol=2e-3)


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR)
def test_dense_output_is_refused(name):
    with pytest.raises(sa.UnsupportedCombination, match="RecursiveCheckpointAdjoint"):
        gradient(Counted().problem(), getattr(sa, name)(), dense=True)


def test_a_fixed_step_method_needs_a_fixed_step():
    with pytest.raises(sa.UnsupportedCombination, match="FixedStep"):
        gradient(Counted().problem(), sa.GaussAdjoint(alg=sa.RK4()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sa.GaussAdjoint(alg="Tsit5"), "Dopri5"),
        (lambda: sa.GaussAdjoint(rtol=-1.0), "rtol"),
        (lambda: sa.QuadratureAdjoint(quad_rtol=0.0), "quad_rtol"),
        (lambda: sa.GaussAdjoint(checkpointing=False, checkpoints=4), "contradict"),
        (lambda: sa.GaussAdjoint(checkpointing="on"), "checkpointing"),
        (lambda: sa.BacksolveAdjoint(checkpointing="auto"), "checkpointing"),
        (lambda: sa.BacksolveAdjoint(seminorm=1), "seminorm"),
        (lambda: sa.InterpolatingAdjoint(checkpoints=0), "intervals"),
        (lambda: sa.InterpolatingAdjoint(checkpoints="lots"), "units"),
        (lambda: sa.InterpolatingAdjoint(checkpoints=[np.nan]), "finite"),
        (lambda: sa.InterpolatingAdjoint(checkpoints=object()), "no times"),
    ],
)
def test_options_that_make_no_sense(make, words):
    with pytest.raises(sa.InputError, match=words):
        make()


@pytest.mark.parametrize(("checkpoints", "error"), [([9.0], sa.TimesError), ("8B", sa.InputError)])
def test_checkpoints_that_cannot_be(checkpoints, error):
    with pytest.raises(error, match="checkpoints"):
        gradient(Counted().problem(), sa.GaussAdjoint(checkpoints=checkpoints))
