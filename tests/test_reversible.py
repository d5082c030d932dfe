"""The reversible adjoint: exact for the solve it makes, in memory without the steps, and honest where it cannot be.

The reference is a second implementation of that solve, below: the reversible pair over a given mesh, written for
complex numbers, so that `Im G(x + i e d) / e` is its derivative without any subtraction (Squire, Trapp 1998). As in
`test_discrete`, nodes move with t0, the last step takes up the change of t1, and couplings are constants.
"""

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.methods import Method
from sensitivity.prepare import prepare
from sensitivity.reversible import STEEPNESS

GOLD = {p["id"]: p for p in json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())["problems"]}
E = 1e-100
U0, P, T0, T1 = np.array([1.0, 0.5, -0.25]), np.array([1.5, 0.7, 0.3]), 0.25, 2.0
ALL = ("u0", "p", "t0", "t1", "saveat")
TIMES = [1.3, 0.25, 2.0, 0.9, 1.3, 1.9999]
# The last step of the fixed mesh is a short one, so that its own role is seen.
FIXED = {"controller": sa.FixedStep(), "dt": 0.11}
ADAPTIVE = {"rtol": 1e-3, "atol": 1e-5}


@cache
def field(xp):
    """Nonlinear, with time in it, three states, three parameters; one function for all tests of a framework."""

    def f(t, u, p):
        x, y, z = u[0], u[1], u[2]
        return xp.stack([p[0] * y * z + xp.cos(p[1] * t), -p[2] * x * z - t * y * p[0], p[1] * x * y - z * z * p[2]])

    return f


class Mesh:
    """The reversible solve as a function of its inputs, with frozen steps and couplings."""

    def __init__(self, method, coupling, nodes, saves):
        self.form, self.nodes, self.saves = method.tableau(True), np.asarray(nodes), saves
        self.s = self.form.stages - self.form.fsal
        self.A = np.zeros((self.s, self.s))
        for i, row in enumerate(self.form.a[: self.s]):
            self.A[i, : len(row)] = row
        self.b, self.c = np.array(self.form.b[: self.s]), np.array(self.form.c[: self.s])
        self.coupling = coupling
        self.f = field(np)

    def increment(self, t, h, u, p):
        K = np.zeros((self.s, len(u)), dtype=complex)
        for i in range(self.s):
            K[i] = self.f(t + self.c[i] * h, u + h * (self.A[i] @ K), p)
        return h * (self.b @ K), K

    def __call__(self, u0, p, t0, t1, saveat):
        """Rows of `sol.u` for complex inputs; `nodes[0], nodes[-1]` are the real t0 and t1."""
        nodes = self.nodes
        d0, d1 = t0 - nodes[0], t1 - nodes[-1]
        sign = np.sign(nodes[-1] - nodes[0])
        times = None
        if isinstance(self.saves, int):
            times = [t0 + w * (t1 - t0) for w in np.linspace(0.0, 1.0, self.saves)]
        elif self.saves == "ts":
            times = list(saveat)
        rows, ends = {}, []
        y = z = np.asarray(u0, dtype=complex)
        for n in range(len(nodes) - 1):
            last = n == len(nodes) - 2
            step = nodes[n + 1] - nodes[n]
            ell = self.coupling or np.exp(-STEEPNESS * abs(step) / abs(nodes[-1] - nodes[0]))
            t, h = nodes[n] + d0, step + (d1 - d0 if last else 0.0)
            start = ell * y + (1.0 - ell) * z
            psi, K = self.increment(t, h, z, p)
            y = start + psi
            back, there = self.increment(t + h, -h, y, p)
            z = z - back
            if self.form.fsal:
                K = np.concatenate([K, there[:1]])
            for i, s in enumerate(times or ()):
                inside = sign * nodes[n] < sign * s.real <= sign * nodes[n + 1] or (n == 0 and s.real == nodes[0])
                if inside or (last and i not in rows):
                    x = (s - t) / h
                    b = [sum(d * x ** (k + 1) for k, d in enumerate(row)) for row in self.form.dense]
                    rows[i] = start + h * (np.array(b) @ K)
            ends.append(y)
        if self.saves == "steps":
            return np.stack(ends)
        return np.stack([rows[i] for i in range(len(times))]) if times else y[None, :]


def reference(method, coupling, nodes, saves, ts, weights):
    """Value and gradient of `sum(weights * u)` by complex steps: `(value, {name: gradient})`."""
    mesh = Mesh(method, coupling, nodes, saves)
    x = {"u0": U0.astype(complex), "p": P.astype(complex), "t0": complex(nodes[0]), "t1": complex(nodes[-1]),
         "saveat": None if ts is None else np.asarray(ts, dtype=complex)}

    def G(**changes):
        return np.sum(weights * mesh(**(x | changes)))

    grads = {}
    for name, value in x.items():
        if value is None:
            continue
        flat = np.atleast_1d(value)
        g = []
        for j in range(len(flat)):
            moved = flat.copy()
            moved[j] += 1j * E
            g.append(G(**{name: moved if np.ndim(value) else moved[0]}).imag / E)
        grads[name] = np.array(g) if np.ndim(value) else g[0]
    return G().real, grads


def case(lab, method, saves, options, tspan=(T0, T1), sensealg=None):
    """Problem, options, names, reference weights, and the reference answer."""
    sensealg = sensealg or sa.ReversibleAdjoint()
    prob = sa.ODEProblem(field(lab.xp), lab.array(U0), tuple(lab.array(t) for t in tspan), lab.array(P))
    ts = TIMES if saves == "ts" else None
    steps = sa.solve(prob, method, saveat="steps", sensealg=sensealg, **options)
    nodes = [tspan[0], *lab.numpy(steps.t).tolist()]
    count = len(TIMES) if saves == "ts" else 1 if saves is None else len(nodes) - 1 if saves == "steps" else saves
    weights = np.cos(np.arange(1.0, 1.0 + 3 * count)).reshape(count, 3)
    coupling = None if sensealg.coupling is sa.auto else sensealg.coupling
    want = reference(method, coupling, nodes, saves, ts, weights)
    saveat = lab.array(TIMES) if saves == "ts" else saves
    return prob, {"saveat": saveat, **options}, ALL if saves == "ts" else ALL[:-1], weights, want


def agree(lab, r, names, want, tol):
    value, grads = want
    assert float(r.value) == pytest.approx(value, rel=max(1e-12, tol))
    for name in names:
        np.testing.assert_allclose(lab.numpy(getattr(r, name)), grads[name], rtol=tol,
                                   atol=tol * np.max(np.abs(grads["p"])), err_msg=name)


def loss_of(lab, weights):
    w = lab.array(weights)
    return lambda sol: lab.xp.sum(w * sol.u)


# -- exact for the solve that is made -----------------------------------------------------------------------------


@pytest.mark.parametrize("tspan", [(T0, T1), (T1, T0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("saves", [None, "ts", 4, "steps"], ids=str)
@pytest.mark.parametrize("method", ["Euler", "Heun", "Midpoint", "EES25", "EES27", "RK4", "BS3", "Dopri5", "Tsit5",
                                    "Dopri8"])
def test_fixed_steps(numpy_lab, method, saves, tspan):
    method = getattr(sa, method)()
    prob, options, names, weights, want = case(numpy_lab, method, saves, FIXED, tspan)
    r = sa.gradient(prob, method, loss_of(numpy_lab, weights), wrt=names, sensealg=sa.ReversibleAdjoint(), **options)
    agree(numpy_lab, r, names, want, 1e-11)


@pytest.mark.parametrize("saves", [None, "ts", 4, "steps"], ids=str)
@pytest.mark.parametrize(("method", "tspan"), [("Heun", (T0, T1)), ("EES25", (T0, T1)), ("BS3", (T0, T1)),
                                               ("Tsit5", (T0, T1)), ("Tsit5", (T1, T0)), ("Dopri8", (T1, T0))])
def test_adaptive_steps(numpy_lab, method, saves, tspan):
    method = getattr(sa, method)()
    prob, options, names, weights, want = case(numpy_lab, method, saves, ADAPTIVE, tspan)
    r = sa.gradient(prob, method, loss_of(numpy_lab, weights), wrt=names, sensealg=sa.ReversibleAdjoint(), **options)
    agree(numpy_lab, r, names, want, 1e-11)


@pytest.mark.parametrize("sensealg", [sa.ReversibleAdjoint(0.9), sa.ReversibleAdjoint(1.0),
                                      sa.ReversibleAdjoint(checkpoint_every=2), sa.ReversibleAdjoint(0.99, 3)], ids=str)
@pytest.mark.parametrize("saves", [None, "ts", "steps"], ids=str)
def test_couplings_and_checkpoints(numpy_lab, saves, sensealg):
    method = sa.Tsit5()
    prob, options, names, weights, want = case(numpy_lab, method, saves, FIXED, sensealg=sensealg)
    r = sa.gradient(prob, method, loss_of(numpy_lab, weights), wrt=names, sensealg=sensealg, **options)
    agree(numpy_lab, r, names, want, 1e-11)


@pytest.mark.parametrize("saves", [None, "ts", 4, "steps"], ids=str)
@pytest.mark.parametrize(("method", "options"), [("Tsit5", ADAPTIVE), ("Heun", FIXED)], ids=["Tsit5", "Heun"])
def test_in_every_framework(lab, method, options, saves):
    method = getattr(sa, method)()
    prob, options, names, weights, want = case(lab, method, saves, options)
    r = sa.gradient(prob, method, loss_of(lab, weights), wrt=names, sensealg=sa.ReversibleAdjoint(), **options)
    # With saveat="steps" the outputs move with the mesh, and two adaptive solves place their steps apart by round-off.
    agree(lab, r, names, want, 1e-9 if saves == "steps" and "dt" not in options else 1e-11)


@pytest.mark.parametrize("name", ["disc_lv_mf_euler", "disc_lv_mf_heun"])
def test_reference_values(lab, name):
    """The constant coupling of McCallum and Foster, against 38 digits."""
    G = GOLD[name]
    xp = lab.xp
    rhs, start, cost = eval(G["code"]["rhs"]), eval(G["code"]["u0"]), eval(G["loss"]["code"])
    initial = start({k: k for k in G["params"]}, None)
    p = {k: lab.array(float(v)) for k, v in G["params"].items() if k not in initial}
    u0 = lab.array([float(G["params"][k]) for k in initial])
    prob = sa.ODEProblem(lambda t, u, p: xp.stack(rhs(t, u, p, xp)), u0, tuple(map(float, G["tspan"])), p)
    r = sa.gradient(prob, {"euler": sa.Euler(), "heun": sa.Heun()}[G["code"]["base"]],
                    lambda sol: cost([sol.u[0, :]], p, xp), controller=sa.FixedStep(), dt=float(G["code"]["dt"]),
                    sensealg=sa.ReversibleAdjoint(coupling=float(G["code"]["coupling"])))
    assert float(r.value) == pytest.approx(float(G["value"]), rel=1e-12)
    got = {k: float(v) for k, v in r.p.items()} | dict(zip(initial, map(float, r.u0), strict=True))
    for k, v in G["gradient"].items():
        assert got[k] == pytest.approx(float(v), rel=1e-12), k


@pytest.mark.parametrize("vjp", [sa.ForwardVJP(), sa.ComplexStepVJP(), sa.FiniteDifferenceVJP()], ids=lambda v: v.name)
def test_every_product(numpy_lab, vjp):
    prob, options, names, weights, want = case(numpy_lab, sa.Heun(), "ts", FIXED)
    r = sa.gradient(prob, sa.Heun(), loss_of(numpy_lab, weights), wrt=names, sensealg=sa.ReversibleAdjoint(vjp=vjp),
                    **options)
    agree(numpy_lab, r, names, want, 1e-7 if isinstance(vjp, sa.FiniteDifferenceVJP) else 1e-11)


@pytest.mark.parametrize("saves", [None, "ts", "steps"], ids=str)
@pytest.mark.parametrize("method", ["Heun", "Tsit5"])
def test_solving_alone_is_the_same_solution(lab, method, saves):
    """`plain` and `forward` make one solution, to the last bit where the same program runs."""
    method = getattr(sa, method)()
    prob = sa.ODEProblem(field(lab.xp), lab.array(U0), (T0, T1), lab.array(P))
    saveat = lab.array(TIMES) if saves == "ts" else saves
    alone = sa.solve(prob, method, saveat=saveat, sensealg=sa.ReversibleAdjoint(), **FIXED)
    r = sa.gradient(prob, method, lambda sol: lab.xp.sum(sol.u), saveat=saveat, sensealg=sa.ReversibleAdjoint(),
                    **FIXED)
    tol = 1e-14 if lab.name == "jax" else 0.0
    np.testing.assert_allclose(lab.numpy(alone.u), lab.numpy(r.solution.u), rtol=tol, atol=tol)
    plain = sa.solve(prob, method, saveat=saveat, **FIXED)
    assert np.max(np.abs(lab.numpy(plain.u) - lab.numpy(alone.u))) > 1e-13


def test_order_of_the_pair(numpy_lab):
    """The pair keeps the order of its base method, at the end and inside the steps."""
    prob = numpy_lab.lotka_volterra(2.0)
    ts = np.array([0.337, 1.111, 2.0])
    true = sa.solve(prob, sa.Dopri8(), saveat=ts, rtol=1e-12, atol=1e-13).u
    for method, order in ((sa.Heun(), 2), (sa.BS3(), 3), (sa.RK4(), 4), (sa.Tsit5(), 5)):
        errors = [np.max(np.abs(sa.solve(prob, method, saveat=ts, dt=2.0 / n, controller=sa.FixedStep(),
                                         sensealg=sa.ReversibleAdjoint()).u - true)) for n in (40, 80)]
        # The leading error of Tsit5 is so small that it shows the order of the next one here.
        assert order - 0.25 < np.log2(errors[0] / errors[1]) < order + 1.2, method


# -- through the frameworks' own AD -------------------------------------------------------------------------------


def weighted(sol_u, weights, xp):
    return xp.sum(sol_u * weights)


def test_jax_transforms():
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    f, ts = field(jnp), jnp.array([0.5, 1.1, T1])
    w = jnp.cos(jnp.arange(9.0)).reshape(3, 3)

    def loss(u0, p, sensealg=sa.ReversibleAdjoint()):  # noqa: B008
        return weighted(sa.solve(sa.ODEProblem(f, u0, (T0, T1), p), sa.Heun(), saveat=ts, dt=0.05,
                                 controller=sa.FixedStep(), sensealg=sensealg).u, w, jnp)

    u0, p = jnp.array(U0), jnp.array(P)
    _, g = jax.jit(jax.value_and_grad(loss, (0, 1)))(u0, p)
    d = (jnp.array([0.3, -0.2, 0.1]), jnp.array([-1.0, 0.5, 0.25]))
    along = jax.jvp(loss, (u0, p), d)[1]
    assert float(along) == pytest.approx(float(g[0] @ d[0] + g[1] @ d[1]), rel=1e-11)
    e = 1e-5
    plus, minus = (loss(u0 + s * d[0], p + s * d[1]) for s in (e, -e))
    assert float(along) == pytest.approx(float(plus - minus) / (2 * e), rel=1e-7)
    # Lanes that take steps of different number: adaptive, one gradient each.
    def adaptive(u0):
        prob = sa.ODEProblem(f, u0, (T0, T1), p)
        return weighted(sa.solve(prob, sa.BS3(), saveat=ts, rtol=1e-4, atol=1e-6,
                                 sensealg=sa.ReversibleAdjoint(checkpoint_every=4)).u, w, jnp)

    many = jnp.stack([u0, 3.0 * u0, -0.5 * u0])
    one = jax.jit(jax.value_and_grad(adaptive))
    together = jax.jit(jax.vmap(jax.value_and_grad(adaptive)))(many)
    for i in range(3):
        alone = one(many[i])
        assert float(together[0][i]) == pytest.approx(float(alone[0]), rel=1e-11)
        np.testing.assert_allclose(together[1][i], alone[1], rtol=1e-9, atol=1e-10)
    # Forward over reverse: the derivative of the reverse pass along d.
    h = jax.jvp(jax.grad(loss, 1), (u0, p), (jnp.zeros(3), d[1]))[1]
    differences = (jax.grad(loss, 1)(u0, p + e * d[1]) - jax.grad(loss, 1)(u0, p - e * d[1])) / (2 * e)
    np.testing.assert_allclose(h, differences, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_torch_autograd():
    torch = pytest.importorskip("torch")
    w = torch.cos(torch.arange(9.0, dtype=torch.float64)).reshape(3, 3)
    ts = torch.tensor([0.5, 1.1, T1], dtype=torch.float64)

    def loss(u0, p):
        return (sa.solve(sa.ODEProblem(field(torch), u0, (T0, T1), p), sa.Heun(), saveat=ts, dt=0.05,
                         controller=sa.FixedStep(), sensealg=sa.ReversibleAdjoint()).u * w).sum()

    u0, p = (torch.tensor(x, requires_grad=True) for x in (U0, P))
    loss(u0, p).backward()
    d = (torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), torch.tensor([-1.0, 0.5, 0.25], dtype=torch.float64))
    along = torch.func.jvp(loss, (u0.detach(), p.detach()), d)[1]
    assert along.item() == pytest.approx((u0.grad @ d[0] + p.grad @ d[1]).item(), rel=1e-11)
    with torch.no_grad():
        plus, minus = (loss(u0 + s * d[0], p + s * d[1]) for s in (1e-5, -1e-5))
    assert along.item() == pytest.approx((plus - minus).item() / 2e-5, rel=1e-7)


def test_autograd():
    autograd = pytest.importorskip("autograd")
    import autograd.numpy as anp

    def loss(p):
        return anp.sum(sa.solve(sa.ODEProblem(field(anp), U0, (T0, T1), p), sa.Heun(), saveat=np.array([1.0, T1]),
                                sensealg=sa.ReversibleAdjoint(), **FIXED).u)

    g = autograd.grad(loss)(P)
    for i, unit in enumerate(np.eye(3)):
        assert (loss(P + 1e-5 * unit) - loss(P - 1e-5 * unit)) / 2e-5 == pytest.approx(g[i], rel=1e-7)


@pytest.mark.parametrize("saves", [None, "ts", 4, "steps"], ids=str)
def test_tangents_are_the_transpose(lab, saves):
    """`<reverse(ct), d> == <ct, tangent(d)>`, times included."""
    from sensitivity.algorithms.base import Outputs, Tangents
    from sensitivity.choose import choose

    xp = lab.xp
    method, saveat = sa.Heun(), lab.array(TIMES) if saves == "ts" else saves
    prob = sa.ODEProblem(field(xp), lab.array(U0), (lab.array(T0), lab.array(T1)), lab.array(P))
    run, x = prepare(prob, method, saveat=saveat, **FIXED)
    algorithm, run = choose(run, x, sa.ReversibleAdjoint())
    wanted = frozenset({"u0", "theta", "t0", "t1"} | ({"saveat"} if saves == "ts" else set()))
    out, _, residuals = lab.be.run(algorithm, "forward", run, (x,), wanted)
    weights = np.cos(np.arange(lab.numpy(out.u).size)).reshape(lab.numpy(out.u).shape)
    bar = lab.be.run(algorithm, "reverse", run, (residuals, Outputs(lab.array(weights), None, None)), wanted)
    rng = np.random.default_rng(0)
    du0, dp, dt0, dt1 = rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), rng.normal(size=2), rng.normal(size=2)
    ds = rng.normal(size=(2, len(TIMES)))
    d = Tangents(lab.array(du0), (lab.array(dp),), lab.array(dt0), lab.array(dt1),
                 lab.array(ds) if saves == "ts" else None)
    with lab.be.quiet():
        du = lab.numpy(algorithm.tangent(run, residuals, d))
    for i in range(2):
        left = (lab.numpy(bar.u0) @ du0[i] + lab.numpy(bar.theta[0]) @ dp[i] + float(bar.t0) * dt0[i]
                + float(bar.t1) * dt1[i])
        if saves == "ts":
            left += np.asarray([float(t) for t in bar.saveat]) @ ds[i]
        assert np.sum(weights * du[i]) == pytest.approx(left, rel=1e-10)


# -- how much work, how much memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("saves", [None, "ts", "steps"], ids=str)
@pytest.mark.parametrize("method", ["Heun", "EES27", "Tsit5"])
def test_work_is_counted(numpy_lab, method, saves, options):
    """2 s evaluations an attempted step forwards, 2 s evaluations with their products an accepted one in reverse."""
    method = getattr(sa, method)()
    calls, f = [], field(numpy_lab.xp)

    def counted(t, u, p):
        calls.append(t)
        return f(t, u, p)

    prob = sa.ODEProblem(counted, U0, (T0, T1), P)
    run, x = prepare(prob, method, saveat=np.array(TIMES) if saves == "ts" else saves, **options)
    run = replace(run, vjp=sa.ReverseVJP())
    algorithm, be = sa.ReversibleAdjoint(), run.be
    every = frozenset({"u0", "theta", "t0", "t1", "saveat"})
    calls.clear()
    out, aux, residuals = algorithm.forward(run, x, every)
    s = method.base.stages - method.base.fsal
    assert len(calls) == aux.nfe == 2 * s * (aux.accepted + aux.rejected) + (0 if "dt" in options else 2)
    calls.clear()
    bar = algorithm.reverse(run, residuals, out._replace(u=np.ones_like(out.u)), every)
    assert len(calls) == bar.nvjp == 2 * s * aux.accepted
    assert bar.nfe == 0
    # Choices that make no value on the way need one evaluation more for each product.
    bar = algorithm.reverse(replace(run, vjp=sa.ForwardVJP()), residuals, out._replace(u=np.ones_like(out.u)), every)
    assert bar.nfe == bar.nvjp == 2 * s * aux.accepted
    assert be.name == "numpy"


def peak(steps, saveat):
    prob = sa.ODEProblem(lambda t, u, p: -p * u, np.ones(4000), (0.0, 1.0), np.full(4000, 0.5),
                         vjp=lambda t, u, p, lam: (-p * lam, -u * lam))

    def run():
        return sa.gradient(prob, sa.Heun(), lambda sol: float(sol.u.sum()), dloss=lambda sol: np.ones_like(sol.u),
                           dt=1.0 / steps, controller=sa.FixedStep(), saveat=saveat, sensealg=sa.ReversibleAdjoint())

    run()
    tracemalloc.start()
    run()
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size


@pytest.mark.parametrize("saveat", [None, [0.25, 0.5, 1.0]], ids=["end", "times"])
def test_memory_does_not_grow_with_the_steps(saveat):
    saveat = None if saveat is None else np.array(saveat)
    few, many = peak(50, saveat), peak(450, saveat)
    # Two numbers and a little bookkeeping a step; one state alone has 32000 bytes.
    assert many - few < 400 * 600


def test_compiled_memory_does_not_grow_with_the_steps():
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    ts = jnp.array([0.25, 0.5, 1.0])

    def temporary(steps):
        def loss(p):
            prob = sa.ODEProblem(lambda t, u, p: -p * u, jnp.ones(4000), (0.0, 1.0), p)
            return sa.solve(prob, sa.Heun(), dt=1.0 / steps, controller=sa.FixedStep(), saveat=ts,
                            sensealg=sa.ReversibleAdjoint()).u.sum()

        compiled = jax.jit(jax.grad(loss)).lower(jnp.full(4000, 0.5)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(50), temporary(450)
    # Time, size and a flag: 17 bytes a step.
    assert many - few <= 400 * 32


RESIDENT = """
from pathlib import Path
import torch
import sensitivity as sa

def gradient(steps, sensealg):
    prob = sa.ODEProblem(lambda t, u, p: -p * u, torch.ones(20_000, dtype=torch.float64), (0.0, 1.0),
                         torch.full((20_000,), 0.5, dtype=torch.float64))
    sa.gradient(prob, sa.Heun(), lambda sol: sol.u.sum(), dt=1.0 / steps, controller=sa.FixedStep(), sensealg=sensealg)

def peak():
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

undone, kept, sizes = sa.ReversibleAdjoint(), sa.RecursiveCheckpointAdjoint(), []
for steps, sensealg in ((10, kept), (10, undone), (50, undone), (450, undone), (450, kept)):
    gradient(steps, sensealg)
    sizes.append(peak())
print(sizes[3] - sizes[2], sizes[4] - sizes[3])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of resident memory is read from /proc")
def test_resident_memory_of_torch_does_not_grow_with_the_steps(torch_lab):
    """400 more states are 61 MiB, and the stages of a solve that keeps them more than twice that."""
    out = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    reversible, kept = map(float, out.stdout.split())
    assert reversible < 8 < 122 < kept


# -- where it ends ------------------------------------------------------------------------------------------------


def decaying(k, **changes):
    return sa.ODEProblem(lambda t, u, p: -p * u, np.array([1.0]), (0.0, 5.0), np.array([k]), **changes)


INSTABILITY = GOLD["disc_mf_dissipative_instability"]["value"]


@pytest.mark.parametrize("key", sorted(INSTABILITY))
def test_contracting_problems(key):
    """Stable for about `h k <= 1 - l`; else the solve is given up as soon as the two solutions come apart."""
    k, ell = (float(part.split("=")[1]) for part in key.split(","))

    def solve(on_failure="raise"):
        return sa.solve(decaying(k), sa.RK4(), dt=0.025, sensealg=sa.ReversibleAdjoint(ell), on_failure=on_failure)

    true, known = np.exp(-5 * k), float(INSTABILITY[key])
    if abs(known - true) < 0.01 * true:
        # Six digits of the true value, which round-off limits where it is small itself.
        assert solve().u[0, 0] == pytest.approx(known, rel=1e-6)
        return
    with pytest.raises(sa.SolveError, match="came apart") as e:
        solve()
    assert e.value.retcode == sa.RetCode.Unstable
    assert "RecursiveCheckpointAdjoint" in str(e.value)
    assert np.isnan(solve("nan").u).all()


def test_coming_apart_with_controlled_steps():
    with pytest.raises(sa.SolveError, match="came apart"):
        sa.solve(decaying(20.0), sa.Tsit5(), rtol=1e-6, atol=1e-9, sensealg=sa.ReversibleAdjoint(0.999))


def contracting(**changes):
    """Contracts along one direction at the rate 4, so that undoing it multiplies round-off by e^20 and more."""
    f = lambda t, u, p: np.stack([-p[0] * u[0], np.cos(t) - 0.0 * u[1]])  # noqa: E731
    vjp = lambda t, u, p, lam: (np.array([-p[0] * lam[0], 0.0]), np.array([-u[0] * lam[0]]))  # noqa: E731
    return sa.ODEProblem(f, np.array([1.0, 1.0]), (0.0, 5.0), np.array([4.0]), vjp=vjp, **changes)


def of_contracting(sensealg, dt=0.025):
    return sa.gradient(contracting(), sa.RK4(), lambda sol: float(sol.u.sum()), dloss=lambda sol: np.ones_like(sol.u),
                       saveat=np.array([1.0, 5.0]), dt=dt, sensealg=sensealg)


def test_undoing_what_has_contracted():
    """A strong coupling keeps the solve stable and costs the digits in reverse: a warning, an error, or checkpoints."""
    with pytest.raises(sa.SolveError, match="could not be undone") as e:
        of_contracting(sa.ReversibleAdjoint(0.8))
    assert "checkpoint_every" in str(e.value)
    r = of_contracting(sa.ReversibleAdjoint(0.8, checkpoint_every=20))
    # u = exp(-p t) at t = 1 and 5; the solve itself is exact to 1e-7.
    assert float(r.p[0]) == pytest.approx(-np.exp(-4.0) - 5.0 * np.exp(-20.0), rel=1e-5)
    stored = of_contracting(sa.ReversibleAdjoint(0.8, checkpoint_every=1))
    assert float(r.p[0]) == pytest.approx(float(stored.p[0]), rel=1e-10)


def test_a_warning_where_digits_are_lost():
    with pytest.warns(sa.ReconstructionWarning, match="misses u0"):
        of_contracting(sa.ReversibleAdjoint(0.86))


def test_nan_where_nothing_can_be_raised():
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    def loss(p, sensealg):
        f = lambda t, u, p: jnp.stack([-p * u[0], jnp.cos(t) + 0.0 * u[1]])  # noqa: E731
        prob = sa.ODEProblem(f, jnp.ones(2), (0.0, 5.0), p)
        return sa.solve(prob, sa.RK4(), dt=0.025, sensealg=sensealg).u.sum()

    g = jax.jit(jax.grad(loss), static_argnums=1)
    assert np.isnan(g(jnp.array(4.0), sa.ReversibleAdjoint(0.8)))
    assert float(g(jnp.array(4.0), sa.ReversibleAdjoint(0.8, 20))) == pytest.approx(-5.0 * np.exp(-20.0), rel=1e-4)


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [0.0, -0.5, 1.5, np.nan, "auto", None, True])
def test_couplings_that_are_refused(coupling):
    with pytest.raises(sa.InputError, match="coupling"):
        sa.ReversibleAdjoint(coupling)


@pytest.mark.parametrize("every", [0, -1, 2.5, "10", True])
def test_checkpoints_that_are_refused(every):
    with pytest.raises(sa.InputError, match="checkpoint_every"):
        sa.ReversibleAdjoint(checkpoint_every=every)


class Implicit(Method):
    """Stands for any method that is no explicit Runge-Kutta method."""

    adaptive = True


def test_what_it_does_not_go_with(numpy_lab):
    prob = sa.ODEProblem(field(numpy_lab.xp), U0, (T0, T1), P)
    with pytest.raises(sa.UnsupportedCombination, match="RecursiveCheckpointAdjoint"):
        sa.solve(prob, sa.Tsit5(), dense=True, sensealg=sa.ReversibleAdjoint())
    run, _ = prepare(prob, sa.Tsit5())
    for changed, cause in ((replace(run, method=Implicit()), "explicit Runge-Kutta"), (replace(run, kind=1), "kind")):
        with pytest.raises(sa.UnsupportedCombination, match=cause) as e:
            sa.ReversibleAdjoint().refuse(changed)
        assert "RecursiveCheckpointAdjoint" in str(e.value)
    for events in (sa.Event(lambda t, u, p: u[0] - 0.5), sa.PresetTimes([0.5], lambda t, u, p: 2.0 * u)):
        with pytest.raises(sa.UnsupportedCombination, match="events") as e:
            sa.solve(prob, sa.Tsit5(), events=events, sensealg=sa.ReversibleAdjoint())
        assert "RecursiveCheckpointAdjoint" in str(e.value)
    with pytest.raises(sa.UnsupportedCombination):
        sa.solve(prob.remake(mass_matrix=np.diag([1.0, 1.0, 0.0])), sa.Tsit5(), sensealg=sa.ReversibleAdjoint())


# -- effectively symmetric methods --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "slope"), [("EES25", 6), ("EES27", 8)])
def test_a_step_and_the_step_back(name, slope):
    """`Phi_{-h} Phi_h` is the identity up to h^6 and h^8; extended precision, since both soon sink below round-off."""
    tab = getattr(sa, name).base
    quad = np.longdouble

    def phi(u, h):
        K = []
        for row in tab.a:
            v = u + h * sum((quad(a) * k for a, k in zip(row, K, strict=True)), np.zeros(2, quad))
            K.append(np.array([1.5 * v[0] - v[0] * v[1], v[0] * v[1] - 3.0 * v[1]]))
        return u + h * sum(quad(b) * k for b, k in zip(tab.b, K, strict=True))

    u = np.array([1.3, 0.7], quad)
    defects = [float(np.max(np.abs(phi(phi(u, quad(h)), quad(-h)) - u))) for h in (0.06, 0.03)]
    assert np.log2(defects[0] / defects[1]) == pytest.approx(slope, abs=0.25)


@pytest.mark.parametrize(("name", "end"), [("EES25", 3.09), ("EES27", 3.92)])
def test_real_stability_interval(name, end):
    tab = getattr(sa, name).base
    A = np.zeros((tab.stages, tab.stages))
    for i, row in enumerate(tab.a):
        A[i, : len(row)] = row
    x = np.linspace(0.0, 5.0, 5001)
    R = [1.0 - z * np.array(tab.b) @ np.linalg.solve(np.eye(tab.stages) + z * A, np.ones(tab.stages)) for z in x]
    assert x[np.argmax(np.abs(R) > 1.0 + 1e-12)] == pytest.approx(end, abs=0.01)
