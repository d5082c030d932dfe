"""Gradients of continuous problems against reference values, in every framework, with every algorithm."""

import json
from pathlib import Path

import pytest

import sensitivity as sa

GOLD = {p["id"]: p for p in json.loads((Path(__file__).parent / "fixtures" / "gold.json").read_text())["problems"]}
SOURCE = Path(__file__).resolve().parents[2] / "shared" / "gold" / "gold_problems.json"
STIFF = ("ode_robertson",)
PROBLEMS = [n for n in GOLD if n.startswith("ode_") and n not in STIFF and "integral" not in GOLD[n]["loss"]]
ALGORITHMS = ["RecursiveCheckpointAdjoint", "InterpolatingAdjoint", "BacksolveAdjoint", "GaussAdjoint",
              "QuadratureAdjoint", "ForwardSensitivity", "ForwardADSensitivity", "DirectAdjoint"]


def setup(lab, P):
    """Problem, save times, loss, names of the initial values and whether the span is differentiated."""
    xp = lab.xp
    rhs, start, cost = eval(P["code"]["rhs"]), eval(P["code"]["u0"]), eval(P["loss"]["code"])
    initial = start({k: k for k in P["params"]}, None)
    number = {k: float(v) for k, v in P["params"].items()}
    moving = P["tspan"] == ["t0", "t1"]
    p = {k: lab.array(v) for k, v in number.items() if k not in initial and k not in ("t0", "t1")}
    tspan = tuple(lab.array(number[t]) if moving else float(t) for t in P["tspan"])
    u0 = lab.array([number.get(k, k) for k in initial])
    prob = sa.ODEProblem(lambda t, u, p: xp.stack(rhs(t, u, p, xp)), u0, tspan, p)
    saveat = None if moving else lab.array([float(t) for t in P["loss"]["save_at"]])

    def loss(sol):
        return cost([sol.u[i, :] for i in range(sol.u.shape[0])], p, xp)

    return prob, saveat, loss, initial, moving


def check(lab, P, algorithm):
    prob, saveat, loss, initial, moving = setup(lab, P)
    r = sa.gradient(prob, sa.Dopri8(), loss, saveat=saveat, sensealg=algorithm, rtol=1e-10, atol=1e-11,
                    wrt=("u0", "p", "t0", "t1") if moving else ("u0", "p"))
    assert float(r.value) == pytest.approx(float(P["value"]), rel=1e-8)
    got = {k: float(v) for k, v in r.p.items()} | dict(zip(initial, (float(v) for v in r.u0), strict=True))
    if moving:
        got |= {"t0": float(r.t0), "t1": float(r.t1)}
    scale = max(abs(float(v)) for v in P["gradient"].values())
    for k, v in P["gradient"].items():
        # Forward and adjoint solve are each wrong by a multiple of rtol = 1e-10, more where the problem amplifies it.
        assert got[k] == pytest.approx(float(v), rel=1e-6, abs=1e-7 * scale), k


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(lab, name, algorithm):
    check(lab, GOLD[name], getattr(sa, algorithm)())


@pytest.mark.parametrize("algorithm", [
    sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(rtol=1e-9, atol=1e-10),
    pytest.param(sa.ForwardSensitivity(), marks=pytest.mark.slow)], ids=lambda a: a.name)
@pytest.mark.parametrize("name", STIFF)
def test_stiff_problems(lab, name, algorithm):
    P = GOLD[name]
    prob, saveat, loss, *_ = setup(lab, P)
    r = sa.gradient(prob, sa.Kvaerno5(), loss, saveat=saveat, sensealg=algorithm,
                    rtol=1e-8 if algorithm.exact else 1e-9, atol=lab.array([1e-8, 1e-12, 1e-8]), wrt="p")
    assert float(r.value) == pytest.approx(float(P["value"]), rel=1e-8)
    scaled = {k: float(r.p[k]) * float(P["params"][k]) for k in r.p}
    scale = max(abs(float(v) * float(P["params"][k])) for k, v in P["gradient"].items())
    # A continuous adjoint adds the errors of its own solve and of the dense output.
    tol = 1e-6 if algorithm.exact else 1e-5
    for k, v in P["gradient"].items():
        # Compared as derivatives in the logarithms of the rates, whose sizes differ by nine orders.
        assert scaled[k] == pytest.approx(float(v) * float(P["params"][k]), rel=tol, abs=0.1 * tol * scale), k


def test_the_fixture_is_a_copy():
    """The numbers here are those of the full collection, where it lies beside the repository."""
    if not SOURCE.is_file():
        pytest.skip(f"{SOURCE} is not there")
    full = {p["id"]: p for p in json.loads(SOURCE.read_text())["problems"]}
    for name, problem in GOLD.items():
        for key in ("params", "tspan", "value", "gradient"):
            assert problem[key] == full[name][key], (name, key)


def test_the_full_collection(numpy_lab):
    """Every problem of the collection that an explicit method can solve: none is left out by its name."""
    if not SOURCE.is_file():
        pytest.skip(f"{SOURCE} is not there")
    full = json.loads(SOURCE.read_text())["problems"]
    plain = [p for p in full if p["category"] == "ode" and "integral" not in p["loss"] and p["id"] not in STIFF]
    assert len(plain) >= 5
    for problem in plain:
        check(numpy_lab, problem, sa.RecursiveCheckpointAdjoint())
