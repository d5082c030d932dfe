"""Delay equations within a budget of memory: stretches of history as checkpoints.

The gradient is that of keeping everything, which `test_dde.py` holds against independent truth; the steps taken again
are counted here by a second implementation, from the definition.
"""

import tracemalloc

import numpy as np
import pytest

import sensitivity as sa

U0, P = [1.0, 0.5], [0.8, 1.1, 0.6, 0.13, 0.2]
T0, T1 = 0.2, 5.0
TIMES = [0.2, 5.0, 3.31, 0.75, 3.31, 4.2]
ALL = ("u0", "p", "t0", "t1", "saveat")
SAVES = {"end": None, "even": 4, "steps": "steps", "times": TIMES}
METHODS = {"Tsit5": (sa.Tsit5(), {"rtol": 1e-5}), "RK4": (sa.RK4(), {"dt": 0.1}),
           "Kvaerno3": (sa.Kvaerno3(), {"rtol": 1e-3}), "Rodas5P": (sa.Rodas5P(), {"rtol": 1e-4})}
KEEP = sa.RecursiveCheckpointAdjoint


def problem(lab, calls=None, tspan=(T0, T1)):
    """Two lags that are parameters, a history with parameters that does not join u0, time in f."""
    xp = lab.xp

    def f(t, u, h, p):
        if calls is not None:
            calls.append(1)
        v, w = h(t - p[3]), h(t - p[4])
        return xp.stack([p[0] * v[1] / (1.0 + w[0] ** 2) - p[1] * u[0] + 0.4 * xp.sin(p[2] * t),
                         p[2] * w[0] * u[0] - u[1] * u[1] * p[0] - 0.3 * v[1] + 0.2])

    return sa.DDEProblem(f, lab.array(U0), lambda t, p: xp.stack([p[2] * xp.cos(t), 0.3 + p[0] * t * t]),
                         tuple(lab.array(t) for t in tspan), lab.array(P), lags=lambda p: [p[3], p[4]])


def gradients(lab, method, saves, *budgets):
    alg, options = METHODS[method]
    at = SAVES[saves]
    options = {**options, "saveat": lab.array(at) if isinstance(at, list) else at, "max_steps": 300}
    return [sa.gradient(problem(lab), alg, lambda sol: (sol.u**3).sum(), sensealg=KEEP(**budget),
                        wrt=ALL if saves == "times" else ALL[:4], **options) for budget in ({}, *budgets)]


def memory_for(records, stages, copies=2):
    """Bytes that hold so many steps of two numbers, see `budget.room`."""
    return (8 + copies * records) * (stages + 1) * 16 + 1


def same(lab, whole, few, names):
    assert float(few.value) == pytest.approx(float(whole.value), rel=1e-14)
    scale = np.max(np.abs(lab.numpy(whole.u0)))
    for name in names:
        np.testing.assert_allclose(lab.numpy(getattr(few, name)), lab.numpy(getattr(whole, name)), rtol=1e-13,
                                   atol=1e-13 * scale, err_msg=name)
    assert few.stats.nvjp == whole.stats.nvjp


def taken_again(nodes, longest, records=None, stretches=None):
    """From the definition: how many steps a reverse pass takes again, and the most records that were held."""
    starts, every, most = np.asarray(nodes[:-1]), 1, 0

    def reach(n):
        return max(np.count_nonzero(starts[:n] < starts[n] - longest) - 1, 0)

    def held(count):
        kept = set(range(reach(count - 1), count))
        for a in range(0, count, every):
            kept |= set(range(reach(a), a + 1))
        return kept

    for count in range(1, len(starts) + 1):
        while (-(-count // every) > stretches if records is None
               else len(held(count)) + min(every, count) >= records):
            assert every < count
            every *= 2
        most = max(most, len(held(count)))
    kept, taken = held(len(starts)), 0
    for a in range(0, len(starts), every):
        missing = set(range(a, min(a + every, len(starts)))) - kept
        taken += len(missing) + 1 if missing else 0
    return taken, most


@pytest.mark.parametrize(("method", "saves"), [*(("RK4", name) for name in SAVES), ("Tsit5", "times"),
                                               ("Kvaerno3", "times"), ("Rodas5P", "even")])
def test_the_gradient_is_that_of_keeping_everything(numpy_lab, method, saves):
    """With one stretch, with few, with a memory for some steps, and with one for all."""
    stages, records = {"RK4": (5, 40), "Tsit5": (7, 36), "Kvaerno3": (4, 30), "Rodas5P": (8, 36)}[method]
    budgets = {"checkpoints": 1}, {"checkpoints": 5}, {"memory": memory_for(records, stages)}, {"memory": "1GB"}
    whole, *others = gradients(numpy_lab, method, saves, *budgets)
    for budget, few in zip(budgets, others, strict=True):
        same(numpy_lab, whole, few, ALL if saves == "times" else ALL[:4])
        assert (few.stats.nfe == whole.stats.nfe) == (budget == {"memory": "1GB"}), budget


def test_in_every_framework(lab):
    whole, few = gradients(lab, "RK4", "times", {"memory": memory_for(40, 5, 3 if lab.name == "jax" else 2)})
    same(lab, whole, few, ALL)
    nodes = sa.solve(problem(lab), sa.RK4(), dt=0.1, saveat="steps", max_steps=300).t
    nodes = lab.numpy(nodes)[: few.stats.naccept]
    taken, most = taken_again([T0, *nodes], P[4], records=40)
    assert taken > 0
    assert most < 40 < few.stats.naccept
    assert few.stats.nfe == whole.stats.nfe + 5 * taken


@pytest.mark.parametrize(("method", "stretches"), [("RK4", 2), ("RK4", 100), ("Tsit5", 1), ("Tsit5", 7)])
def test_evaluations_are_those_of_theory(numpy_lab, method, stretches):
    """Each step that is missing is taken once more, and the first one of each segment that lacks some; every stage of
    such a step is an evaluation, as the first slope looks back from the step itself."""
    alg, options = METHODS[method]
    calls = []
    prob = problem(numpy_lab, calls)
    nodes = [T0, *sa.solve(prob, alg, saveat="steps", **options).t]
    calls.clear()
    r = sa.gradient(prob, alg, lambda sol: 0.0, dloss=lambda sol: np.ones_like(sol.u), probe="off", **options,
                    sensealg=KEEP(checkpoints=stretches, vjp=sa.ReverseVJP()))
    taken, _ = taken_again(nodes, P[4], stretches=stretches)
    stages, start = (7, 2) if method == "Tsit5" else (5, 0)  # one of RK4's five is for its dense output
    assert r.stats.nfe == stages * (r.stats.naccept + r.stats.nreject + taken) + start
    assert (taken == 0) == (stretches == 100)
    assert taken < 1.1 * r.stats.naccept
    # A product evaluates f too.
    assert len(calls) == r.stats.nfe + r.stats.nvjp


def test_iterations_of_implicit_steps_are_counted(numpy_lab):
    alg, options = METHODS["Kvaerno3"]
    calls = []
    whole, few = (sa.gradient(problem(numpy_lab, calls), alg, lambda sol: 0.0, dloss=lambda sol: np.ones_like(sol.u),
                              probe="off", sensealg=s, **options).stats for s in (KEEP(), KEEP(checkpoints=1)))
    assert few.nfe > 1.8 * whole.nfe  # all steps but those of the last stretch, with their iterations
    assert few.nlu > whole.nlu
    assert few.nvjp == whole.nvjp


def test_tangents_through_steps_taken_again(lab):
    """Forward mode takes all steps once more: column sums of the Jacobian by rows and by columns."""
    if lab.name == "jax":
        pytest.skip("compiled below, with vmap")
    prob = problem(lab)
    memory = memory_for(40, 5)
    w = lab.array(np.cos(np.arange(1.0, 7.0)).reshape(3, 2))
    options = {"saveat": lab.array([0.5, 5.0, 1.7]), "dt": 0.1, "sensealg": KEEP(memory=memory)}
    r = sa.gradient(prob, sa.RK4(), lambda sol: lab.xp.sum(w * sol.u), **options)
    _, S = sa.forward_sensitivities(prob, sa.RK4(), wrt="p", **options)
    np.testing.assert_allclose(np.einsum("kn,knp->p", lab.numpy(w), lab.numpy(S)), lab.numpy(r.p), rtol=1e-12)


@pytest.mark.slow  # for JAX's compiler
def test_lanes_and_tangents_on_jax(jax_lab):
    """Each lane has its own steps and segments; `jvp` takes all steps again."""
    import jax

    jnp = jax.numpy
    prob = problem(jax_lab)

    def total(p, sensealg):
        return (sa.solve(prob.remake(p=p), sa.BS3(), rtol=1e-3, max_steps=120, sensealg=sensealg).u**3).sum()

    p = jnp.asarray(P) * jnp.asarray([[1.0], [1.3]])
    budget = KEEP(memory=memory_for(36, 4, 3))
    few, whole = (jax.jit(jax.vmap(jax.grad(lambda p, s=s: total(p, s))))(p) for s in (budget, KEEP()))
    np.testing.assert_allclose(few, whole, rtol=1e-12)
    d = jnp.asarray([0.3, -1.0, 0.5, 0.1, 0.2])
    tangent = jax.jit(lambda p: jax.jvp(lambda p: total(p, budget), (p,), (d,))[1])(p[0])
    np.testing.assert_allclose(tangent, few[0] @ d, rtol=1e-11)


def test_backward_twice_on_torch(torch_lab):
    """The second pass finds what the first one found."""
    import torch

    prob = problem(torch_lab)

    def total(p, sensealg):
        return (sa.solve(prob.remake(p=p), sa.RK4(), dt=0.1, sensealg=sensealg).u ** 3).sum()

    p = torch.tensor(P, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(total(p, KEEP()), p)
    loss = total(p, KEEP(memory=memory_for(40, 5)))
    for keep in (True, False):
        np.testing.assert_allclose(torch.autograd.grad(loss, p, retain_graph=keep)[0], whole, rtol=1e-13)


def test_a_lag_longer_than_the_solve(numpy_lab):
    """Everything is history: a stretch is nothing but the steps so far, and no step is missing for want of room."""
    prob = sa.DDEProblem(lambda t, u, h, p: -p[0] * h(t - p[1]) * u, np.array([0.4]),
                         lambda t, p: numpy_lab.xp.stack([1.0 + t * p[0]]), (0.0, 1.7), np.array([1.2, 2.5]),
                         lags=lambda p: [p[1]])
    whole, few = (sa.gradient(prob, sa.RK4(), lambda sol: sol.u.sum(), dt=0.1, sensealg=s)
                  for s in (KEEP(), KEEP(checkpoints=2)))
    same(numpy_lab, whole, few, ("u0", "p"))
    assert few.stats.nfe == whole.stats.nfe


# -- memory -------------------------------------------------------------------------------------------------------


def wide(xp, n, u0):
    return sa.DDEProblem(lambda t, u, h, p: p[0] * xp.roll(h(t - p[1]), 1) - u + xp.sin(t), u0,
                         lambda t, p: p[0] * xp.ones(n), (0.0, 8.0), xp.array([0.9, 0.05]), lags=lambda p: [p[1]])


def test_memory_is_respected(numpy_lab):
    """The peak of everything NumPy and Python allocate stays below the budget; without one it is far above."""
    prob, peaks, grads = wide(numpy_lab.xp, 1000, np.linspace(-1.0, 1.0, 1000)), [], []
    options = {"loss": lambda sol: 0.0, "dloss": lambda sol: np.ones_like(sol.u), "dt": 0.04}
    for sensealg in (KEEP(memory="7MB"), KEEP()):
        sa.gradient(prob.remake(tspan=(0.0, 0.1)), sa.RK4(), sensealg=sensealg, **options)
        tracemalloc.start()
        grads.append(sa.gradient(prob, sa.RK4(), sensealg=sensealg, **options))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 7e6 < 1e7 < peaks[1]
    np.testing.assert_array_equal(grads[0].u0, grads[1].u0)
    np.testing.assert_array_equal(grads[0].p, grads[1].p)
    assert grads[0].stats.nfe > 1.5 * grads[1].stats.nfe


@pytest.mark.slow  # for JAX's compiler
def test_memory_is_respected_in_compiled_code(jax_lab):
    """What the compiled gradient needs beside its arguments and results, as XLA counts it."""
    import jax

    n, steps = 500, 250
    prob = wide(jax.numpy, n, jax.numpy.linspace(-1.0, 1.0, n))

    def temporary(sensealg):
        def total(u0, p):
            return sa.solve(prob.remake(u0=u0, p=p), sa.RK4(), dt=0.04, max_steps=steps, sensealg=sensealg).u.sum()

        compiled = jax.jit(jax.grad(total, (0, 1))).lower(prob.u0, prob.p).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(KEEP(memory="3MB")) < 3e6 + 20 * steps
    assert temporary(KEEP()) > 9e6


# -- refusals -----------------------------------------------------------------------------------------------------


def test_too_little_memory(lab):
    with pytest.raises(sa.InputError, match="too little for 2 unknowns"):
        sa.solve(problem(lab), sa.RK4(), dt=0.1, sensealg=KEEP(memory=1000))
    with pytest.raises(sa.SolveError, match="later steps look back") as e:
        sa.solve(problem(lab), sa.RK4(), dt=0.1, max_steps=300, sensealg=KEEP(memory=3500))
    assert e.value.retcode == sa.RetCode.Memory


def test_what_a_budget_does_not_go_with(numpy_lab, tmp_path):
    prob = problem(numpy_lab)
    for sensealg, options, says in (
        (KEEP(spill=tmp_path), {}, "look back at whole steps"),
        (KEEP(checkpoints=3), {"dense": True}, "dense=True"),
    ):
        with pytest.raises(sa.UnsupportedCombination, match=says):
            sa.solve(prob, sa.Tsit5(), sensealg=sensealg, **options)
    with pytest.raises(sa.UnsupportedCombination, match="how far later steps look back is not known"):
        sa.solve(prob.remake(lags=lambda t, u, p: [p[3], p[4]]), sa.Tsit5(), sensealg=KEEP(checkpoints=3))


def test_a_number_of_stretches_on_a_tracing_backend(jax_lab):
    with pytest.raises(sa.UnsupportedCombination, match="how many steps a lag is long"):
        sa.solve(problem(jax_lab), sa.Tsit5(), sensealg=KEEP(checkpoints=3))


def test_advice_within_a_budget(numpy_lab):
    """The discrete adjoint with a budget is what is advised; the others would keep more."""
    memory = memory_for(56, 5)
    prob = problem(numpy_lab, tspan=(T0, 12.0))
    advice = sa.advise(prob, sa.RK4(), dt=0.1, memory=memory)
    assert advice.sensealg.name == "RecursiveCheckpointAdjoint"
    assert advice.sensealg.memory == memory
    r, want = (sa.gradient(prob, sa.RK4(), lambda sol: sol.u.sum(), dt=0.1, sensealg=s)
               for s in (advice.sensealg, KEEP()))
    assert r.stats.nfe > want.stats.nfe
    np.testing.assert_allclose(r.p, want.p, rtol=1e-13)
