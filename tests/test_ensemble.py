"""Ensembles: members are what they are alone, batched or spread, to the last bit where nothing is reordered."""

import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.testing import models

TIMES = np.array([0.5, 1.0])
RATES = np.array([[1.5, 1.0, 3.0, 1.0], [1.3, 0.9, 2.8, 1.1], [1.1, 1.2, 2.5, 0.8]])


def plain(t, u, p):
    """Lotka-Volterra without any framework: it travels to other processes."""
    return np.array([p[0] * u[0] - p[1] * u[0] * u[1], p[3] * u[0] * u[1] - p[2] * u[1]])


def vjp(t, u, p, lam):
    x, y = u
    return (np.array([(p[0] - p[1] * y) * lam[0] + p[3] * y * lam[1], -p[1] * x * lam[0] + (p[3] * x - p[2]) * lam[1]]),
            np.array([x * lam[0], -x * y * lam[0], -y * lam[1], x * y * lam[1]]))


def ones(sol):
    return np.ones_like(sol.u)


def total(sol):
    return sol.u.sum()


def jax_field(t, u, p):
    import jax.numpy as jnp

    return jnp.stack([p[0] * u[0] - p[1] * u[0] * u[1], p[3] * u[0] * u[1] - p[2] * u[1]])


def jax_total(sol):
    return (sol.u**2).sum()


@pytest.fixture(scope="module")
def ensemble(lab):
    prob = models.lotka_volterra(lab.xp).remake(tspan=(0.0, 1.0))
    u0 = np.stack([[1.0, 1.0], [1.2, 0.8], [0.9, 1.1]])
    return sa.EnsembleProblem(prob, u0=lab.array(u0), p=lab.array(RATES))


def test_members_are_what_they_are_alone(lab, ensemble):
    ts = lab.array(TIMES)
    sol = sa.solve(ensemble, sa.Tsit5(), saveat=ts)
    assert len(ensemble) == 3
    assert tuple(sol.u.shape) == (3, 2, 2)
    assert tuple(sol.t.shape) == (3, 2)
    assert sol.prob is ensemble
    for i in range(3):
        alone = sa.solve(ensemble.member(i), sa.Tsit5(), saveat=ts)
        np.testing.assert_allclose(lab.numpy(sol.u)[i], lab.numpy(alone.u), rtol=0 if lab.name != "jax" else 1e-13)
        assert int(sol.stats.naccept[i]) == alone.stats.naccept
        assert int(sol.stats.nfe[i]) == alone.stats.nfe
        assert int(sol.retcode[i]) == 0


def test_gradients_of_members(lab, ensemble):
    ts = lab.array(TIMES)
    loss = lambda sol: (sol.u**2).sum()  # noqa: E731
    r = sa.gradient(ensemble, sa.Tsit5(), loss, saveat=ts)
    assert tuple(r.value.shape) == (3,)
    assert tuple(r.u0.shape) == (3, 2)
    assert tuple(r.p.shape) == (3, 4)
    assert r.t0 is None
    alone = sa.gradient(ensemble.member(1), sa.Tsit5(), loss, saveat=ts)
    for name in ("value", "u0", "p"):
        np.testing.assert_allclose(lab.numpy(getattr(r, name))[1], lab.numpy(getattr(alone, name)), rtol=1e-13)
    assert int(r.stats.nvjp[1]) == alone.stats.nvjp


def test_frameworks_differentiate_through_an_ensemble(lab, ensemble):
    """The gradient of a sum over members is the sum of their gradients."""
    ts = lab.array(TIMES)
    want = lab.numpy(sa.gradient(ensemble, sa.Tsit5(), lambda sol: (sol.u**2).sum(), saveat=ts).p)

    def loss(p):
        return (sa.solve(ensemble.remake(p=p), sa.Tsit5(), saveat=ts).u ** 2).sum()

    if lab.name == "torch":
        p = ensemble.p.clone().requires_grad_()
        loss(p).backward()
        got = p.grad.numpy()
    elif lab.name == "jax":
        import jax

        got = jax.jit(jax.grad(loss))(ensemble.p)
    else:
        import autograd

        got = autograd.grad(loss)(ensemble.p)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_what_may_vary(numpy_lab):
    """Times, trees, plain leaves, steady states."""
    prob = sa.ODEProblem(lambda t, u, p: {"x": -p["k"] * u["x"]}, {"x": np.array([1.0])}, (0.0, 1.0),
                         {"k": np.array(1.0), "name": "slow"})
    sol = sa.solve(sa.EnsembleProblem(prob, tspan=(0.0, np.array([1.0, 2.0]))), sa.Tsit5(), rtol=1e-9)
    np.testing.assert_allclose(sol.u["x"][:, 0, 0], np.exp([-1.0, -2.0]), rtol=1e-8)
    np.testing.assert_array_equal(sol.t, [[1.0], [2.0]])
    same = sa.solve(sa.EnsembleProblem(prob, tspan=np.array([[0.0, 1.0], [0.0, 2.0]])), sa.Tsit5(), rtol=1e-9)
    np.testing.assert_array_equal(same.u["x"], sol.u["x"])
    ens = sa.EnsembleProblem(prob, p={"k": np.array([0.5, 1.5]), "name": "slow"})
    r = sa.gradient(ens, sa.Tsit5(), lambda sol: sol.u["x"][0, 0], rtol=1e-9, wrt=("p", "t1"))
    np.testing.assert_allclose(r.p["k"], -np.exp([-0.5, -1.5]), rtol=1e-7)
    np.testing.assert_allclose(r.t1, -np.array([0.5, 1.5]) * np.exp([-0.5, -1.5]), rtol=1e-7)
    assert r.p["name"] == "slow"
    steady = sa.SteadyStateProblem(lambda t, u, p: p - u**3, np.ones(1), np.ones(1))
    sol = sa.solve(sa.EnsembleProblem(steady, p=np.array([[8.0], [27.0]])))
    np.testing.assert_allclose(sol.u[:, 0, 0], [2.0, 3.0], rtol=1e-9)


@pytest.fixture
def workers(monkeypatch):
    """One fresh process, which can import this module."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def travelling():
    """An ensemble that pickles: the vector field and its products are functions of this module."""
    prob = sa.ODEProblem(plain, np.array([1.0, 1.0]), (0.0, 1.0), RATES[0], vjp=vjp)
    return sa.EnsembleProblem(prob, p=RATES)


def equal(a, b):
    for name in ("value", "u0", "p"):
        np.testing.assert_array_equal(np.asarray(getattr(a, name)), np.asarray(getattr(b, name)))
    np.testing.assert_array_equal(np.asarray(a.solution.u), np.asarray(b.solution.u))
    assert [int(v) for v in a.stats.nvjp] == [int(v) for v in b.stats.nvjp]


def test_threads(travelling):
    serial = sa.gradient(travelling, sa.Tsit5(), total, dloss=ones, saveat=TIMES)
    with ThreadPoolExecutor(2) as pool:
        equal(sa.gradient(travelling, sa.Tsit5(), total, dloss=ones, saveat=TIMES, executor=pool), serial)
        equal(sa.gradient(travelling, sa.Tsit5(), total, dloss=ones, saveat=TIMES, executor=pool, chunk=2), serial)
        got = sa.solve(travelling, sa.Tsit5(), saveat=TIMES, executor=pool)
    np.testing.assert_array_equal(got.u, serial.solution.u)
    assert got.prob is travelling


def test_processes(travelling, workers):
    serial = sa.gradient(travelling, sa.Tsit5(), total, dloss=ones, saveat=TIMES)
    equal(sa.gradient(travelling, sa.Tsit5(), total, dloss=ones, saveat=TIMES, executor=workers), serial)
    bad = sa.EnsembleProblem(travelling.prob, p=np.stack([RATES[0], 1e9 * RATES[0]]))
    with pytest.raises(sa.SolveError, match="max_steps=50") as e:
        sa.solve(bad, sa.Tsit5(), executor=workers, max_steps=50)
    assert "member 1" in "".join(getattr(e.value, "__notes__", [""]))


@pytest.mark.slow
def test_jax_processes_keep_their_precision(workers):
    """A fresh process starts in float32; the numbers it sends back are float64, and those of the serial loop."""
    jax = pytest.importorskip("jax")
    prob = sa.ODEProblem(jax_field, jax.numpy.array([1.0, 1.0]), (0.0, 1.0), jax.numpy.array(RATES[0]))
    ens = sa.EnsembleProblem(prob, p=jax.numpy.array(RATES))
    options = {"saveat": jax.numpy.array(TIMES), "chunk": 2}
    serial = sa.gradient(ens, sa.Tsit5(), jax_total, **options)
    spread = sa.gradient(ens, sa.Tsit5(), jax_total, executor=workers, **options)
    assert spread.p.dtype == "float64"
    equal(spread, serial)


def sde(lab, noise, structure):
    xp = lab.xp
    if structure == "tree":
        return sa.SDEProblem(lambda t, u, p: {"a": p[0] * u["a"], "b": u["a"].sum() - u["b"]},
                             lambda t, u, p: {"a": p[1] * u["a"], "b": p[1] * xp.sin(u["b"])},
                             {"a": lab.array([1.0, 2.0]), "b": lab.array([0.5])}, (0.0, 1.0), lab.array([-0.5, 0.3]),
                             noise=noise)
    return sa.SDEProblem(lambda t, u, p: p[0] * u - 0.1 * u**3, lambda t, u, p: p[1] + 0.0 * u,
                         lab.array([1.0, 2.0]), (0.0, 1.0), lab.array([-0.5, 0.3]), noise=noise)


def entries(lab, tree):
    return [lab.numpy(x) for x in lab.be.flatten(tree)[0]]


STEPS = [("diagonal", "vector", sa.Milstein()), ("scalar", "tree", sa.EulerMaruyama()),
         ("diagonal", "tree", sa.EulerMaruyama()), ("additive", "vector", sa.ShARK())]


@pytest.mark.parametrize(("noise", "structure", "alg"), STEPS, ids=lambda x: getattr(x, "name", x))
def test_paths_side_by_side(lab, noise, structure, alg):
    """What shares its steps is what it is alone: state, counts, and gradient, of every leaf, path and parameter."""
    if lab.name == "jax":
        pytest.skip("members are always mapped there")
    prob = sde(lab, noise, structure)
    rates = lab.array([[-0.5, 0.3], [-0.2, 0.1], [-0.9, 0.5]])
    options = {"dt": 0.1, "saveat": lab.array([0.33, 1.0])}

    def loss(sol):
        return (sol.prob.p[0] * (sol.u["a"] if structure == "tree" else sol.u) ** 2).sum()

    for varied in ({"key": np.arange(7, 10)}, {"key": np.arange(7, 10), "p": rates}):
        ens = sa.EnsembleProblem(prob, **varied)
        sol, r = sa.solve(ens, alg, **options), sa.gradient(ens, alg, loss, **options)
        for i in (0, 2):
            alone, one = sa.solve(ens.member(i), alg, **options), sa.gradient(ens.member(i), alg, loss, **options)
            for got, want in zip(entries(lab, sol.u), entries(lab, alone.u), strict=True):
                np.testing.assert_allclose(got[i], want, rtol=1e-14, atol=1e-15)
            np.testing.assert_array_equal(lab.numpy(sol.t)[i], lab.numpy(alone.t))
            assert int(sol.stats.nfe[i]) == alone.stats.nfe
            assert int(r.stats.nvjp[i]) == one.stats.nvjp
            np.testing.assert_allclose(float(r.value[i]), float(one.value), rtol=1e-14)
            for name in ("u0", "p"):
                for got, want in zip(entries(lab, getattr(r, name)), entries(lab, getattr(one, name)), strict=True):
                    np.testing.assert_allclose(got[i], want, rtol=1e-12, atol=1e-14)


def test_steps_are_shared(lab):
    """`f` is called once per step for all members where the framework can; no step is taken member by member."""
    if lab.name == "jax":
        pytest.skip("one trace serves all steps there")
    calls = []

    def f(t, u, p):
        calls.append(1)
        return -p * u

    prob = sa.SDEProblem(f, lambda t, u, p: 0.1 * u, lab.array([1.0]), (0.0, 1.0), lab.array(0.5))
    ens = sa.EnsembleProblem(prob, key=np.arange(50))
    sa.solve(ens.member(0), sa.EulerMaruyama(), dt=0.01)
    calls.clear()
    sol = sa.solve(ens, sa.EulerMaruyama(), dt=0.01)
    assert [int(n) for n in sol.stats.nfe] == [100] * 50
    assert len(calls) < 120 if lab.name == "torch" else len(calls) < 50 * 105


def test_paths_that_cannot_share_steps(lab):
    """A failed member, branches on values, a matrix for g, adaptive steps: one by one, with the same results."""
    if lab.name == "jax":
        pytest.skip("members are always mapped there")
    branch = sa.SDEProblem(lambda t, u, p: -u if u.sum() > 0.0 else p * u, lambda t, u, p: 0.1 * u,
                           lab.array([1.0]), (0.0, 1.0),
                           lab.array(-0.5))
    matrix = sa.SDEProblem(lambda t, u, p: -p * u, lambda t, u, p: lab.array([[0.1, 0.2]]), lab.array([1.0]),
                           (0.0, 1.0), lab.array(0.5), noise="additive")
    starts = lab.array([[1.0], [-1.0]])
    for prob, alg in ((branch, sa.EulerMaruyama()), (matrix, sa.ShARK())):
        ens = sa.EnsembleProblem(prob, u0=starts)
        told = lab.name == "torch" and prob is branch
        with pytest.warns(sa.SensitivityWarning, match="one by one") if told else contextlib.nullcontext():
            got = sa.solve(ens, alg, dt=0.1)
        for i in range(2):
            alone = sa.solve(ens.member(i), alg, dt=0.1)
            np.testing.assert_array_equal(lab.numpy(got.u)[i], lab.numpy(alone.u))
    grows = sa.SDEProblem(lambda t, u, p: p * u**3, lambda t, u, p: 0.1 * u, lab.array([1.0]), (0.0, 1.0),
                          lab.array(0.1))
    ens = sa.EnsembleProblem(grows, p=lab.array([0.1, 400.0]))
    with np.errstate(all="ignore"):
        with pytest.raises(sa.SolveError) as e:
            sa.solve(ens, sa.EulerMaruyama(), dt=0.1)
        sol = sa.solve(ens, sa.EulerMaruyama(), dt=0.1, on_failure="nan")
    assert "member 1" in "".join(e.value.__notes__)
    assert [bool(v) for v in sol.success] == [True, False]


def test_wrong_arguments_are_told_of_a_member(lab):
    prob = sa.SDEProblem(lambda t, u, p: -p * u, lambda t, u, p: 0.1 * u, lab.array([1.0]), (0.0, 1.0), lab.array(0.5))
    ens = sa.EnsembleProblem(prob, key=np.arange(3))
    for option, error, words in (({"sensealg": "gauss"}, sa.InputError, "sensealg='gauss'"),
                                 ({"sensealg": sa.GaussAdjoint}, sa.InputError, "is a class"),
                                 ({"steps": 3}, TypeError, "unexpected keyword 'steps'"),
                                 ({"on_failure": "shrug"}, sa.InputError, "on_failure='shrug'")):
        with pytest.raises(error, match=words):
            sa.solve(ens, sa.EulerMaruyama(), dt=0.1, **option)


def test_paths_spread_are_paths_together(lab):
    """Groups are the same with and without an executor, so that results are the same to the last bit."""
    if lab.name == "jax":
        pytest.skip("there a batch is compiled for its size")
    prob = sa.SDEProblem(lambda t, u, p: lab.xp.sin(p * u), lambda t, u, p: lab.xp.exp(-u), lab.array([1.0, 0.3, 0.2]),
                         (0.0, 1.0), lab.array(0.5))
    ens = sa.EnsembleProblem(prob, key=np.arange(67))
    options = {"dt": 0.25, "dloss": lambda sol: 2.0 * sol.u}
    serial = sa.gradient(ens, sa.EulerMaruyama(), lambda sol: (sol.u**2).sum(), **options)
    with ThreadPoolExecutor(2) as pool:
        equal(sa.gradient(ens, sa.EulerMaruyama(), lambda sol: (sol.u**2).sum(), executor=pool, **options), serial)


def test_failures_name_the_member(lab):
    prob = sa.ODEProblem(lambda t, u, p: p * u * u, lab.array([1.0]), (0.0, 1.0), lab.array(0.1))
    ens = sa.EnsembleProblem(prob, p=lab.array([0.1, 5.0]))
    with pytest.raises(sa.SolveError) as e:
        sa.solve(ens, sa.Tsit5())
    assert "member 1" in str(e.value) + "".join(getattr(e.value, "__notes__", []))
    sol = sa.solve(ens, sa.Tsit5(), on_failure="nan")
    assert np.isfinite(lab.numpy(sol.u)[0]).all()
    assert np.isnan(lab.numpy(sol.u)[1]).all()
    assert [bool(v) for v in sol.success] == [True, False]


def test_what_is_refused(ensemble, lab):
    prob = ensemble.prob
    with pytest.raises(sa.InputError, match="neither"):
        sa.EnsembleProblem(prob)
    with pytest.raises(sa.InputError, match="differently"):
        sa.EnsembleProblem(prob, u0=lab.array(np.ones((2, 2))), p=ensemble.p)
    with pytest.raises(sa.InputError, match="no axis"):
        sa.EnsembleProblem(prob, p=[lab.array(1.0), lab.array([1.0, 2.0])])
    with pytest.raises(sa.InputError, match="no field"):
        ensemble.remake(f=None)
    with pytest.raises(sa.UnsupportedCombination, match="ensemble of"):
        sa.EnsembleProblem(ensemble, p=ensemble.p)
    with pytest.raises(sa.InputError, match="no times"):
        sa.EnsembleProblem(sa.SteadyStateProblem(prob.f, prob.u0, prob.p), tspan=(0.0, lab.array([1.0, 2.0])))
    for options in ({"dense": True}, {"saveat": "steps"}):
        with pytest.raises(sa.UnsupportedCombination, match="ensemble"):
            sa.solve(ensemble, sa.Tsit5(), **options)
    with pytest.raises(sa.InputError, match="chunk"):
        sa.solve(ensemble, sa.Tsit5(), chunk=0)
    with pytest.raises(sa.InputError, match="executor"):
        sa.solve(ensemble, sa.Tsit5(), executor=4)
