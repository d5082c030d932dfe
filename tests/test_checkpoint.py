"""Checkpoint schedules against theory, and gradients within a budget against those that keep everything."""

import importlib.util
import subprocess
import sys
import tracemalloc
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.algorithms import budget as budgets
from sensitivity.checkpoint import Plan, advances, beta, offline, online, repetitions, reverse, split
from sensitivity.testing.harness import Harness
from sensitivity.testing.solves import check_adjoint_identity

STEPS, SLOTS = (*range(1, 41), 64, 65, 127, 200), (1, 2, 3, 4, 7, 12, 39, 250)


@cache
def fewest(steps, slots):
    """Steps taken beside those reversed, by Bellman's principle over all places of the next state."""
    if steps <= 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(m + fewest(steps - m, slots - 1) + fewest(m, slots) for m in range(1, steps))


def held_after(places, steps):
    """Which states lie in which slots after a solve, the newest one aside."""
    held = {}
    for step, slot in zip(range(steps), places, strict=False):
        if slot >= 0:
            held[slot] = step
    return {slot: step for slot, step in held.items() if step < steps - 1}


def perform(steps, slots, held, block=1):
    """Perform a reverse pass with numbers for states: `(steps taken, most often taken beside reversals)`."""
    memory, here, due, taken, whole = dict(held), None, steps - 1, 0, set()
    often = [1] * (steps - 1) + [0]
    for kind, step, slot in reverse(steps, slots, held, block):
        # Where its number is not known beforehand, the newest block has a state of its own.
        assert len({s for s in memory.values() if s <= due and s < steps - 1}) <= slots + (block > 1)
        if kind == "restore":
            here = memory[slot]
            assert here == step
        elif kind == "store":
            assert here == step
            assert 0 <= slot <= slots
            memory[slot] = here
        elif kind == "advance":
            assert here == step
            here, taken = here + 1, taken + 1
            often[step] += 1
        elif kind == "hold":
            assert here == step
            here, taken = here + 1, taken + 1
            whole.add(step)
            assert len(whole) < block
        else:
            assert step == due
            assert here == step or step == steps - 1 or step in whole
            due -= 1
            taken += step < steps - 1 and step not in whole
            whole.discard(step)
    assert due == -1
    return taken, max(often)


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7, 12, 39])
def test_closed_form_is_the_minimum(slots):
    for steps in range(1, 66):
        assert advances(steps, slots) == fewest(steps, slots)
        r = repetitions(steps, slots)
        assert beta(slots, r - 1) < steps <= beta(slots, r)
        if slots > 1 and steps > 1:
            m = split(steps, slots)
            assert m + fewest(steps - m, slots - 1) + fewest(m, slots) == fewest(steps, slots)


@pytest.mark.parametrize(("steps", "slots"), [(10, 3), (56, 5), (1000, 10), (1000, 30), (10**6, 100)])
def test_binomial_numbers(steps, slots):
    """Griewank, Walther 2000: 56 steps go through 3 states with at most 5 repetitions, as beta(3, 5) = 56."""
    r = repetitions(steps, slots)
    assert advances(steps, slots) == r * steps - beta(slots + 1, r - 1)
    assert (repetitions(56, 3), repetitions(57, 3), advances(56, 3)) == (5, 6, 5 * 56 - 70)


@pytest.mark.parametrize("slots", SLOTS)
def test_offline_takes_exactly_as_many_steps_as_theory_says(slots):
    for steps in STEPS:
        taken, _ = perform(steps, slots, held_after(offline(steps, slots), steps))
        assert taken == advances(steps, slots)


@pytest.mark.parametrize("slots", SLOTS)
def test_online_repeats_no_step_more_often_than_the_bound(slots):
    """The bound is on repetitions; the sum over all steps was never seen above 4/3 of the optimum."""
    for steps in STEPS:
        held = held_after(online(slots), steps)
        assert len(held) <= slots
        taken, often = perform(steps, slots, held)
        assert often <= max(repetitions(steps, slots), 1)
        assert 3 * taken <= 4 * advances(steps, slots) + 1


@pytest.mark.parametrize("block", [2, 5, 16])
@pytest.mark.parametrize("slots", SLOTS)
def test_blocks_are_reversed_as_steps_are(slots, block):
    """As steps of a solve with as many steps as blocks, of which the newest has one step."""
    for steps in STEPS:
        for known in (steps, None):
            plan, blocks = Plan(slots, known, block=block), 1 + -(-(steps - 1) // block)
            taken, often = perform(steps, slots, held_after(plan.places(), steps), block)
            assert often <= max(repetitions(blocks, slots), 1)
            if known is not None:
                assert taken <= block * advances(blocks, slots)
            if blocks <= slots + 1:
                assert taken == steps - 1


def test_plan_is_offline_where_the_number_of_steps_is_known():
    assert list(islice(Plan(3, 20).places(), 25)) == [*offline(20, 3), *[-1] * 5]
    assert list(islice(Plan(3).places(), 25)) == list(islice(online(3), 25))


# -- gradients ---------------------------------------------------------------------------------------------------


U0, P = [1.0, 0.5, -0.25], [1.5, 0.7, 0.3]
ALL = ("u0", "p", "t0", "t1", "saveat")
SAVES = {"end": None, "even": 4, "steps": "steps", "times": [2.0, 0.3, 1.7, 1.1, 0.3]}
METHODS = {"Tsit5": (sa.Tsit5(), {"rtol": 1e-6}), "RK4": (sa.RK4(), {"dt": 0.1})}


def problem(lab, calls=None, u0=U0):
    xp = lab.xp

    def f(t, u, p):
        if calls is not None:
            calls.append(1)
        x, y, z = u[0], u[1], u[2]
        return xp.stack([p[0] * y * z + xp.cos(p[1] * t), -p[2] * x * z - t * y * p[0], p[1] * x * y - z * z * p[2]])

    return sa.ODEProblem(f, lab.array(u0), (0.25, 2.0), lab.array(P))


def loss(sol):
    return (sol.u ** 3).sum()


def compared(lab, method, saves, sensealg):
    """The gradient with everything kept and the one within a budget."""
    alg, options = METHODS[method]
    at = SAVES[saves]
    options = {**options, "saveat": lab.array(at) if isinstance(at, list) else at,
               "wrt": ALL if isinstance(at, list) else ALL[:4]}
    return [sa.gradient(problem(lab), alg, loss=loss, sensealg=s, **options)
            for s in (sa.RecursiveCheckpointAdjoint(), sensealg)]


@pytest.mark.parametrize("budget", [{"checkpoints": 2}, {"checkpoints": 10**6}, {"memory": 2000},
                                    {"memory": "1GB"}, {"spill": True}], ids=str)
@pytest.mark.parametrize("saves", SAVES)
@pytest.mark.parametrize("method", METHODS)
def test_numpy_gradient_is_the_same_to_the_last_bit(numpy_lab, method, saves, budget):
    whole, few = compared(numpy_lab, method, saves, sa.RecursiveCheckpointAdjoint(**budget))
    assert few.value == whole.value
    for name in ALL if saves == "times" else ALL[:4]:
        np.testing.assert_array_equal(getattr(few, name), getattr(whole, name), err_msg=name)
    assert few.stats.nvjp == whole.stats.nvjp
    assert (few.stats.nfe == whole.stats.nfe) == (budget == {"memory": "1GB"})


@pytest.mark.parametrize("saves", SAVES)
def test_gradient_is_that_of_keeping_everything(lab, saves):
    whole, few = compared(lab, "Tsit5", saves, sa.RecursiveCheckpointAdjoint(checkpoints=3))
    for name in ALL if saves == "times" else ALL[:4]:
        np.testing.assert_allclose(lab.numpy(getattr(few, name)), lab.numpy(getattr(whole, name)), rtol=1e-13,
                                   atol=1e-14, err_msg=name)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("budget", [{"checkpoints": 3}, {"memory": "10KB"}], ids=str)
def test_tangents_are_the_transpose(backend, budget):
    """`<reverse(ct), d> == <ct, tangent(d)>`; JAX has a test of its own, compiled once."""
    pytest.importorskip(backend)
    check_adjoint_identity(Harness(backend), sa.RecursiveCheckpointAdjoint(**budget))


@pytest.mark.parametrize("slots", [1, 2, 5, 34, 100])
def test_evaluations_are_those_of_theory(numpy_lab, slots):
    """35 steps of known number: the reverse pass takes t(35, c) of them, each with all its stages."""
    for alg, stages in ((sa.Euler(), 1), (sa.RK4(), 4)):
        calls = []
        r = sa.gradient(problem(numpy_lab, calls), alg, dt=0.05, loss=loss, probe="off",
                        sensealg=sa.RecursiveCheckpointAdjoint(checkpoints=slots, vjp=sa.ReverseVJP()))
        assert r.stats.naccept == 35
        assert r.stats.nfe == stages * (35 + advances(35, slots))
        assert r.stats.nvjp == stages * 35
        # Each product evaluates f as well; the automatic choice is not asked.
        assert len(calls) == r.stats.nfe + r.stats.nvjp


@pytest.mark.parametrize("slots", [1, 4])
def test_adaptive_evaluations_are_counted(numpy_lab, slots):
    """First-same-as-last: a step taken again costs one evaluation less than it has stages."""
    calls = []
    r = sa.gradient(problem(numpy_lab, calls), sa.Tsit5(), rtol=1e-9, loss=loss, probe="off",
                    sensealg=sa.RecursiveCheckpointAdjoint(checkpoints=slots, vjp=sa.ReverseVJP()))
    steps = r.stats.naccept
    taken, _ = perform(steps, slots, held_after(online(slots), steps))
    assert r.stats.nfe == 2 + 6 * (steps + r.stats.nreject) + 6 * taken
    assert len(calls) == r.stats.nfe + r.stats.nvjp


def wide(n):
    """A chain of `n` oscillators with its products, for memory."""

    def f(t, u, p):
        return p[0] * np.roll(u, 1) - u + np.sin(t)

    def vjp(t, u, p, lam):
        return p[0] * np.roll(lam, -1) - lam, np.array([lam @ np.roll(u, 1)])

    return sa.ODEProblem(f, np.linspace(-1.0, 1.0, n), (0.0, 30.0), np.array([0.9]), vjp=vjp)


def test_memory_is_respected():
    """The peak of everything NumPy and Python allocate stays below the budget; without one it is far above."""
    prob, peaks, grads = wide(2000), [], []
    options = {"loss": lambda sol: 0.0, "dloss": lambda sol: np.ones_like(sol.u), "rtol": 1e-7}
    for sensealg in (sa.RecursiveCheckpointAdjoint(memory="2MB"), sa.RecursiveCheckpointAdjoint()):
        sa.gradient(prob.remake(tspan=(0.0, 0.1)), sa.Tsit5(), sensealg=sensealg, **options)
        tracemalloc.start()
        grads.append(sa.gradient(prob, sa.Tsit5(), sensealg=sensealg, **options))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 2e6 < 8e6 < peaks[1]
    np.testing.assert_array_equal(grads[0].u0, grads[1].u0)
    np.testing.assert_array_equal(grads[0].p, grads[1].p)
    assert grads[0].stats.nfe > grads[1].stats.nfe


def test_spilled_states(lab, tmp_path):
    """Every step is taken again once, but the newest; the file has no name and is gone afterwards."""
    spilled = sa.RecursiveCheckpointAdjoint(spill=tmp_path)
    if lab.name == "jax":
        with pytest.raises(sa.UnsupportedCombination, match="write no files"):
            sa.gradient(problem(lab), sa.Tsit5(), loss=loss, sensealg=spilled)
        return
    few, whole = (sa.gradient(problem(lab), sa.Tsit5(), loss=loss, sensealg=s)
                  for s in (spilled, sa.RecursiveCheckpointAdjoint()))
    np.testing.assert_array_equal(lab.numpy(few.u0), lab.numpy(whole.u0))
    np.testing.assert_array_equal(lab.numpy(few.p), lab.numpy(whole.p))
    assert few.stats.nfe == whole.stats.nfe + 6 * (whole.stats.naccept - 1)
    assert not list(tmp_path.iterdir())


def test_spilling_needs_little_memory():
    sensealg = sa.RecursiveCheckpointAdjoint(spill=True)
    options = {"loss": lambda sol: 0.0, "dloss": lambda sol: np.ones_like(sol.u), "rtol": 1e-7, "sensealg": sensealg}
    sa.gradient(wide(2000).remake(tspan=(0.0, 0.1)), sa.Tsit5(), **options)
    tracemalloc.start()
    sa.gradient(wide(2000), sa.Tsit5(), **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2e6  # eight steps with their stages are 1.0e6


RESIDENT = """
import sys
from pathlib import Path
import numpy as np
import sensitivity as sa

torch = __import__("torch") if sys.argv[1] == "torch" else None
array, roll = (np.asarray, np.roll) if torch is None else (torch.as_tensor, torch.roll)

def gradient(t1, spill):
    prob = sa.ODEProblem(lambda t, u, p: p[0] * roll(u, 1) - u, array(np.linspace(-1.0, 1.0, 20_000)), (0.0, t1),
                         array([0.9]), vjp=None if torch else lambda t, u, p, ct: (
                             p[0] * np.roll(ct, -1) - ct, np.array([ct @ np.roll(u, 1)])))
    return sa.gradient(prob, sa.Euler(), lambda sol: sol.u.sum(), dloss=lambda sol: np.ones_like(sol.u), dt=0.01,
                       controller=sa.FixedStep(), sensealg=sa.RecursiveCheckpointAdjoint(spill=spill))

def peak():
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

gradient(0.1, True)
before = peak()
spilled = gradient(5.0, True)
between = peak()
whole = gradient(5.0, False)
assert (spilled.u0 == whole.u0).all() and (spilled.p == whole.p).all()
print(between - before, peak() - between)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of resident memory is read from /proc")
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_resident_memory_of_spilling(name):
    """500 states of 20,000 numbers are 76 MiB; resident at once are two blocks of the file, 4 MiB each."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the {name} backend is not there")
    out = subprocess.run([sys.executable, "-c", RESIDENT, name], capture_output=True, text=True, check=True)
    spilled, whole = map(float, out.stdout.split())
    assert spilled < 24 < 76 < whole


@pytest.mark.parametrize(("options", "named"), [
    ({"checkpoints": 0}, "checkpoints=0"), ({"checkpoints": True}, "checkpoints=True"),
    ({"checkpoints": 2.0}, "checkpoints=2.0"), ({"memory": "much"}, "memory='much'"), ({"memory": -5}, "memory=-5"),
    ({"memory": True}, "memory=True"), ({"checkpoints": 3, "memory": "1MB"}, "given together"),
    ({"spill": "/no/such/folder"}, "spill='/no/such/folder'"), ({"spill": 1}, "spill=1"),
    ({"spill": True, "checkpoints": 2}, "checkpoints=2 and spill=True are given together"),
])
def test_budgets_that_are_none(options, named):
    with pytest.raises(sa.InputError, match=named):
        sa.RecursiveCheckpointAdjoint(**options)


def test_memory_too_little_for_one_step(lab):
    with pytest.raises(sa.InputError, match="too little for 3 unknowns"):
        sa.gradient(problem(lab), sa.Tsit5(), loss=loss, sensealg=sa.RecursiveCheckpointAdjoint(memory="100B"))


def test_hidden_steps_do_not_go_with_a_budget(numpy_lab):
    few = sa.RecursiveCheckpointAdjoint(checkpoints=3)
    with pytest.raises(sa.UnsupportedCombination, match=r"ScipySolver.*\n.*keeps them to itself"):
        sa.gradient(problem(numpy_lab), sa.ScipySolver("LSODA"), loss=loss, sensealg=few)


def test_dense_output_does_not_go_with_a_budget(lab):
    sensealg = sa.RecursiveCheckpointAdjoint(checkpoints=3)
    with pytest.raises(sa.UnsupportedCombination, match="dense=True"):
        sa.solve(problem(lab), sa.Tsit5(), dense=True, sensealg=sensealg)
    sol = sa.solve(problem(lab), sa.Tsit5(), sensealg=sensealg)
    np.testing.assert_allclose(lab.numpy(sol(2.0)), lab.numpy(sol.u[-1]), rtol=1e-12)


@pytest.mark.parametrize("room", [3_000, 10_000, 100_000, 10**8])
@pytest.mark.parametrize("held", [300, 2_000, 400_000])
def test_blocks_are_the_smallest_that_are_taken_again_once(room, held):
    """Of a known number of steps; larger ones are taken as long as they stay in the cache, and half of the room if even
    these do not suffice."""
    state, most = 100, max(1, room // 2 // held)

    def reach(block):
        return block * budgets._slots(room, state, held, block)

    assert budgets._block(room, state, held, None) == most
    for steps in (1, 10, 100, 1_000, 10_000, 10**6):
        block = budgets._block(room, state, held, steps)
        smallest = next((b for b in range(1, most + 1) if reach(b) >= steps), most)
        assert block == max(smallest, min(most, budgets.CACHE // held))
