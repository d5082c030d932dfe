"""The JAX backend: every transform, closures, modules, lanes under vmap, failures, how often `f` is traced."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import sensitivity as sa  # noqa: E402

P = np.array([1.5, 1.0, 3.0, 1.0])
TS = np.arange(1.0, 11.0)
GRAD_P = np.array([-7.5558620739812871820, -16.824915246868327154, 5.1114038569799057827, -37.335193444966730494])
GRAD_U0 = np.array([-7.4651778929941023335, -1.9371334661489880546])
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
ALGORITHMS = [sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(), sa.ForwardSensitivity(), sa.DirectAdjoint()]


pytestmark = pytest.mark.usefixtures("jax_double")

def lotka_volterra(t, u, p):
    x, y = u[0], u[1]
    a, b, c, d = p
    return jnp.stack([a * x - b * x * y, -c * y + d * x * y])


def decay(t, u, p):
    return -p * u


def problem(p=P, f=lotka_volterra):
    return sa.ODEProblem(f, jnp.ones(2), (0.0, 10.0), jnp.asarray(p))


def total(sensealg, **more):
    steps = {"max_steps": 640} if isinstance(sensealg, sa.DirectAdjoint) else {}
    return lambda p: sa.solve(problem(p), sa.Tsit5(), saveat=TS, sensealg=sensealg, **TIGHT, **steps, **more).u.sum()


@pytest.mark.parametrize("sensealg", ALGORITHMS, ids=lambda s: s.name)
def test_transforms_agree_with_known_digits(sensealg):
    f, p = total(sensealg), jnp.asarray(P)
    lanes = jnp.stack([p, 1.01 * p])
    results = {
        "grad": jax.grad(f)(p),
        "jit(grad)": jax.jit(jax.grad(f))(p),
        "jacrev": jax.jacrev(f)(p),
        "jacfwd": jax.jacfwd(f)(p),
        "vmap(grad)": jax.vmap(jax.grad(f))(lanes)[0],
        "grad(vmap)": jax.grad(lambda P: jax.vmap(f)(P).sum())(lanes)[0],
        "vmap(jacfwd)": jax.vmap(jax.jacfwd(f))(lanes)[0],
    }
    for name, value in results.items():
        np.testing.assert_allclose(value, GRAD_P, rtol=2e-9, err_msg=name)
    d = jnp.array([0.3, -0.2, 0.5, 0.1])
    np.testing.assert_allclose(jax.jvp(f, (p,), (d,))[1], GRAD_P @ d, atol=2e-9 * np.abs(GRAD_P).sum())


@pytest.mark.parametrize("sensealg", ALGORITHMS[:3], ids=lambda s: s.name)
def test_hessian_is_the_difference_of_gradients(sensealg):
    f, p, e = total(sensealg), jnp.asarray(P), 1e-5
    gradient = jax.jit(jax.grad(f))
    numeric = np.stack([(gradient(p + e * v) - gradient(p - e * v)) / (2 * e) for v in np.eye(4)])
    exact = jax.hessian(f)(p)
    np.testing.assert_allclose(exact, numeric, rtol=1e-5, atol=1e-5)  # differences of gradients: 1e-9 / 1e-5 each


def test_lanes_with_different_steps_equal_single_solves():
    f = total(sa.RecursiveCheckpointAdjoint())
    lanes = jnp.asarray(P) * jnp.array([[1.0], [0.3], [1.7]])
    together = jax.vmap(jax.value_and_grad(f))(lanes)
    for i, p in enumerate(lanes):
        value, gradient = jax.value_and_grad(f)(p)
        np.testing.assert_allclose(together[0][i], value, rtol=1e-11)
        np.testing.assert_allclose(together[1][i], gradient, rtol=1e-9)


def test_stages_are_evaluated_again_in_lanes_of_a_light_field():
    """As the products with many small states need them; heavier fields, and solves alone, keep their stages."""
    def heavy(t, u, p):
        return jnp.eye(2) @ lotka_volterra(t, u, p)

    def gradient(p, f):
        return sa.gradient(problem(p, f), sa.Tsit5(), lambda sol: sol.u.sum(), rtol=1e-8, atol=1e-8)

    lanes = jnp.asarray(P) * jnp.array([[1.0], [0.3]])
    light, kept = (jax.vmap(lambda p, f=f: gradient(p, f))(lanes) for f in (lotka_volterra, heavy))
    steps = np.asarray(light.stats.naccept)
    np.testing.assert_array_equal(steps, kept.stats.naccept)
    assert steps[1] < steps[0] < 512  # so many have room for their stages
    np.testing.assert_array_equal(light.stats.nfe - kept.stats.nfe, 7 * steps)
    np.testing.assert_allclose(light.p, kept.p, rtol=1e-11)
    alone = gradient(lanes[1], lotka_volterra)
    assert alone.stats.nfe == kept.stats.nfe[1]
    np.testing.assert_allclose(alone.p, kept.p[1], rtol=1e-11)


def test_stages_of_steps_beyond_the_room_for_them_are_counted():
    for steps, again in ((1000, 1000 - 511), (500, 0)):
        prob = problem().remake(tspan=(0.0, 0.01 * steps))
        r = sa.gradient(prob, sa.RK4(), lambda sol: sol.u.sum(), dt=0.01, controller=sa.FixedStep())
        assert r.stats.naccept == steps
        assert r.stats.nfe == 4 * (steps + again)


def test_every_input_of_one_vmapped_solve():
    def end(u0, k, t1, ts):
        prob = sa.ODEProblem(decay, u0[None], (0.0, t1), k)
        return sa.solve(prob, sa.Tsit5(), saveat=ts, **TIGHT).u[:, 0].sum()

    u0, k = jnp.array([1.0, 2.0]), jnp.array([0.5, 2.0])
    t1, ts = jnp.array([2.0, 3.0]), jnp.array([[0.5, 1.5], [2.5, 0.1]])
    got = jax.vmap(jax.grad(end, (0, 1, 3)))(u0, k, t1, ts)
    decays = np.exp(-np.asarray(k)[:, None] * np.asarray(ts))
    np.testing.assert_allclose(got[0], decays.sum(1), rtol=1e-9)
    np.testing.assert_allclose(got[1], -(np.asarray(u0)[:, None] * ts * decays).sum(1), rtol=1e-8)
    np.testing.assert_allclose(got[2], -np.asarray(k * u0)[:, None] * decays, rtol=1e-6)


@pytest.mark.parametrize("sensealg", ALGORITHMS, ids=lambda s: s.name)
def test_times_have_derivatives(sensealg):
    k = 0.7

    def end(t0, t1):
        prob = sa.ODEProblem(decay, jnp.array([1.3]), (t0, t1), jnp.array(k))
        return sa.solve(prob, sa.Tsit5(), sensealg=sensealg, max_steps=256, **TIGHT).u[0, 0]

    value = 1.3 * np.exp(-k * 1.5)
    for derive in (jax.grad, jax.jacfwd):
        t0_bar, t1_bar = derive(end, (0, 1))(0.5, 2.0)
        np.testing.assert_allclose([t0_bar, t1_bar], [k * value, -k * value], rtol=1e-8)


def test_integer_saveat_moves_with_the_span():
    def rows(t1):
        prob = sa.ODEProblem(decay, jnp.array([1.0]), (0.0, t1), jnp.array(0.7))
        return sa.solve(prob, sa.Tsit5(), saveat=3, **TIGHT).u[:, 0]

    w = np.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(jax.jacrev(rows)(2.0), -0.7 * w * np.exp(-1.4 * w), rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(jax.jacfwd(rows)(2.0), -0.7 * w * np.exp(-1.4 * w), rtol=1e-7, atol=1e-10)


def test_closed_over_values_are_differentiated():
    def closing(k, shift):
        def f(t, u, p):
            return -k * u + shift["b"] * 0.0

        return sa.solve(sa.ODEProblem(f, jnp.array([1.0]), (0.0, 2.0)), sa.Tsit5(), **TIGHT).u[0, 0]

    for derive in (jax.grad, jax.jacfwd, lambda g: jax.jit(jax.grad(g))):
        np.testing.assert_allclose(derive(closing)(0.5, {"b": 1.0}), -2.0 * np.exp(-1.0), rtol=1e-9)
    lanes = jax.vmap(jax.grad(closing), (0, None))(jnp.array([0.5, 0.6]), {"b": 1.0})
    np.testing.assert_allclose(lanes, -2.0 * np.exp(-2.0 * np.array([0.5, 0.6])), rtol=1e-9)


def test_a_module_as_vector_field():
    eqx = pytest.importorskip("equinox")

    class Decay(eqx.Module):
        rate: jax.Array
        name: str = eqx.field(static=True, default="decay")

        def __call__(self, t, u, p):
            return -self.rate * u

    def end(f):
        return sa.solve(sa.ODEProblem(f, jnp.array([1.0]), (0.0, 2.0)), sa.Tsit5(), **TIGHT).u[0, 0]

    got = eqx.filter_grad(end)(Decay(jnp.array(0.5)))
    np.testing.assert_allclose(got.rate, -2.0 * np.exp(-1.0), rtol=1e-9)
    np.testing.assert_allclose(jax.jit(end)(Decay(jnp.array(0.5))), np.exp(-1.0), rtol=1e-9)


def test_steps_are_padded_inside_jit_and_cut_outside():
    prob = sa.ODEProblem(decay, jnp.array([1.0]), (0.0, 1.0), jnp.array(0.5))
    outside = sa.solve(prob, sa.Tsit5(), saveat="steps")
    inside = jax.jit(lambda: sa.solve(prob, sa.Tsit5(), saveat="steps", max_steps=50))()
    n = int(inside.n_steps)
    assert outside.u.shape == (n, 1)
    assert inside.u.shape == (50, 1)
    np.testing.assert_array_equal(inside.u[:n], outside.u)
    assert np.isnan(inside.u[n:]).all()
    assert np.isnan(inside.t[n:]).all()
    slope = jax.grad(lambda k: jnp.nansum(sa.solve(prob.remake(p=k), sa.Tsit5(), saveat="steps", max_steps=50).u[-1]))
    assert np.isfinite(slope(jnp.array(0.5)))


def test_gradient_of_steps_equals_gradient_of_the_same_times():
    prob = sa.ODEProblem(decay, jnp.array([1.0]), (0.0, 1.0), jnp.array(0.5))
    r = sa.gradient(prob, sa.Tsit5(), lambda sol: (sol.u**2).sum(), saveat="steps")
    ts = np.asarray(r.solution.t)
    np.testing.assert_allclose(r.p, (-2 * ts * np.exp(-1.0 * ts)).sum(), rtol=1e-6)


def test_dense_output_has_derivatives():
    def between(k):
        prob = sa.ODEProblem(decay, jnp.array([1.0]), (0.0, 2.0), k)
        return sa.solve(prob, sa.Tsit5(), dense=True, **TIGHT)(jnp.array([0.3, 1.7]))[:, 0]

    t = np.array([0.3, 1.7])
    np.testing.assert_allclose(jax.jacrev(between)(0.5), -t * np.exp(-0.5 * t), rtol=1e-7)


def test_a_failed_lane_is_nan_and_says_why():
    def blow_up(u0):
        prob = sa.ODEProblem(lambda t, u, p: u**2, u0[None], (0.0, 1.0))
        sol = sa.solve(prob, sa.Tsit5())
        return sol.u[0, 0], sol.retcode

    values, codes = jax.vmap(blow_up)(jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(values[0], 1.0, rtol=1e-5)
    assert np.isnan(values[1])
    assert codes[0] == sa.RetCode.Success != codes[1]
    slopes = jax.vmap(jax.grad(lambda u0: blow_up(u0)[0]))(jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(slopes[0], 4.0, rtol=1e-4)
    assert np.isnan(slopes[1])
    with pytest.raises(sa.SolveError) as e:
        blow_up(jnp.array(2.0))
    assert e.value.retcode in (sa.RetCode.DtMin, sa.RetCode.NonFinite, sa.RetCode.MaxSteps)
    assert 0.4 < e.value.t < 0.6


def test_step_limit_inside_jit_is_nan_never_a_short_answer():
    stuck = jax.jit(lambda p: sa.solve(problem(p), sa.Tsit5(), saveat=TS, max_steps=20).u)
    assert np.isnan(stuck(jnp.asarray(P))).all()


def test_float32_stays_float32():
    prob = sa.ODEProblem(lotka_volterra, jnp.ones(2, jnp.float32), (0.0, 2.0), jnp.asarray(P, jnp.float32))
    r = sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u.sum())
    assert r.solution.u.dtype == r.p.dtype == r.u0.dtype == jnp.float32
    exact = sa.gradient(problem().remake(tspan=(0.0, 2.0)), sa.Tsit5(), lambda sol: sol.u.sum(), **TIGHT)
    np.testing.assert_allclose(r.p, exact.p, rtol=2e-3)  # float32 at its default tolerance, 1e-4


def test_f_is_traced_a_few_times_whatever_the_number_of_steps():
    calls = []

    def counted(t, u, p):
        calls.append(1)
        return lotka_volterra(t, u, p)

    jax.jit(jax.grad(lambda p: sa.solve(problem(p, counted), sa.Tsit5(), saveat=TS, **TIGHT).u.sum()))(jnp.asarray(P))
    assert len(calls) <= 5
    calls.clear()
    prob = problem(f=counted)
    for scale in (1.0, 1.1, 1.2):
        sa.solve(prob.remake(p=jnp.asarray(scale * P)), sa.Tsit5(), saveat=TS)
    first = len(calls)
    sa.solve(prob.remake(p=jnp.asarray(1.3 * P)), sa.Tsit5(), saveat=TS)
    assert len(calls) == first <= 2


def test_numpy_arrays_may_stand_beside_jax_arrays():
    prob = sa.ODEProblem(lotka_volterra, jnp.ones(2), (0.0, 1.0), P)
    assert isinstance(sa.solve(prob, sa.Tsit5()).u, jax.Array)


def test_second_use_of_a_gradient_costs_no_new_trace():
    prob, loss = problem(), lambda sol: sol.u.sum()
    a = sa.gradient(prob, sa.Tsit5(), loss, saveat=TS, **TIGHT)
    np.testing.assert_allclose(a.p, GRAD_P, rtol=2e-9)
    np.testing.assert_allclose(a.u0, GRAD_U0, rtol=2e-9)
    assert int(a.stats.nvjp) == 6 * int(a.stats.naccept) + 1


def test_a_callable_without_a_hash():
    class Decay:
        def __init__(self, rate):
            self.rate = rate

        def __eq__(self, other):
            return isinstance(other, Decay) and self.rate == other.rate

        __hash__ = None

        def __call__(self, t, u, p):
            return -self.rate * p * u

    prob = sa.ODEProblem(Decay(0.5), jnp.array([1.0]), (0.0, 2.0), jnp.array(1.0))
    r = sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u[0, 0], **TIGHT)
    np.testing.assert_allclose(r.p, -np.exp(-1.0), rtol=1e-9)


def test_whole_numbers_and_words_in_p_stay_what_they_are():
    def f(t, u, p):
        return -sum(p["k"] for _ in range(p["n"])) * u if p["name"] == "decay" else u

    prob = sa.ODEProblem(f, jnp.array([1.0]), (0.0, 1.0), {"k": jnp.array(0.25), "n": 2, "name": "decay"})
    r = sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u[0, 0], wrt="p", **TIGHT)
    np.testing.assert_allclose(r.p["k"], -2.0 * np.exp(-0.5), rtol=1e-9)
    assert r.p["n"] == 2
