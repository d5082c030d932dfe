"""The automatic choice and `advise`: they agree, never take what refuses, and say why in words that are true."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.advice import spelled
from sensitivity.recommend import METHOD_RULES
from sensitivity.registry import algorithms as registered
from sensitivity.rules import PRODUCT_RULES, RULES, facts, rules
from sensitivity.solve import prepare_options

WRONG = 1.01


def plain_lotka(t, u, p):
    return np.array([p[0] * u[0] - p[1] * u[0] * u[1], -p[2] * u[1] + p[3] * u[0] * u[1]])


def lotka_vjp(t, u, p, w):
    J = np.array([[p[0] - p[1] * u[1], -p[1] * u[0]], [p[3] * u[1], -p[2] + p[3] * u[0]]])
    P = np.array([[u[0], -u[0] * u[1], 0, 0], [0, 0, -u[1], u[0] * u[1]]])
    return J.T @ w, P.T @ w


def wrong_vjp(t, u, p, w):
    a, b = lotka_vjp(t, u, p, w)
    return WRONG * a, b


def decay(t, u, p):
    return -p * u


def vdp(t, u, p):
    return np.array([u[1], p[0] * (1.0 - u[0] ** 2) * u[1] - u[0]])


def ring(t, u, p):
    v = u.copy()
    v[:] = p[0] * (np.roll(np.asarray(u, float), 1) - u) + p[1] * np.sin(np.asarray(u, float))
    return v


U2 = np.array([1.0, 2.0])
ODE = sa.ODEProblem(decay, U2, (0.0, 1.0), np.array(0.5))
LV = sa.ODEProblem(plain_lotka, np.array([1.0, 1.0]), (0.0, 2.0), np.array([1.5, 1.0, 3.0, 1.0]), vjp=lotka_vjp)
RING = sa.ODEProblem(ring, np.linspace(0.0, 1.0, 8), (0.0, 1.0), np.array([1.0, 0.5]))
DAE = sa.ODEProblem(lambda t, u, p: np.stack([-p * u[0] + u[1], u[0] - u[1]]), np.array([1.0, 1.0]), (0.0, 1.0),
                    np.array(2.0), mass_matrix=np.diag([1.0, 0.0]))
DDE = sa.DDEProblem(lambda t, u, h, p: -p[0] * h(t - 0.5), np.array([1.0]), lambda t, p: np.array([1.0]), (0.0, 1.0),
                    np.array([0.7]), lags=[0.5])
STEADY = sa.SteadyStateProblem(lambda t, u, p: p - u, U2, np.array([2.0, 3.0]))
JUMP = sa.PresetTimes(np.array([0.5]), lambda t, u, p: 2.0 * u)

# What `auto` takes: problem, method, options, and the rule that decides.
TABLE = {
    "ode": (ODE, sa.Tsit5(), {}, "default"),
    "fixed": (ODE, sa.RK4(), {"dt": 0.1}, "default"),
    "stiff": (ODE, sa.Kvaerno5(), {}, "default"),
    "rosenbrock": (ODE, sa.Rodas5P(), {}, "default"),
    "u0": (ODE, sa.Tsit5(), {"wrt": "u0"}, "default"),
    "saveat": (ODE, sa.Tsit5(), {"saveat": 5}, "default"),
    "dense": (ODE, sa.Tsit5(), {"dense": True}, "default"),
    "user": (LV, sa.Tsit5(), {"wrt": "p"}, "default"),
    "black-box": (ODE, sa.ScipySolver("RK45"), {}, "hidden-stages"),
    "differences": (RING, sa.Tsit5(), {"wrt": "p"}, "columns"),
    "differences-all": (RING, sa.Tsit5(), {}, "default"),
    "differences-stiff": (RING, sa.Kvaerno5(), {"wrt": "p"}, "default"),
    "events": (ODE, sa.Tsit5(), {"events": JUMP}, "default"),
    "dae": (DAE, sa.Kvaerno5(), {}, "constraints"),
    "dde": (DDE, sa.Tsit5(), {}, "delays"),
    "steady": (STEADY, None, {}, "steady"),
}


def squares(sol):
    return (sol.u**2).sum()


def dsquares(sol):
    return 2.0 * sol.u


def made(prob, alg, options, sensealg):
    dloss = None if not sensealg.boundary else dsquares
    return sa.gradient(prob, alg, squares, sensealg=sensealg, dloss=dloss, **options)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("ignore::sensitivity.SensitivityWarning")
def test_advise_says_what_auto_does(name):
    prob, alg, options, decides = TABLE[name]
    advice = sa.advise(prob, alg, **options)
    r = sa.gradient(prob, alg, squares, dloss=dsquares, **options)
    assert advice.sensealg.name == r.sensealg.name
    assert advice.vjp == r.sensealg.vjp
    assert advice.sensealg.because == r.sensealg.because
    (chosen,) = [c for c in advice.table if c.verdict == "chosen"]
    assert chosen.rule == decides
    assert chosen.why == r.sensealg.because[0]
    again = made(prob, alg, options, advice.sensealg)
    for part in ("u0", "p"):
        if getattr(r, part) is not None:
            np.testing.assert_array_equal(getattr(again, part), getattr(r, part))


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("ignore::sensitivity.SensitivityWarning")
def test_every_candidate_runs_or_says_its_refusal(name):
    prob, alg, options, _ = TABLE[name]
    advice = sa.advise(prob, alg, **options)
    assert len(advice.table) >= 12
    truth = made(prob, alg, options, advice.sensealg)
    size = max(np.abs(v).max() for v in (truth.u0, truth.p) if v is not None)
    for row in advice.table:
        if row.verdict == "ruled out" and row.rule is None:
            with pytest.raises(sa.UnsupportedCombination) as e:
                made(prob, alg, options, row.sensealg)
            assert str(e.value) == row.why
            continue
        if row.rule == "untraced":
            with pytest.raises(sa.UnsupportedCombination, match="AD fails"):
                made(prob, alg, options, row.sensealg)
            continue
        r = made(prob, alg, options, row.sensealg)
        # Discretise-then-differentiate and the reverse differ by the error of the steps, here of a fixed 0.1.
        tolerance = 1e-3 if name == "fixed" else 1e-4
        for part in ("u0", "p"):
            if getattr(truth, part) is not None:
                np.testing.assert_allclose(getattr(r, part), getattr(truth, part), atol=tolerance * size,
                                           err_msg=row.name)


def test_in_every_framework(lab):
    prob = lab.lotka_volterra(t1=1.0)
    advice = sa.advise(prob, sa.Tsit5())
    sol = sa.solve(prob, sa.Tsit5())
    assert (advice.sensealg.name, advice.vjp) == (sol.sensealg.name, sol.sensealg.vjp)
    assert advice.sensealg.because == sol.sensealg.because
    assert advice.facts.backend == lab.name
    # The eigenvalues at the start, (1, 1), are those of [[0.5, -1], [1, -2]].
    assert advice.probes.rate >= 1.5
    assert advice.vjp == sa.ReverseVJP()


def test_noise():
    prob = sa.SDEProblem(decay, lambda t, u, p: 0.1 * u, U2, (0.0, 1.0), np.array(0.5), noise="diagonal",
                         interpretation="stratonovich", key=1)
    options = {"dt": 0.1}
    advice = sa.advise(prob, sa.StochasticHeun(), **options)
    r = sa.gradient(prob, sa.StochasticHeun(), squares, dloss=dsquares, **options)
    assert (advice.sensealg.name, advice.sensealg.because) == (r.sensealg.name, r.sensealg.because)
    assert advice.facts.kind == "sde"
    for row in advice.table:
        if row.verdict == "ruled out":
            with pytest.raises(sa.UnsupportedCombination) as e:
                made(prob, sa.StochasticHeun(), options, row.sensealg)
            assert str(e.value) == row.why


def test_counts_of_exact_algorithms_are_what_they_take():
    advice = sa.advise(LV, sa.Tsit5())
    for kind in (sa.RecursiveCheckpointAdjoint, sa.ReversibleAdjoint):
        (row,) = [c for c in advice.table if type(c.sensealg) is kind]
        stats = made(LV, sa.Tsit5(), {}, kind()).stats
        assert (row.estimate.nfe, row.estimate.nvjp) == (stats.nfe, stats.nvjp)


def test_columns_by_differences_are_cheaper():
    calls = [0]

    def counted(t, u, p):
        calls[0] += 1
        return ring(t, u, p)

    prob = RING.remake(f=counted)
    spent = {}
    for kind in (sa.ForwardADSensitivity, sa.RecursiveCheckpointAdjoint):
        calls[0] = 0
        made(prob, sa.Tsit5(), {"wrt": "p", "probe": "off"}, kind(vjp=sa.FiniteDifferenceVJP()))
        spent[kind] = calls[0]
    assert 2 * spent[sa.ForwardADSensitivity] < spent[sa.RecursiveCheckpointAdjoint]


def test_auto_evaluates_nothing():
    calls = [0]

    def counted(t, u, p):
        calls[0] += 1
        return plain_lotka(t, u, p)

    run, x = prepare_options(LV.remake(f=counted), sa.Tsit5(), {"probe": "off"})
    calls[0] = 0
    from sensitivity.choose import choose

    choose(run, x, sa.auto)
    assert calls[0] == 0


def test_method_is_recommended():
    assert sa.advise(LV).alg == sa.Tsit5()
    assert sa.advise(LV, rtol=1e-10, atol=1e-10).alg == sa.Dopri8()
    stiff = sa.ODEProblem(vdp, np.array([2.0, 0.0]), (0.0, 1.0), np.array([1000.0]))
    advice = sa.advise(stiff)
    assert advice.alg == sa.Kvaerno5()
    assert advice.probes.stiff
    # At (2, 0) one eigenvalue is near -3 mu.
    assert 2500.0 < advice.probes.decay < 3100.0
    assert sa.advise(stiff.remake(jac=lambda t, u, p: np.array(
        [[0.0, 1.0], [-2.0 * p[0] * u[0] * u[1] - 1.0, p[0] * (1.0 - u[0] ** 2)]]))).alg == sa.Rodas5P()
    assert sa.advise(DAE).alg == sa.Kvaerno5()


def test_digits_at_risk_of_a_decay():
    """`u' = -a u` loses `a T / ln 10` digits on the way back."""
    for a, ruled in ((1.0, False), (30.0, True)):
        advice = sa.advise(ODE.remake(p=np.array(a)), sa.Tsit5())
        assert advice.probes.digits == pytest.approx(a / np.log(10.0), rel=1e-6)
        (row,) = [c for c in advice.table if c.sensealg.name == "BacksolveAdjoint"]
        assert (row.verdict == "ruled out") is ruled
        assert row.rule == ("contraction" if ruled else "discretised")


def test_large_states_get_a_bound():
    prob = sa.ODEProblem(lambda t, u, p: -p * u, np.ones(40), (0.0, 1.0), np.array(2.0))
    probes = sa.advise(prob, sa.Tsit5()).probes
    assert probes.bound
    assert probes.digits == pytest.approx(2.0 / np.log(10.0), rel=1e-5)


def test_memory_budget():
    prob = sa.ODEProblem(decay, np.ones(50), (0.0, 10.0), np.array(2.0))
    advice = sa.advise(prob, sa.Tsit5(), memory="30kB")
    assert advice.sensealg == sa.RecursiveCheckpointAdjoint(memory="30kB", vjp=sa.ReverseVJP())
    chosen, *others = advice.table
    assert chosen.rule == "memory"
    assert chosen.estimate.memory <= 30_000
    assert {c.rule for c in others if c.sensealg.name == "DirectAdjoint"} == {"memory"}
    assert sa.advise(prob, sa.Tsit5(), memory="1GB").sensealg.memory is None


@pytest.mark.parametrize("memory", ["30kB", 30_000])
def test_memory_budget_of_steps_that_are_not_repeated(memory):
    """The matrices of one implicit step are more than this budget; the advice is one that works."""
    pytest.importorskip("autograd")
    prob = sa.ODEProblem(decay, np.ones(50), (0.0, 1.0), np.array(2.0))
    advice = sa.advise(prob, sa.Kvaerno5(), memory=memory, rtol=1e-8, atol=1e-8)
    assert (advice.table[0].rule, advice.sensealg.name) == ("memory-segments", "GaussAdjoint")
    assert advice.table[0].estimate.memory <= 30_000
    r = sa.gradient(prob, sa.Kvaerno5(), lambda sol: np.sum(sol.u[-1]), sensealg=advice.sensealg, rtol=1e-8, atol=1e-8)
    assert float(r.p) == pytest.approx(-50.0 * np.exp(-2.0), rel=1e-7)


def test_memory_budget_of_implicit_steps():
    """A state of four numbers has small matrices, so its steps are taken again, within the budget."""
    pytest.importorskip("autograd")
    prob = sa.ODEProblem(decay, np.ones(4), (0.0, 1.0), np.array(2.0))
    advice = sa.advise(prob, sa.Kvaerno5(), memory="4kB", rtol=1e-10, atol=1e-10)
    assert (advice.table[0].rule, advice.sensealg.memory) == ("memory", "4kB")
    r = sa.gradient(prob, sa.Kvaerno5(), lambda sol: np.sum(sol.u[-1]), sensealg=advice.sensealg, rtol=1e-10,
                    atol=1e-10)
    assert r.stats.nlu > r.stats.naccept
    assert float(r.p) == pytest.approx(-4.0 * np.exp(-2.0), rel=1e-7)


def test_measured_gradients_agree(numpy_lab):
    pytest.importorskip("autograd")
    advice = sa.advise(numpy_lab.lotka_volterra(t1=2.0), sa.Tsit5(), measure=True)
    assert advice.agree
    tried = [c for c in advice.table if c.error is not None]
    assert len(tried) == 10
    assert all(0.0 <= c.error < 1e-4 for c in tried)
    assert all(c.seconds > 0.0 and c.peak > 0 and c.spread >= 0.0 for c in tried)
    assert f"{100 * max(c.spread for c in tried):.0f} % at most" in " ".join(str(advice).split())
    times = [c.seconds for c in tried]
    assert times == sorted(times)
    assert "differences of f" in advice.reference
    assert "peak by tracemalloc" in " ".join(str(advice).split())
    (chosen,) = [c for c in advice.table if c.verdict == "chosen"]
    offered = [c.seconds for c in tried if c.rule not in ("backwards", "second-order")]
    assert chosen.seconds <= offered[0] / 0.85 * (1.0 + 1e-9)
    assert f"{len(tried)} gradients agree" in str(advice)


@pytest.mark.filterwarnings("ignore::sensitivity.SensitivityWarning")
def test_measuring_catches_a_wrong_vjp():
    advice = sa.advise(LV.remake(vjp=wrong_vjp), sa.Tsit5(), loss=squares, dloss=dsquares, measure=True)
    assert advice.agree is False
    wrong = {c.sensealg.name for c in advice.table if c.verdict == "wrong"}
    assert {"RecursiveCheckpointAdjoint", "InterpolatingAdjoint", "GaussAdjoint"} <= wrong
    assert advice.vjp != sa.UserVJP()
    assert "WRONG" in str(advice)
    r = made(LV.remake(vjp=wrong_vjp), sa.Tsit5(), {}, advice.sensealg)
    np.testing.assert_allclose(r.p, made(LV, sa.Tsit5(), {}, sa.RecursiveCheckpointAdjoint()).p, rtol=1e-5)
    right = sa.advise(LV, sa.Tsit5(), loss=squares, dloss=dsquares, measure=True)
    assert right.agree
    assert right.vjp == sa.UserVJP()


def test_measuring_other_kinds():
    """Reference and candidates in single precision, of a steady state, and of a state that is a tree."""
    pytest.importorskip("autograd")
    tree = sa.ODEProblem(lambda t, u, p: {"a": -p["k"] * u["a"], "b": u["a"][:1] - u["b"]},
                         {"a": np.ones(2), "b": np.ones(1)}, (0.0, 1.0), {"k": np.array(1.0)})
    single = ODE.remake(u0=U2.astype("float32"), p=np.float32(0.5))
    for prob, alg, count in ((tree, sa.Tsit5(), 10), (single, sa.Tsit5(), 10), (STEADY, None, 1)):
        advice = sa.advise(prob, alg, measure=True)
        assert advice.agree
        assert sum(c.error is not None for c in advice.table) == count


def test_text_html_and_json_say_the_same():
    advice = sa.advise(LV, sa.Tsit5(), rtol=1e-5)
    text, html, data = str(advice), advice._repr_html_(), json.loads(advice.to_json())
    assert "estimated, nothing measured" in text
    assert data["sensealg"] == spelled(advice.sensealg) == "sa.RecursiveCheckpointAdjoint(vjp=sa.UserVJP())"
    assert data["code"] in text
    assert data["facts"]["n"] == 2
    assert data["facts"]["params"] == 4
    assert [row["verdict"] for row in data["table"]].count("chosen") == 1
    assert [step[1] for step in data["path"]] == ["no"] * (len(data["path"]) - 1) + ["yes"]
    for row in data["table"]:
        assert row["sensealg"] in text
        assert f">{row['sensealg']}<" in html
    words = " ".join(text.split())
    assert all(row.brief in words for row in advice.table)
    assert all(row.brief in " ".join(row.why.split()) for row in advice.table)
    assert max(len(line) for line in text.splitlines() if "choice" not in line) <= 120
    assert data["table"][0]["measured_seconds"] is None


@pytest.mark.filterwarnings("ignore::sensitivity.SensitivityWarning")
def test_the_line_to_paste_works():
    advice = sa.advise(LV, sa.Tsit5(), rtol=1e-5, wrt="p")
    r = eval(advice.code, {"sa": sa, "prob": LV, "loss": lambda sol: (sol.u**2).sum()})
    np.testing.assert_allclose(r.p, made(LV, sa.Tsit5(), {"rtol": 1e-5, "wrt": "p"}, advice.sensealg).p, rtol=1e-8)


def test_picture():
    pytest.importorskip("matplotlib")
    advice = sa.advise(ODE, sa.Tsit5())
    ax = advice.plot()
    names = {t.get_text() for t in ax.texts}
    offered = [c for c in advice.table if c.verdict != "ruled out" and c.rule != "second-order"]
    assert names == {c.name.removesuffix("()") for c in offered}
    assert "estimated" in ax.get_xlabel()
    # Whatever the dashed line leaves out needs as much of both, or more.
    (front,) = [line.get_xydata() for line in ax.lines if line.get_linestyle() == "--"]
    for c in offered:
        place = (c.estimate.evaluations(advice.facts), c.estimate.memory)
        assert any(x <= place[0] and y <= place[1] for x, y in front[:-1])
    with pytest.raises(sa.UnsupportedCombination, match="nothing to draw"):
        sa.advise(ODE, sa.Tsit5(), order=2).plot()


def test_rules_of_plugins_come_first(monkeypatch):
    from sensitivity.registry import registry

    mine = replace(RULES[-1], id="mine", take=lambda f: sa.DirectAdjoint(), because="because I say so")
    monkeypatch.setattr(registry(), "rules", (mine,))
    assert rules()[0] is mine
    sol = sa.solve(ODE, sa.Tsit5())
    assert sol.sensealg.name == "DirectAdjoint"
    assert sol.sensealg.because[0] == "because I say so"


def test_rules_are_complete():
    assert len({r.id for r in RULES}) == len(RULES)
    assert all(r.because and r.reference and r.question.endswith("?") for r in RULES)
    run, x = prepare_options(ODE, None, {})
    assert RULES[-1].holds(facts(run, x, sa.ReverseVJP()))


def test_an_ensemble_is_refused():
    ensemble = sa.EnsembleProblem(ODE, p=np.array([0.5, 1.0]))
    with pytest.raises(sa.InputError, match=r"ensemble\.prob"):
        sa.advise(ensemble)


def command(*arguments):
    line = [sys.executable, "-m", "sensitivity", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


SCRIPT = """
import numpy as np
import sensitivity as sa
prob = sa.ODEProblem(lambda t, u, p: -p * u, np.array([1.0, 2.0]), (0.0, 1.0), np.array(0.5))
other = prob.remake(tspan=(0.0, 2.0))
"""


def test_advise_at_the_command_line(tmp_path):
    script = tmp_path / "model.py"
    script.write_text(SCRIPT)
    done = command("advise", f"{script}:prob", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sensealg"].startswith("sa.RecursiveCheckpointAdjoint(")
    done = command("advise", f"{script}:prob", "--order", "2", "--json")
    assert json.loads(done.stdout)["sensealg"].startswith("sa.ForwardOverAdjoint(")
    done = command("advise", str(script))
    assert done.returncode == 1
    assert "prob, other" in done.stderr


def test_doctor_at_the_command_line():
    done = command("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    backends = {b["name"]: b for b in found["backends"]}
    assert backends["numpy"]["x64"]
    assert backends["numpy"]["version"] == np.__version__
    assert 0.0 < backends["numpy"]["error"] < 1e-9
    assert set(backends) <= set(found["plugins"])
    assert "numpy" in command("doctor").stdout


def test_the_documentation_lists_the_rules():
    page = (Path(__file__).resolve().parent.parent / "docs" / "advisor.md").read_text(encoding="utf-8")
    methods, page = page.split("## The questions")
    page = page.split("### ")[0]
    row = r"^\| `(.*?)` \| (.*?) \| `(.*?)` \|$"
    assert re.findall(row, methods, re.M) == [(r.id, r.question, r.take.name) for r in METHOD_RULES]
    listed = re.findall(row, page, re.M)
    run, x = prepare_options(ODE, None, {})
    known = facts(run, x, sa.ReverseVJP(), memory="1GB")
    assert listed == [(r.id, r.question, r.take(known).name) for r in RULES]


def test_the_fastest_right_one_is_chosen():
    from sensitivity.measure import _decided

    advice = sa.advise(ODE, sa.Tsit5())
    usual, other, *rest = (c for c in advice.table if c.verdict != "ruled out")
    rest = [replace(c, seconds=9.0) for c in rest]
    for seconds, fastest in ((0.9, usual), (0.8, other)):
        decided = _decided(advice, [replace(usual, seconds=1.0), replace(other, seconds=seconds), *rest])
        (chosen,) = [c for c in decided.table if c.verdict == "chosen"]
        assert chosen.name == fastest.name
        assert decided.sensealg.name == fastest.sensealg.name
        assert (decided.path == advice.path) is (fastest is usual)
    decided = _decided(advice, [replace(usual, verdict="wrong"), replace(other, seconds=1.0)])
    assert decided.sensealg.name == other.sensealg.name


def branching(t, u, p):
    level = p[0] * u
    if level[0] > 0.0:
        return -level
    return -2.0 * level


def test_what_is_said_of_a_field():
    lines = [i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line == "    if level[0] > 0.0:"]
    prob = ODE.remake(f=branching, p=np.array([0.5]))
    found = sa.advise(prob, sa.Tsit5()).field
    assert found == (True, ("u", "p"), tuple(lines), 0)
    assert f"branches on values at line {lines[0]}" in str(sa.advise(prob, sa.Tsit5()))
    assert sa.advise(ODE.remake(f=lambda t, u, p: -u), sa.Tsit5()).field.reaches == ("u",)
    calls = [0]

    def impure(t, u, p):
        calls[0] += 1
        return -p * u * (1.0 + 1e-9 * calls[0])

    assert sa.advise(ODE.remake(f=impure), sa.Tsit5(), probe="off").field.pure is False


def test_what_a_field_closes_over(torch_lab):
    import torch

    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    prob = sa.ODEProblem(lambda t, u, p: -weight * u, torch_lab.array([1.0]), (0.0, 1.0), None)
    assert sa.advise(prob, sa.Tsit5()).field.captured == 1


def test_probes_have_the_eigenvalues_of_the_problem():
    """Of each kind: the fastest rates are known by hand."""
    pytest.importorskip("autograd")
    # y = z, so that z' = (1 - p) z with p = 2: one finite eigenvalue, -1.
    probes = sa.advise(DAE, sa.Kvaerno5()).probes
    assert (probes.rate, probes.decay) == pytest.approx((1.0, 1.0), rel=1e-6)
    assert probes.digits == pytest.approx(1.0 / np.log(10.0), rel=1e-6)
    # The drift of the stochastic problem, and the delayed one with its past held fixed.
    noise = sa.SDEProblem(decay, lambda t, u, p: 0.1 * u, U2, (0.0, 1.0), np.array(0.5), noise="diagonal",
                          interpretation="stratonovich", key=1)
    assert sa.advise(noise, sa.StochasticHeun(), dt=0.1).probes.decay == pytest.approx(0.5, rel=1e-6)
    late = DDE.remake(f=lambda t, u, h, p: -3.0 * u - p[0] * h(t - 0.5))
    assert sa.advise(late, sa.Tsit5()).probes.decay == pytest.approx(3.0, rel=1e-6)
    assert sa.advise(late, sa.Tsit5()).field.reaches == ("u", "p")
    # Rest is stable, and there are no digits to lose.
    probes = sa.advise(STEADY).probes
    assert (probes.growth, probes.rate, probes.density) == pytest.approx((-1.0, 1.0, 0.5), rel=1e-6)
    assert probes.digits is None
    assert "at rest, stable" in str(sa.advise(STEADY))
    assert "unstable" in str(sa.advise(STEADY.remake(f=lambda t, u, p: u - p)))
    # exp(i t) turns at the rate 5 and decays at the rate 1.
    turning = sa.ODEProblem(lambda t, u, p: p * u, np.array([1.0 + 0.0j]), (0.0, 1.0), np.array(-1.0 + 5.0j))
    probes = sa.advise(turning, sa.Tsit5()).probes
    assert (probes.decay, probes.rate, probes.lipschitz) == pytest.approx((1.0, 26.0**0.5, 26.0**0.5), rel=1e-6)
    # The norm of a shear is more than its eigenvalues: sqrt(2) + 1 for [[1, 2], [0, 1]].
    shear = ODE.remake(f=lambda t, u, p: np.stack([u[0] + 2.0 * u[1], u[1]]))
    probes = sa.advise(shear, sa.Tsit5()).probes
    assert (probes.rate, probes.lipschitz, probes.density) == pytest.approx((1.0, 2.0**0.5 + 1.0, 0.75), rel=1e-5)


@pytest.mark.filterwarnings("ignore::sensitivity.SensitivityWarning")
@pytest.mark.parametrize("name", ["dae", "dde", "steady", "noise", "complex", "events"])
def test_every_kind_has_facts_and_a_ranked_table(name):
    noise = sa.SDEProblem(decay, lambda t, u, p: 0.1 * u, U2, (0.0, 1.0), np.array(0.5), noise="diagonal",
                          interpretation="stratonovich", key=1)
    turning = sa.ODEProblem(lambda t, u, p: p * u, np.array([1.0 + 0.0j]), (0.0, 1.0), np.array(-1.0 + 5.0j))
    prob, alg, options = {"noise": (noise, sa.StochasticHeun(), {"dt": 0.1}), "complex": (turning, sa.Tsit5(), {})}.get(
        name) or TABLE[name][:3]
    advice = sa.advise(prob, alg, **options)
    assert advice.probes is not None
    assert advice.field.pure
    verdicts = [row.verdict for row in advice.table]
    assert verdicts[0] == "chosen"
    assert verdicts == sorted(verdicts, key=["chosen", "possible", "ruled out"].index)
    assert all(row.why for row in advice.table)
    data = json.loads(advice.to_json())
    assert data["field"]["pure"]
    assert data["probes"]["rate"] == advice.probes.rate


def test_frame():
    pandas = pytest.importorskip("pandas")
    advice = sa.advise(LV, sa.Tsit5())
    frame = advice.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["sensealg"]) == [row.name for row in advice.table]
    assert list(frame["verdict"]).count("chosen") == 1
    chosen = frame[frame["verdict"] == "chosen"].iloc[0]
    assert chosen["estimated_nvjp"] == advice.table[0].estimate.nvjp


@pytest.mark.filterwarnings("ignore::sensitivity.SensitivityWarning")
def test_rich_shows_the_same_table():
    rich = pytest.importorskip("rich.console")
    import io

    advice = sa.advise(LV, sa.Tsit5())
    out = io.StringIO()
    rich.Console(file=out, width=400).print(advice)
    text = out.getvalue()
    assert all(row.name in text for row in advice.table)
    assert all(line in text for line in (advice.code, str(advice.field), advice.sensealg.because[-1]))


def test_memory_at_its_peak(lab):
    """All steps of a long state, against three states and what is repeated from them."""
    n = 2000
    prob = sa.ODEProblem(lambda t, u, p: -p[0] * u, lab.array(np.ones(n)), (0.0, 4.0), lab.array([1.0]))
    options = {"controller": sa.FixedStep(), "dt": 0.1, "max_steps": 40, "wrt": "p"}
    peaks, said = {}, set()
    for sensealg in (sa.RecursiveCheckpointAdjoint(), sa.RecursiveCheckpointAdjoint(checkpoints=3)):
        def run(sensealg=sensealg):
            return sa.gradient(prob, sa.RK4(), lambda sol: sol.u[-1, 0], sensealg=sensealg, **options)

        run()
        peaks[sensealg.checkpoints], by = lab.be.peak(run, prob.u0)
        said.add(by)
    steps = 40 * 5 * n * 8
    assert steps < peaks[None] < 3 * steps
    assert peaks[3] < 0.5 * steps
    assert said == {{"numpy": "tracemalloc", "torch": "the storages of all tensors",
                     "jax": "the compiler, for the forward or the reverse pass"}[lab.name]}


def test_an_algorithm_of_a_plugin_is_advised_on_like_our_own():
    from dataclasses import dataclass
    from typing import ClassVar

    from sensitivity.estimates import Effort
    from sensitivity.plugins import hookimpl
    from sensitivity.registry import registry

    @dataclass(frozen=True)
    class Thrice(sa.RecursiveCheckpointAdjoint):
        """The discrete adjoint, its products made three times."""

        per_input: ClassVar[bool] = True

        def work(self, w):
            return Effort(7, 0, 3 * w.N * w.s, 2 * w.n)

    class Plugin:
        @hookimpl
        def sensitivity_algorithms(self):
            return {"Thrice": Thrice}

    registry().register(Plugin(), name="thrice")
    try:
        advice = sa.advise(LV, sa.Tsit5())
        (row,) = [c for c in advice.table if c.sensealg.name == "Thrice"]
        (plain,) = [c for c in advice.table if c.sensealg.name == "RecursiveCheckpointAdjoint"]
        assert row.verdict == "possible"
        assert row.estimate == (plain.estimate.nfe + 7, 0, 3 * plain.estimate.nvjp, 2 * 2 * 8)
        many = sa.advise(RING.remake(p=np.ones(200)), sa.Tsit5())
        assert {c.rule for c in many.table if c.sensealg.name == "Thrice"} == {"many-columns"}
        small = sa.advise(LV, sa.Tsit5(), memory=2000)
        assert {c.verdict for c in small.table if c.sensealg.name == "Thrice"} == {"possible"}
        assert {c.rule for c in small.table if c.sensealg.name == "GaussAdjoint"} == {"memory"}
    finally:
        registry().manager.unregister(name="thrice")
        registry().refresh()
    assert "Thrice" not in {c.sensealg.name for c in sa.advise(LV, sa.Tsit5()).table}


def test_candidates_are_ranked_by_their_work():
    """Among those that nothing speaks against, and among those of which the same is to be said."""
    advice = sa.advise(LV, sa.Tsit5(), saveat=200)
    for rule in (None, "restarts"):
        rows = [c for c in advice.table if c.verdict == "possible" and c.rule == rule]
        work = [c.estimate.evaluations(advice.facts) for c in rows]
        assert len(work) > 1
        assert work == sorted(work)
    (few,) = [c for c in sa.advise(LV, sa.Tsit5()).table if c.sensealg.name == "InterpolatingAdjoint"]
    (many,) = [c for c in advice.table if c.sensealg.name == "InterpolatingAdjoint"]
    # One step of six stages at least between any two of the 200 save times.
    assert few.estimate.nvjp < many.estimate.nvjp == 6 * 200


def all_facts():
    """What the rules may meet, each with each, but for what is refused before they are asked."""
    import itertools

    from sensitivity.rules import Facts

    wanted = (None, frozenset({"theta"}), frozenset({"u0"}), frozenset({"u0", "theta", "t1"}))
    yes = (False, True)
    for kind, method, params, order, wants in itertools.product(
            ("ode", "dde", "sde", "steady"), ("explicit", "implicit", "black box"), (0, 3, 1000), (1, 2), wanted):
        for mass, events, dense, transposes, over, budgets, undone in itertools.product(*[yes] * 7):
            if (kind != "ode" and (method == "black box" or mass)) or (kind == "steady" and (events or dense or over)):
                continue
            if (mass and method != "implicit") or (method == "black box" and events):
                continue
            if undone and (kind, method) != ("sde", "explicit"):
                continue
            for digits, device, saves in ((None, "cpu", 1), (9.0, "cuda:0", 50), (0.1, "cpu", "steps")):
                memory = {"memory": 100, "limit": 100, "kept": 1e6} if over else {}
                yield Facts(kind, 5, params, wants, saves, method, mass, events, dense, "numpy", transposes, 64,
                            budgets=budgets and not (events or dense) and method == "explicit", undone=undone,
                            digits=digits, device=device, order=order, stiff=method == "implicit", steps=20, **memory)


def test_whatever_the_facts_the_rules_take_what_can_serve():
    from sensitivity.rules import LOST, remark, selected

    met, spoken = set(), set()
    candidates = [kind() for kind in registered().values()]
    for known in all_facts():
        rule = selected(known)
        met.add(rule.id)
        taken = rule.take(known)
        where = f"{rule.id}: {known}"
        if known.order == 2:
            assert taken.order == 2, where
        elif known.kind == "steady":
            assert "steady" in taken.kinds, where
        assert known.method != "black box" or "stages" not in taken.needs, where
        assert not known.events or taken.events or known.kind == "steady", where
        assert not known.mass or taken.algebraic, where
        assert not (taken.retraces and known.digits is not None and known.digits > LOST[64]), where
        assert "cpu" in taken.devices, where
        assert known.device == "cpu" or "gpu" in taken.devices, where
        if taken.per_input:
            assert known.columns <= 100, where
        if known.over and known.order == 1 and known.kind == "ode" and known.method != "black box" and not known.dense:
            assert "100" in spelled(taken), where
        for candidate in candidates:
            said = remark(known, candidate)
            if said is not None:
                spoken.add(said.id)
                assert said.because(known), where
                assert rule.take(known).name != candidate.name or not said.excludes, where
    assert met == {r.id for r in RULES}
    assert spoken >= {"contraction", "stiff-backwards", "many-columns", "restarts", "tape", "discretised"}


def test_second_derivatives_have_their_rule(lab):
    """Where the method hides its stages too; the numbers are those of `u0 exp(-p)`: `d2 (u0^2 e^-2p) / dp2`."""
    prob = sa.ODEProblem(lambda t, u, p: -p[0] * u, lab.array([1.0, 2.0]), (0.0, 1.0), lab.array([0.5]))
    methods = [sa.Tsit5(), sa.ScipySolver("RK45")] if lab.name == "numpy" else [sa.Tsit5()]
    if lab.name == "numpy":
        pytest.importorskip("autograd")
    for method in methods:
        advice = sa.advise(prob, method, order=2, wrt="p", rtol=1e-9, atol=1e-9)
        hidden = not method.one_step
        assert advice.table[0].rule == ("second-order-hidden" if hidden else "second-order")
        assert "sa.hessian(" in advice.code
        loss = lambda sol: (sol.u[-1, ...] ** 2).sum()  # noqa: E731
        names = {"sa": sa, "prob": prob, "loss": loss}
        for H in (eval(advice.code, names), sa.hessian(prob, method, loss, wrt="p", rtol=1e-9, atol=1e-9)):
            assert float(lab.numpy(H)[0, 0]) == pytest.approx(4.0 * 5.0 * np.exp(-1.0), rel=1e-7)
    offered = {c.name for c in sa.advise(prob, sa.Tsit5(), order=2).table if c.verdict != "ruled out"}
    assert offered == {"ForwardOverAdjoint()", "RecursiveCheckpointAdjoint()", "InterpolatingAdjoint()",
                       "GaussAdjoint()", "QuadratureAdjoint()", "BacksolveAdjoint()", "ReversibleAdjoint()"}
    with pytest.raises(sa.InputError, match="order=3"):
        sa.advise(prob, sa.Tsit5(), order=3)
    with pytest.raises(sa.UnsupportedCombination, match="not measured"):
        sa.advise(prob, sa.Tsit5(), order=2, measure=True)


@pytest.mark.filterwarnings("ignore::sensitivity.SensitivityWarning")  # of products by differences
def test_second_derivatives_that_are_not_there_are_refused():
    with pytest.raises(sa.UnsupportedCombination, match="without events"):
        sa.advise(DDE, sa.Tsit5(), order=2)
    with pytest.raises(sa.UnsupportedCombination, match="mass matrix"):
        sa.advise(DAE, sa.Kvaerno5(), order=2)


@pytest.mark.filterwarnings("ignore::sensitivity.SensitivityWarning")  # of products by differences
def test_black_boxes_by_differences_go_forwards():
    """They evaluate `f` less than half as often as a continuous adjoint, which solves again backwards."""
    calls = [0]

    def counted(t, u, p):
        calls[0] += 1
        return ring(t, u, p)

    prob, method, spent, found = RING.remake(f=counted), sa.ScipySolver("RK45"), {}, {}
    assert sa.advise(RING, method, wrt="p").table[0].rule == "columns-hidden"
    assert sa.advise(RING, method).table[0].rule == "hidden-stages"
    assert sa.advise(RING, sa.ScipySolver("BDF"), wrt="p").table[0].rule == "hidden-stages"
    for sensealg in (sa.auto, sa.GaussAdjoint(vjp=sa.FiniteDifferenceVJP())):
        calls[0] = 0
        r = sa.gradient(prob, method, squares, dloss=dsquares, wrt="p", sensealg=sensealg, probe="off", rtol=1e-8,
                        atol=1e-8)
        spent[r.sensealg.name], found[r.sensealg.name] = calls[0], r.p
    assert 2 * spent["ForwardSensitivity"] < spent["GaussAdjoint"]
    # Both are right up to the tolerance and the nine digits of differences.
    np.testing.assert_allclose(found["ForwardSensitivity"], found["GaussAdjoint"], rtol=1e-7, atol=1e-7)


def test_steps_that_can_be_undone_need_no_memory():
    anp = pytest.importorskip("autograd.numpy")
    prob = sa.SDEProblem(lambda t, u, p: p[0] * anp.sin(u), lambda t, u, p: 0.1 * u, np.linspace(0.5, 1.0, 50),
                         (0.0, 1.0), np.array([0.5]), noise="diagonal", interpretation="stratonovich", key=1)
    advice = sa.advise(prob, sa.ReversibleHeun(), dt=0.01, memory="5kB")
    assert (advice.table[0].rule, advice.sensealg.name) == ("memory-undone", "ReversibleHeunAdjoint")
    assert advice.table[0].estimate.memory <= 5000
    ours = made(prob, sa.ReversibleHeun(), {"dt": 0.01}, advice.sensealg)
    exact = made(prob, sa.ReversibleHeun(), {"dt": 0.01}, sa.RecursiveCheckpointAdjoint())
    np.testing.assert_allclose(ours.p, exact.p, rtol=1e-10)
    assert sa.advise(prob, sa.StochasticHeun(), dt=0.01, memory="50kB").table[0].rule == "memory"


def test_what_does_not_run_where_the_arrays_are_is_refused(monkeypatch):
    from dataclasses import dataclass
    from typing import ClassVar

    from sensitivity.choose import choose
    from sensitivity.registry import registry

    @dataclass(frozen=True)
    class Host(sa.RecursiveCheckpointAdjoint):
        devices: ClassVar[frozenset[str]] = frozenset({"cpu"})

    assert sa.solve(ODE, sa.Tsit5(), sensealg=Host()).sensealg.name == "Host"
    ours, scipys = (prepare_options(ODE, method, {}) for method in (sa.Tsit5(), sa.ScipySolver("RK45")))
    monkeypatch.setattr(type(registry().backend("numpy")), "device", lambda be, x: "cuda:0")
    with pytest.raises(sa.UnsupportedCombination, match="Host does not run on cuda:0"):
        choose(*ours, Host())
    with pytest.raises(sa.UnsupportedCombination, match=r"ScipySolver.* does not run on cuda:0"):
        choose(*scipys, sa.GaussAdjoint())


def test_reasons_stand_on_every_solution(lab):
    """The algorithm's and the products', by the rules that hold; `prob` carries nothing of its own."""
    prob = lab.lotka_volterra(t1=1.0)
    for result in (sa.solve(prob, sa.Tsit5()), sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u.sum())):
        why = result.sensealg.because
        assert why[0] == {r.id: r for r in RULES}["default"].because
        assert why[1] == f"reverse-mode AD of {lab.name}"
        assert len(why) == 2
    assert sa.solve(prob).alg.because[0].startswith("not stiff at the start")


def own():
    """The library's algorithms, without those of plugins."""
    return {name: kind for name, kind in registered().items() if kind.__module__.startswith("sensitivity.")}


@pytest.mark.filterwarnings("ignore::sensitivity.SensitivityWarning")  # of products by differences
def test_algorithms_declare_what_they_do():
    """What a class says of itself, against what it does with a problem of each kind."""
    from sensitivity.choose import choose

    noise = sa.SDEProblem(decay, lambda t, u, p: 0.1 * u, U2, (0.0, 1.0), np.array(0.5), noise="diagonal",
                          interpretation="stratonovich", key=1)
    cases = {"ode": (ODE, sa.Tsit5(), {}), "dde": (DDE, sa.Tsit5(), {}), "steady": (STEADY, None, {}),
             "sde": (noise, sa.ReversibleHeun(), {"dt": 0.1}), "black box": (ODE, sa.ScipySolver("RK45"), {}),
             "implicit": (ODE, sa.Kvaerno5(), {}), "events": (ODE, sa.Tsit5(), {"events": JUMP}),
             "constraints": (DAE, sa.Kvaerno5(), {})}
    for case, (prob, alg, options) in cases.items():
        run, x = prepare_options(prob, alg, options)
        kind = "ode" if run.kind is None else run.kind.name
        for name, made_by in own().items():
            algorithm = made_by()
            declared = kind in algorithm.kinds | algorithm.elsewhere and {
                "black box": "stages" not in algorithm.needs, "implicit": "explicit" not in algorithm.needs,
                "events": algorithm.events, "constraints": algorithm.algebraic}.get(case, True)
            try:
                choose(run, x, algorithm, verify=False)
                serves = True
            except sa.UnsupportedCombination:
                serves = False
            assert serves is declared, (case, name)


def test_the_documentation_lists_what_algorithms_declare():
    page = (Path(__file__).resolve().parent.parent / "docs" / "advisor.md").read_text(encoding="utf-8")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")]
    listed = {r[0].strip("`"): r[1:] for r in rows if len(r) == 10}

    def yes(value):
        return "yes" if value else ""

    for name, kind in own().items():
        a = kind()
        assert listed[name] == [
            ", ".join(sorted(a.kinds | a.elsewhere)), yes(a.exact), a.keeps, ", ".join(sorted(a.needs)), yes(a.events),
            yes(a.algebraic), yes(a.retraces), yes(a.per_input), yes(a.second_order)], name
    products = page.split("### Products")[1].split("### What")[0]
    found = re.findall(r"^\| `(.*?)` \| (.*?) \| `(.*?)` \|$", products, re.M)
    assert found == [(r.id, r.question, r.take.name) for r in PRODUCT_RULES]
    assert all(r.reference for r in PRODUCT_RULES)
