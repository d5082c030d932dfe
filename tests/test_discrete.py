"""The discrete adjoint is the derivative of the computed solution, to round-off.

The reference is a second implementation of the computed solution, below: Runge-Kutta steps over a given mesh, written
for complex numbers, so that `Im G(x + i e d) / e` is its derivative without any subtraction (Squire, Trapp 1998).
Conventions, as in algorithms/discrete.py: every node moves with t0, the last step takes up the change of t1, equally
spaced save times move with the span, and the step that a save time belongs to is fixed.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa

GOLD = {p["id"]: p for p in json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())["problems"]}
E = 1e-100
U0, P, T0, T1 = np.array([1.0, 0.5, -0.25]), np.array([1.5, 0.7, 0.3]), 0.25, 2.0
ALL = ("u0", "p", "t0", "t1", "saveat")


def field(xp):
    """Nonlinear, with time in it, three states, three parameters."""

    def f(t, u, p):
        x, y, z = u[0], u[1], u[2]
        return xp.stack([p[0] * y * z + xp.cos(p[1] * t), -p[2] * x * z - t * y * p[0], p[1] * x * y - z * z * p[2]])

    return f


class Mesh:
    """The computed solution as a function of its inputs, with frozen steps."""

    def __init__(self, method, nodes, saves):
        self.tab, self.nodes, self.saves = method.tableau(True), np.asarray(nodes), saves
        self.f = field(np)

    def __call__(self, u0, p, t0, t1, saveat):
        """Rows of `sol.u` for complex inputs; `nodes[0], nodes[-1]` are the real t0 and t1."""
        tab, nodes = self.tab, self.nodes
        A = np.zeros((tab.stages, tab.stages))
        for i, row in enumerate(tab.a):
            A[i, : len(row)] = row
        d0, d1 = t0 - nodes[0], t1 - nodes[-1]
        sign = np.sign(nodes[-1] - nodes[0])
        times = None
        if isinstance(self.saves, int):
            count = self.saves
            times = [t0 + w * (t1 - t0) for w in ([1.0] if count == 1 else np.linspace(0.0, 1.0, count))]
        elif self.saves == "ts":
            times = list(saveat)
        rows = {}
        u = np.asarray(u0, dtype=complex)
        ends = []
        for n in range(len(nodes) - 1):
            last = n == len(nodes) - 2
            t, h = nodes[n] + d0, nodes[n + 1] - nodes[n] + (d1 - d0 if last else 0.0)
            K = np.zeros((tab.stages, len(u)), dtype=complex)
            for i in range(tab.stages):
                K[i] = self.f(t + tab.c[i] * h, u + h * (A[i] @ K), p)
            for i, s in enumerate(times or ()):
                inside = sign * nodes[n] < sign * s.real <= sign * nodes[n + 1] or (n == 0 and s.real == nodes[0])
                if inside or (last and i not in rows):
                    x = (s - t) / h
                    b = [sum(d * x ** (k + 1) for k, d in enumerate(row)) for row in tab.dense]
                    rows[i] = u + h * (np.array(b) @ K)
            u = u + h * (np.array(tab.b) @ K)
            ends.append(u)
        if self.saves == "steps":
            return np.stack(ends)
        return np.stack([rows[i] for i in range(len(times))]) if times else u[None, :]


def reference(method, nodes, saves, ts, weights):
    """Value and gradient of `sum(weights * u)` by complex steps: `(value, {name: gradient})`."""
    mesh = Mesh(method, nodes, saves)
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


def count_of(saves, nodes):
    """Rows of the solution."""
    if saves == "ts":
        return len(TIMES)
    return 1 if saves is None else len(nodes) - 1 if saves == "steps" else saves


METHODS = ["Euler", "Heun", "Midpoint", "RK4", "BS3", "Dopri5", "Tsit5", "Dopri8"]
TIMES = [1.3, 0.25, 2.0, 0.9, 1.3, 1.9999]
# The last step of the fixed mesh is a short one, so that its own role is seen.
FIXED = {"controller": sa.FixedStep(), "dt": 0.2}
ADAPTIVE = {"rtol": 1e-3, "atol": 1e-5}


def case(lab, method, saves, options, tspan=(T0, T1)):
    """Problem, options, names, reference weights, and the reference answer."""
    prob = sa.ODEProblem(field(lab.xp), lab.array(U0), tuple(lab.array(t) for t in tspan), lab.array(P))
    ts = TIMES if saves == "ts" else None
    saveat = lab.array(TIMES) if saves == "ts" else saves
    steps = sa.solve(prob, method, saveat="steps", **options)
    nodes = [tspan[0], *lab.numpy(steps.t).tolist()]
    count = count_of(saves, nodes)
    weights = np.cos(np.arange(1.0, 1.0 + 3 * count)).reshape(count, 3)
    names = ALL if saves == "ts" else ALL[:-1]
    return prob, {"saveat": saveat, **options}, names, weights, reference(method, nodes, saves, ts, weights)


def agree(lab, r, names, want, tol):
    value, grads = want
    assert float(r.value) == pytest.approx(value, rel=max(1e-12, tol))
    for name in names:
        got = lab.numpy(getattr(r, name))
        np.testing.assert_allclose(got, grads[name], rtol=tol, atol=tol * np.max(np.abs(grads["p"])), err_msg=name)


def on_the_steps(saves, options):
    """Two adaptive solves may place their steps apart by the round-off of an error estimate; with `saveat="steps"` the
    outputs move with them, and then this is the tolerance."""
    return 1e-9 if saves == "steps" and "dt" not in options else None


def loss_of(lab, weights):
    w = lab.array(weights)
    return lambda sol: lab.xp.sum(w * sol.u)


# -- against the complex steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tspan", [(T0, T1), (T1, T0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("saves", [None, "ts", 4, "steps"], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_fixed_steps(numpy_lab, method, saves, tspan):
    method = getattr(sa, method)()
    prob, options, names, weights, want = case(numpy_lab, method, saves, FIXED, tspan)
    r = sa.gradient(prob, method, loss_of(numpy_lab, weights), wrt=names, sensealg=sa.RecursiveCheckpointAdjoint(),
                    **options)
    agree(numpy_lab, r, names, want, 1e-12)


@pytest.mark.parametrize("tspan", [(T0, T1), (T1, T0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("saves", [None, "ts", 4, "steps"], ids=str)
@pytest.mark.parametrize("method", ["Heun", "Midpoint", "BS3", "Dopri5", "Tsit5", "Dopri8"])
def test_adaptive_steps(numpy_lab, method, saves, tspan):
    method = getattr(sa, method)()
    prob, options, names, weights, want = case(numpy_lab, method, saves, ADAPTIVE, tspan)
    r = sa.gradient(prob, method, loss_of(numpy_lab, weights), wrt=names, sensealg=sa.RecursiveCheckpointAdjoint(),
                    **options)
    agree(numpy_lab, r, names, want, 1e-11)


@pytest.mark.parametrize("options", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("saves", [None, "ts", 4, "steps"], ids=str)
@pytest.mark.parametrize("method", ["Tsit5", "Heun"])
def test_every_framework(lab, method, saves, options):
    method = getattr(sa, method)()
    prob, options, names, weights, want = case(lab, method, saves, options)
    r = sa.gradient(prob, method, loss_of(lab, weights), wrt=names, sensealg=sa.RecursiveCheckpointAdjoint(), **options)
    agree(lab, r, names, want, on_the_steps(saves, options) or 1e-11)


def test_save_times_on_nodes(numpy_lab):
    """A time on a node belongs to the step that ends there; with tstops the nodes are known beforehand."""
    nodes = [T0, 0.5, 1.0, 1.5, T1]
    ts = [0.5, 1.5, T1, T0, 1.0]
    weights = np.cos(np.arange(1.0, 16.0)).reshape(5, 3)
    prob = sa.ODEProblem(field(numpy_lab.xp), U0, (T0, T1), P)
    r = sa.gradient(prob, sa.Tsit5(), loss_of(numpy_lab, weights), wrt=ALL, saveat=np.array(ts), tstops=nodes[1:-1],
                    controller=sa.FixedStep(), dt=0.5, sensealg=sa.RecursiveCheckpointAdjoint())
    assert r.stats.naccept == 4
    agree(numpy_lab, r, ALL, reference(sa.Tsit5(), nodes, "ts", ts, weights), 1e-12)


@pytest.mark.parametrize("method", ["Tsit5", "RK4"])
def test_dense_output(lab, method):
    """Cotangents of `sol(t)` reach the states and the stages of every step."""
    method = getattr(sa, method)()
    prob, _, _, _, want = case(lab, method, "ts", FIXED)
    weights = np.cos(np.arange(1.0, 19.0)).reshape(6, 3)
    w, ts = lab.array(weights), lab.array(TIMES)
    r = sa.gradient(prob, method, lambda sol: lab.xp.sum(w * sol(ts)), dense=True,
                    sensealg=sa.RecursiveCheckpointAdjoint(), **FIXED)
    agree(lab, r, ("u0", "p"), want, 1e-11)


def test_captured_mesh_is_not_differentiated(numpy_lab):
    """The adaptive gradient is that of frozen steps: it differs from differences of whole adaptive solves."""
    prob, options, _, weights, (_, grads) = case(numpy_lab, sa.Tsit5(), None, ADAPTIVE)

    def G(p):
        return float(np.sum(weights * sa.solve(prob.remake(p=p), sa.Tsit5(), **options).u))

    d = np.array([1.0, 0.0, 0.0])
    whole = (G(P + 1e-5 * d) - G(P - 1e-5 * d)) / 2e-5
    assert whole == pytest.approx(grads["p"][0], rel=0.05)
    assert whole != pytest.approx(grads["p"][0], rel=1e-9)


# -- against the framework's own AD, and against differences ------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("Tsit5", FIXED), ("Tsit5", ADAPTIVE), ("RK4", FIXED)],
                         ids=["Tsit5-fixed", "Tsit5-adaptive", "RK4-fixed"])
@pytest.mark.parametrize("saves", [None, "ts", 4, "steps"], ids=str)
def test_equals_direct(lab, method, saves, options):
    method = getattr(sa, method)()
    prob, options, names, weights, want = case(lab, method, saves, options)
    loss = loss_of(lab, weights)
    a, b = (sa.gradient(prob, method, loss, wrt=names, sensealg=s, **options)
            for s in (sa.RecursiveCheckpointAdjoint(), sa.DirectAdjoint()))
    assert float(a.value) == pytest.approx(float(b.value), rel=on_the_steps(saves, options) or 1e-13)
    for name in names:
        x, y = lab.numpy(getattr(a, name)), lab.numpy(getattr(b, name))
        tol = on_the_steps(saves, options) or 1e-12
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol * np.max(np.abs(want[1]["p"])), err_msg=name)


def test_dense_output_by_both(lab):
    prob, _, _, weights, _ = case(lab, sa.Tsit5(), "ts", FIXED)
    w, ts = lab.array(weights), lab.array(TIMES)
    a, b = (sa.gradient(prob, sa.Tsit5(), lambda sol: lab.xp.sum(w * sol(ts)), dense=True, sensealg=s, **FIXED)
            for s in (sa.RecursiveCheckpointAdjoint(), sa.DirectAdjoint()))
    for name in ("u0", "p"):
        np.testing.assert_allclose(lab.numpy(getattr(a, name)), lab.numpy(getattr(b, name)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sensealg", [sa.RecursiveCheckpointAdjoint(), sa.DirectAdjoint()], ids=lambda s: s.name)
def test_loss_of_the_parameters(lab, sensealg):
    """A loss may use `sol.prob.p`: its own derivative is added."""
    prob = sa.ODEProblem(lambda t, u, p: -p * u, lab.array([2.0]), (0.0, 1.0), lab.array([0.5]))
    r = sa.gradient(prob, sa.Tsit5(), lambda sol: lab.xp.sum(sol.u) + lab.xp.sum(sol.prob.p**2), sensealg=sensealg,
                    rtol=1e-9, atol=1e-9)
    assert float(r.p[0]) == pytest.approx(-2.0 * np.exp(-0.5) + 1.0, rel=1e-7)


def test_taylor_remainder(lab):
    """`G(x + e d) - G(x) - e <g, d>` falls with e^2 on a fixed mesh."""
    prob, options, _, weights, _ = case(lab, sa.Tsit5(), "ts", FIXED)
    loss = loss_of(lab, weights)
    r = sa.gradient(prob, sa.Tsit5(), loss, sensealg=sa.RecursiveCheckpointAdjoint(), **options)
    du, dp = np.array([0.3, -0.5, 1.0]), np.array([1.0, 0.25, -0.75])
    slope = float(np.dot(lab.numpy(r.u0), du) + np.dot(lab.numpy(r.p), dp))

    def remainder(e):
        moved = prob.remake(u0=lab.array(U0 + e * du), p=lab.array(P + e * dp))
        value = float(loss(sa.solve(moved, sa.Tsit5(), **options)))
        return abs(value - float(r.value) - e * slope)

    sizes = [1e-1, 3e-2, 1e-2, 3e-3, 1e-3]
    orders = np.diff(np.log([remainder(e) for e in sizes])) / np.diff(np.log(sizes))
    np.testing.assert_allclose(orders[1:], 2.0, atol=0.1)


def test_central_differences(lab):
    prob, options, _, weights, _ = case(lab, sa.Tsit5(), "ts", FIXED)
    loss = loss_of(lab, weights)
    r = sa.gradient(prob, sa.Tsit5(), loss, sensealg=sa.RecursiveCheckpointAdjoint(), **options)
    for name, x in (("u0", U0), ("p", P)):
        for j, unit in enumerate(np.eye(3)):
            plus, minus = (float(loss(sa.solve(prob.remake(**{name: lab.array(x + e * unit)}), sa.Tsit5(), **options)))
                           for e in (1e-5, -1e-5))
            # e^2 times a third derivative, and round-off over e: ten digits each
            assert (plus - minus) / 2e-5 == pytest.approx(float(lab.numpy(getattr(r, name))[j]), rel=1e-8, abs=1e-8)


# -- reference values ---------------------------------------------------------------------------------------------

SOLVERS = {"euler": sa.Euler(), "heun": sa.Heun(), "rk4": sa.RK4(), "tsit5": sa.Tsit5(), "dopri5": sa.Dopri5(),
           "ees25_x0.1": sa.EES25(), "ees27_xopt": sa.EES27(),
           "implicit_euler": sa.ImplicitEuler(), "implicit_midpoint": sa.ImplicitMidpoint(),
           "trapezoid": sa.Trapezoid()}


@pytest.mark.parametrize("name", [n for n in GOLD if GOLD[n]["code"].get("solver") in SOLVERS])
def test_reference_values(lab, name):
    P = GOLD[name]
    xp = lab.xp
    rhs, start, cost = (eval(P["code"][k]) if k != "loss" else eval(P["loss"]["code"]) for k in ("rhs", "u0", "loss"))
    initial = start({k: k for k in P["params"]}, None)
    p = {k: lab.array(float(v)) for k, v in P["params"].items() if k not in initial}
    u0 = lab.array([float(P["params"][k]) for k in initial])
    prob = sa.ODEProblem(lambda t, u, p: xp.stack(rhs(t, u, p, xp)), u0, tuple(map(float, P["tspan"])), p)
    r = sa.gradient(prob, SOLVERS[P["code"]["solver"]], lambda sol: cost([sol.u[0, :]], p, xp),
                    controller=sa.FixedStep(), dt=float(P["code"]["dt"]), sensealg=sa.RecursiveCheckpointAdjoint())
    assert float(r.value) == pytest.approx(float(P["value"]), rel=1e-12)
    got = {k: float(v) for k, v in r.p.items()} | dict(zip(initial, map(float, r.u0), strict=True))
    largest = max(abs(float(v)) for v in P["gradient"].values())
    for k, v in P["gradient"].items():
        # Rounding is relative to the largest entry: one in a hundred of it has two digits less.
        assert got[k] == pytest.approx(float(v), rel=1e-12, abs=1e-14 * largest), k


# -- how much work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saves", [None, "ts", "steps"], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_products_are_counted(numpy_lab, method, saves):
    """One product per distinct evaluation of `f` that reaches an output, no more."""
    method = getattr(sa, method)()
    calls = []
    f = field(np)

    def vjp(t, u, p, lam):
        calls.append(t)
        rows = [np.imag(f(t, u + 1j * E * d, p)) / E for d in np.eye(3)]
        cols = [np.imag(f(t, u, p + 1j * E * d)) / E for d in np.eye(3)]
        return np.array(rows) @ lam, np.array(cols) @ lam

    prob = sa.ODEProblem(f, U0, (T0, T1), P, vjp=vjp)
    saveat = np.array(TIMES) if saves == "ts" else saves
    r = sa.gradient(prob, method, lambda sol: np.sum(sol.u), dloss=lambda sol: np.ones_like(sol.u), saveat=saveat,
                    sensealg=sa.RecursiveCheckpointAdjoint(vjp=sa.UserVJP()), **FIXED)
    tab, steps = method.tableau(saves == "ts"), r.stats.naccept
    assert steps == 9
    # First same as last: neighbouring steps share one evaluation, and the very last one reaches no output but one
    # inside the last step.
    theory = (tab.stages - 1) * steps + (saves == "ts") if tab.fsal else tab.stages * steps
    assert len(calls) == theory
    assert r.stats.nvjp == theory


def test_unused_parts_cost_nothing(numpy_lab):
    """Without `p` in `wrt` the parameters are not differentiated."""
    prob = sa.ODEProblem(field(numpy_lab.xp), U0, (T0, T1), P)
    r = sa.gradient(prob, sa.Tsit5(), lambda sol: numpy_lab.xp.sum(sol.u), wrt="u0", **FIXED)
    assert r.p is None
    assert r.t0 is None
    full = sa.gradient(prob, sa.Tsit5(), lambda sol: numpy_lab.xp.sum(sol.u), **FIXED)
    np.testing.assert_allclose(r.u0, full.u0, rtol=1e-14)


@pytest.mark.parametrize("vjp", [sa.ForwardVJP(), sa.ComplexStepVJP(), sa.FiniteDifferenceVJP()], ids=lambda v: v.name)
def test_every_product(lab, vjp):
    prob, options, names, weights, want = case(lab, sa.Tsit5(), "ts", FIXED)
    loss = loss_of(lab, weights)
    r = sa.gradient(prob, sa.Tsit5(), loss, wrt=names, sensealg=replace(sa.RecursiveCheckpointAdjoint(), vjp=vjp),
                    **options)
    agree(lab, r, names, want, 1e-7 if isinstance(vjp, sa.FiniteDifferenceVJP) else 1e-11)
