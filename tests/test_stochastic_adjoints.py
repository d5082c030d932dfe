"""Continuous adjoints of stochastic problems: against closed forms along each path, on every backend, and refusals."""

import importlib
import math

import numpy as np
import pytest
from stochastic_problems import GOLD, answer, compare, nonlinear, setup

import sensitivity as sa

BOTH = [sa.InterpolatingAdjoint(), sa.BacksolveAdjoint()]
TREE = sa.VirtualBrownianTree(3, (0.0, 1.0), 2.0**-9)
MEMBERS = 300


# -- convergence to the derivative of the exact solution, path by path -------------------------------------------------


def geometric(interpretation, anp):
    """`X = x exp((mu - sigma^2 / 2) + sigma W)`, Ito; without `sigma^2 / 2`, Stratonovich."""
    del anp
    mu, sigma, x0 = 0.3, 0.6, 1.2
    ito = interpretation == "ito"
    p = {"mu": np.full(MEMBERS, mu), "sigma": np.full(MEMBERS, sigma)}
    prob = sa.SDEProblem(lambda t, u, p: p["mu"] * u, lambda t, u, p: p["sigma"] * u, np.full(MEMBERS, x0), (0.0, 1.0),
                         p, interpretation=interpretation, brownian=TREE)
    W = TREE(np.array([1.0]), MEMBERS)[0]
    X = x0 * np.exp(mu - 0.5 * sigma**2 * ito + sigma * W)
    return prob, X, {"u0": X / x0, "mu": X, "sigma": (W - sigma * ito) * X}


def arctangent(interpretation, anp):
    """`X = arctan(p W + tan x)`: g is curved, so the derivative of the correction matters."""
    p, x0 = 0.8, 0.3

    def f(t, u, q):
        return -(q["p"] ** 2) * anp.sin(u) * anp.cos(u) ** 3 if interpretation == "ito" else 0.0 * u

    prob = sa.SDEProblem(f, lambda t, u, q: q["p"] * anp.cos(u) ** 2, np.full(MEMBERS, x0), (0.0, 1.0),
                         {"p": np.full(MEMBERS, p)}, interpretation=interpretation, brownian=TREE)
    W = TREE(np.array([1.0]), MEMBERS)[0]
    slope = 1.0 / (1.0 + (p * W + np.tan(x0)) ** 2)
    return prob, np.arctan(p * W + np.tan(x0)), {"u0": slope / np.cos(x0) ** 2, "p": W * slope}


def errors(prob, X, exact, method, sensealg, levels, anp):
    """Root mean square over the paths of the error of each derivative of `X(1)^2 / 2`, for steps `2^-k`."""
    out = []
    for k in levels:
        r = sa.gradient(prob, method, lambda sol: 0.5 * anp.sum(sol.u[-1] ** 2), dt=2.0**-k, sensealg=sensealg)
        got = {"u0": r.u0, **r.p}
        out.append([math.sqrt(np.mean((got[name] - X * exact[name]) ** 2)) for name in exact])
    return np.array(out)


@pytest.mark.parametrize("sensealg", BOTH, ids=lambda a: a.name)
@pytest.mark.parametrize(("method", "order"), [(sa.EulerMaruyama(), 0.5), (sa.Milstein(), 1.0),
                                               (sa.StochasticHeun(), 1.0), (sa.ReversibleHeun(), 1.0)],
                         ids=lambda v: getattr(v, "name", str(v)))
@pytest.mark.parametrize("make", [geometric, arctangent])
def test_strong_order_of_the_gradient(make, method, order, sensealg):
    """Strong order of the solve in every derivative; three sizes and 300 paths leave 0.15 open."""
    anp = pytest.importorskip("autograd.numpy")
    prob, X, exact = make(method.interpretation, anp)
    levels = (4, 6, 8)
    every = errors(prob, X, exact, method, sensealg, levels, anp)
    for j in range(len(exact)):
        assert np.polyfit(levels, -np.log2(every[:, j]), 1)[0] > order - 0.15, list(exact)[j]


@pytest.mark.parametrize("sensealg", BOTH, ids=lambda a: a.name)
def test_without_the_correction_there_is_no_convergence(sensealg, monkeypatch):
    """What the Ito drift would give where the Stratonovich drift belongs: an error that does not shrink."""
    anp = pytest.importorskip("autograd.numpy")
    from dataclasses import replace

    from sensitivity.algorithms import pathwise

    prob, X, exact = arctangent("ito", anp)
    monkeypatch.setattr(pathwise, "stratonovich", lambda run: replace(run, field=replace(run.field, squares=False)))
    coarse, fine = errors(prob, X, exact, sa.Milstein(), sensealg, (5, 8), anp)
    assert np.all(fine > 0.8 * coarse)
    assert np.all(fine > 0.1 * math.sqrt(np.mean((X * exact["u0"]) ** 2)))


@pytest.mark.parametrize("interpretation", ["ito", "stratonovich"])
@pytest.mark.parametrize("sensealg", BOTH, ids=lambda a: a.name)
def test_general_noise_converges(torch_lab, interpretation, sensealg):
    """`X_i = x_i exp(a_i . W)` (less `|a_i|^2 / 2` for Ito) with two noises in both entries: 8 paths, root mean square;
    with 16 times as many steps the error is at least 1/3 (order 1/2 less what 8 paths leave open), or 1/8 (order 1)."""
    torch = torch_lab.xp
    a, x0 = np.array([[0.5, -0.3], [0.2, 0.4]]), np.array([1.0, 2.0])
    ito = interpretation == "ito"
    gaps = {2: [], 6: []}
    for key in range(8):
        path = sa.VirtualBrownianTree(key, (0.0, 1.0), 2.0**-6)
        prob = sa.SDEProblem(lambda t, u, p: 0.0 * u, lambda t, u, p: p * u[:, None], torch_lab.array(x0), (0.0, 1.0),
                             torch_lab.array(a), noise="general", interpretation=interpretation, brownian=path)
        W = path(np.array([1.0]), 2)[0]
        X = x0 * np.exp(a @ W - 0.5 * ito * np.sum(a**2, axis=1))
        exact = np.concatenate([X / x0, (X[:, None] * (W[None, :] - ito * a)).ravel()])
        for k, rows in gaps.items():
            r = sa.gradient(prob, sa.EulerMaruyama() if ito else sa.StochasticHeun(),
                            lambda sol: torch.sum(sol.u[-1]), dt=2.0**-k, sensealg=sensealg)
            rows.append(np.concatenate([torch_lab.numpy(r.u0), torch_lab.numpy(r.p).ravel()]) - exact)
    coarse, fine = (math.sqrt(np.mean(np.square(rows))) for rows in gaps.values())
    assert fine < (coarse / 3.0 if ito else coarse / 8.0)


@pytest.mark.parametrize("sensealg", BOTH, ids=lambda a: a.name)
@pytest.mark.parametrize("name", [k for k in GOLD if k.endswith("pathwise")])
def test_given_paths(numpy_lab, name, sensealg):
    """On a piecewise linear path both solves are of second order: the tolerance is that of the discrete gradient."""
    P = GOLD[name]
    ts = [float(v) for v in P["driver"]["t"]]
    W = np.array([[float(v) for v in P["driver"][f"W{i + 1}"]] for i in range(2 if "2d" in name else 1)]).T
    prob, initial, loss = setup(numpy_lab, P, ts, W, interpretation="stratonovich")
    r = sa.gradient(prob, sa.StochasticHeun(), loss, dt=2e-3, sensealg=sensealg,
                    saveat=np.array([float(v) for v in P["loss"]["save_at"]]))
    compare(P, r, initial, 2e-5)


# -- all backends, noises and outputs ----------------------------------------------------------------------------------

CASES = [("diagonal", "ito", "ts"), ("scalar", "ito", None), ("general", "ito", "steps"), ("additive", "ito", 4),
         ("diagonal", "stratonovich", "steps"), ("general", "stratonovich", "ts")]


def method_of(noise, interpretation):
    return (sa.ShARK() if noise == "additive" else
            sa.EulerMaruyama() if interpretation == "ito" else sa.StochasticHeun())


@pytest.mark.parametrize("sensealg", BOTH, ids=lambda a: a.name)
@pytest.mark.parametrize(("noise", "interpretation", "saves"), CASES, ids=lambda v: str(v))
def test_continuous_gradients_are_the_same_everywhere(lab, noise, interpretation, saves, sensealg):
    """To round-off on every backend; the numbers themselves are those that the tests above and below examine."""
    if importlib.util.find_spec("autograd") is None:
        pytest.skip("the vector field is written for autograd's NumPy")
    method = method_of(noise, interpretation)
    here = type(lab)("numpy")
    expected = answer(here, nonlinear(here, noise, interpretation), method, saves, sensealg, dt=0.15)
    np.testing.assert_allclose(answer(lab, nonlinear(lab, noise, interpretation), method, saves, sensealg, dt=0.15),
                               expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sensealg", BOTH, ids=lambda a: a.name)
@pytest.mark.parametrize(("noise", "interpretation", "saves"), CASES, ids=lambda v: str(v))
def test_continuous_tends_to_discrete(numpy_lab, noise, interpretation, saves, sensealg):
    """All parameters, noises and outputs of a nonlinear problem on one path: with 1/8 of the step the gap to the
    discrete gradient is about 8 times smaller for order 1, 2.8 times for order 1/2; one path leaves a factor 2 open."""
    prob = nonlinear(numpy_lab, noise, interpretation)
    prob = prob.remake(brownian=sa.VirtualBrownianTree(5, (0.0, 0.6), 0.6 / 64))
    method = method_of(noise, interpretation)
    gaps = []
    for steps in (8, 64):
        both = [answer(numpy_lab, prob, method, saves, a, dt=0.6 / steps)
                for a in (sensealg, sa.RecursiveCheckpointAdjoint())]
        if saves == "steps":
            both = [v / steps for v in both]
        gaps.append(np.linalg.norm(both[0] - both[1]))
    first = noise == "diagonal" and interpretation == "stratonovich"
    assert gaps[1] < gaps[0] / (4.0 if first else 1.4)


@pytest.mark.parametrize("sensealg", [sa.InterpolatingAdjoint(checkpoints=3),
                                      sa.InterpolatingAdjoint(checkpointing=True),
                                      sa.InterpolatingAdjoint(checkpoints="2kB")], ids=str)
@pytest.mark.parametrize("method", [sa.StochasticHeun(), sa.ReversibleHeun()], ids=lambda m: m.name)
def test_interpolating_within_a_budget(lab, method, sensealg):
    """Steps taken again see the same path: the same numbers."""
    prob = nonlinear(lab, "general", "stratonovich")
    full = answer(lab, prob, method, "ts", sa.InterpolatingAdjoint())
    np.testing.assert_allclose(answer(lab, prob, method, "ts", sensealg), full, rtol=1e-13)


@pytest.mark.parametrize("sensealg", [sa.RecursiveCheckpointAdjoint(checkpoints=2),
                                      sa.RecursiveCheckpointAdjoint(memory="2kB")], ids=str)
@pytest.mark.parametrize(("method", "noise", "saves"), [("EulerMaruyama", "general", "ts"),
                                                        ("Milstein", "diagonal", "steps"),
                                                        ("ReversibleHeun", "general", None),
                                                        ("ShARK", "additive", "ts")])
def test_discrete_gradient_within_a_budget(lab, method, noise, saves, sensealg):
    """Few states kept, the others found again on the same path: the exact gradient, to the last digits."""
    method = getattr(sa, method)()
    prob = nonlinear(lab, noise, method.interpretation)
    full = answer(lab, prob, method, saves, sa.RecursiveCheckpointAdjoint())
    np.testing.assert_allclose(answer(lab, prob, method, saves, sensealg), full, rtol=1e-13)


# -- the frameworks' own derivatives -----------------------------------------------------------------------------------


def field(xp):
    return (lambda t, u, p: xp.sin(p[0] * u)), (lambda t, u, p: p[1] * xp.cos(u))


@pytest.mark.parametrize("sensealg", BOTH, ids=lambda a: a.name)
def test_attached_to_torch(torch_lab, sensealg):
    torch = torch_lab.xp
    p = torch.tensor([0.5, 0.3], dtype=torch.float64, requires_grad=True)
    prob = sa.SDEProblem(*field(torch), torch.ones(2, dtype=torch.float64), (0.0, 1.0), p)
    sa.solve(prob, sa.EulerMaruyama(), dt=0.2, sensealg=sensealg).u.pow(2).sum().backward()
    r = sa.gradient(prob.remake(p=p.detach()), sa.EulerMaruyama(), lambda sol: (sol.u**2).sum(), dt=0.2,
                    sensealg=sensealg)
    torch.testing.assert_close(p.grad, r.p, rtol=1e-12, atol=0.0)


def test_attached_to_jax(jax_lab):
    """Reverse mode is that of the algorithm, forward mode goes through the steps."""
    import jax

    jnp = jax_lab.xp
    p, d = jnp.array([0.5, 0.3]), jnp.array([1.0, -2.0])
    prob = sa.SDEProblem(*field(jnp), jnp.ones(2), (0.0, 1.0), p)

    def loss(p, sensealg):
        return jnp.sum(sa.solve(prob.remake(p=p), sa.EulerMaruyama(), dt=0.25, sensealg=sensealg).u ** 2)

    sensealg = sa.BacksolveAdjoint()
    r = sa.gradient(prob, sa.EulerMaruyama(), lambda sol: jnp.sum(sol.u**2), dt=0.25, sensealg=sensealg)
    np.testing.assert_allclose(jax.grad(loss)(p, sensealg), r.p, rtol=1e-12)
    _, along = jax.jvp(lambda p: loss(p, sensealg), (p,), (d,))
    np.testing.assert_allclose(along, jnp.dot(jax.grad(loss)(p, sa.RecursiveCheckpointAdjoint()), d), rtol=1e-12)


def test_attached_to_autograd():
    anp = pytest.importorskip("autograd.numpy")
    from autograd import grad

    p = np.array([0.5, 0.3])
    prob = sa.SDEProblem(*field(anp), np.ones(2), (0.0, 1.0), p)
    for sensealg in BOTH:
        r = sa.gradient(prob, sa.EulerMaruyama(), lambda sol: anp.sum(sol.u**2), dt=0.2, sensealg=sensealg)
        got = grad(lambda p, a: anp.sum(sa.solve(prob.remake(p=p), sa.EulerMaruyama(), dt=0.2, sensealg=a).u ** 2))
        np.testing.assert_allclose(got(p, sensealg), r.p, rtol=1e-12)


def test_single_precision_of_continuous_adjoints(lab):
    """The gradient in float32 is that in float64 to the precision of the state."""
    got = []
    for dtype in ("float32", "float64"):
        prob = sa.SDEProblem(*field(lab.xp), lab.array([1.0, 0.5], dtype), (0.0, 1.0), lab.array([0.5, 0.3], dtype))
        for sensealg in BOTH[:1 if lab.name == "jax" else 2]:
            r = sa.gradient(prob, sa.EulerMaruyama(), lambda sol: (sol.u**2).sum(), dt=0.25, sensealg=sensealg)
            assert dtype in str(r.p.dtype)
            got.append(np.concatenate([lab.numpy(r.u0), lab.numpy(r.p)]).astype(float))
    half = len(got) // 2
    for a, b in zip(got[:half], got[half:], strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-6)


@pytest.mark.parametrize("vjp", [sa.ForwardVJP(), sa.FiniteDifferenceVJP()], ids=lambda v: v.name)
def test_products_of_continuous_adjoints(numpy_lab, vjp):
    """Every way to make the products gives the same gradient: to round-off, or what differences leave."""
    prob = nonlinear(numpy_lab, "diagonal", "ito")
    exact = answer(numpy_lab, prob, sa.EulerMaruyama(), "ts", sa.BacksolveAdjoint())
    got = answer(numpy_lab, prob, sa.EulerMaruyama(), "ts", sa.BacksolveAdjoint(vjp=vjp))
    np.testing.assert_allclose(got, exact, rtol=1e-6 if vjp == sa.FiniteDifferenceVJP() else 1e-11)


# -- what it costs, and when it fails ----------------------------------------------------------------------------------


def test_cost_and_mismatch(numpy_lab):
    """Two products a step; the states integrated backwards miss the stored ones by less with smaller steps."""
    prob = nonlinear(numpy_lab, "general", "stratonovich")
    prob = prob.remake(brownian=sa.VirtualBrownianTree(5, (0.0, 0.6), 0.6 / 64))

    def run(sensealg, steps):
        loss = {"loss": lambda sol: np.sum(sol.u), "dloss": lambda sol: np.ones_like(sol.u)}
        return sa.gradient(prob, sa.StochasticHeun(), dt=0.6 / steps, sensealg=sensealg, **loss).stats

    s = run(sa.InterpolatingAdjoint(), 8)
    assert (s.nfe, s.nvjp, s.mismatch) == (16, 16, None)
    s = run(sa.BacksolveAdjoint(), 8)
    assert (s.nfe, s.nvjp) == (16, 16)
    assert 1e-5 < run(sa.BacksolveAdjoint(), 64).drift < s.drift / 4.0 < 0.01
    assert s.mismatch == pytest.approx(2.0 * s.drift)
    once = run(sa.BacksolveAdjoint(checkpointing=False), 8).drift
    assert once > 1.5 * s.drift


def test_evaluations_of_the_backward_solve():
    """What the functions themselves count: AD runs them once for each product; one call of each finds what they close
    over, one of g its shape."""
    torch = pytest.importorskip("torch")
    calls = {"f": 0, "g": 0}

    def counted(name, value):
        def call(t, u, p):
            calls[name] += 1
            return value(t, u, p)

        return call

    f, g = (counted(k, v) for k, v in zip("fg", field(torch), strict=True))
    p = torch.tensor([0.5, 0.3], dtype=torch.float64)
    prob = sa.SDEProblem(f, g, torch.ones(2, dtype=torch.float64), (0.0, 1.0), p, interpretation="stratonovich")
    for sensealg in BOTH:
        calls.update(f=0, g=0)
        s = sa.gradient(prob, sa.StochasticHeun(), lambda sol: sol.u.sum(), dt=0.125, sensealg=sensealg,
                        probe="off").stats
        assert (calls["f"], calls["g"]) == (s.nfe + s.nvjp + 1, s.nfe + s.nvjp + 2) == (33, 34)


def test_backwards_into_nonsense():
    """What contracts forwards cannot be found again: an error, not a wrong gradient."""
    anp = pytest.importorskip("autograd.numpy")
    prob = sa.SDEProblem(lambda t, u, p: -p * u, lambda t, u, p: 0.2 * u, np.ones(2), (0.0, 4.0), np.array(8.0),
                         interpretation="stratonovich")
    lost = sa.BacksolveAdjoint(checkpointing=False)
    with pytest.raises(sa.UnstableSensealgError, match="misses the stored one"):
        sa.gradient(prob, sa.StochasticHeun(), lambda sol: anp.sum(sol.u), dt=0.1, sensealg=lost)
    kept, exact = (sa.gradient(prob, sa.StochasticHeun(), lambda sol: anp.sum(sol.u), dt=0.1, sensealg=a)
                   for a in (sa.InterpolatingAdjoint(), sa.RecursiveCheckpointAdjoint()))
    np.testing.assert_allclose(kept.u0, exact.u0, rtol=0.1)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sensealg", "options", "words"),
    [
        (sa.BacksolveAdjoint(checkpoints=[0.5]), {}, "stored at steps"),
        (sa.BacksolveAdjoint(checkpoints="saveat"), {}, "stored at steps"),
        (sa.BacksolveAdjoint(checkpoints="2MB"), {}, "stored at steps"),
        (sa.InterpolatingAdjoint(checkpoints="saveat"), {}, "stored at steps"),
        (sa.InterpolatingAdjoint(rtol=1e-8), {}, "rtol"),
        (sa.BacksolveAdjoint(atol=1e-8), {}, "atol"),
        (sa.BacksolveAdjoint(alg=sa.Tsit5()), {}, "Stratonovich"),
        (sa.InterpolatingAdjoint(alg=sa.EulerMaruyama()), {}, "Stratonovich"),
        (sa.InterpolatingAdjoint(), {"dense": True}, "dense=True"),
        (sa.BacksolveAdjoint(), {"wrt": "t1"}, "no derivative in time"),
        (sa.BacksolveAdjoint(), {"g": lambda t, u, p: u[::-1] * u}, "mixes entries"),
        (sa.InterpolatingAdjoint(vjp=sa.FiniteDifferenceVJP()),
         {"g": lambda t, u, p: np.array([float(u[0]), float(u[1])])}, "numpy AD fails"),
        (sa.BacksolveAdjoint(), {"brownian": sa.TabulatedPath(np.array([0.0, 1.0]), np.zeros((2, 2)))}, "no Ito integ"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refused_continuous_adjoints(sensealg, options, words):
    pytest.importorskip("autograd")
    options = dict(options)
    changes = {k: options.pop(k) for k in ("g", "brownian") if k in options}
    prob = sa.SDEProblem(lambda t, u, p: -p * u, lambda t, u, p: 0.1 * u, np.array([1.0, 2.0]), (0.0, 1.0),
                         np.array(0.5)).remake(**changes)
    with pytest.raises(sa.UnsupportedCombination, match=words):
        sa.gradient(prob, sa.EulerMaruyama(), lambda sol: sol.u.sum(), dloss=lambda sol: np.ones_like(sol.u), dt=0.1,
                    sensealg=sensealg, **options)


def test_a_path_with_a_point_for_every_step():
    """Ito on a table is allowed where the table has all the increments that the steps see."""
    anp = pytest.importorskip("autograd.numpy")
    ts = np.linspace(0.0, 1.0, 257)
    prob, X, exact = arctangent("ito", anp)
    prob = prob.remake(brownian=sa.TabulatedPath(ts, TREE(ts, MEMBERS)))
    (error,) = errors(prob, X, exact, sa.Milstein(), sa.BacksolveAdjoint(), (8,), anp)
    assert np.all(error < 0.02)
