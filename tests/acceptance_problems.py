"""Varied problems with known gradients: what the automatic choice is held against.

Those of `fixtures/gold.json` carry gradients of about 30 digits. Those of the field's models, networks and other
problems without a formula have gradients in `fixtures/acceptance.json`, which `benchmarks/acceptance.py --references`
makes: tangents through tight NumPy solves, an algorithm that `auto` does not take for them.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sensitivity as sa
from sensitivity.testing import models

FIXTURES = Path(__file__).parent / "fixtures"
GOLD = {p["id"]: p for p in json.loads((FIXTURES / "gold.json").read_text())["problems"]}
STORED = FIXTURES / "acceptance.json"
KEPT = 60  # entries of a gradient in the fixture; of longer ones, some at equal distances


class Task(NamedTuple):
    """One problem in one framework; `alg` is None where the method is chosen too.

    `named` makes from a `Gradient` the numbers that `want` holds; without it, the entries of `u0` and `p`. Errors are
    relative to the largest number; with `sizes`, of the products with these.
    """

    prob: Any
    loss: Any
    alg: Any = None
    options: dict[str, Any] = {}  # noqa: RUF012
    wrt: Any = None
    named: Callable | None = None
    want: Any = None
    sizes: Any = None


def end(i):
    return lambda sol: sol.u[-1, i]


def squares(sol):
    return (sol.u**2).sum()


TIGHT = {"rtol": 1e-8, "atol": 1e-10}


# -- problems with known gradients ------------------------------------------------------------------------------------


def gold(name, **options):
    """A problem of the collection: parameters that are initial values go into `u0`, the others into `p`."""

    def build(lab):
        P, xp = GOLD[name], lab.xp
        code, number = P["code"], {k: float(v) for k, v in P["params"].items()}
        rhs, start = eval(code["rhs"]), eval(code["u0"])
        moving = P["tspan"] == ["t0", "t1"]
        initial = [] if "history" in code else _plain_start(start, number)
        names = [k for k in number if k not in initial and k not in ("t0", "t1")]
        p = {k: lab.array(number[k]) for k in names}
        u0 = lab.array([float(x) for x in start(number, np)])
        tspan = tuple(lab.array(number[t]) if moving else float(t) for t in P["tspan"] if t != "inf")
        more = {"mass_matrix": np.array(code["mass"], dtype=float)} if "mass" in code else {}
        cost = eval(P["loss"]["code"])

        def f(t, u, p):
            return xp.stack([x + 0.0 * u[0] for x in rhs(t, u, p, xp)])

        def loss(sol):
            return cost([sol.u[i, :] for i in range(sol.u.shape[0])], None, xp)

        def named(r):
            got = dict(r.p)
            got |= {k: r.u0[i] for i, k in enumerate(initial) if isinstance(k, str)} if r.u0 is not None else {}
            got |= {"t0": r.t0, "t1": r.t1} if moving else {}
            if not initial:  # the chain rule through initial values that are functions of the parameters
                for k in names:
                    moved = number | {k: number[k] + 1e-100j}
                    got[k] = got[k] + sum(np.imag(x) / 1e-100 * r.u0[i] for i, x in enumerate(start(moved, np)))
            return [got[k] for k in P["gradient"]]

        inside = eval(P["loss"].get("integral", "None"))
        if inside and "mass" in code:
            loss, field = (lambda sol: cost([sol.u[0, :]], None, xp) + sol.u[0, -1]), f
            more["mass_matrix"] = np.block([[more["mass_matrix"], np.zeros((len(u0), 1))],
                                            [np.zeros((1, len(u0))), np.ones((1, 1))]])
            u0 = lab.array([*(float(x) for x in start(number, np)), 0.0])
            f = lambda t, u, p: xp.stack([*field(t, u, p), inside(t, u, p, xp)])  # noqa: E731
        elif inside:
            loss = sa.ContinuousCost(lambda t, u, p: inside(t, u, p, xp)) + loss
        if P["tspan"][1] == "inf":
            prob = sa.SteadyStateProblem(f, u0, p)
        elif "lags" in code:
            delayed, past = eval(code["rhs"]), eval(code["history"])
            lags = eval(code["lags"])
            prob = sa.DDEProblem(
                lambda t, u, h, p: xp.stack(delayed(t, u, [h(t - s) for s in lags(p)], p, xp)), u0,
                lambda t, p: xp.stack([x + 0.0 * t for x in past(t, p, xp)]), tspan, p, lags=lags)
        else:
            prob = sa.ODEProblem(f, u0, tspan, p, **more)
        saves = [float(t) for t in P["loss"]["save_at"] if t not in ("inf", "t1")]
        timed = {} if moving or P["tspan"][1] == "inf" else {"saveat": lab.array(saves)}
        wrt = ("u0", "p", "t0", "t1") if moving else ("u0", "p")
        if P["tspan"][1] == "inf":
            timed, wrt = {}, "p"
        alg = {"rk4": sa.RK4(), "heun": sa.Heun(), "euler": sa.Euler()}.get(code.get("solver"))
        usual = {"dt": float(code["dt"]), "controller": sa.FixedStep()} if alg else {} if wrt == "p" else TIGHT
        return Task(prob, loss, alg, {**usual, **timed, **options}, wrt, named,
                    [float(v) for v in P["gradient"].values()],
                    [number[k] for k in P["gradient"]] if name == "ode_robertson" else None)

    return build


def _plain_start(start, number):
    """The names of the initial values; none where they are more than parameters and zeros."""
    try:
        found = start({k: k for k in number}, None)
    except (AttributeError, TypeError):
        return []
    return found if all(isinstance(x, str) or x == 0.0 for x in found) else []


def stiff_closed(lab):
    """One entry is pulled to `p[1]` at the rate 1e5, the other decays: `u(1) = (p1, 2 exp(-p0))`."""
    xp = lab.xp
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([-1e5 * (u[0] - p[1]), -p[0] * u[1]]), lab.array([0.0, 2.0]),
                         (0.0, 1.0), lab.array([0.7, 3.0]))
    return Task(prob, lambda sol: sol.u[-1, 0] + sol.u[-1, 1], None, TIGHT, "p", lambda r: [r.p[0], r.p[1]],
                [-2.0 * math.exp(-0.7), 1.0])


def bouncing_ball(lab):
    P, xp = GOLD["ev_bouncing_ball"], lab.xp
    p = {k: float(v) for k, v in P["params"].items()}
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([u[1], -p["g"] + 0.0 * u[0]]), lab.array([p["h0"], p["v0"]]),
                         (0.0, 2.5), {k: lab.array(p[k]) for k in "ge"})
    floor = sa.Event(lambda t, u, p: u[0], lambda t, u, p: xp.stack([0.0 * u[0], -p["e"] * u[1]]), direction=-1)
    return Task(prob, lambda s: s.u[0, 0] + 0.5 * s.u[0, 1] ** 2, None, {"events": floor, **TIGHT}, ("u0", "p"),
                lambda r: [r.p["g"], r.p["e"], r.u0[0], r.u0[1]], [float(v) for v in P["gradient"].values()])


def terminal(lab):
    P, xp = GOLD["ev_terminal_state"], lab.xp
    p = {k: float(v) for k, v in P["params"].items()}
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([u[1], -p["g"] + 0.0 * u[0]]), lab.array([p["h0"], p["v0"]]),
                         (0.0, 2.0), {"g": lab.array(p["g"])})
    ground = sa.Event(lambda t, u, p: u[0], terminal=True, direction=-1)
    return Task(prob, lambda s: s.events.u[0, 1] ** 2, None, {"events": ground, **TIGHT}, ("u0", "p"),
                lambda r: [r.p["g"], r.u0[0], r.u0[1]], [float(v) for v in P["gradient"].values()])


def geometric(interpretation):
    """`u' = a u + s u o dW` on a given path: in either calculus the computed product of its steps is known."""

    def build(lab):
        a, s, steps = 0.3, 0.6, 16
        path = np.concatenate([[0.0], np.cumsum([0.2 * math.sin(3.0 * i + 1.0) for i in range(steps)])])
        ito = interpretation == "ito"
        table = sa.TabulatedPath(lab.array(np.arange(steps + 1) / steps), lab.array(path[:, None]))
        prob = sa.SDEProblem(lambda t, u, p: p[0] * u, lambda t, u, p: p[1] * u, lab.array([1.2]), (0.0, 1.0),
                             lab.array([a, s]), noise="diagonal", interpretation=interpretation, brownian=table)
        dw, h = np.diff(path), 1.0 / steps

        def final(a, s, u):
            z = a * h + s * dw
            return u * np.prod(1.0 + z if ito else 1.0 + z + 0.5 * z * z)

        tiny = 1e-30
        want = [np.imag(final(a + tiny * 1j, s, 1.2)) / tiny, np.imag(final(a, s + tiny * 1j, 1.2)) / tiny,
                final(a, s, 1.0)]
        return Task(prob, end(0), sa.EulerMaruyama() if ito else sa.StochasticHeun(), {"dt": h}, ("u0", "p"),
                    lambda r: [r.p[0], r.p[1], r.u0[0]], want)

    return build


# -- problems with gradients in the fixture ---------------------------------------------------------------------------


def network(sizes, scale, t1, saves, **more):
    """`u' = W2 tanh(W1 u + b1) + b2` and deeper, all weights in one vector."""

    def build(lab):
        xp, shapes = lab.xp, list(zip(sizes[1:], sizes, strict=False))
        rng = np.random.default_rng(7)
        p = np.concatenate([np.concatenate([scale * rng.uniform(-1, 1, m * n) / math.sqrt(n), np.zeros(m)])
                            for m, n in shapes])

        def f(t, u, p):
            at = 0
            for i, (m, n) in enumerate(shapes):
                u = xp.matmul(xp.reshape(p[at:at + m * n], (m, n)), u) + p[at + m * n:at + m * n + m]
                at += m * n + m
                u = xp.tanh(u) if i + 1 < len(shapes) else u
            return u

        u0 = lab.array(np.cos(np.arange(sizes[0])))
        return Task(sa.ODEProblem(f, u0, (0.0, t1), lab.array(p)), squares, None, {**TIGHT, "saveat": saves, **more})

    return build


def model(name, loss, rtol=1e-8, atol=1e-10, wrt=("u0", "p"), **changes):
    def build(lab):
        prob = getattr(models, name)(lab.xp)
        options = {"rtol": rtol, "atol": atol} | {k: v for k, v in changes.items() if k == "saveat"}
        prob = prob.remake(**{k: v for k, v in changes.items() if k != "saveat"})
        sizes = None
        if wrt == "p" and name in ("robertson", "pollu", "robertson_dae"):
            sizes = np.asarray(lab.numpy(prob.p))
        return Task(prob, loss, None, options, wrt, sizes=sizes)

    return build


def pkpd(lab):
    prob, times, affect = models.pkpd(lab.xp)
    doses = sa.PresetTimes(lab.array(times), affect)
    return Task(prob, lambda sol: sol.u[-1, 4] ** 2, None, {"events": doses, "rtol": 1e-8, "atol": 1e-8}, "p")


def van_der_pol(mu, t1, rtol=1e-8):
    def build(lab):
        xp = lab.xp
        prob = sa.ODEProblem(lambda t, u, p: xp.stack([u[1], p[0] * (1.0 - u[0] ** 2) * u[1] - u[0]]),
                             lab.array([2.0, 0.0]), (0.0, t1), lab.array([mu]))
        return Task(prob, end(0), None, {"rtol": rtol, "atol": rtol}, "p")

    return build


def lorenz(lab):
    """Before chaos sets in."""
    xp = lab.xp
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([p[0] * (u[1] - u[0]), u[0] * (p[1] - u[2]) - u[1],
                                                   u[0] * u[1] - p[2] * u[2]]),
                         lab.array([1.0, 0.0, 0.0]), (0.0, 3.0), lab.array([10.0, 28.0, 8.0 / 3.0]))
    return Task(prob, end(2), None, TIGHT)


def ring(lab):
    """24 cells that diffuse and rotate, a rate for each: as many parameters as states, and twelve times the output."""
    xp, n = lab.xp, 24
    shift = lab.array(np.roll(np.eye(n), 1, axis=0) - np.eye(n))

    def f(t, u, p):
        return p * xp.matmul(shift, u) + 0.1 * xp.sin(u)

    return Task(sa.ODEProblem(f, lab.array(np.cos(np.arange(n))), (0.0, 2.0), lab.array(np.linspace(0.5, 1.5, n))),
                squares, None, {**TIGHT, "saveat": 12})


def oscillator(lab):
    """One parameter, and 200 rows of output over twenty periods."""
    xp = lab.xp
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([u[1], -u[0] - p[0] * u[1]]), lab.array([1.0, 0.0]), (0.0, 120.0),
                         lab.array([0.02]))
    return Task(prob, squares, None, {**TIGHT, "saveat": 200}, "p")


def contraction(lab):
    """What decays by exp(-60): nobody finds the way back."""
    prob = sa.ODEProblem(lambda t, u, p: -p[0] * (u - p[1]), lab.array([2.0, 1.0]), (0.0, 20.0), lab.array([3.0, 0.5]))
    return Task(prob, squares, None, {**TIGHT, "saveat": 5}, "p")


def discrete_cost(lab):
    prob = lab.lotka_volterra(t1=4.0)
    data = np.array([1.0, 2.0])
    cost = sa.DiscreteCost([1.0, 2.5, 4.0], lambda u, p, t, i: 2.0 * (u - lab.array(data)),
                           g=lambda u, p, t, i: ((u - lab.array(data)) ** 2).sum())
    return Task(prob, cost, None, TIGHT)


def steady(lab):
    """A network at rest: 10 states, 100 weights."""
    xp, n = lab.xp, 10
    weights = 0.4 * np.random.default_rng(3).normal(size=(n, n)) / math.sqrt(n)

    def f(t, u, p):
        return xp.tanh(xp.matmul(xp.reshape(p, (n, n)), u)) - u + 0.3

    return Task(sa.SteadyStateProblem(f, lab.array(np.zeros(n)), lab.array(weights.ravel())), squares, None, {}, "p")


def noisy(lab):
    """Five entries with diagonal noise and 15 parameters on a path from a key."""
    xp, n = lab.xp, 5
    prob = sa.SDEProblem(lambda t, u, p: p[:n] * xp.sin(u) - p[n:2 * n] * u, lambda t, u, p: p[2 * n:] * xp.cos(u),
                         lab.array(np.linspace(0.5, 1.0, n)), (0.0, 1.0), lab.array(np.linspace(0.2, 0.8, 3 * n)),
                         noise="diagonal", interpretation="stratonovich", key=5)
    return Task(prob, squares, None, {"dt": 0.02})


def member(sol):
    return (sol.u[-1, ...] ** 2).sum()


CASES: dict[str, Callable[[Any], Task]] = {
    "decay": gold("ode_exp_decay"),
    "logistic": gold("ode_logistic_sse"),
    "lotka-volterra": gold("ode_lotka_volterra"),
    "forced, times": gold("ode_forced_tspan"),
    "small network": gold("ode_neural_mlp"),
    "running cost": gold("ode_integral_cost"),
    "discrete cost": discrete_cost,
    "fixed steps": gold("disc_lv_rk4"),
    "nonsingular mass": gold("mass_nonsingular"),
    "network, 300 weights": network((4, 32, 4), 1.0, 2.0, 10),
    "network, 5000 weights": network((16, 128, 24, 16), 1.0, 1.0, 5),
    "rates per cell": ring,
    "200 rows": oscillator,
    "contraction": contraction,
    "lorenz": lorenz,
    "long horizon": model("lotka_volterra", end(0), tspan=(0.0, 100.0)),
    "van der pol": van_der_pol(1.0, 20.0),
    "brusselator": model("brusselator_2d", member, rtol=1e-6, atol=1e-6, tspan=(0.0, 0.3)),
    "stiff, closed form": stiff_closed,
    "stiff van der pol": van_der_pol(1000.0, 300.0, 1e-7),
    "robertson": gold("ode_robertson", atol=1e-12),
    "pollu": model("pollu", lambda sol: sol.u[-1, 0], rtol=1e-6, atol=1e-10, wrt="p"),
    "linear constraint": gold("dae_linear_semiexplicit"),
    "pendulum": gold("dae_pendulum_index1"),
    "robertson, constraint": model("robertson_dae", end(1), rtol=1e-7, atol=1e-12, wrt="p", tspan=(0.0, 40.0)),
    "bouncing ball": bouncing_ball,
    "terminal event": terminal,
    "doses": pkpd,
    "delay": gold("dde_linear_continuous"),
    "delay, jump": gold("dde_linear_jump"),
    "delay, chaotic": gold("dde_mackey_glass"),
    "noise, ito": geometric("ito"),
    "noise, stratonovich": geometric("stratonovich"),
    "noise, key": noisy,
    "steady, linear": gold("steady_linear"),
    "steady network": steady,
}


def gradient(lab, task, sensealg, alg=None, **more):
    return sa.gradient(task.prob, task.alg or alg, task.loss, wrt=task.wrt, sensealg=sensealg,
                       **{**task.options, **more})


def numbers(lab, task, r):
    """The gradient as one NumPy vector."""
    if task.named is not None:
        return np.array([float(v) for v in task.named(r)])
    parts = [lab.numpy(v).ravel() for part in (r.u0, r.p) if part is not None for v in lab.be.flatten(part)[0]]
    return np.concatenate(parts)


def reduced(values):
    """The entries that the fixture keeps."""
    return values[:: -(-values.shape[0] // KEPT)]


def error(name, task, values):
    """The largest difference to the known gradient, relative to its largest entry."""
    want = task.want
    if want is None:
        want, values = np.array(json.loads(STORED.read_text())[name]), reduced(values)
    want, weights = np.asarray(want), 1.0
    if task.sizes is not None:
        weights = np.asarray(task.sizes)
    return float(np.max(np.abs(weights * (values - want))) / np.max(np.abs(weights * want)))
