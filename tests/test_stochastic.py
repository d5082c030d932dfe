"""Stochastic problems: solutions on a given path, their gradients, strong orders, expectations, refusals."""

import importlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stochastic_problems import GOLD, TIMES, answer, compare, nonlinear, setup

import sensitivity as sa

SOURCE = Path(__file__).resolve().parents[2] / "shared" / "gold" / "gold_problems.json"
METHODS = {"euler_maruyama": sa.EulerMaruyama(), "heun": sa.StochasticHeun(), "reversible_heun": sa.ReversibleHeun()}


def test_the_fixture_is_a_copy():
    """The numbers here are those of the full collection, where it lies beside the repository."""
    if not SOURCE.is_file():
        pytest.skip(f"{SOURCE} is not there")
    full = {p["id"]: p for p in json.loads(SOURCE.read_text())["problems"]}
    for name, problem in GOLD.items():
        for key in ("params", "tspan", "value", "gradient"):
            assert problem[key] == full[name][key], (name, key)


# -- reference values on a given path ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_discrete_gradients(lab, name):
    """Exact derivative of the computed solution, and what it costs."""
    P = GOLD["disc_sde_" + name]
    W = np.concatenate([[0.0], np.cumsum([float(v) for v in P["code"]["dW"]])])
    prob, initial, loss = setup(lab, P, np.arange(9) / 8.0, W[:, None],
                                interpretation="ito" if name == "euler_maruyama" else "stratonovich")
    r = sa.gradient(prob, METHODS[name], loss, dt=0.125)
    compare(P, r, initial, 1e-12)
    nfe, nvjp = {"euler_maruyama": (8, 8), "heun": (16, 16), "reversible_heun": (9, 16)}[name]
    assert (r.stats.naccept, r.stats.nfe, r.stats.nvjp) == (8, nfe, nvjp)


@pytest.mark.parametrize("method", [sa.StochasticHeun(), sa.ReversibleHeun()], ids=lambda m: m.name)
@pytest.mark.parametrize("name", [k for k in GOLD if k.endswith("pathwise")])
def test_pathwise_gradients(lab, name, method):
    """On a piecewise linear path, Stratonovich methods of second order solve an ordinary differential equation."""
    P = GOLD[name]
    ts = [float(v) for v in P["driver"]["t"]]
    columns = 2 if "2d" in name else 1
    W = np.array([[float(v) for v in P["driver"][f"W{i + 1}"]] for i in range(columns)]).T
    prob, initial, loss = setup(lab, P, ts, W, interpretation="stratonovich")
    # Errors of second order: 1e-6 at dt = 1e-3, four times that here.
    r = sa.gradient(prob, method, loss, dt=2e-3, saveat=lab.array([float(v) for v in P["loss"]["save_at"]]))
    compare(P, r, initial, 1e-5)


# -- strong order ------------------------------------------------------------------------------------------------------

MEMBERS = 300
TREE = sa.VirtualBrownianTree(3, (0.0, 1.0), 2.0**-12)
LEVELS = (4, 5, 6, 7, 8)


def strong_order(prob, method, exact, levels=LEVELS):
    """Slope of the root mean square error at the end against the step size, over many members."""
    errors = [np.sqrt(np.mean((sa.solve(prob, method, dt=2.0**-k).u[-1] - exact) ** 2)) for k in levels]
    return np.polyfit(levels, -np.log2(errors), 1)[0]


def geometric(interpretation):
    mu, sigma, x0 = 0.3, 0.6, 1.2
    prob = sa.SDEProblem(lambda t, u, p: mu * u, lambda t, u, p: sigma * u, np.full(MEMBERS, x0), (0.0, 1.0),
                         interpretation=interpretation, brownian=TREE)
    drift = mu - (0.5 * sigma**2 if interpretation == "ito" else 0.0)
    return prob, x0 * np.exp(drift + sigma * TREE(np.array([1.0]), MEMBERS)[0])


def arctangent(interpretation):
    """`X = arctan(p W + tan x0)`."""
    import autograd.numpy as anp

    p, x0 = 0.8, 0.3

    def f(t, u, _):
        return -(p**2) * anp.sin(u) * anp.cos(u) ** 3 if interpretation == "ito" else 0.0 * u

    prob = sa.SDEProblem(f, lambda t, u, _: p * anp.cos(u) ** 2, np.full(MEMBERS, x0), (0.0, 1.0),
                         interpretation=interpretation, brownian=TREE)
    return prob, np.arctan(p * TREE(np.array([1.0]), MEMBERS)[0] + np.tan(x0))


@pytest.mark.parametrize("make", [geometric, arctangent])
@pytest.mark.parametrize(
    ("method", "order"),
    [(sa.EulerMaruyama(), 0.5), (sa.Milstein(), 1.0), (sa.StochasticHeun(), 1.0), (sa.ReversibleHeun(), 1.0)],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_strong_order(make, method, order):
    """Orders 1/2 and 1 within 0.1, for which five sizes and 300 paths are enough."""
    pytest.importorskip("autograd")
    prob, exact = make(method.interpretation)
    assert strong_order(prob, method, exact) == pytest.approx(order, abs=0.1)


def test_the_other_interpretation_is_another_solution():
    """What the refusal of a wrong method guards against: an error that does not shrink."""
    prob, _ = geometric("ito")
    _, exact = geometric("stratonovich")
    gap = [np.sqrt(np.mean((sa.solve(prob, sa.EulerMaruyama(), dt=2.0**-k).u[-1] - exact) ** 2)) for k in (6, 9)]
    assert gap[1] > 0.9 * gap[0] > 0.1


@pytest.mark.parametrize(
    ("method", "order"),
    [(sa.EulerMaruyama(), 1.0), (sa.Milstein(), 1.0), (sa.StochasticHeun(), 1.0), (sa.ShARK(), 1.5)],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_strong_order_for_additive_noise(method, order):
    """A nonlinear drift, and a g that changes in time; the reference is the same path with 2^11 steps."""
    pytest.importorskip("autograd")
    prob = sa.SDEProblem(lambda t, u, p: np.sin(3.0 * u) - u**3,
                         lambda t, u, p: 0.5 * (1.0 + t) ** 2 * np.ones(MEMBERS), np.full(MEMBERS, 0.9), (0.0, 1.0),
                         noise="additive", brownian=TREE)
    exact = sa.solve(prob, sa.ShARK(), dt=2.0**-11).u[-1]
    assert strong_order(prob, method, exact, (3, 4, 5, 6, 7)) == pytest.approx(order, abs=0.12)


def test_additive_noise_against_the_closed_form():
    a, b = 0.4, 0.7
    prob = sa.SDEProblem(lambda t, u, p: b / np.sqrt(1.0 + t) - u / (2.0 * (1.0 + t)),
                         lambda t, u, p: a * b / np.sqrt(1.0 + t) * np.ones((3, 1)), np.full(3, 0.9), (0.0, 1.0),
                         noise="additive", brownian=TREE)
    exact = (0.9 + b * (1.0 + a * TREE(np.array([1.0]))[0])) / math.sqrt(2.0)
    np.testing.assert_allclose(sa.solve(prob, dt=2.0**-8).u[-1], np.full(3, exact), rtol=0, atol=5e-7)
    assert sa.solve(prob, dt=0.1).alg == sa.ShARK()


def matrix(interpretation):
    """`x = exp(a W1 + b W2) x0` (Stratonovich) in both entries: general noise that commutes."""
    g = np.array([[0.5, -0.3], [0.2, 0.4]])
    drift = 0.0 if interpretation == "stratonovich" else 0.5 * np.sum(g**2, axis=1)
    prob = sa.SDEProblem(lambda t, u, p: drift * u, lambda t, u, p: g * u[:, None], np.array([1.0, 2.0]), (0.0, 1.0),
                         noise="general", interpretation=interpretation)
    return prob, g


@pytest.mark.parametrize("method", [sa.EulerMaruyama(), sa.Milstein(), sa.StochasticHeun()], ids=lambda m: m.name)
def test_general_noise(method):
    """Root mean square over 30 paths; 16 times as many steps make it 4 and 16 times smaller."""
    prob, g = matrix(method.interpretation)
    gaps = []
    for k in (4, 8) if method != sa.Milstein() else (2, 6):
        gap = []
        for key in range(30):
            path = sa.VirtualBrownianTree(key, (0.0, 1.0), 2.0**-8)
            exact = np.exp(g @ path(np.array([1.0]), 2)[0]) * prob.u0
            gap.append(sa.solve(prob.remake(brownian=path), method, dt=2.0**-k).u[-1] - exact)
        gaps.append(np.sqrt(np.mean(np.square(gap))))
    order = math.log2(gaps[0] / gaps[1]) / 4
    assert order == pytest.approx(0.5 if method == sa.EulerMaruyama() else 1.0, abs=0.15)


@pytest.mark.parametrize("method", [sa.Milstein(), sa.StochasticHeun()], ids=lambda m: m.name)
def test_scalar_noise(method):
    """Kubo's oscillator: `(x, y)` turned by the angle `a W`, one noise for both entries."""
    anp = pytest.importorskip("autograd.numpy")
    a = 0.9
    ito = method.interpretation == "ito"
    prob = sa.SDEProblem(lambda t, u, p: -0.5 * a * a * u * ito, lambda t, u, p: a * anp.array([-u[1], u[0]]),
                         np.array([1.0, 0.0]), (0.0, 1.0), noise="scalar", interpretation=method.interpretation)
    gaps = []
    for k in (4, 8):
        gap = []
        for key in range(20):
            path = sa.VirtualBrownianTree(key, (0.0, 1.0), 2.0**-8)
            angle = a * path(np.array([1.0]))[0, 0]
            exact = np.array([np.cos(angle), np.sin(angle)])
            gap.append(sa.solve(prob.remake(brownian=path), method, dt=2.0**-k).u[-1] - exact)
        gaps.append(np.sqrt(np.mean(np.square(gap))))
    assert math.log2(gaps[0] / gaps[1]) / 4 == pytest.approx(1.0, abs=0.15)


def weak_error(prob, method, X, levels):
    """Mean of `X_N^2 - X^2` over the paths, and its standard error, for steps `2^-k`."""
    gaps = [sa.solve(prob, method, dt=2.0**-k).u[-1] ** 2 - X**2 for k in levels]
    return np.array([(np.mean(v), np.std(v) / math.sqrt(v.shape[0])) for v in gaps]).T


@pytest.mark.parametrize("method", [sa.EulerMaruyama(), sa.Milstein(), sa.StochasticHeun(), sa.ReversibleHeun()],
                         ids=lambda m: m.name)
def test_weak_order(method):
    """Order 1 of the bias of `E[X(1)^2]`, from the exact solution on the same paths, where the strong order is 1/2 too.

    The standard error of the slope over a factor 4 follows from those of the two means; it is below 0.12, and 0.12
    more is left to terms of higher order.
    """
    pytest.importorskip("autograd")
    B, mu, sigma, x0 = 30_000, 0.3, 0.6, 1.2
    tree = sa.VirtualBrownianTree(11, (0.0, 1.0), 2.0**-5)
    prob = sa.SDEProblem(lambda t, u, p: mu * u, lambda t, u, p: sigma * u, np.full(B, x0), (0.0, 1.0),
                         interpretation=method.interpretation, brownian=tree)
    drift = mu - (0.5 * sigma**2 if method.interpretation == "ito" else 0.0)
    bias, error = weak_error(prob, method, x0 * np.exp(drift + sigma * tree(np.array([1.0]), B)[0]), (3, 5))
    open_ = math.hypot(*(error / bias)) / (2.0 * math.log(2.0))
    assert open_ < 0.12
    assert abs(math.log2(bias[0] / bias[1]) / 2.0 - 1.0) < 0.12 + 3.0 * open_


# -- ensembles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["EulerMaruyama", "ReversibleHeun"])
def test_ensembles_of_paths(lab, method):
    """A member's path depends on its key alone: not on the others, on their order, or on how they are batched."""
    method = getattr(sa, method)()
    one = nonlinear(lab, "general", method.interpretation)
    keys = np.array([5, 1, 9, 5])
    key = lab.array(keys, "int64")

    def solved(key, **options):
        return lab.numpy(sa.solve(sa.EnsembleProblem(one, key=key), method, dt=0.2, saveat=3, **options).u)

    u = solved(key)
    assert u.shape == (4, 3, 2)
    assert np.all(u[0] == u[3])
    assert not np.any(u[0, 1:] == u[1, 1:])
    np.testing.assert_allclose(solved(key, chunk=2), u, rtol=1e-13)
    if lab.name != "jax":  # where every layout is compiled anew
        for k, row in zip(keys, u, strict=True):
            alone = sa.solve(one.remake(key=int(k)), method, dt=0.2, saveat=3).u
            np.testing.assert_array_equal(lab.numpy(alone), row)
        with ThreadPoolExecutor(2) as pool:
            np.testing.assert_array_equal(solved(key, executor=pool), u)


def test_gradients_of_ensembles(lab):
    """Each member its own gradient; without keys all see the path of the problem."""
    xp = lab.xp
    one = sa.SDEProblem(lambda t, u, p: -p * u, lambda t, u, p: 0.3 * xp.cos(u), lab.array([1.0]), (0.0, 1.0), key=3)
    p = lab.array([0.5, 0.5, 0.7])

    def gradients(**parts):
        members = sa.EnsembleProblem(one, p=p, **parts)
        return lab.numpy(sa.gradient(members, sa.EulerMaruyama(), lambda sol: (sol.u**2).sum(), dt=0.25).p)

    same, own = gradients(), gradients(key=lab.array([3, 4, 3], "int64"))
    assert same[0] == pytest.approx(same[1], rel=1e-14)
    assert own[0] == pytest.approx(same[0], rel=1e-13)
    assert own[2] == pytest.approx(same[2], rel=1e-13)
    assert abs(own[1] - same[1]) > 1e-3


def test_ensembles_that_cannot_be():
    prob = sa.SDEProblem(lambda t, u, p: -u, lambda t, u, p: u, np.ones(1), (0.0, 1.0), brownian=TREE)
    with pytest.raises(sa.InputError, match="with a path"):
        sa.EnsembleProblem(prob, key=np.arange(3))
    with pytest.raises(sa.InputError, match="with no noise"):
        sa.EnsembleProblem(sa.ODEProblem(lambda t, u, p: -u, np.ones(1), (0.0, 1.0)), key=np.arange(3))


# -- gradients: every method, noise and product ------------------------------------------------------------------------


CASES = [("EulerMaruyama", "general", None), ("EulerMaruyama", "scalar", "ts"), ("Milstein", "diagonal", "ts"),
         ("Milstein", "scalar", None), ("Milstein", "commutative", "ts"), ("StochasticHeun", "diagonal", 4),
         ("StochasticHeun", "general", "steps"), ("ReversibleHeun", "general", "ts"),
         ("ReversibleHeun", "diagonal", "steps"), ("ShARK", "additive", "ts"), ("ReversibleHeun", "additive", None)]


@pytest.mark.parametrize(("name", "noise", "saves"), CASES, ids=lambda v: str(v))
def test_equals_direct_for_sdes(lab, name, noise, saves):
    """The discrete adjoint is the derivative that the framework finds through the same loop; the last step is short."""
    method = getattr(sa, name)()
    prob = nonlinear(lab, noise, method.interpretation)
    exact = answer(lab, prob, method, saves, sa.DirectAdjoint())
    np.testing.assert_allclose(answer(lab, prob, method, saves, sa.RecursiveCheckpointAdjoint()), exact, rtol=1e-11,
                               atol=1e-12)


@pytest.mark.parametrize("wide", [False, True], ids=["few-parameters", "many-parameters"])
@pytest.mark.parametrize(("name", "noise"), [("EulerMaruyama", "scalar"), ("Milstein", "diagonal"),
                                             ("StochasticHeun", "diagonal"), ("ShARK", "additive")])
def test_recorded_steps(torch_lab, name, noise, wide):
    """Large states, whose steps are recorded, and many parameters, whose products are made for many stages at once."""
    torch, n = torch_lab.xp, 40
    net = torch.nn.Linear(n, n, dtype=torch.float64)
    method = getattr(sa, name)()

    def f(t, u, p):
        return p[0] * torch.tanh(net(u) if wide else u)

    def g(t, u, p):
        return p[1] * (torch.cos(t) * torch.ones(n, dtype=torch.float64) if noise == "additive" else torch.cos(u))

    p = torch.tensor([0.5, 0.3], dtype=torch.float64, requires_grad=True)
    prob = sa.SDEProblem(f, g, torch.ones(n, dtype=torch.float64), (0.0, 1.0), p, noise=noise,
                         interpretation=method.interpretation)

    def gradients(sensealg):
        u = sa.solve(prob, method, dt=0.15, sensealg=sensealg, saveat=3).u
        return torch.autograd.grad((u**2).sum(), [p, *(net.parameters() if wide else ())])

    exact = gradients(sa.DirectAdjoint())
    for sensealg in (sa.RecursiveCheckpointAdjoint(), sa.RecursiveCheckpointAdjoint(checkpoints=2)):
        for a, b in zip(gradients(sensealg), exact, strict=True):
            assert b.abs().max() > 0.0
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("saves", [None, 3, "steps", "ts"], ids=str)
def test_undone_steps(lab, saves):
    """Without stored states the gradient is that of the discrete adjoint, to the round-off of undoing nine steps."""
    prob = nonlinear(lab, "general", "stratonovich")
    exact = answer(lab, prob, sa.ReversibleHeun(), saves, sa.RecursiveCheckpointAdjoint())
    np.testing.assert_allclose(answer(lab, prob, sa.ReversibleHeun(), saves, sa.ReversibleHeunAdjoint()), exact,
                               rtol=1e-11, atol=1e-12)


def test_forward_mode(lab):
    """Tangents through the steps give the same gradient."""
    prob = nonlinear(lab, "general", "stratonovich")
    for method in (sa.StochasticHeun(), sa.ReversibleHeun()):
        exact = answer(lab, prob, method, "ts", sa.RecursiveCheckpointAdjoint())
        np.testing.assert_allclose(answer(lab, prob, method, "ts", sa.ForwardADSensitivity()), exact, rtol=1e-11)


def test_undone_steps_cost_and_fail(numpy_lab):
    prob = nonlinear(numpy_lab, "general", "stratonovich")
    r = sa.gradient(prob, sa.ReversibleHeun(), lambda sol: np.sum(sol.u), dloss=lambda sol: np.ones_like(sol.u), dt=0.1,
                    sensealg=sa.ReversibleHeunAdjoint())
    assert (r.stats.nfe, r.stats.nvjp) == (7, 7)
    assert r.stats.drift < 1e-13
    # On a contracting problem the hidden half of the state grows, and round-off with it.
    stiff = prob.remake(f=lambda t, u, p: -8.0 * u, g=lambda t, u, p: 0.2 * u, noise="diagonal", tspan=(0.0, 4.0))
    with pytest.raises(sa.UnstableSensealgError, match="undone to the start, miss u0"):
        sa.gradient(stiff, sa.ReversibleHeun(), lambda sol: np.sum(sol.u), dloss=lambda sol: np.ones_like(sol.u),
                    dt=0.05, sensealg=sa.ReversibleHeunAdjoint())
    with pytest.warns(sa.ReconstructionWarning, match="hidden half"):
        r = sa.gradient(stiff.remake(tspan=(0.0, 3.0)), sa.ReversibleHeun(), lambda sol: np.sum(sol.u),
                        dloss=lambda sol: np.ones_like(sol.u), dt=0.05, sensealg=sa.ReversibleHeunAdjoint())
    assert 1e-6 < r.stats.drift < 0.1


def test_stand_ins(numpy_lab):
    """What an algorithm for ODEs means here: the reversible adjoint of reversible Heun, tangents through the steps."""
    prob = nonlinear(numpy_lab, "general", "stratonovich")
    r = sa.gradient(prob, sa.ReversibleHeun(), lambda sol: (sol.u**2).sum(), dt=0.1, sensealg=sa.ReversibleAdjoint())
    assert isinstance(r.sensealg, sa.ReversibleHeunAdjoint)
    sol, S = sa.forward_sensitivities(prob, sa.StochasticHeun(), saveat=TIMES, dt=0.07)
    assert isinstance(sol.sensealg, sa.ForwardADSensitivity)
    w = np.cos(np.arange(10.0)).reshape(5, 2)
    exact = answer(numpy_lab, prob, sa.StochasticHeun(), "ts", sa.RecursiveCheckpointAdjoint())
    np.testing.assert_allclose(np.einsum("kn,kni->i", 2.0 * w * sol.u, S), exact[3:], rtol=1e-11)


def test_costs(numpy_lab):
    """A cost at given times is one more loss; one over time is refused, as are second derivatives."""
    prob = nonlinear(numpy_lab, "diagonal")
    cost = sa.DiscreteCost([0.2, 0.6], dgdu=lambda t, u, p, i: 2.0 * u, g=lambda t, u, p, i: (u**2).sum())
    for sensealg in (sa.auto, sa.InterpolatingAdjoint(), sa.BacksolveAdjoint()):
        a = sa.gradient(prob, sa.EulerMaruyama(), cost, dt=0.1, sensealg=sensealg)
        b = sa.gradient(prob, sa.EulerMaruyama(), lambda sol: (sol.u**2).sum(), dt=0.1, sensealg=sensealg,
                        saveat=[0.2, 0.6])
        assert a.value == pytest.approx(b.value, rel=1e-14)
        np.testing.assert_allclose(a.p["s"], b.p["s"], rtol=1e-13)
    with pytest.raises(sa.UnsupportedCombination, match="DiscreteCost, or a callable"):
        sa.gradient(prob, sa.EulerMaruyama(), sa.ContinuousCost(lambda t, u, p: (u**2).sum()), dt=0.1)
    for second in (sa.hessian, lambda *a, **k: sa.hessian_vector_product(*a, np.ones(2), **k)):
        with pytest.raises(sa.UnsupportedCombination, match="second derivatives through steps"):
            second(prob, sa.EulerMaruyama(), lambda sol: (sol.u**2).sum(), wrt="u0", dt=0.1)


def test_advice_for_an_sde(numpy_lab):
    """What is exact comes before what is right up to the error of the steps, and what cannot be is ruled out."""
    advice = sa.advise(nonlinear(numpy_lab, "diagonal"), sa.EulerMaruyama(), dt=0.1)
    rows = {row.sensealg.name: row for row in advice.table}
    assert advice.sensealg.name == "RecursiveCheckpointAdjoint"
    assert "error of the steps" in rows["BacksolveAdjoint"].why
    assert rows["InterpolatingAdjoint"].verdict == "possible"
    assert {rows[k].verdict for k in ("QuadratureAdjoint", "GaussAdjoint", "ForwardOverAdjoint")} == {"ruled out"}


def test_check_gradient_of_an_sde(numpy_lab):
    """Only algorithms that differentiate the computed solution are held against its differences."""
    check = sa.check_gradient(nonlinear(numpy_lab, "diagonal"), sa.Milstein(), lambda sol: (sol.u**2).sum(), dt=0.1)
    assert check.ok
    assert [row.sensealg.name for row in check.rows] == ["RecursiveCheckpointAdjoint", "ForwardADSensitivity"]


@pytest.mark.parametrize("vjp", [sa.ForwardVJP(), sa.FiniteDifferenceVJP(), sa.ComplexStepVJP()], ids=lambda v: v.name)
@pytest.mark.parametrize(("name", "noise"), [("StochasticHeun", "general"), ("Milstein", "diagonal"),
                                             ("ShARK", "additive")])
def test_every_product_for_sdes(lab, name, noise, vjp):
    """All choices give the same gradient: to round-off, or what differences leave."""
    method = getattr(sa, name)()
    prob = nonlinear(lab, noise, method.interpretation)
    exact = answer(lab, prob, method, "ts", sa.RecursiveCheckpointAdjoint(vjp=sa.ReverseVJP()))
    got = answer(lab, prob, method, "ts", sa.RecursiveCheckpointAdjoint(vjp=vjp))
    tolerance = 1e-7 if vjp == sa.FiniteDifferenceVJP() else 1e-11
    np.testing.assert_allclose(got, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "noise", "saves"), [CASES[2], CASES[7]], ids=lambda v: str(v))
def test_tangents_are_the_transpose(lab, name, noise, saves):
    """`<reverse(ct), d> = <ct, tangent(d)>` to round-off."""
    from sensitivity.algorithms.base import Outputs, Tangents
    from sensitivity.choose import choose
    from sensitivity.solve import prepare_options

    method = getattr(sa, name)()
    prob = nonlinear(lab, noise, method.interpretation)
    run, x = prepare_options(prob, method, {"dt": 0.07, "saveat": lab.array(TIMES)})
    algorithm, run = choose(run, x, sa.RecursiveCheckpointAdjoint())
    be, rng = run.be, np.random.default_rng(0)
    wanted = frozenset({"u0", "theta"})
    out, _, residuals = be.run(algorithm, "forward", run, (x,), wanted)
    ct = lab.array(rng.normal(size=tuple(out.u.shape)))
    bar = be.run(algorithm, "reverse", run, (residuals, Outputs(ct, None, None)), wanted)
    d = Tangents(lab.array(rng.normal(size=(3, 2))),
                 tuple(lab.array(rng.normal(size=(3, *v.shape))) for v in x.theta), None, None, None)
    with be.quiet():
        du = lab.numpy(algorithm.tangent(run, residuals, d))
    left = np.sum(lab.numpy(d.u0) * lab.numpy(bar.u0), axis=1)
    for a, b in zip(d.theta, bar.theta, strict=True):
        left = left + np.sum((lab.numpy(a) * lab.numpy(b)).reshape(3, -1), axis=1)
    np.testing.assert_allclose(left, np.sum(du * lab.numpy(ct)[None], axis=(1, 2)), rtol=1e-12)


def test_trees_and_batches(lab):
    """A state of two arrays in a dict, one of them a matrix, is the same as one vector."""
    xp = lab.xp
    a, b = lab.array([[0.3, 0.4], [0.5, 0.6]]), lab.array([1.0])

    def halves(t, u, p):
        return {"m": -p * u["m"], "v": u["v"] * xp.sum(u["m"])}

    def spread(t, u, p):
        return {"m": p * xp.cos(u["m"]), "v": 0.1 + 0.0 * u["v"]}

    def flat(fun):
        def call(t, u, p):
            out = fun(t, {"m": xp.reshape(u[:4], (2, 2)), "v": u[4:]}, p)
            return xp.concatenate([xp.reshape(out["m"], (4,)), out["v"]])

        return call

    p = lab.array(0.7)
    tree = sa.SDEProblem(halves, spread, {"m": a, "v": b}, (0.0, 0.5), p)
    vector = sa.SDEProblem(flat(halves), flat(spread), lab.array([0.3, 0.4, 0.5, 0.6, 1.0]), (0.0, 0.5), p)
    r = sa.gradient(tree, sa.EulerMaruyama(), lambda sol: xp.sum(sol.u["m"]) + xp.sum(sol.u["v"] ** 2), dt=0.125)
    s = sa.gradient(vector, sa.EulerMaruyama(), lambda sol: xp.sum(sol.u[:, :4]) + xp.sum(sol.u[:, 4:] ** 2), dt=0.125)
    assert float(r.value) == pytest.approx(float(s.value), rel=1e-14)
    assert float(r.p) == pytest.approx(float(s.p), rel=1e-13)
    np.testing.assert_allclose(lab.numpy(r.u0["m"]).ravel(), lab.numpy(s.u0)[:4], rtol=1e-13)


def test_backends_solve_on_one_path(lab):
    """One key, one solution, whatever the framework."""
    here = nonlinear(type(lab)("numpy"), "general") if importlib.util.find_spec("autograd") else None
    if here is None:
        pytest.skip("the vector field is written for autograd's NumPy")
    expected = sa.solve(here, sa.EulerMaruyama(), dt=0.05, saveat=5).u
    got = lab.numpy(sa.solve(nonlinear(lab, "general"), sa.EulerMaruyama(), dt=0.05, saveat=5).u)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_single_precision(lab):
    """The path, and with it the solution and its gradient, is the same to the precision of the state."""
    xp = lab.xp
    got = []
    for dtype in ("float32", "float64"):
        prob = sa.SDEProblem(lambda t, u, p: -p[0] * u, lambda t, u, p: p[1] * xp.cos(u), lab.array([1.0, 2.0], dtype),
                             (0.0, 1.0), lab.array([0.5, 0.3], dtype), key=(1 << 40) + 5)
        r = sa.gradient(prob, sa.EulerMaruyama(), lambda sol: (sol.u**2).sum(), dt=0.1)
        assert dtype in str(r.solution.u.dtype)
        assert dtype in str(r.p.dtype)
        got.append(np.array([float(r.value), *lab.numpy(r.p)], dtype=float))
    np.testing.assert_allclose(got[0], got[1], rtol=3e-6)


def test_evaluations_are_counted(numpy_lab):
    calls = {"f": 0, "g": 0}

    def f(t, u, p):
        calls["f"] += 1
        return -p * u

    def g(t, u, p):
        calls["g"] += 1
        return 0.1 * u

    prob = sa.SDEProblem(f, g, np.ones(2), (0.0, 1.0), np.array(0.5), interpretation="stratonovich")
    for method, count in ((sa.StochasticHeun(), 20), (sa.ReversibleHeun(), 11)):
        calls.update(f=0, g=0)
        sol = sa.solve(prob, method, dt=0.1, probe="off", saveat=[0.35, 1.0])
        # One call of g before the start tells how many noises there are.
        assert (calls["f"], calls["g"]) == (sol.stats.nfe, sol.stats.nfe + 1) == (count, count + 1)


def test_dense_output(lab):
    """Linear between the nodes, and the nodes themselves."""
    prob = nonlinear(lab, "general", "stratonovich")
    for method in (sa.StochasticHeun(), sa.ReversibleHeun()):
        sol = sa.solve(prob, method, dt=0.1, saveat="steps", dense=True)
        u = lab.numpy(sol.u)
        np.testing.assert_allclose(lab.numpy(sol(0.2)), u[1], rtol=1e-12)
        np.testing.assert_allclose(lab.numpy(sol(0.25)), 0.5 * (u[1] + u[2]), rtol=1e-12)


# -- expectations ------------------------------------------------------------------------------------------------------


def members(lab, name, B):
    """One member per entry of u, and parameters of its own for each, so that every member has its own gradient."""
    P = GOLD[name]
    number = {k: float(v) for k, v in P["params"].items()}
    p = {k: lab.array(np.full(B, v)) for k, v in number.items() if k != "x0"}
    if "gbm" in name:
        f, g = lambda t, u, p: p["mu"] * u, lambda t, u, p: p["sigma"] * u
    else:
        f, g = lambda t, u, p: p["th"] * (p["m"] - u), lambda t, u, p: p["s"] + 0.0 * u
    return P, number, sa.SDEProblem(f, g, lab.array(np.full(B, number["x0"])), (0.0, 1.0), p, key=2)


def second_moment(name, steps, x0, **p):
    """`E[X_N^2]` of the Euler-Maruyama map in closed form."""
    h = 1.0 / steps
    if "gbm" in name:
        return x0**2 * (1.0 + (2.0 * p["mu"] + p["sigma"] ** 2) * h + (p["mu"] * h) ** 2) ** steps
    r = 1.0 - p["th"] * h
    mean = p["m"] + (x0 - p["m"]) * r**steps
    return mean**2 + p["s"] ** 2 * h * (1.0 - r ** (2 * steps)) / (1.0 - r**2)


@pytest.mark.parametrize("name", ["sde_gbm_expectation", "sde_ou_expectation"])
def test_expectations(lab, name):
    """Mean of pathwise gradients within 4 standard errors of the derivative of `E[X_N^2]`, which is known in closed
    form for the scheme and tends to that of `E[X(1)^2]` with order 1."""
    B, steps = 20_000, 32
    P, number, prob = members(lab, name, B)
    r = sa.gradient(prob, sa.EulerMaruyama(), lambda sol: lab.xp.sum(sol.u[0, :] ** 2), dt=1.0 / steps)
    each = {k: lab.numpy(v) for k, v in r.p.items()} | {"x0": lab.numpy(r.u0)}

    def slope(k, n):
        return second_moment(name, n, **(number | {k: number[k] + 1e-30j})).imag / 1e-30

    for k, exact in P["gradient"].items():
        error = 4.0 * np.std(each[k]) / math.sqrt(B)
        assert abs(np.mean(each[k]) - slope(k, steps)) < error, k
        assert 2.0 * slope(k, 2**14) - slope(k, 2**13) == pytest.approx(float(exact), rel=1e-6), k
        assert abs(np.mean(each[k]) - float(exact)) < error + abs(slope(k, steps) - float(exact)), k
    assert float(r.value) / B == pytest.approx(second_moment(name, steps, **number), rel=0.1)


# -- AD of the frameworks ----------------------------------------------------------------------------------------------


def test_jax_transforms():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy

    def end(p, key):
        prob = sa.SDEProblem(lambda t, u, p: -p[0] * u, lambda t, u, p: p[1] * u, jnp.ones(2), (0.0, 1.0), p, key=key)
        return jnp.sum(sa.solve(prob, sa.EulerMaruyama(), dt=0.125).u)

    p, key = jnp.array([0.5, 0.3]), jnp.array([1, 2], dtype=jnp.uint32)
    r = sa.gradient(sa.SDEProblem(lambda t, u, p: -p[0] * u, lambda t, u, p: p[1] * u, jnp.ones(2), (0.0, 1.0), p,
                                  key=key), sa.EulerMaruyama(), lambda sol: jnp.sum(sol.u), dt=0.125)
    grad = jax.grad(end)(p, key)
    np.testing.assert_allclose(grad, r.p, rtol=1e-13)
    np.testing.assert_allclose(jax.jvp(lambda p: end(p, key), (p,), (jnp.array([1.0, 0.0]),))[1], grad[0], rtol=1e-12)
    keys = jnp.array([[1, 2], [3, 4], [5, 6]], dtype=jnp.uint32)
    batch = jax.jit(jax.vmap(jax.grad(end), in_axes=(None, 0)))(p, keys)
    np.testing.assert_allclose(batch[0], grad, rtol=1e-12)
    np.testing.assert_allclose(batch[2], jax.grad(end)(p, keys[2]), rtol=1e-12)


def test_jax_refuses_times_and_paths():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy

    def end(t1=1.0, W=None, sensealg=sa.auto):
        path = None if W is None else sa.TabulatedPath(jnp.array([0.0, 1.0]), W)
        prob = sa.SDEProblem(lambda t, u, p: -u, lambda t, u, p: 0.1 * u, jnp.ones(1), (0.0, t1), brownian=path)
        return jnp.sum(sa.solve(prob, sa.EulerMaruyama(), dt=0.25, sensealg=sensealg, max_steps=8).u)

    for sensealg in (sa.auto, sa.DirectAdjoint()):
        with pytest.raises(sa.UnsupportedCombination, match="t1"):
            jax.grad(end)(1.0, None, sensealg)
    with pytest.raises(sa.UnsupportedCombination, match=r"TabulatedPath\.W"):
        jax.grad(lambda W: end(W=W))(jnp.array([[0.0], [1.0]]))


def test_torch_autograd():
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(2, 2, dtype=torch.float64)
    scale = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)

    class Noise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(2, 2, dtype=torch.float64)

        def forward(self, t, u, p):
            return torch.tanh(self.net(u)) * p

    noise = Noise()
    prob = sa.SDEProblem(lambda t, u, p: torch.tanh(layer(u)), noise, torch.ones(2, dtype=torch.float64), (0.0, 1.0),
                         scale)

    def grads(sensealg):
        every = [scale, *layer.parameters(), *noise.parameters()]
        for x in every:
            x.grad = None
        sa.solve(prob, sa.EulerMaruyama(), dt=0.2, sensealg=sensealg).u.pow(2).sum().backward()
        return [x.grad.clone() for x in every]

    for a, b in zip(grads(sa.RecursiveCheckpointAdjoint()), grads(sa.DirectAdjoint()), strict=True):
        assert a.abs().max() > 0.0
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    t1 = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(sa.UnsupportedCombination, match="t1"):
        sa.solve(prob.remake(tspan=(0.0, t1)), sa.EulerMaruyama(), dt=0.2)


def test_torch_vmap_over_keys():
    torch = pytest.importorskip("torch")
    one = torch.ones(2, dtype=torch.float64)

    def end(key):
        return sa.solve(sa.SDEProblem(lambda t, u, p: -u, lambda t, u, p: torch.cos(u), one, (0.0, 1.0), key=key),
                        sa.EulerMaruyama(), dt=0.25).u

    keys = torch.tensor([[1, 2], [3, 4]])
    both = torch.func.vmap(end)(keys)
    torch.testing.assert_close(both, torch.stack([end(k) for k in keys]), rtol=1e-14, atol=0.0)
    assert not torch.equal(both[0], both[1])


def test_autograd():
    anp = pytest.importorskip("autograd.numpy")
    from autograd import grad

    p = np.array([0.5, 0.3])
    prob = sa.SDEProblem(lambda t, u, p: -p[0] * u, lambda t, u, p: p[1] * anp.cos(u), np.ones(2), (0.0, 1.0), p)

    def end(p, sensealg=sa.auto):
        return anp.sum(sa.solve(prob.remake(p=p), sa.EulerMaruyama(), dt=0.2, sensealg=sensealg).u ** 2)

    r = sa.gradient(prob, sa.EulerMaruyama(), lambda sol: anp.sum(sol.u**2), dt=0.2)
    np.testing.assert_allclose(grad(end)(p), r.p, rtol=1e-13)
    np.testing.assert_allclose(grad(end)(p, sa.DirectAdjoint()), r.p, rtol=1e-13)
    with pytest.raises(sa.UnsupportedCombination, match="t1"):
        grad(lambda t1: anp.sum(sa.solve(prob.remake(tspan=(0.0, t1)), sa.EulerMaruyama(), dt=0.2).u))(1.0)


# -- refusals ----------------------------------------------------------------------------------------------------------

PROB = sa.SDEProblem(lambda t, u, p: -p * u, lambda t, u, p: 0.1 * u, np.array([1.0, 2.0]), (0.0, 1.0), np.array(0.5))


def rotating(t, u, p):
    """Two noises that do not commute: growth of one entry, and a rotation."""
    import autograd.numpy as anp

    x, y = u[0], u[1]
    return anp.stack([anp.stack([x, -y]), anp.stack([0.0 * y, x])])


def solved(alg=None, dt=0.1, sensealg=sa.auto, wrt=None, remake=None, **options):
    prob = PROB.remake(**(remake or {}))
    return sa.gradient(prob, alg or sa.EulerMaruyama(), lambda sol: sol.u.sum(), dloss=lambda sol: np.ones_like(sol.u),
                       dt=dt, sensealg=sensealg, wrt=wrt, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alg": sa.StochasticHeun()}, "Stratonovich"),
        ({"alg": sa.ReversibleHeun()}, "EulerMaruyama"),
        ({"alg": sa.EulerMaruyama(), "remake": {"interpretation": "stratonovich"}}, "StochasticHeun"),
        ({"alg": sa.ShARK()}, "diagonal noise"),
        ({"alg": sa.Tsit5()}, "no method for an SDEProblem"),
        ({"controller": sa.PIController()}, "error estimate"),
        ({"alg": sa.Milstein(), "remake": {"noise": "general", "g": rotating}}, "commutes"),
        ({"tstops": [0.5]}, "tstops"),
        ({"dtmax": 0.1}, "dtmax"),
        ({"sensealg": sa.ReversibleAdjoint()}, "cannot be undone"),
        ({"sensealg": sa.ReversibleAdjoint(coupling=0.9)}, r"ReversibleHeun\(\)"),
        ({"sensealg": sa.QuadratureAdjoint()}, "smooth in time"),
        ({"sensealg": sa.GaussAdjoint()}, "smooth in time"),
        ({"sensealg": sa.ForwardOverAdjoint()}, "second derivatives"),
        ({"events": [sa.Event(lambda t, u, p: u[0])]}, "events"),
        ({"sensealg": sa.ReversibleHeunAdjoint()}, "cannot be undone"),
        ({"wrt": "t0"}, "t0"),
        ({"wrt": "t1"}, "no derivative in time"),
        ({"wrt": "saveat", "saveat": np.array([0.5])}, "saveat"),
        ({"remake": {"u0": np.array([1j])}}, "complex"),
        ({"sensealg": sa.RecursiveCheckpointAdjoint(vjp=sa.UserVJP())}, "neither vjp nor jac"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refused(options, words):
    with pytest.raises(sa.UnsupportedCombination, match=words):
        solved(**options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dt": None}, sa.InputError, "dt was not given"),
        ({"remake": {"tspan": (1.0, 0.0)}}, sa.TimesError, "forwards"),
        ({"remake": {"noise": "odd"}}, sa.InputError, "noise='odd'"),
        ({"remake": {"interpretation": "Ito"}}, sa.InputError, "interpretation='Ito'"),
        ({"remake": {"g": 3.0}}, sa.SignatureError, "g is float"),
        ({"remake": {"brownian": 3.0}}, sa.InputError, "brownian is float"),
        ({"remake": {"g": lambda t, u, p: np.ones(3)}}, sa.OutputError, "g returned shapes"),
        ({"remake": {"noise": "general"}}, sa.OutputError, "g returned shapes"),
        ({"remake": {"noise": "additive"}}, sa.InputError, "g changes with u"),
        ({"remake": {"g": lambda t, u, p: np.random.default_rng().normal(size=2)}}, sa.ImpureFunctionError, "two answ"),
        ({"remake": {"brownian": sa.VirtualBrownianTree(0, (0.0, 0.5), 0.01)}}, sa.InputError, "covers"),
        ({"remake": {"brownian": sa.VirtualBrownianTree(0, (0.0, 1.0), 0.5)}}, sa.InputError, "larger than dt"),
        ({"remake": {"brownian": sa.TabulatedPath(np.array([0.0, 1.0]), np.zeros((2, 1)))}}, sa.InputError, "columns"),
        ({"remake": {"key": 0.5}}, sa.InputError, "key"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_arguments(options, error, words):
    with pytest.raises(error, match=words):
        solved(**options)


def test_milstein_looks_at_g():
    """Diagonal noise whose entries mix, and a g that the AD cannot follow."""
    pytest.importorskip("autograd")
    with pytest.raises(sa.UnsupportedCombination, match="mixes entries"):
        solved(sa.Milstein(), remake={"g": lambda t, u, p: u[::-1] * u})
    with pytest.raises(sa.UnsupportedCombination, match="AD"):
        solved(sa.Milstein(), remake={"g": lambda t, u, p: np.array([float(u[0]), float(u[1])])})


def test_algorithms_for_sdes_refuse_odes():
    prob = sa.ODEProblem(lambda t, u, p: -u, np.ones(1), (0.0, 1.0))
    with pytest.raises(sa.UnsupportedCombination, match="cannot be undone"):
        sa.solve(prob, sa.Tsit5(), sensealg=sa.ReversibleHeunAdjoint())


def test_methods_for_sdes_refuse_odes():
    prob = sa.ODEProblem(lambda t, u, p: -u, np.ones(1), (0.0, 1.0))
    with pytest.raises(sa.UnsupportedCombination, match="stochastic"):
        sa.solve(prob, sa.EulerMaruyama(), dt=0.1)


def test_defaults_and_copies():
    assert replace(PROB).remake(key=3).key == 3
    assert sa.solve(PROB, dt=0.5).alg == sa.EulerMaruyama()
    assert sa.solve(PROB.remake(interpretation="stratonovich"), dt=0.5).alg == sa.StochasticHeun()
    one, same, other = (sa.solve(PROB.remake(key=k), dt=0.1).u for k in (1, 1, 2))
    assert np.all(one == same)
    assert not np.any(one == other)
    # A mesh of 2^-k steps sees the path at the same times as a finer one.
    u = [sa.solve(PROB.remake(f=lambda t, u, p: 0 * u, g=lambda t, u, p: 1 + 0 * u), dt=2.0**-k).u for k in (2, 5)]
    np.testing.assert_allclose(u[0], u[1], rtol=1e-13)
