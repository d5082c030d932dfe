"""The step loop and its keywords, in every framework."""

import dataclasses
import math

import numpy as np
import pytest

import sensitivity as sa

TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def decay(t, u, p):
    return -p * u


def problem(lab, tspan=(0.0, 2.0), dtype="float64"):
    """`u' = -p u` with a rate per component; the solution is `u0 exp(-p (t - t0))`."""
    return sa.ODEProblem(decay, lab.array([1.5, -0.75, 2.0], dtype), tspan, lab.array([0.5, 1.0, -0.25], dtype))


def exact(t, t0=0.0):
    t = np.asarray(t, dtype=float)
    return np.array([1.5, -0.75, 2.0]) * np.exp(-np.array([0.5, 1.0, -0.25]) * (t[..., None] - t0))


def near(lab, got, want, tol=1e-8):
    np.testing.assert_allclose(lab.numpy(got), want, rtol=tol, atol=tol)


# -- saveat -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.5)], ids=["forwards", "backwards"])
def test_saveat_none(lab, tspan):
    sol = sa.solve(problem(lab, tspan), sa.Tsit5(), **TIGHT)
    assert tuple(sol.u.shape) == (1, 3)
    near(lab, sol.t, [tspan[1]], 0.0)
    near(lab, sol.u, exact([tspan[1]], tspan[0]))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.0)], ids=["forwards", "backwards"])
def test_saveat_keeps_the_order_given(lab, tspan, dense):
    ts = [1.3, 0.0, 2.0, 0.4, 1.3, 2.0, 0.0]
    sol = sa.solve(problem(lab, tspan), sa.Tsit5(), saveat=lab.array(ts), dense=dense, **TIGHT)
    near(lab, sol.t, ts, 0.0)
    near(lab, sol.u, exact(ts, tspan[0]))
    first = lab.numpy(sol.u)[ts.index(tspan[0])]
    np.testing.assert_array_equal(first, [1.5, -0.75, 2.0])


def test_saveat_of_another_kind(lab):
    """A list, a tuple and a NumPy array are times as well as an array of the framework."""
    want = lab.numpy(sa.solve(problem(lab), sa.Tsit5(), saveat=lab.array([0.5, 1.5])).u)
    for ts in ([0.5, 1.5], (0.5, 1.5), np.array([0.5, 1.5])):
        np.testing.assert_array_equal(lab.numpy(sa.solve(problem(lab), sa.Tsit5(), saveat=ts).u), want)


@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.5)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_saveat_number(lab, count, tspan):
    sol = sa.solve(problem(lab, tspan), sa.Tsit5(), saveat=count, **TIGHT)
    ts = np.linspace(*tspan, count) if count > 1 else [tspan[1]]
    near(lab, sol.t, ts, 1e-15)
    near(lab, sol.u, exact(ts, tspan[0]))


@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.5)], ids=["forwards", "backwards"])
def test_saveat_steps(lab, tspan):
    sol = sa.solve(problem(lab, tspan), sa.Tsit5(), saveat="steps", **TIGHT)
    t, n = lab.numpy(sol.t), int(sol.n_steps)
    assert n == len(t) == sol.u.shape[0] == int(sol.stats.naccept)
    assert t[-1] == tspan[1]
    assert np.all(np.sign(np.diff([tspan[0], *t])) == np.sign(tspan[1] - tspan[0]))
    near(lab, sol.u, exact(t, tspan[0]))


@pytest.mark.parametrize("saveat", [[0.5, 2.5], [-0.1], [math.nan]])
def test_saveat_outside(lab, saveat):
    with pytest.raises(sa.TimesError, match="saveat"):
        sa.solve(problem(lab), sa.Tsit5(), saveat=lab.array(saveat))


@pytest.mark.parametrize("saveat", ["step", 0, [], [[0.5]], "0.5"])
def test_saveat_makes_no_sense(lab, saveat):
    with pytest.raises(sa.InputError, match="saveat"):
        sa.solve(problem(lab), sa.Tsit5(), saveat=saveat)


# -- dense output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", [sa.Tsit5(), sa.Dopri8(), sa.Heun()], ids=repr)
def test_dense(lab, method, tspan):
    tight = {"rtol": 1e-6, "atol": 1e-8} if isinstance(method, sa.Heun) else TIGHT
    tol = 1e-5 if isinstance(method, sa.Heun) else 1e-8
    sol = sa.solve(problem(lab, tspan), method, dense=True, **tight)
    ts = np.linspace(0.0, 2.0, 23)
    near(lab, sol(lab.array(ts)), exact(ts, tspan[0]), tol)
    assert tuple(sol(0.7).shape) == (3,)
    near(lab, sol(0.7), exact(0.7, tspan[0]), tol)
    near(lab, sol(tspan[1]), lab.numpy(sol.u)[0], 1e-14)
    with pytest.raises(sa.TimesError, match="outside"):
        sol(2.1)


def test_dense_was_not_asked_for(lab):
    calls = []
    prob = problem(lab)

    def counted(t, u, p):
        calls.append(t)
        return prob.f(t, u, p)

    sol = sa.solve(prob.remake(f=counted), sa.Tsit5(), saveat=[0.5], rtol=1e-9, atol=1e-9)
    kept = sa.solve(prob, sa.Tsit5(), dense=True, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(lab.numpy(sol(1.0)), lab.numpy(kept(1.0)))
    before = len(calls)
    sol(1.5)
    assert len(calls) == before
    with pytest.raises(sa.InputError, match="dense=True"):
        sa.gradient(prob, sa.Tsit5(), lambda sol: lab.xp.sum(sol(1.0)))


# -- span and steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saveat", [None, [1.0, 1.0], 3, "steps"])
def test_no_time_at_all(lab, saveat):
    sol = sa.solve(problem(lab, (1.0, 1.0)), sa.Tsit5(), saveat=saveat)
    assert sol.retcode == sa.RetCode.Success
    assert int(sol.stats.naccept) == 0
    rows = {None: 1, "steps": 0}.get(saveat if not isinstance(saveat, list) else "list", 2 if saveat != 3 else 3)
    assert tuple(sol.u.shape) == (rows, 3)
    near(lab, sol.u, exact([0.0] * rows), 0.0)


@pytest.mark.parametrize("tspan", [(0.0, 1.0), (1.0, 0.0)], ids=["forwards", "backwards"])
def test_fixed_steps_shorten_the_last(lab, tspan):
    sol = sa.solve(problem(lab, tspan), sa.Tsit5(), controller=sa.FixedStep(), dt=0.3, saveat="steps")
    ts = [0.3, 0.6, 0.9, 1.0]
    near(lab, sol.t, ts if tspan[1] else 1.0 - np.array(ts), 1e-15)
    assert lab.numpy(sol.t)[-1] == tspan[1]


def test_fixed_steps_that_fit(lab):
    """Ten steps of 0.1 make ten steps, not eleven with one of round-off size."""
    sol = sa.solve(problem(lab, (0.0, 1.0)), sa.RK4(), dt=0.1)
    assert int(sol.stats.naccept) == 10


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_many_fixed_steps_land_on_the_end(lab, dtype):
    sol = sa.solve(problem(lab, (0.0, 1.0), dtype), sa.Euler(), dt=0.001)
    assert int(sol.stats.naccept) == 1000
    assert lab.numpy(sol.t)[-1] == 1.0


def test_fixed_steps_need_a_size(lab):
    with pytest.raises(sa.InputError, match="dt"):
        sa.solve(problem(lab), sa.RK4())
    with pytest.raises(sa.InputError, match="dt"):
        sa.solve(problem(lab), sa.Tsit5(), controller=sa.FixedStep())
    with pytest.raises(sa.UnsupportedCombination, match="error estimate"):
        sa.solve(problem(lab), sa.RK4(), controller=sa.PIController(), dt=0.1)


def test_dt_is_the_first_step_to_try(lab):
    first = [lab.numpy(sa.solve(problem(lab), sa.Tsit5(), dt=dt, saveat="steps").t)[0] for dt in (1e-3, 1e-2)]
    assert first == pytest.approx([1e-3, 1e-2], rel=1e-12)


def test_dtmax(lab):
    sol = sa.solve(problem(lab), sa.Tsit5(), dtmax=0.05, saveat="steps")
    steps = np.diff([0.0, *lab.numpy(sol.t)])
    assert steps.max() <= 0.05 * (1 + 1e-8)
    assert len(steps) >= 40


def blow_up(t, u, p):
    return u * u


@pytest.mark.parametrize("dtmin", [None, 1e-3])
def test_dtmin(lab, dtmin):
    """`u' = u^2` from 1 leaves every bound at t = 1."""
    prob = sa.ODEProblem(blow_up, lab.array([1.0]), (0.0, 2.0))
    with pytest.raises(sa.SolveError) as e:
        sa.solve(prob, sa.Tsit5(), dtmin=dtmin)
    assert e.value.retcode in (sa.RetCode.DtMin, sa.RetCode.NonFinite)
    # The computed solution blows up at its own time, which the tolerance of 1e-6 moves.
    assert e.value.t == pytest.approx(1.0, abs=1e-5 if dtmin is None else 0.1)
    if dtmin is not None:
        assert e.value.retcode == sa.RetCode.DtMin


@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.0)], ids=["forwards", "backwards"])
def test_tstops_are_hit_exactly(lab, tspan):
    stops = [1.1, 0.3, 0.7000000000000001, 1.9]
    sol = sa.solve(problem(lab, tspan), sa.Tsit5(), tstops=stops, saveat="steps")
    assert set(stops) <= set(lab.numpy(sol.t).tolist())
    near(lab, sol.u, exact(lab.numpy(sol.t), tspan[0]), 1e-5)


def test_tstops_outside(lab):
    with pytest.raises(sa.TimesError, match="tstops"):
        sa.solve(problem(lab), sa.Tsit5(), tstops=[3.0])


# -- failures -----------------------------------------------------------------------------------------------------


def test_max_steps(lab):
    prob = lab.lotka_volterra()
    with pytest.raises(sa.SolveError, match="max_steps=10") as e:
        sa.solve(prob, sa.Tsit5(), max_steps=10)
    assert e.value.retcode == sa.RetCode.MaxSteps
    assert 0.0 < e.value.t < 10.0
    assert int(e.value.solution.stats.naccept) + int(e.value.solution.stats.nreject) == 10
    for saveat in (None, [1.0, 9.0], "steps"):
        sol = sa.solve(prob, sa.Tsit5(), max_steps=10, saveat=saveat, on_failure="return")
        assert sol.retcode == sa.RetCode.MaxSteps
        assert not sol.success


def test_on_failure_return_and_nan(lab):
    prob, ts = lab.lotka_volterra(), lab.array([0.1, 9.0])
    reached = lab.numpy(sa.solve(prob, sa.Tsit5(), saveat=ts).u)[0]
    kept = lab.numpy(sa.solve(prob, sa.Tsit5(), max_steps=10, saveat=ts, on_failure="return").u)
    np.testing.assert_array_equal(kept[0], reached)  # what was reached is there, what was not is not made up
    assert np.isnan(kept[1]).all()
    gone = sa.solve(prob, sa.Tsit5(), max_steps=10, saveat=ts, on_failure="nan")
    assert gone.retcode == sa.RetCode.MaxSteps
    assert np.isnan(lab.numpy(gone.u)).all()
    with pytest.raises(sa.InputError, match="on_failure"):
        sa.solve(prob, sa.Tsit5(), on_failure="ignore")


@pytest.mark.parametrize("fixed", [False, True])
def test_not_finite(lab, fixed):
    prob = sa.ODEProblem(lambda t, u, p: u * math.nan, lab.array([1.0]), (0.0, 1.0))
    options = {"controller": sa.FixedStep(), "dt": 0.25} if fixed else {}
    with pytest.raises(sa.SolveError, match="finite") as e:
        sa.solve(prob, sa.Tsit5(), probe="off", **options)
    assert e.value.retcode == sa.RetCode.NonFinite


def test_not_finite_later(lab):
    """`f` that is not finite behind t = 1; the message names the time."""
    xp = lab.xp
    prob = sa.ODEProblem(lambda t, u, p: -u / xp.sqrt(p[0] - t + 0.0 * u), lab.array([1.0]), (0.0, 2.0),
                         lab.array([1.0]))
    with np.errstate(all="ignore"), pytest.raises(sa.SolveError) as e:
        sa.solve(prob, sa.Tsit5())
    assert e.value.retcode in (sa.RetCode.NonFinite, sa.RetCode.DtMin)
    assert e.value.t == pytest.approx(1.0, abs=1e-6)


# -- control ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"controller": sa.FixedStep(), "dt": 0.1}], ids=["adaptive", "fixed"])
def test_progress(lab, options):
    seen = []
    sa.solve(problem(lab), sa.Tsit5(), **options, progress=lambda fraction, t: seen.append((float(fraction), float(t))))
    if lab.name == "jax":
        import jax

        jax.effects_barrier()
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert seen[-1] == (1.0, 2.0)
    assert seen[0][0] == pytest.approx(seen[0][1] / 2.0)


def test_tolerances_control_the_error(lab):
    def error(tol):
        return np.abs(lab.numpy(sa.solve(problem(lab), sa.Tsit5(), rtol=tol, atol=tol).u) - exact([2.0])).max()

    assert error(1e-4) > 10 * error(1e-7) > 100 * error(1e-10)
    assert error(1e-10) < 1e-9


def test_atol_per_entry(lab):
    """A component whose tolerance is loose does not ask for steps."""

    def f(t, u, p):
        return p * u

    prob = sa.ODEProblem(f, lab.array([1.0, 1.0]), (0.0, 1.0), lab.array([-0.1, -40.0]))
    strict, loose = ([1e-9, 1e-9], [1e-9, 10.0])
    steps = [int(sa.solve(prob, sa.Tsit5(), rtol=1e-9, atol=lab.array(atol)).stats.naccept) for atol in (strict, loose)]
    assert steps[1] < steps[0] / 2
    same = [sa.solve(prob, sa.Tsit5(), atol=atol).stats.naccept for atol in (1e-7, lab.array([1e-7, 1e-7]))]
    assert int(same[0]) == int(same[1])
    with pytest.raises(sa.ToleranceError, match="shapes"):
        sa.solve(prob, sa.Tsit5(), atol=lab.array([1e-9, 1e-9, 1e-9]))


def test_atol_pytree(lab):
    prob = sa.ODEProblem(lambda t, u, p: {"a": -u["a"], "b": -40.0 * u["b"]},
                         {"a": lab.array([1.0]), "b": lab.array([1.0])}, (0.0, 1.0))
    atol = {"a": lab.array([1e-9]), "b": lab.array([10.0])}
    loose = sa.solve(prob, sa.Tsit5(), rtol=1e-9, atol=atol)
    strict = sa.solve(prob, sa.Tsit5(), rtol=1e-9, atol=1e-9)
    assert int(loose.stats.naccept) < int(strict.stats.naccept) / 2


@pytest.mark.parametrize(("name", "value"), [("rtol", -1.0), ("atol", math.nan), ("rtol", 1e-17)])
def test_tolerances_that_cannot_be(lab, name, value):
    with pytest.raises(sa.ToleranceError, match=name):
        sa.solve(problem(lab), sa.Tsit5(), **{name: value})


def test_own_norm(lab):
    """An error norm that looks at the first component only."""
    prob = sa.ODEProblem(lambda t, u, p: p * u, lab.array([1.0, 1.0]), (0.0, 1.0), lab.array([-0.1, -40.0]))
    plain = sa.solve(prob, sa.Tsit5(), rtol=1e-8)
    first = sa.solve(prob, sa.Tsit5(), rtol=1e-8, norm=lambda e: lab.be.rms(e[:1]))
    assert int(first.stats.naccept) < int(plain.stats.naccept) / 2


# -- states and parameters ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Body:
    position: object
    speed: object


@pytest.mark.parametrize("kind", ["dict", "tuple", "list", "dataclass", "nested"])
def test_states_are_pytrees(lab, kind):
    """The harmonic oscillator, its state in every container."""
    make = {
        "dict": lambda x, v: {"x": x, "v": v},
        "tuple": lambda x, v: (x, v),
        "list": lambda x, v: [x, v],
        "dataclass": Body,
        "nested": lambda x, v: {"x": (x, None), "v": [v]},
    }[kind]
    take = {
        "dict": lambda u: (u["x"], u["v"]),
        "tuple": lambda u: u,
        "list": lambda u: u,
        "dataclass": lambda u: (u.position, u.speed),
        "nested": lambda u: (u["x"][0], u["v"][0]),
    }[kind]

    def f(t, u, p):
        x, v = take(u)
        return make(v, -x)

    x0, v0 = np.array([[1.0, 2.0, 3.0]]), np.array([[0.5, 0.0, -1.0]])
    ts = np.array([0.0, 1.2])
    sol = sa.solve(sa.ODEProblem(f, make(lab.array(x0), lab.array(v0)), (0.0, 1.2)), sa.Dopri8(), saveat=lab.array(ts),
                   **TIGHT)
    x, v = take(sol.u)
    c, s = np.cos(ts)[:, None, None], np.sin(ts)[:, None, None]
    assert tuple(x.shape) == (2, 1, 3)
    near(lab, x, c * x0 + s * v0)
    near(lab, v, c * v0 - s * x0)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 2)])
def test_states_of_any_shape(lab, shape):
    u0 = np.arange(1.0, 1.0 + math.prod(shape)).reshape(shape)
    prob = sa.ODEProblem(lambda t, u, p: -u, lab.array(u0), (0.0, 1.0))
    sol = sa.solve(prob, sa.Tsit5(), saveat=3, dense=True, **TIGHT)
    assert tuple(sol.u.shape) == (3, *shape)
    near(lab, sol.u[2], u0 * math.exp(-1.0))
    assert tuple(sol(0.5).shape) == shape
    near(lab, sol(0.5), u0 * math.exp(-0.5))


def test_single_precision(lab):
    sol = sa.solve(problem(lab, dtype="float32"), sa.Tsit5(), saveat=[0.5, 2.0], dense=True)
    assert lab.numpy(sol.u).dtype == np.float32
    assert lab.numpy(sol(1.0)).dtype == np.float32
    near(lab, sol.u, exact([0.5, 2.0]), 1e-3)  # ten times the default tolerance of float32
    near(lab, sol(1.0), exact(1.0), 1e-3)


def test_dtype_keyword(lab):
    prob = sa.ODEProblem(lambda t, u, p: -0.5 * u, lab.array([1.0]), (0.0, 1.0))
    sol = sa.solve(prob, sa.Tsit5(), dtype=lab.be.xp.float32)
    assert lab.numpy(sol.u).dtype == np.float32


def test_whole_numbers_become_floats(lab):
    prob = sa.ODEProblem(lambda t, u, p: -0.5 * u, lab.array([2, 4], "int64"), (0, 1))
    sol = sa.solve(prob, sa.Tsit5(), **({} if lab.name != "torch" else {"dtype": lab.xp.float64}), **TIGHT)
    near(lab, sol.u, [[2 * math.exp(-0.5), 4 * math.exp(-0.5)]])


def test_parameters_that_are_python_floats(lab):
    prob = sa.ODEProblem(lambda t, u, p: -p["k"] * u, lab.array([2.0]), (0.0, 1.0), {"k": 0.5})
    near(lab, sa.solve(prob, sa.Tsit5(), **TIGHT).u, [[2.0 * math.exp(-0.5)]])
    assert sa.solve(prob, sa.Tsit5()).u.shape == (1, 1)


def test_parameters_that_are_no_floats(lab):
    seen = {}

    def f(t, u, p):
        seen.update({k: p[k] for k in ("word", "nothing", "number")})
        return -p["k"] * u[p["index"]] * u / u[p["index"]]

    p = {"word": "linear", "nothing": None, "number": 3, "index": lab.array([0, 1], "int64"), "k": lab.array(0.5)}
    prob = sa.ODEProblem(f, lab.array([2.0, 3.0]), (0.0, 1.0), p)
    near(lab, sa.solve(prob, sa.Tsit5(), **TIGHT).u, np.array([[2.0, 3.0]]) * math.exp(-0.5))
    assert seen == {"word": "linear", "nothing": None, "number": 3}


def test_no_parameters(lab):
    def f(t, u, p):
        assert p is None
        return -u

    near(lab, sa.solve(sa.ODEProblem(f, lab.array([2.0]), (0.0, 1.0)), sa.Tsit5(), **TIGHT).u, [[2 * math.exp(-1)]])


# -- counts -------------------------------------------------------------------------------------------------------

EAGER = pytest.mark.parametrize("method", ["Euler", "Heun", "Midpoint", "RK4", "BS3", "Dopri5", "Tsit5", "Dopri8"])


@EAGER
@pytest.mark.parametrize("saveat", [None, [0.5, 1.0], "steps"])
def test_evaluations_are_counted(numpy_lab, method, saveat):
    """`stats.nfe` is the number of calls of `f`; rejected steps and the starting step size included."""
    calls = []
    prob = numpy_lab.lotka_volterra(3.0)

    def f(t, u, p):
        calls.append(t)
        return prob.f(t, u, p)

    method = getattr(sa, method)()
    options = {"rtol": 1e-5} if method.adaptive else {"dt": 0.1}
    sol = sa.solve(prob.remake(f=f), method, saveat=saveat, probe="off",
                   sensealg=sa.RecursiveCheckpointAdjoint(vjp=sa.ReverseVJP()), **options)
    assert sol.stats.nfe == len(calls)
    assert sol.stats["nfe"] == sol.stats.nfe


def test_counts_agree_across_frameworks(lab, numpy_lab):
    want = sa.solve(numpy_lab.lotka_volterra(), sa.Tsit5()).stats
    got = sa.solve(lab.lotka_volterra(), sa.Tsit5()).stats
    assert int(want.nreject) > 0
    assert (int(got.nfe), int(got.naccept), int(got.nreject)) == (want.nfe, want.naccept, want.nreject)


# -- keywords -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "hint"), [("t_eval", "saveat"), ("abstol", "atol"), ("typo", "saveat, rtol")])
def test_unknown_keywords_are_named(numpy_lab, name, hint):
    with pytest.raises(TypeError, match=f"{name}.*{hint}"):
        sa.solve(problem(numpy_lab), sa.Tsit5(), **{name: 1})


@pytest.mark.parametrize(("name", "value"), [("dt", -0.1), ("dtmax", 0.0), ("dtmin", math.nan), ("max_steps", 0),
                                             ("max_steps", 2.5), ("progress", 3), ("probe", "maybe"),
                                             ("backend", "fortran")])
def test_values_that_make_no_sense(numpy_lab, name, value):
    with pytest.raises(sa.InputError, match=name):
        sa.solve(problem(numpy_lab), sa.Tsit5(), **{name: value})


def test_classes_in_place_of_objects(numpy_lab):
    with pytest.raises(sa.InputError, match=r"Tsit5\(\)"):
        sa.solve(problem(numpy_lab), sa.Tsit5)
    with pytest.raises(sa.InputError, match="DirectAdjoint"):
        sa.solve(problem(numpy_lab), sa.Tsit5(), sensealg=sa.DirectAdjoint)


def test_the_default_method(numpy_lab):
    assert sa.solve(problem(numpy_lab)).alg == sa.Tsit5()
