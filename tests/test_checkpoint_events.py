"""Budgets with events: a step that ends on one is retaken to end on it, and the next starts behind its affect."""

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.checkpoint import advances

NAMES = ("u0", "p", "t0", "t1")
FIXED = {"controller": sa.FixedStep()}


def ball(lab, calls=None):
    """A ball that bounces and loses `p[1]`, with drag `p[2]`."""
    xp = lab.xp

    def f(t, u, p):
        if calls is not None:
            calls.append(1)
        return xp.stack([u[1], -p[0] - p[2] * u[1] * xp.cos(t * p[1])])

    bounce = sa.Event(lambda t, u, p: u[0], affect=lambda t, u, p: xp.stack([0.0 * u[0], -p[1] * u[1]]), direction=-1)
    return sa.ODEProblem(f, lab.array([1.0, 0.3]), (0.05, 2.0), lab.array([9.81, 0.8, 0.1])), [bounce]


def dose(lab):
    """Doses at a given time, at one that is a parameter, and a rate that each of the latter changes."""
    xp = lab.xp

    def given(t, u, p):
        return xp.stack([u[0] + p[2], u[1] * p[0]])

    def changed(t, u, p):
        return xp.stack([u[0], u[1] + t * p[1]]), xp.stack([p[0] * 1.3, p[1], p[2], p[3]])

    prob = sa.ODEProblem(lambda t, u, p: xp.stack([-p[0] * u[0] * u[1], p[0] * u[0] - p[1] * u[1]]),
                         lab.array([1.0, 0.3]), (0.0, 2.0), lab.array([0.7, 0.4, 0.9, 1.3]))
    return prob, [sa.PresetTimes([0.6], given), sa.PresetTimes(lambda p: [p[3]], changed)]


def ended(lab):
    prob, (bounce,) = ball(lab)
    return prob, [sa.Event(lambda t, u, p: u[0] - p[1] * 0.1, direction=-1, terminal=True), bounce]


CASES = {"bounces": ball, "doses": dose, "terminal": ended}


def seen(sol):
    """States, and times and states of events."""
    t, u = sol.events.t, sol.events.u
    return (sol.u[-1] ** 3).sum() + (t[:1] ** 2).sum() + (u[:1] ** 2).sum()


TSIT5 = sa.Tsit5()


def both(lab, case, budget, alg=TSIT5, **options):
    prob, events = CASES[case](lab)
    return [sa.gradient(prob, alg, loss=seen, sensealg=s, events=events, wrt=NAMES, **{"rtol": 1e-7, **options})
            for s in (sa.RecursiveCheckpointAdjoint(), sa.RecursiveCheckpointAdjoint(**budget))]


@pytest.mark.parametrize("budget", [{"checkpoints": 1}, {"checkpoints": 4}, {"memory": 3500}, {"spill": True}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_numpy_gradient_is_the_same_to_the_last_bit(numpy_lab, case, budget):
    for options in ({}, {"saveat": None if case == "terminal" else 4}, {"saveat": "steps"}):
        whole, few = both(numpy_lab, case, budget, **options)
        assert few.value == whole.value
        for name in NAMES:
            np.testing.assert_array_equal(getattr(few, name), getattr(whole, name), err_msg=f"{name} {options}")
        assert few.stats.nvjp == whole.stats.nvjp
        assert "memory" in budget or few.stats.nfe > whole.stats.nfe


@pytest.mark.parametrize("case", ["bounces", "doses"])
def test_event_gradient_is_that_of_keeping_everything(lab, case):
    whole, few = both(lab, case, {"checkpoints": 2}, saveat=4)
    for name in NAMES:
        np.testing.assert_allclose(lab.numpy(getattr(few, name)), lab.numpy(getattr(whole, name)), rtol=1e-12,
                                   atol=1e-13, err_msg=name)
    assert few.stats.nfe > whole.stats.nfe


@pytest.mark.parametrize("alg", [sa.Kvaerno3(), sa.Rodas5P()], ids=lambda a: a.name)
def test_implicit_steps_over_events(numpy_lab, alg):
    whole, few = both(numpy_lab, "doses", {"checkpoints": 2}, alg, rtol=1e-4)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(few, name), getattr(whole, name), err_msg=name)
    assert few.stats.nlu > whole.stats.nlu


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_counts_are_those_of_theory(numpy_lab, slots):
    """Fixed steps, of which the bounces cut some short; known and unknown numbers of steps take as many again here."""
    calls = []
    prob, events = ball(numpy_lab, calls)
    options = {"loss": seen, "events": events, "dt": 0.15, "probe": "off", **FIXED}
    counted = []
    for budget in ({}, {"checkpoints": slots}):
        calls.clear()
        sensealg = sa.RecursiveCheckpointAdjoint(vjp=sa.ReverseVJP(), **budget)
        r = sa.gradient(prob, sa.RK4(), sensealg=sensealg, **options)
        counted.append((r.stats, len(calls)))
    (whole, before), (few, after) = counted
    assert few.nfe - whole.nfe == after - before
    steps, again = whole.naccept, (few.nfe - whole.nfe) / 4
    assert advances(steps, slots) <= again <= 4 / 3 * advances(steps, slots) + 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_within_a_budget(torch_lab):
    """Tangents over events through the steps taken once more."""
    import torch

    prob, events = ball(torch_lab)
    few = sa.RecursiveCheckpointAdjoint(checkpoints=2)

    def total(p):
        return seen(sa.solve(prob.remake(p=p), sa.Tsit5(), rtol=1e-7, sensealg=few, events=events))

    v = torch_lab.array([0.3, -0.5, 1.0])
    g, along = torch.func.grad(total)(prob.p), torch.func.jvp(total, (prob.p,), (v,))[1]
    np.testing.assert_allclose(float(along), float(g @ v), rtol=1e-10)
