"""Costs given by their derivatives and running costs, in every framework, with every algorithm.

Truth: closed forms of `u' = -k u` with `G = int (k u^2 + t u) dt + u(T)`, and of `u' = -k u + a cos(w t)` with
`G = int u dt`.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
ALGORITHMS = [sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(), sa.ForwardSensitivity(),
              sa.ForwardADSensitivity(), sa.DirectAdjoint()]
GOLD = {p["id"]: p for p in json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())["problems"]}
INTEGRAL = GOLD["ode_integral_cost"]
K, U0 = (float(INTEGRAL["params"][n]) for n in ("k", "u0"))
VALUE, DK, DU0 = float(INTEGRAL["value"]), *(float(INTEGRAL["gradient"][n]) for n in ("k", "u0"))


def limits(lab, sensealg):
    # JAX differentiates a loop of this many steps backwards.
    return {"max_steps": 128} if lab.name == "jax" and isinstance(sensealg, sa.DirectAdjoint) else {}


def decay(lab, **products):
    return sa.ODEProblem(lambda t, u, p: -p[0] * u, lab.array([U0]), (0.0, 2.0), lab.array([K]), **products)


def running(given=False):
    slopes = {"dgdu": lambda t, u, p: 2.0 * p[0] * u + t, "dgdp": lambda t, u, p: u**2} if given else {}
    return sa.ContinuousCost(lambda t, u, p: p[0] * u[0] ** 2 + t * u[0], **slopes)


def terminal(lab, g=True):
    value = {"g": lambda t, u, p: u[0]} if g else {}
    return sa.DiscreteCost(lab.array([2.0]), lambda t, u, p: 0.0 * u + 1.0, **value)


def close(lab, r, rtol=1e-8):
    np.testing.assert_allclose(lab.numpy(r.value), VALUE, rtol=rtol)
    np.testing.assert_allclose(lab.numpy(r.p), [DK], rtol=rtol)
    np.testing.assert_allclose(lab.numpy(r.u0), [DU0], rtol=rtol)


@pytest.mark.parametrize("sensealg", ALGORITHMS, ids=lambda s: s.name)
def test_running_and_terminal_cost(lab, sensealg):
    r = sa.adjoint_sensitivities(decay(lab), sa.Tsit5(), running() + terminal(lab), sensealg, **TIGHT,
                                 **limits(lab, sensealg))
    close(lab, r)
    np.testing.assert_allclose(lab.numpy(r.solution.u), [[U0 * np.exp(-2.0 * K)]], rtol=1e-9)
    np.testing.assert_allclose(lab.numpy(r.solution.t), [2.0])
    assert r.solution.prob.u0.shape == (1,)


def test_running_cost_beside_a_callable(lab):
    r = sa.gradient(decay(lab), sa.Tsit5(), (lambda sol: sol.u[-1, 0]) + running(), **TIGHT)
    close(lab, r)
    r = sa.gradient(decay(lab), sa.Tsit5(), running() + (lambda sol: sol.u[2, 0]), saveat=lab.array([0.5, 1.0, 2.0]),
                    **TIGHT)
    close(lab, r)
    np.testing.assert_allclose(lab.numpy(r.solution.t), [0.5, 1.0, 2.0])


def test_dloss_beside_a_running_cost(lab):
    def ones_at_the_end(sol):
        return lab.array([[0.0], [1.0]])

    r = sa.gradient(decay(lab), sa.Tsit5(), running() + (lambda sol: sol.u[1, 0]), saveat=lab.array([1.0, 2.0]),
                    dloss=ones_at_the_end, **TIGHT)
    close(lab, r)


@pytest.mark.parametrize("products", ["vjp", "vjp and jvp", "jac"])
@pytest.mark.parametrize("sensealg", ALGORITHMS[:4], ids=lambda s: s.name)
def test_without_any_ad(sensealg, products):
    """Everything by the user's derivatives: no warning of differences, and `math` keeps AD out."""
    import math

    def f(t, u, p):
        return np.array([-float(p[0]) * float(u[0])])

    given = {"vjp": {"vjp": lambda t, u, p, lam: (-p * lam, -u * lam)},
             "jac": {"jac": lambda t, u, p: -p[:, None], "paramjac": lambda t, u, p: -u[:, None]}}
    given["vjp and jvp"] = given["vjp"] | {"jvp": lambda t, u, p, du, dp: -p * du - u * dp}
    prob = sa.ODEProblem(f, np.array([U0]), (0.0, 2.0), np.array([K]), **given[products])
    cost = sa.ContinuousCost(lambda t, u, p: math.fsum([float(p[0]) * float(u[0]) ** 2, float(t) * float(u[0])]),
                             dgdu=lambda t, u, p: 2.0 * p[0] * u + t, dgdp=lambda t, u, p: u**2)
    end = sa.DiscreteCost([2.0], lambda t, u, p: np.ones(1), g=lambda t, u, p: float(u[0]))
    r = sa.adjoint_sensitivities(prob, sa.Tsit5(), cost + end, sensealg, **TIGHT)
    np.testing.assert_allclose([r.value, r.p[0], r.u0[0]], [VALUE, DK, DU0], rtol=1e-8)
    assert isinstance(r.sensealg.vjp, sa.UserVJP)


@pytest.mark.parametrize("sensealg", ALGORITHMS, ids=lambda s: s.name)
def test_times_with_a_running_cost(lab, sensealg):
    """G = int_{t0}^{t1} e^{-k (t - t0)} u0 dt + u(t1)^2 (the end moves with t1)."""
    prob = sa.ODEProblem(lambda t, u, p: -p[0] * u, lab.array([U0]), (0.3, 1.7), lab.array([K]))
    cost = sa.ContinuousCost(lambda t, u, p: (1.0 + t) * u[0])
    end = U0 * np.exp(-K * 1.4)
    r = sa.gradient(prob, sa.Tsit5(), cost + (lambda sol: sol.u[0, 0] ** 2), wrt=("t0", "t1", "u0"), sensealg=sensealg,
                    **TIGHT, **limits(lab, sensealg))
    # With s = t - t0: G = u0 int_0^L (1 + t0 + s) e^{-ks} ds + end^2.
    L, e = 1.4, np.exp(-K * 1.4)
    first, moment = (1.0 - e) / K, (1.0 - (1.0 + K * L) * e) / K**2
    by_length = (1.0 + 1.7) * end - 2.0 * K * end**2
    np.testing.assert_allclose(lab.numpy(r.value), U0 * (1.3 * first + moment) + end**2, rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.t1), by_length, rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.t0), U0 * first - by_length, rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.u0), [1.3 * first + moment + 2.0 * end * e], rtol=1e-8)


@pytest.mark.parametrize("sensealg", ALGORITHMS, ids=lambda s: s.name)
def test_times_with_costs_at_fixed_times(lab, sensealg):
    """A DiscreteCost stays where it is when the span moves; the running cost makes the end a row of its own."""
    prob = sa.ODEProblem(lambda t, u, p: -p[0] * u, lab.array([U0]), (0.3, 1.7), lab.array([K]))
    at = np.array([1.1, 0.6])
    cost = sa.ContinuousCost(lambda t, u, p: u[0]) + sa.DiscreteCost(at, lambda t, u, p: 2.0 * u,
                                                                     g=lambda t, u, p: u[0] ** 2)
    r = sa.gradient(prob, sa.Tsit5(), cost, wrt=("t0", "t1"), sensealg=sensealg, **TIGHT, **limits(lab, sensealg))
    u = U0 * np.exp(-K * (at - 0.3))
    end = U0 * np.exp(-K * 1.4)
    np.testing.assert_allclose(lab.numpy(r.t1), end, rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.t0), -end + 2.0 * K * (u**2).sum(), rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.solution.t), at)


@pytest.mark.parametrize("sensealg", ALGORITHMS, ids=lambda s: s.name)
def test_discrete_cost_equals_the_callable(lab, sensealg):
    """Unsorted and repeated times, both ends, data by index, a direct dependence on p."""
    prob = lab.lotka_volterra(2.0)
    at = np.array([2.0, 0.5, 0.0, 0.5, 1.25])
    data = lab.array(np.linspace(0.5, 1.5, 10).reshape(5, 2))
    options = {"rtol": 1e-7, "atol": 1e-9, "sensealg": sensealg, **limits(lab, sensealg)}

    def loss(sol):
        return ((sol.u - data) ** 2).sum() + (sol.t * sol.prob.p[1] ** 2).sum()

    def dgdp(t, u, p):
        return 2.0 * t * p * lab.array([0.0, 1.0, 0.0, 0.0])

    a = sa.gradient(prob, sa.Tsit5(), loss, saveat=lab.array(at), **options)
    cost = sa.DiscreteCost(at, lambda t, u, p, i: 2.0 * (u - data[i]), dgdp,
                           lambda t, u, p, i: ((u - data[i]) ** 2).sum() + t * p[1] ** 2)
    b = sa.adjoint_sensitivities(prob, sa.Tsit5(), cost, **options)
    for name in ("value", "u0", "p"):
        np.testing.assert_allclose(lab.numpy(getattr(a, name)), lab.numpy(getattr(b, name)), rtol=1e-12, atol=1e-13)
    assert a.solution.stats.nfe == b.solution.stats.nfe


def test_a_cost_differentiated_from_its_value(lab):
    prob = lab.lotka_volterra(2.0)
    at = np.array([0.5, 2.0])
    given = sa.DiscreteCost(at, lambda t, u, p: 2.0 * u, lambda t, u, p: 0.0 * p + t,
                            lambda t, u, p: (u**2).sum() + t * p.sum())
    derived = sa.DiscreteCost(at, None, g=given.g)
    a, b, both = (sa.gradient(prob, sa.Tsit5(), c) for c in (given, derived, given + derived))
    for name in ("value", "u0", "p"):
        x, y, z = (lab.numpy(getattr(r, name)) for r in (a, b, both))
        np.testing.assert_allclose(x, y, rtol=1e-12)
        np.testing.assert_allclose(2.0 * x, z, rtol=1e-12)


def test_without_a_value(lab):
    r = sa.adjoint_sensitivities(decay(lab), sa.Tsit5(), running() + terminal(lab, g=False), **TIGHT)
    assert r.value is None
    np.testing.assert_allclose(lab.numpy(r.p), [DK], rtol=1e-8)


def test_pytrees_and_tolerances_for_each_entry(lab):
    def f(t, u, p):
        return {"v": -p["k"] * u["x"], "x": u["v"]}

    u0 = {"x": lab.array([1.0, 2.0]), "v": lab.array([0.0, 0.0])}
    prob = sa.ODEProblem(f, u0, (0.0, 1.0), {"k": lab.array(4.0), "n": 3})
    cost = sa.ContinuousCost(lambda t, u, p: (u["x"] ** 2).sum() * p["k"])
    atol = {"x": lab.array([1e-11, 1e-11]), "v": lab.array([1e-10, 1e-10])}
    r = sa.gradient(prob, sa.Tsit5(), cost, rtol=1e-9, atol=atol)
    # x = x0 cos(w t), w = 2: int_0^1 x^2 = x0^2 (1/2 + sin(2w)/(4w)).
    w = 2.0
    part = 0.5 + np.sin(2 * w) / (4 * w)
    by_w = np.cos(2 * w) / (2 * w) - np.sin(2 * w) / (4 * w**2)
    np.testing.assert_allclose(lab.numpy(r.value), 4.0 * 5.0 * part, rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.p["k"]), 5.0 * (part + 4.0 * by_w / (2 * w)), rtol=1e-7)
    np.testing.assert_allclose(lab.numpy(r.u0["x"]), 8.0 * np.array([1.0, 2.0]) * part, rtol=1e-8)
    assert r.p["n"] == 3


def test_neither_part_dilutes_the_other(numpy_lab):
    """A large state that stands still must not loosen the tolerance of the integral."""
    def steps(n):
        prob = sa.ODEProblem(lambda t, u, p: 0.0 * u, np.ones(n), (0.0, 20.0),
                             vjp=lambda t, u, p, lam: (0.0 * lam, None))
        cost = sa.ContinuousCost(lambda t, u, p: np.cos(3.0 * t) * u[0], lambda t, u, p: 0.0 * u)
        return sa.gradient(prob, sa.Tsit5(), cost, rtol=1e-6, atol=1e-6).solution.stats.naccept

    assert steps(1000) == steps(1) > 50


def test_sum_starts_at_zero(lab):
    costs = [running(), terminal(lab)]
    close(lab, sa.gradient(decay(lab), sa.Tsit5(), sum(costs), **TIGHT))
    # Two integrands share one state.
    halves = sa.ContinuousCost(lambda t, u, p: p[0] * u[0] ** 2) + sa.ContinuousCost(lambda t, u, p: t * u[0])
    close(lab, sa.gradient(decay(lab), sa.Tsit5(), halves + terminal(lab), **TIGHT))


def test_work_is_counted(numpy_lab):
    """The integral costs one g beside each f, and its derivative one product with the pair."""
    calls = {"f": 0, "g": 0, "vjp": 0, "dgdu": 0}

    def count(name, function):
        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    prob = sa.ODEProblem(count("f", lambda t, u, p: -p * u), np.array([U0]), (0.0, 2.0), np.array([K]),
                         vjp=count("vjp", lambda t, u, p, lam: (-p * lam, -u * lam)))
    cost = sa.ContinuousCost(count("g", lambda t, u, p: u[0]), count("dgdu", lambda t, u, p: np.ones(1)))
    r = sa.gradient(prob, sa.Tsit5(), cost, probe="off")
    assert calls["f"] == calls["g"] == r.stats.nfe
    assert calls["vjp"] == calls["dgdu"] == r.stats.nvjp == 6 * r.stats.naccept


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: sa.DiscreteCost([1.0], None), sa.InputError, "dgdu"),
        (lambda: sa.DiscreteCost([1.0], 3.0), sa.InputError, "callable"),
        (lambda: sa.ContinuousCost(1.0), sa.InputError, "callable"),
        (lambda: sa.ContinuousCost(lambda t, u, p: u[0], None, lambda t, u, p: p), sa.InputError, "dgdp"),
        (lambda: sa.DiscreteCost([3.0], lambda t, u, p: u), sa.TimesError, r"at\[0\]=3 lies outside"),
        (lambda: sa.DiscreteCost(1.0, lambda t, u, p: u), sa.TimesError, "vector"),
        (lambda: sa.DiscreteCost("soon", lambda t, u, p: u), sa.TimesError, "times"),
        (lambda: sa.DiscreteCost([1.0], lambda t, u, p: u[0]), sa.InputError, "dgdu returned shapes"),
        (lambda: sa.DiscreteCost([1.0], lambda t, u, p: u, lambda t, u, p: (p, p)), sa.InputError, "dgdp returned"),
        (lambda: sa.DiscreteCost([1.0], lambda t, u, p: u, lambda t, u, p: p[0]), sa.InputError, "dgdp returned shape"),
        (lambda: sa.ContinuousCost(lambda t, u, p: u), sa.InputError, r"returned shape \(1,\)"),
        (lambda: sa.ContinuousCost(lambda t, u, p: None), sa.InputError, "NoneType"),
        (lambda: lambda sol: 0.0, sa.InputError, "gradient"),
    ],
)
def test_what_is_refused(make, error, words):
    prob = sa.ODEProblem(lambda t, u, p: -p * u, np.array([1.0]), (0.0, 2.0), np.array([0.5]))
    with pytest.raises(error, match=words):
        sa.adjoint_sensitivities(prob, sa.Tsit5(), make())


def test_what_does_not_go_together(lab):
    cost = running()
    with pytest.raises(sa.InputError, match="fixed numbers"):
        sa.gradient(decay(lab), sa.Tsit5(), cost, wrt="saveat")
    with pytest.raises(sa.InputError, match="steps"):
        sa.gradient(decay(lab), sa.Tsit5(), cost, saveat="steps")
    with pytest.raises(sa.InputError, match="callable loss"):
        sa.gradient(decay(lab), sa.Tsit5(), cost, dloss=lambda sol: sol.u)
    with pytest.raises(sa.UnsupportedCombination, match="complex"):
        sa.gradient(decay(lab).remake(u0=lab.array([1.0], "complex128")), sa.Tsit5(), cost)
    with pytest.raises(TypeError):
        cost + 3.0


@pytest.mark.parametrize("sensealg", [sa.RecursiveCheckpointAdjoint(), sa.ForwardADSensitivity()],
                         ids=lambda s: s.name)
def test_running_cost_over_an_event(lab, sensealg):
    """u' = -k u jumps up by 1 where it falls to c: G = (u0 - c) / k + (c + 1) (1 - e^{-k (T - t*)}) / k."""
    k, u0, c, T = 0.8, 1.5, 0.5, 2.0
    refill = sa.Event(lambda t, u, p: u[0] - c, lambda t, u, p: u + 1.0, direction=-1)
    prob = sa.ODEProblem(lambda t, u, p: -p * u, lab.array([u0]), (0.0, T), lab.array([k]))
    r = sa.gradient(prob, sa.Tsit5(), sa.ContinuousCost(lambda t, u, p: u[0]), sensealg=sensealg, events=refill,
                    wrt=("u0", "p", "t1"), **TIGHT, **({"max_steps": 64, "max_events": 4} if lab.name == "jax" else {}))
    at = np.log(u0 / c) / k
    e = np.exp(-k * (T - at))
    by_at = -(c + 1) * e
    by_k = -(u0 - c) / k**2 - (c + 1) * (1 - e) / k**2 + (c + 1) * (T - at) * e / k - by_at * at / k
    np.testing.assert_allclose(lab.numpy(r.value), (u0 - c) / k + (c + 1) * (1 - e) / k, rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.u0), [1 / k + by_at / (k * u0)], rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.p), [by_k], rtol=1e-8)
    np.testing.assert_allclose(lab.numpy(r.t1), (c + 1) * e, rtol=1e-8)
    assert r.solution.events.u.shape == (1, 1)


def test_a_terminal_event_is_no_place_for_other_rows(numpy_lab):
    stop = sa.Event(lambda t, u, p: u[0] - 0.5, terminal=True)
    r = sa.gradient(decay(numpy_lab), sa.Tsit5(), sa.ContinuousCost(lambda t, u, p: u[0]), events=stop, **TIGHT)
    np.testing.assert_allclose(r.value, (U0 - 0.5) / K, rtol=1e-8)
    np.testing.assert_allclose(r.p, [-(U0 - 0.5) / K**2], rtol=1e-8)
    with pytest.raises(sa.UnsupportedCombination, match="terminal"):
        sa.gradient(decay(numpy_lab), sa.Tsit5(), running() + terminal(numpy_lab), events=stop)


def test_float32(lab):
    prob = sa.ODEProblem(lambda t, u, p: -p[0] * u, lab.array([U0], "float32"), (0.0, 2.0), lab.array([K], "float32"))
    r = sa.gradient(prob, sa.Tsit5(), running() + terminal(lab), rtol=2e-5, atol=1e-6)
    assert r.p.dtype == prob.p.dtype
    close(lab, r, rtol=3e-5)


def test_a_module_as_field_and_in_the_cost():
    """Parameters that f and g share are differentiated once, through both."""
    torch = pytest.importorskip("torch")
    rate = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        rate.weight[:] = -K

    class Decay(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = rate

        def forward(self, t, u, p):
            return self.rate(u)

    prob = sa.ODEProblem(Decay(), torch.tensor([U0], dtype=torch.float64), (0.0, 2.0))
    cost = sa.ContinuousCost(lambda t, u, p: -rate(u)[0] * u[0] + t * u[0]) + (lambda sol: sol.u[0, 0])
    r = sa.gradient(prob, sa.Tsit5(), cost, wrt=("u0", "p"), **TIGHT)
    np.testing.assert_allclose(r.p[0].numpy(), [[-DK]], rtol=1e-8)
    np.testing.assert_allclose(r.u0.numpy(), [DU0], rtol=1e-8)


def test_an_integrand_that_leaves_the_ad_is_named():
    torch = pytest.importorskip("torch")
    prob = sa.ODEProblem(lambda t, u, p: -p * u, torch.tensor([U0], dtype=torch.float64), (0.0, 2.0),
                         torch.tensor([K], dtype=torch.float64))
    with pytest.raises(sa.BrokenGradientError, match=r"test_costs.py:\d+"):
        sa.gradient(prob, sa.Tsit5(), sa.ContinuousCost(lambda t, u, p: u[0].item() ** 2))


def test_under_jit_and_with_a_pytree_as_field():
    jax = pytest.importorskip("jax")

    @jax.tree_util.register_pytree_node_class
    class Decay:
        def __init__(self, k):
            self.k = k

        def __call__(self, t, u, p):
            return -self.k * u

        def tree_flatten(self):
            return (self.k,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    @jax.jit
    def gradient(k, t1):
        prob = sa.ODEProblem(Decay(k), jax.numpy.array([U0]), (0.0, t1))
        cost = sa.ContinuousCost(lambda t, u, p: u[0] * t1) + sa.DiscreteCost([1.0], lambda t, u, p: 2.0 * u)
        r = sa.gradient(prob, sa.Tsit5(), cost, wrt=("u0", "p", "t1"), max_steps=128, **TIGHT)
        return r.u0, r.p, r.t1

    u0, p, t1 = gradient(jax.numpy.array(K), 2.0)
    first = (1.0 - np.exp(-2.0 * K)) / K
    by_k = (-1.0 + (1.0 + 2.0 * K) * np.exp(-2.0 * K)) / K**2
    np.testing.assert_allclose(u0, [2.0 * first + 2.0 * U0 * np.exp(-2.0 * K)], rtol=1e-8)
    np.testing.assert_allclose(p[0], 2.0 * U0 * by_k - 2.0 * U0**2 * np.exp(-2.0 * K), rtol=1e-8)
    np.testing.assert_allclose(t1, 2.0 * U0 * np.exp(-2.0 * K), rtol=1e-8)
