"""Every exception: its code, its built-in parent, its text, and its way through a pickle."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

import sensitivity as sa
from sensitivity import errors
from sensitivity.registry import registry

BUILT_IN = {
    sa.SensitivityError: Exception,
    sa.SignatureError: TypeError,
    sa.OutputError: ValueError,
    sa.ImpureFunctionError: ValueError,
    sa.BrokenGradientError: ValueError,
    sa.TracingError: TypeError,
    sa.MixedFrameworksError: TypeError,
    sa.InputError: ValueError,
    sa.TimesError: ValueError,
    sa.ToleranceError: ValueError,
    sa.UnsupportedCombination: NotImplementedError,
    sa.IndexTooHigh: NotImplementedError,
    sa.CapturedValueError: ValueError,
    sa.SolveError: RuntimeError,
    sa.UnstableSensealgError: RuntimeError,
    sa.BackendMissingError: ImportError,
}
DEFINED = [c for c in vars(errors).values() if inspect.isclass(c) and c.__module__ == errors.__name__]
EXCEPTIONS = [c for c in DEFINED if issubclass(c, sa.SensitivityError)]
WARNINGS = [c for c in DEFINED if issubclass(c, Warning)]


def test_the_table_is_complete():
    assert set(EXCEPTIONS) == set(BUILT_IN)
    assert set(EXCEPTIONS) | set(WARNINGS) == set(DEFINED)
    assert all(getattr(sa, c.__name__) is c for c in DEFINED)


def test_codes_are_unique_and_stable():
    codes = {c.__name__: c.code for c in EXCEPTIONS}
    assert len(set(codes.values())) == len(codes)
    assert codes == {
        "SensitivityError": "SN100", "SignatureError": "SN101", "OutputError": "SN102", "ImpureFunctionError": "SN103",
        "BrokenGradientError": "SN104", "TracingError": "SN105", "MixedFrameworksError": "SN106", "InputError": "SN107",
        "TimesError": "SN108", "ToleranceError": "SN109", "UnsupportedCombination": "SN110",
        "CapturedValueError": "SN111", "IndexTooHigh": "SN112", "SolveError": "SN201",
        "UnstableSensealgError": "SN202", "BackendMissingError": "SN401",
    }


@pytest.mark.parametrize("cls", DEFINED)
def test_every_class_is_documented(cls):
    first = cls.__doc__.splitlines()[0]
    assert len(first) > 20
    assert cls.__dict__.get("__doc__")


@pytest.mark.parametrize("cls", EXCEPTIONS)
def test_text_parent_and_pickle(cls):
    e = cls("what was seen", "why it matters", "what to type")
    assert isinstance(e, BUILT_IN[cls])
    assert isinstance(e, sa.SensitivityError)
    assert str(e) == f"[{cls.code}] what was seen\n  why: why it matters\n  fix: what to type"
    assert str(cls("only this")) == f"[{cls.code}] only this"
    ways = [pickle.loads(pickle.dumps(e, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for twin in (*ways, copy.copy(e), copy.deepcopy(e)):
        assert type(twin) is cls
        assert twin.args == e.args
        assert str(twin) == str(e)
    e.add_note("more")
    assert pickle.loads(pickle.dumps(e)).__notes__ == ["more"]


@pytest.mark.parametrize("cls", WARNINGS)
def test_warnings_belong_together(cls):
    assert issubclass(cls, sa.SensitivityWarning)
    assert issubclass(cls, UserWarning)
    w = cls("text")
    assert str(pickle.loads(pickle.dumps(w))) == "text"


def test_a_failed_solve_keeps_its_fields():
    prob = sa.ODEProblem(np.square, np.ones(2), (0.0, 3.0))
    prob = prob.remake(f=lambda t, u, p: u * u)
    with pytest.raises(sa.SolveError) as caught:
        sa.solve(prob, sa.Tsit5())
    e = caught.value
    assert e.retcode == sa.RetCode.DtMin
    assert e.t == pytest.approx(1.0, abs=1e-3)
    assert e.solution is not None
    for twin in (pickle.loads(pickle.dumps(e)), copy.copy(e), copy.deepcopy(e)):
        assert (twin.retcode, twin.t, str(twin)) == (e.retcode, e.t, str(e))
        assert twin.solution is None


def _fail():
    raise sa.SolveError("what", "why", "fix", sa.RetCode.MaxSteps, 0.5, object())


@pytest.mark.slow
def test_errors_cross_a_process_pool():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for _ in range(2):  # the pool survives
            with pytest.raises(sa.SolveError) as caught:
                pool.submit(_fail).result()
            assert (caught.value.retcode, caught.value.t) == (sa.RetCode.MaxSteps, 0.5)


# -- arguments --------------------------------------------------------------------------------------------------------


def field(t, u, p):
    return -u


def problem(u0=None, tspan=(0.0, 1.0), p=None):
    return sa.ODEProblem(field, np.ones(2) if u0 is None else u0, tspan, p)


def run(u0=None, tspan=(0.0, 1.0), p=None, alg=None, **options):
    return lambda: sa.solve(problem(u0, tspan, p), alg, **options)


NAN = float("nan")
WRONG = {
    "float32 tolerance": (run(np.ones(2, np.float32), rtol=1e-10), sa.ToleranceError, "float32", "rtol>=1.2e-05"),
    "float16 tolerance": (run(np.ones(2, np.float16), rtol=1e-5), sa.ToleranceError, "float16", "rtol>="),
    "float64 tolerance": (run(rtol=1e-16), sa.ToleranceError, "float64 (machine epsilon 2.2e-16)", "rtol>=2.2e-14"),
    "negative tolerance": (run(rtol=-1.0), sa.ToleranceError, "rtol=-1 is not a positive", "rtol=1e-06"),
    "tolerance NaN": (run(atol=NAN), sa.ToleranceError, "atol=nan", "atol=1e-09"),
    "tolerance text": (run(rtol="small"), sa.ToleranceError, "rtol='small' is not a number", "rtol=1e-06"),
    "no tolerance": (run(rtol=0.0, atol=0.0), sa.ToleranceError, "both zero", "rtol=1e-6"),
    "tolerance of another shape": (run(atol=np.ones(3)), sa.ToleranceError, "other shapes than u0", "atol="),
    "negative entry of a tolerance": (run(atol=np.array([-1.0, 1.0])), sa.ToleranceError, "not positive", "atol="),
    "saveat beyond": (run(saveat=[0.0, 2.0]), sa.TimesError, "saveat[1]=2 lies outside tspan=(0, 1)", "tspan=(0, 2)"),
    "saveat before": (run(saveat=[-1.0]), sa.TimesError, "saveat[0]=-1 lies outside", "tspan=(-1, 1)"),
    "saveat NaN": (run(saveat=[0.0, NAN]), sa.TimesError, "saveat[1]=nan", "remove it"),
    "saveat text": (run(saveat="all"), sa.InputError, "saveat='all'", "saveat='steps'"),
    "saveat zero": (run(saveat=0), sa.TimesError, "asks for no output", "saveat=None"),
    "saveat scalar": (run(saveat=0.5), sa.TimesError, "shape ()", "saveat=[t]"),
    "saveat object": (run(saveat=object()), sa.TimesError, "not a list of times", "np.linspace"),
    "tspan NaN": (run(tspan=(0.0, NAN)), sa.TimesError, "tspan[1]=nan", "tspan=(0.0, 10.0)"),
    "tspan infinite": (run(tspan=(0.0, float("inf"))), sa.TimesError, "tspan[1]=inf", "tspan=(0.0, 10.0)"),
    "tspan text": (run(tspan=("a", "b")), sa.TimesError, "tspan[0]='a'", "tspan=(0.0, 10.0)"),
    "tspan vector": (run(tspan=(0.0, np.ones(2))), sa.TimesError, "shape (2,)", "tspan=(0.0, 10.0)"),
    "tspan of three": (lambda: problem(tspan=(0.0, 1.0, 2.0)), sa.InputError, "not a pair", "tspan=(0.0, 10.0)"),
    "tstops beyond": (run(tstops=[3.0]), sa.TimesError, "tstops holds 3", "leave it out"),
    "u0 text": (run("ab"), sa.InputError, "u0 holds a str", "u0=np.array"),
    "u0 None": (lambda: sa.solve(sa.ODEProblem(field, None, (0.0, 1.0))), sa.InputError, "no numbers", "u0=np.array"),
    "u0 NaN": (run(np.array([1.0, NAN])), sa.SolveError, "u0 holds a value that is not finite", "in u0"),
    "p NaN": (lambda: sa.solve(problem(p=np.array([NAN])).remake(f=lambda t, u, p: p * u)), sa.SolveError,
              "p holds a value that is not finite", "in p"),
    "p a float NaN": (lambda: sa.solve(problem(p={"k": NAN}).remake(f=lambda t, u, p: p["k"] * u)), sa.SolveError,
                      "p holds a value", "in p"),
    "method class": (run(alg=sa.Tsit5), sa.InputError, "alg=Tsit5 is a class", "alg=Tsit5()"),
    "method name": (run(alg="RK45"), sa.InputError, "alg='RK45'", "alg=sa.Tsit5()"),
    "no problem": (lambda: sa.solve(field), sa.InputError, "prob is function", "sa.ODEProblem(f, u0, tspan, p)"),
    "f not callable": (lambda: sa.ODEProblem(3, np.ones(2), (0.0, 1.0)), sa.SignatureError, "f is int",
                       "def f(t, u, p)"),
    "no step size": (run(alg=sa.RK4()), sa.InputError, "dt was not given", "dt=0.01"),
    "negative step": (run(dt=-0.1), sa.InputError, "dt=-0.1", "dt=0.1"),
    "step text": (run(dt="x"), sa.InputError, "dt='x'", "dt=0.01"),
    "control without estimate": (run(alg=sa.RK4(), controller=sa.PIController()), sa.UnsupportedCombination,
                                 "no error estimate", "FixedStep()"),
    "no steps": (run(max_steps=0), sa.InputError, "max_steps=0", "max_steps=100000"),
    "steps text": (run(max_steps="many"), sa.InputError, "max_steps='many'", "max_steps=100000"),
    "progress": (run(progress=3), sa.InputError, "progress=3", "progress=True"),
    "backend": (run(backend="tf"), sa.InputError, "backend='tf'", "install the plugin"),
    "algorithm class": (run(sensealg=sa.DirectAdjoint), sa.InputError, "is a class", "sensealg=DirectAdjoint()"),
    "algorithm name": (run(sensealg="adjoint"), sa.InputError, "sensealg='adjoint'", "sensealg=sa.auto"),
    "on_failure": (run(on_failure=3), sa.InputError, "on_failure=3", "on_failure='raise'"),
    "remake": (lambda: problem().remake(y0=1.0), sa.InputError, "remake got 'y0'", "u0"),
    "wrt": (lambda: sa.gradient(problem(), loss=lambda sol: sol.u.sum(), wrt="y0"), sa.InputError, "'y0'", "u0"),
    "loss": (lambda: sa.gradient(problem()), sa.InputError, "loss is not callable", "loss=lambda sol"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    call, error, what, fix = WRONG[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error) as caught:
            call()
    assert type(caught.value) is error
    seen, why, advice = caught.value.args[:3]
    assert what in seen
    assert why
    assert fix in advice


def test_foreign_keywords_are_translated():
    with pytest.raises(TypeError, match="'t_eval'; here it is called saveat"):
        sa.solve(problem(), t_eval=[1.0])


def _arrays(name):
    pytest.importorskip(name)
    if name not in registry().backends:
        pytest.skip(f"no {name} backend")
    if name == "torch":
        import torch

        return torch.tensor
    import jax.numpy as jnp

    return jnp.asarray


@pytest.mark.parametrize("where", ["p", "tspan", "saveat"])
def test_frameworks_do_not_mix(where):
    torch, jax = _arrays("torch"), _arrays("jax")
    parts = {"p": None, "tspan": (0.0, 1.0), "saveat": None}
    parts[where] = {"p": jax([1.0]), "tspan": (0.0, jax(1.0)), "saveat": jax([1.0])}[where]
    saveat = parts.pop("saveat")
    with pytest.raises(sa.MixedFrameworksError, match=f"u0 is torch, {where} is jax") as caught:
        sa.solve(problem(torch([1.0, 1.0]), **parts), saveat=saveat)
    assert "one framework" in caught.value.args[1]
    assert "torch.as_tensor" in caught.value.args[2]


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_numpy_constants_may_stand_beside_any_framework(name):
    array = _arrays(name)
    sol = sa.solve(problem(array([1.0, 1.0]), p=np.ones(2)), saveat=np.array([0.0, 1.0]))
    assert type(sol.u) is type(array([1.0]))


@pytest.mark.parametrize("u0", [np.array([1, 2]), np.array([True, False]), 2, [1, 2.0]], ids=str)
def test_whole_numbers_become_floats(u0):
    sol = sa.solve(problem(u0).remake(f=lambda t, u, p: [-v for v in u] if isinstance(u, list) else -u))
    first = sol.u[0] if isinstance(u0, list) else sol.u
    assert first.dtype == np.float64


def test_a_list_state_names_the_way_to_an_array():
    with pytest.raises(sa.OutputError, match=r"make u0 one array: u0=np\.array"):
        sa.solve(problem([1.0, 2.0]).remake(f=lambda t, u, p: np.array([u[1], -u[0]])))
    with pytest.raises(TypeError) as caught:
        sa.solve(problem([1.0, 2.0]))
    assert "make u0 an array" in caught.value.__notes__[0]


def test_nan_is_no_exception_for_samplers():
    sol = sa.solve(problem(np.array([1.0, NAN])), on_failure="nan")
    assert np.isnan(sol.u).all()


WITHOUT_X64 = """
import jax, numpy as np, pytest, sensitivity as sa, jax.numpy as jnp
prob = sa.ODEProblem(lambda t, u, p: -p * u, np.array([1.0, 2.0]), (0.0, 1.0), jnp.array([1.0, 2.0]))
for change in ({}, {"backend": "jax"}):
    with pytest.raises(sa.ToleranceError, match="float32"):
        sa.solve(prob, rtol=1e-10, **change)
with pytest.raises(sa.ToleranceError, match="float32"):
    sa.solve(prob.remake(u0=[1.0, 2.0], f=lambda t, u, p: [-u[0], -u[1]]), rtol=1e-10)
assert sa.solve(prob).u.dtype == jnp.float32
assert int(sa.solve(prob).stats.naccept) < 8  # the tolerances of float32
"""


def test_jax_without_x64_is_held_to_float32():
    _arrays("jax")
    path = os.pathsep.join(p for p in sys.path if p)
    env = os.environ | {"JAX_ENABLE_X64": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", WITHOUT_X64], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
