"""Events: found where they happen, and differentiated exactly, in every framework."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa

GOLD = {p["id"]: p for p in json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())["problems"]}
TIGHT = {"rtol": 1e-11, "atol": 1e-12}
ALGORITHMS = {
    "discrete": sa.RecursiveCheckpointAdjoint(),
    "interpolating": sa.InterpolatingAdjoint(),
    "checkpoints": sa.InterpolatingAdjoint(checkpoints=4),
    "gauss": sa.GaussAdjoint(),
    "quadrature": sa.QuadratureAdjoint(),
    "backsolve": sa.BacksolveAdjoint(),
    "forward": sa.ForwardSensitivity(),
    "tangents": sa.ForwardADSensitivity(),
}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def numbers(name):
    return {k: float(v) for k, v in GOLD[name]["params"].items()}


def agrees(name, value, got):
    assert float(value) == pytest.approx(float(GOLD[name]["value"]), rel=1e-10)
    for k, v in GOLD[name]["gradient"].items():
        assert float(got[k]) == pytest.approx(float(v), rel=1e-8), k


# -- reference problems -----------------------------------------------------------------------------------------------


@every_algorithm
def test_bouncing_ball(lab, algorithm):
    xp, p = lab.xp, numbers("ev_bouncing_ball")
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([u[1], -p["g"] + 0.0 * u[0]]), lab.array([p["h0"], p["v0"]]),
                         (0.0, 2.5), {k: lab.array(p[k]) for k in "ge"})
    floor = sa.Event(lambda t, u, p: u[0], lambda t, u, p: xp.stack([0.0 * u[0], -p["e"] * u[1]]), direction=-1)
    r = sa.gradient(prob, sa.Tsit5(), lambda s: s.u[0, 0] + 0.5 * s.u[0, 1] ** 2, events=floor,
                    sensealg=ALGORITHMS[algorithm], **TIGHT)
    agrees("ev_bouncing_ball", r.value, {**r.p, "h0": r.u0[0], "v0": r.u0[1]})
    # Flight times from the closed form.
    v = math.sqrt(p["v0"] ** 2 + 2 * p["g"] * p["h0"])
    times = [(p["v0"] + v) / p["g"]]
    for k in range(1, 4):
        times.append(times[-1] + 2 * p["e"] ** k * v / p["g"])
    assert lab.numpy(r.solution.events.t)[:4] == pytest.approx(times, rel=1e-11)
    assert len(r.solution.events) == 4
    assert lab.numpy(r.solution.events.index)[:4].tolist() == [0] * 4


@every_algorithm
def test_time_of_a_terminal_event(lab, algorithm):
    xp, p = lab.xp, numbers("ev_pendulum_quarter_period")
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([u[1], -p["g"] / p["l"] * xp.sin(u[0])]), lab.array([p["th0"], 0.0]),
                         (0.0, 1.0), {k: lab.array(p[k]) for k in "gl"})
    r = sa.gradient(prob, sa.Tsit5(), lambda s: s.events.t[0], events=sa.Event(lambda t, u, p: u[0], terminal=True),
                    sensealg=ALGORITHMS[algorithm], **TIGHT)
    assert r.solution.retcode == sa.RetCode.Terminated
    assert r.solution.success
    agrees("ev_pendulum_quarter_period", r.value, {**r.p, "th0": r.u0[0]})


@pytest.mark.parametrize("where", ["events", "end"])
@every_algorithm
def test_state_at_a_terminal_event(lab, where, algorithm):
    xp, p = lab.xp, numbers("ev_terminal_state")
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([u[1], -p["g"] + 0.0 * u[0]]), lab.array([p["h0"], p["v0"]]),
                         (0.0, 2.0), {"g": lab.array(p["g"])})
    read = {"events": lambda s: s.events.u[0, 1] ** 2, "end": lambda s: s.u[0, 1] ** 2}[where]
    r = sa.gradient(prob, sa.Tsit5(), read, events=sa.Event(lambda t, u, p: u[0], terminal=True, direction=-1),
                    sensealg=ALGORITHMS[algorithm], **TIGHT)
    agrees("ev_terminal_state", r.value, {**r.p, "h0": r.u0[0], "v0": r.u0[1]})


@pytest.mark.parametrize("kind", ["preset", "condition"])
@every_algorithm
def test_dose_at_a_time_that_is_a_parameter(lab, kind, algorithm):
    xp, p = lab.xp, numbers("ev_dose_time")
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([-p["k"] * u[0], u[0]]), lab.array([p["D1"], 0.0]), (0.0, 3.0),
                         {k: lab.array(p[k]) for k in ("k", "D2", "td")})

    def dose(t, u, p):
        return xp.stack([u[0] + p["D2"], u[1]])

    event = {"preset": sa.PresetTimes(lambda p: xp.stack([p["td"]]), dose),
             "condition": sa.Event(lambda t, u, p: t - p["td"], dose)}[kind]
    r = sa.gradient(prob, sa.Tsit5(), lambda s: s.u[0, 0] ** 2 + s.u[1, 0] + s.u[1, 1], saveat=[2.0, 3.0], events=event,
                    sensealg=ALGORITHMS[algorithm], **TIGHT)
    agrees("ev_dose_time", r.value, {**r.p, "D1": r.u0[0]})


# -- the exact derivative of the computed solution --------------------------------------------------------------------


def kicked(lab):
    """A ball on a rising floor, with drag and two kicks: conditions and affects use time, state and parameters."""
    xp = lab.xp

    def f(t, u, p):
        return xp.stack([u[1], -p[0] - p[2] * u[1] * xp.sqrt(1.0 + u[1] ** 2)])

    prob = sa.ODEProblem(f, lab.array([1.0, 0.3]), (0.0, 2.0), lab.array([9.81, 0.8, 0.1, 0.7]))
    events = [sa.Event(lambda t, u, p: u[0] - 0.01 * t * p[2],
                       lambda t, u, p: xp.stack([u[0], -p[1] * u[1] + 0.1 * p[3] * t]), direction=-1),
              sa.PresetTimes(lambda p: xp.stack([p[3], p[3] + 1.05]), lambda t, u, p: xp.stack([u[0], u[1] + p[3]]))]
    return prob, events


FIXED = {"dt": 0.05, "controller": sa.FixedStep()}


def cost(sol):
    e = sol.events
    return (sol.u[:, 0] * sol.u[:, 1]).sum() + 3.0 * e.t[0] + 6.0 * e.t[2] + e.u[1, 1] * e.u[3, 0] + e.u[3, 1]


def differences(loss, x, step=1e-4):
    """Central differences, extrapolated once."""
    out = []
    for i in range(len(x)):
        d = np.zeros(len(x))
        d[i] = step
        near, far = ((loss(x + k * d) - loss(x - k * d)) / (2 * k * step) for k in (1, 2))
        out.append((4 * near - far) / 3)
    return np.array(out)


@pytest.fixture(scope="module")
def truth(numpy_lab):
    """Derivatives of the map that the fixed steps and the events make, by differences."""
    prob, events = kicked(numpy_lab)
    found = {}
    for saveat in (None, (0.33, 1.1, 1.77)):
        def loss(z, saveat=saveat):
            moved = prob.remake(u0=z[:2], p=z[2:6], tspan=(z[6], z[7]))
            return float(cost(sa.solve(moved, sa.Tsit5(), events=events, saveat=saveat, **FIXED)))

        found[saveat] = differences(loss, np.array([1.0, 0.3, 9.81, 0.8, 0.1, 0.7, 0.0, 2.0]), 1e-5)
    return found


@pytest.mark.parametrize("algorithm", ["RecursiveCheckpointAdjoint", "ForwardADSensitivity"])
@pytest.mark.parametrize("saveat", [None, (0.33, 1.1, 1.77)], ids=["end", "times"])
def test_exact_for_the_computed_solution(lab, truth, saveat, algorithm):
    prob, events = kicked(lab)
    given = None if saveat is None else lab.array(saveat)
    r = sa.gradient(prob, sa.Tsit5(), cost, wrt=("u0", "p", "t0", "t1"), events=events, saveat=given, max_events=8,
                    sensealg=getattr(sa, algorithm)(), **FIXED)
    got = np.concatenate([lab.numpy(r.u0), lab.numpy(r.p), [float(r.t0)], [float(r.t1)]])
    # What is left is the round-off of the differences, 1e-16 / 1e-5 of the values.
    assert got == pytest.approx(truth[saveat], rel=1e-8, abs=5e-9)
    assert lab.numpy(r.solution.events.index).tolist() == [0, 1, 0, 1, 0]


@every_algorithm
def test_times_are_differentiated_by_all(lab, algorithm):
    """Initial and save times too, with two kinds of events, against the discrete adjoint; the rest of the difference
    is the error of the solves."""
    prob, events = kicked(lab)
    options = {"events": events, "saveat": lab.array((0.33, 1.1, 1.77)), "max_events": 8,
               "wrt": ("u0", "p", "t0", "t1", "saveat"), **TIGHT}
    found, expected = (sa.gradient(prob, sa.Tsit5(), cost, sensealg=a, **options)
                       for a in (ALGORITHMS[algorithm], sa.RecursiveCheckpointAdjoint()))
    for name in ("u0", "p", "t0", "t1", "saveat"):
        got, wanted = (lab.numpy(getattr(r, name)) for r in (found, expected))
        assert got == pytest.approx(wanted, rel=1e-8, abs=1e-8), name


def test_jax_transforms(truth, jax_lab):
    import jax

    lab = jax_lab
    prob, events = kicked(lab)

    def loss(u0, p):
        return cost(sa.solve(prob.remake(u0=u0, p=p), sa.Tsit5(), events=events, saveat=lab.array((0.33, 1.1, 1.77)),
                             max_events=8, **FIXED))

    reverse = jax.jit(jax.grad(loss, (0, 1)))(prob.u0, prob.p)
    forward = jax.jit(jax.jacfwd(loss, (0, 1)))(prob.u0, prob.p)
    for a, b in zip(reverse, forward, strict=True):
        assert lab.numpy(a) == pytest.approx(lab.numpy(b), rel=1e-12)
    many = np.stack([lab.numpy(prob.p), 1.05 * lab.numpy(prob.p), 0.95 * lab.numpy(prob.p)])
    batched = jax.jit(jax.vmap(jax.grad(loss, 1), (None, 0)))(prob.u0, lab.array(many))
    assert lab.numpy(batched[0]) == pytest.approx(lab.numpy(reverse[1]), rel=1e-12)
    alone = jax.grad(loss, 1)(prob.u0, lab.array(many[1]))
    assert lab.numpy(batched[1]) == pytest.approx(lab.numpy(alone), rel=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_torch_transforms(truth, torch_lab):
    import torch

    lab = torch_lab
    prob, events = kicked(lab)

    def loss(p):
        return cost(sa.solve(prob.remake(p=p), sa.Tsit5(), events=events, saveat=lab.array((0.33, 1.1, 1.77)), **FIXED))

    p = prob.p.clone().requires_grad_()
    loss(p).backward()
    expected = truth[0.33, 1.1, 1.77][2:6]
    assert p.grad.numpy() == pytest.approx(expected, rel=1e-8)
    pushed = [float(torch.func.jvp(loss, (prob.p,), (e,))[1]) for e in torch.eye(4, dtype=torch.float64)]
    assert pushed == pytest.approx(p.grad.numpy(), rel=1e-12)
    with pytest.raises(sa.UnsupportedCombination, match="vmap"):
        torch.func.vmap(loss)(torch.stack([prob.p, prob.p]))


def test_autograd_differentiates_event_times(numpy_lab):
    autograd = pytest.importorskip("autograd")
    lab = numpy_lab
    prob, events = kicked(lab)
    read = autograd.grad(lambda p: sa.solve(prob.remake(p=p), sa.Tsit5(), events=events, **FIXED).events.t[2])
    by_differences = differences(lambda p: float(sa.solve(prob.remake(p=p), sa.Tsit5(), events=events,
                                                          **FIXED).events.t[2]), np.asarray(prob.p))
    assert read(prob.p) == pytest.approx(by_differences, rel=1e-7, abs=1e-9)


# -- parameters that events change ------------------------------------------------------------------------------------


@pytest.mark.parametrize("products", ["ad", "user"])
def test_parameter_changes(lab, products):
    xp = lab.xp

    def f(t, u, p):
        return xp.stack([u[1], -p["k"][0] * u[0] - p["k"][1] * u[1]])

    def weaker(t, u, p):
        return xp.stack([u[0], u[1] * p["e"]]), {"k": p["k"] * p["e"] + 0.1 * t, "e": 0.9 * p["e"]}

    def vjp(t, u, p, lam):
        return (xp.stack([-p["k"][0] * lam[1], lam[0] - p["k"][1] * lam[1]]),
                {"k": xp.stack([-u[0] * lam[1], -u[1] * lam[1]]), "e": 0.0 * p["e"]})

    events = [sa.Event(lambda t, u, p: u[0] * p["k"][0], weaker),
              sa.PresetTimes([0.5], lambda t, u, p: (u, {"k": p["k"] + 0.3, "e": p["e"] ** 2}))]
    prob = sa.ODEProblem(f, lab.array([1.0, 0.3]), (0.0, 3.0), {"k": lab.array([2.0, 0.1]), "e": lab.array(0.8)},
                         vjp=vjp if products == "user" else None)

    def loss(s):
        return (s.u[:, 0] * s.u[:, 1]).sum() + 3.0 * s.events.t[0] + 6.0 * s.events.t[1] + s.events.u[1, 1]

    def value(z):
        moved = prob.remake(u0=lab.array(z[:2]), p={"k": lab.array(z[2:4]), "e": lab.array(z[4])})
        return float(loss(sa.solve(moved, sa.Tsit5(), events=events, saveat=lab.array([0.33, 1.1, 2.77]), **FIXED)))

    r = sa.gradient(prob, sa.Tsit5(), loss, events=events, saveat=lab.array([0.33, 1.1, 2.77]), **FIXED)
    got = np.concatenate([lab.numpy(r.u0), lab.numpy(r.p["k"]), [float(r.p["e"])]])
    assert got == pytest.approx(differences(value, np.array([1.0, 0.3, 2.0, 0.1, 0.8])), rel=1e-8, abs=1e-9)
    assert r.solution.u.shape == (3, 2)
    assert type(r.sensealg) is sa.RecursiveCheckpointAdjoint


# -- what happens on the way ------------------------------------------------------------------------------------------


def oscillator(lab, t1=7.0):
    xp = lab.xp
    return sa.ODEProblem(lambda t, u, p: xp.stack([u[1], -u[0]]), lab.array([0.0, 1.0]), (0.0, t1))


@pytest.mark.parametrize(("direction", "expected"), [(0, [math.pi, 2 * math.pi]), (1, [2 * math.pi]), (-1, [math.pi])])
def test_directions(lab, direction, expected):
    """u = sin t starts on zero, which is no crossing."""
    sol = sa.solve(oscillator(lab), sa.Tsit5(), events=sa.Event(lambda t, u, p: u[0], direction=direction),
                   rtol=1e-10, atol=1e-12)
    assert lab.numpy(sol.events.t) == pytest.approx(expected, rel=1e-9)
    assert lab.numpy(sol.events.u)[:, 1] == pytest.approx(np.cos(expected), rel=1e-8)
    assert sol.retcode == sa.RetCode.Success


def test_backwards_in_time(lab):
    prob = oscillator(lab).remake(tspan=(7.0, 0.5), u0=lab.array([math.sin(7.0), math.cos(7.0)]))
    sol = sa.solve(prob, sa.Tsit5(), events=sa.Event(lambda t, u, p: u[0]), rtol=1e-10, atol=1e-12)
    assert lab.numpy(sol.events.t) == pytest.approx([2 * math.pi, math.pi], rel=1e-9)


def test_rows_behind_a_terminal_event_are_nan(numpy_lab):
    sol = sa.solve(oscillator(numpy_lab), sa.Tsit5(), saveat=[1.0, 3.0, 5.0],
                   events=sa.Event(lambda t, u, p: u[0], terminal=True))
    assert np.isnan(sol.u[2]).all()
    assert sol.u[:2, 0] == pytest.approx(np.sin([1.0, 3.0]), rel=1e-5)


def test_two_events_and_their_indices(lab):
    sol = sa.solve(oscillator(lab), sa.Tsit5(), rtol=1e-10, atol=1e-12,
                   events=[sa.Event(lambda t, u, p: u[0]), sa.Event(lambda t, u, p: u[1])])
    assert lab.numpy(sol.events.index).tolist() == [1, 0, 1, 0]
    assert lab.numpy(sol.events.t) == pytest.approx([k * math.pi / 2 for k in (1, 2, 3, 4)], rel=1e-9)


def test_two_crossings_in_one_step(numpy_lab):
    """A step may be longer than the time between two crossings: u' = 0 with a condition of time alone."""
    prob = sa.ODEProblem(lambda t, u, p: 0.0 * u, np.ones(1), (0.0, 1.0))
    sol = sa.solve(prob, sa.Tsit5(), events=sa.Event(lambda t, u, p: (t - 0.3) * (t - 0.6)), dt=1.0)
    assert sol.events.t == pytest.approx([0.3, 0.6], rel=1e-12)


def test_costs_of_an_event(numpy_lab):
    """Two trial steps for a smooth condition, none for a preset time; each event starts with one evaluation."""
    calls = [0]

    def f(t, u, p):
        calls[0] += 1
        return np.array([u[1], -u[0]])

    prob = sa.ODEProblem(f, np.array([0.0, 1.0]), (0.0, 7.0))
    plain = sa.solve(prob, sa.Tsit5(), rtol=1e-8, atol=1e-8)
    calls[0] = 0
    found = sa.solve(prob, sa.Tsit5(), rtol=1e-8, atol=1e-8, events=sa.Event(lambda t, u, p: u[0]), probe="off")
    assert calls[0] == found.stats.nfe
    assert found.stats.nreject - plain.stats.nreject <= 2 * 3
    preset = sa.solve(prob, sa.Tsit5(), rtol=1e-8, atol=1e-8, probe="off",
                      events=sa.PresetTimes([1.0, 2.0], lambda t, u, p: u))
    assert preset.stats.nreject == plain.stats.nreject
    assert lambda_counts(numpy_lab) == (6, 5)


def lambda_counts(lab):
    """Products that one state event and one preset event add to a gradient, beyond 6 for each accepted step."""
    xp = lab.xp
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([u[1], -p[0] * u[0]]), lab.array([0.1, 1.0]), (0.0, 4.0),
                         lab.array([1.0]))
    extra = []
    for event in (sa.Event(lambda t, u, p: u[0]), sa.PresetTimes([1.0], lambda t, u, p: u)):
        r = sa.gradient(prob, sa.Tsit5(), lambda s: (s.u ** 2).sum(), events=event)
        extra.append(r.stats.nvjp - 6 * r.stats.naccept)
    # A state event takes 5 more for the derivative of its condition along the step; a first slope behind it, and none
    # of its last one, cancel.
    return extra[0] + 1, extra[1] + 5


# -- what has no derivative, and mistakes -----------------------------------------------------------------------------


def test_an_output_on_an_event_has_no_gradient(lab):
    xp = lab.xp
    prob = sa.ODEProblem(lambda t, u, p: 0.0 * u + 1.0, lab.array([0.0]), (0.0, 2.0))
    event = sa.Event(lambda t, u, p: u[0] - 1.0, lambda t, u, p: 2.0 * u)
    assert lab.numpy(sa.solve(prob, sa.Tsit5(), saveat=[1.0], events=event).u)[0, 0] == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(sa.SolveError, match="exactly on an event") as e:
        sa.gradient(prob, sa.Tsit5(), lambda s: xp.sum(s.u), saveat=[1.0], events=event)
    assert e.value.retcode == sa.RetCode.EventAtSaveTime


def test_simultaneous_events_have_no_gradient(lab):
    xp = lab.xp
    prob = sa.ODEProblem(lambda t, u, p: 0.0 * u + 1.0, lab.array([0.0, 0.0]), (0.0, 2.0))
    events = [sa.Event(lambda t, u, p: u[0] - 1.0, lambda t, u, p: u * lab.array([1.0, 3.0])),
              sa.Event(lambda t, u, p: t - 1.0, lambda t, u, p: u + lab.array([0.0, 2.0]))]
    with pytest.raises(sa.SolveError, match="two events happen at one time"):
        sa.gradient(prob, sa.Tsit5(), lambda s: xp.sum(s.u), events=events)


def test_a_grazing_event_has_no_gradient(numpy_lab):
    prob = sa.ODEProblem(lambda t, u, p: np.array([3.0 * (t - 1.0) ** 2]), np.array([-1.0]), (0.0, 2.0))
    with pytest.raises(sa.SolveError, match="grazes"):
        sa.gradient(prob, sa.Tsit5(), lambda s: s.events.t[0], events=sa.Event(lambda t, u, p: u[0]),
                    sensealg=sa.RecursiveCheckpointAdjoint(vjp=sa.FiniteDifferenceVJP()), **TIGHT)


def test_events_that_accumulate(lab):
    xp = lab.xp
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([u[1], 0.0 * u[0] - 10.0]), lab.array([1.0, 0.0]), (0.0, 5.0))
    floor = sa.Event(lambda t, u, p: u[0], lambda t, u, p: xp.stack([0.0 * u[0], -0.5 * u[1]]), direction=-1)
    with pytest.raises(sa.SolveError, match="max_events=12") as e:
        sa.solve(prob, sa.Tsit5(), events=floor, max_events=12)
    assert e.value.retcode == sa.RetCode.MaxEvents


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: sa.Event(1.0), sa.InputError, "condition is float"),
    (lambda: sa.Event(lambda t, u, p: u[0], direction=2), sa.InputError, "direction=2"),
    (lambda: sa.PresetTimes([1.0], None), sa.InputError, "affect is NoneType"),
    (lambda: "event", sa.InputError, r"events\[0\] is str"),
    (lambda: sa.Event(lambda t, u, p: u), sa.OutputError, r"condition returned shape \(2,\)"),
    (lambda: sa.Event(lambda t, u, p: u[0], lambda t, u, p: u[:1]), sa.OutputError, "affect returned shapes"),
    (lambda: sa.Event(lambda t, u, p: u[0], lambda t, u, p: (u, p)), sa.InputError, "nothing to change"),
    (lambda: sa.PresetTimes(1.0, lambda t, u, p: u), sa.TimesError, "expected a vector"),
    (lambda: sa.PresetTimes([0.0], lambda t, u, p: u), sa.TimesError, "start of tspan"),
    (lambda: sa.PresetTimes([1.0, 1.0], lambda t, u, p: u), sa.TimesError, "two preset events"),
])
def test_mistakes(lab, make, error, words):
    with pytest.raises(error, match=words):
        sa.solve(oscillator(lab), sa.Tsit5(), events=make())


def test_captured_tensors_are_refused(torch_lab):
    import torch

    level = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(sa.CapturedValueError, match="condition"):
        sa.solve(oscillator(torch_lab), sa.Tsit5(), events=sa.Event(lambda t, u, p: u[0] - level))


def test_jax_closures_are_differentiated(jax_lab):
    import jax

    prob = oscillator(jax_lab, 3.0)

    def when(level):
        return sa.solve(prob, sa.Tsit5(), events=sa.Event(lambda t, u, p: u[0] - level), max_events=2,
                        rtol=1e-10, atol=1e-12).events.t[0]

    # sin t = level
    assert float(jax.grad(when)(0.5)) == pytest.approx(1.0 / math.sqrt(0.75), rel=1e-8)


def test_differences_of_an_affect_are_said_aloud(numpy_lab):
    """An affect that leaves autograd's namespace is differentiated by differences, with a warning, and right."""
    xp = numpy_lab.xp
    prob = sa.ODEProblem(lambda t, u, p: xp.stack([u[1], -p[0] * u[0]]), np.array([0.1, 1.0]), (0.0, 4.0), np.ones(1))
    by_hand = sa.Event(lambda t, u, p: u[0], lambda t, u, p: np.array([float(u[0]), 0.5 * float(u[1])]))
    in_namespace = sa.Event(lambda t, u, p: u[0], lambda t, u, p: xp.stack([u[0], 0.5 * u[1]]))
    with pytest.warns(sa.NumericalDerivativeWarning, match="condition or affect"):
        a = sa.gradient(prob, sa.Tsit5(), lambda s: (s.u ** 2).sum(), events=by_hand)
    b = sa.gradient(prob, sa.Tsit5(), lambda s: (s.u ** 2).sum(), events=in_namespace)
    assert a.u0 == pytest.approx(b.u0, rel=1e-7)
    assert a.p == pytest.approx(b.p, rel=1e-7)
