"""`forward_sensitivities` and `ForwardADSensitivity`: closed forms, the adjoint's numbers, and what is refused."""

import numpy as np
import pytest

import sensitivity as sa

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
FORWARD = [sa.ForwardSensitivity(), sa.ForwardADSensitivity()]
TS = np.array([2.0, 0.5, 1.0])


def decay(lab):
    """u_i' = -k_i u_i, so that du_i/dk_i = -(t - t0) u_i and du_i/du0_i = u_i / u0_i."""
    return sa.ODEProblem(lambda t, u, p: -p * u, lab.array([1.0, 2.0]), (0.25, 2.0), lab.array([0.5, 0.8]))


def exact(ts=TS):
    return np.array([1.0, 2.0]) * np.exp(-np.array([0.5, 0.8]) * (ts[:, None] - 0.25))


@pytest.mark.parametrize("sensealg", FORWARD, ids=lambda s: s.name)
def test_closed_forms(lab, sensealg):
    sol, S = sa.forward_sensitivities(decay(lab), sa.Tsit5(), saveat=lab.array(TS), wrt=("u0", "p", "t0", "t1"),
                                      sensealg=sensealg, **TIGHT)
    u, S = exact(), lab.numpy(S)
    assert S.shape == (3, 2, 6)
    np.testing.assert_allclose(lab.numpy(sol.u), u, rtol=1e-8)
    np.testing.assert_allclose(S[:, :, :2], (u / np.array([1.0, 2.0]))[:, :, None] * np.eye(2), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(S[:, :, 2:4], ((0.25 - TS)[:, None] * u)[:, :, None] * np.eye(2), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(S[:, :, 4], np.array([0.5, 0.8]) * u, rtol=1e-8)
    # The save times are fixed numbers. (The discrete derivative is that of the last step's interpolant.)
    np.testing.assert_allclose(S[:, :, 5], 0.0, atol=1e-7)


@pytest.mark.parametrize("sensealg", FORWARD, ids=lambda s: s.name)
def test_the_end_and_equally_spaced_times_move_with_the_span(lab, sensealg):
    rate = np.array([0.5, 0.8])
    _, S = sa.forward_sensitivities(decay(lab), sa.Tsit5(), wrt=("t0", "t1"), sensealg=sensealg, **TIGHT)
    speed = -rate * exact(np.array([2.0]))
    np.testing.assert_allclose(lab.numpy(S), np.stack([-speed, speed], axis=-1), rtol=1e-8)
    _, S = sa.forward_sensitivities(decay(lab), sa.Tsit5(), saveat=3, wrt="t1", sensealg=sensealg, **TIGHT)
    w = np.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(lab.numpy(S)[:, :, 0], -rate * exact(0.25 + 1.75 * w) * w[:, None], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sensealg", FORWARD, ids=lambda s: s.name)
def test_seeds_are_directions(lab, sensealg):
    prob = lab.lotka_volterra(2.0)
    seeds = np.linspace(-1.0, 1.0, 12).reshape(6, 2)
    options = {"saveat": lab.array([1.0, 2.0]), "wrt": ("u0", "p"), "sensealg": sensealg, **TIGHT}
    _, S = sa.forward_sensitivities(prob, sa.Tsit5(), **options)
    _, along = sa.forward_sensitivities(prob, sa.Tsit5(), seeds=lab.array(seeds), **options)
    # Other directions, other step sizes where their errors count.
    rtol = 1e-12 if sensealg.exact else 1e-7
    np.testing.assert_allclose(lab.numpy(along), lab.numpy(S) @ seeds, rtol=rtol)


def test_the_discrete_tangent_is_the_transpose_of_the_discrete_adjoint(lab):
    """At coarse tolerances, where any other derivative differs: equality to round-off, and fixed steps too."""
    prob = lab.lotka_volterra(3.0)
    every = ("u0", "p", "t0", "t1", "saveat")

    def loss(sol):
        return (sol.u**2).sum()

    for saveat in (lab.array([0.7, 3.0]), None):
        wrt = every if saveat is not None else every[:4]
        results = [sa.gradient(prob, sa.Tsit5(), loss, saveat=saveat, wrt=wrt, rtol=1e-3, atol=1e-4, sensealg=s)
                   for s in (sa.RecursiveCheckpointAdjoint(), sa.ForwardADSensitivity())]
        for name in wrt:
            a, b = (lab.numpy(getattr(r, name)) for r in results)
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11, err_msg=name)


def test_steps_of_the_solver(lab):
    """One row per accepted step; its columns are those of the adjoint."""
    prob = lab.lotka_volterra(1.0)
    options = {"saveat": "steps", "rtol": 1e-4, "atol": 1e-6, "sensealg": sa.ForwardADSensitivity(), "max_steps": 64}
    sol, S = sa.forward_sensitivities(prob, sa.Tsit5(), **options)
    assert S.shape == (sol.n_steps, 2, 4)
    r = sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u.sum(), wrt="p", saveat="steps", rtol=1e-4, atol=1e-6,
                    max_steps=64)
    np.testing.assert_allclose(lab.numpy(S).sum((0, 1)), lab.numpy(r.p), rtol=1e-11)


def test_over_an_event(lab):
    """Exact for the computed solution, so equal to the adjoint; a parameter jumps as well."""
    jump = sa.Event(lambda t, u, p: u[0] - 0.7, lambda t, u, p: (u + 1.0, 2.0 * p), direction=-1)
    limits = {"max_steps": 64, "max_events": 4} if lab.name == "jax" else {}
    options = {"events": jump, "rtol": 1e-4, "atol": 1e-6, **limits}
    sol, S = sa.forward_sensitivities(decay(lab), sa.Tsit5(), wrt=("u0", "p"), sensealg=sa.ForwardADSensitivity(),
                                      **options)
    assert len(sol.events) == 2
    a, b = (sa.gradient(decay(lab), sa.Tsit5(), lambda sol: sol.u.sum() + sol.events.t[0], sensealg=s, **options)
            for s in (sa.RecursiveCheckpointAdjoint(), sa.ForwardADSensitivity()))
    for name in ("u0", "p"):
        np.testing.assert_allclose(lab.numpy(getattr(a, name)), lab.numpy(getattr(b, name)), rtol=1e-11, atol=1e-13)
    c = sa.gradient(decay(lab), sa.Tsit5(), lambda sol: sol.u.sum(), **options)
    np.testing.assert_allclose(lab.numpy(S).sum((0, 1)), np.concatenate([lab.numpy(c.u0), lab.numpy(c.p)]), rtol=1e-11)
    tight = options | {"rtol": 1e-9, "atol": 1e-10}
    _, continuous = sa.forward_sensitivities(decay(lab), sa.Tsit5(), wrt=("u0", "p"), **tight)
    _, discrete = sa.forward_sensitivities(decay(lab), sa.Tsit5(), wrt=("u0", "p"), sensealg=sa.ForwardADSensitivity(),
                                           **tight)
    np.testing.assert_allclose(lab.numpy(continuous), lab.numpy(discrete), rtol=1e-6)


def test_pytrees_are_raveled_in_order(lab):
    u0 = {"x": lab.array([[1.0, 2.0]]), "v": lab.array(3.0)}
    p = {"k": lab.array([0.5]), "count": 2, "a": lab.array(0.25)}
    prob = sa.ODEProblem(lambda t, u, p: {"v": -p["a"] * u["v"], "x": -p["k"] * u["x"]}, u0, (0.0, 1.0), p)
    sol, S = sa.forward_sensitivities(prob, sa.Tsit5(), **TIGHT)
    S = lab.numpy(S)[0]
    # Dictionaries go by key: a, k and v, x.
    np.testing.assert_allclose(S[0], [-3.0 * np.exp(-0.25), 0.0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(S[1:, 1], -np.array([1.0, 2.0]) * np.exp(-0.5), rtol=1e-9)
    assert sol.u["x"].shape == (1, 1, 2)


def test_error_control_of_the_state_alone_takes_the_steps_of_a_plain_solve(lab):
    prob = lab.lotka_volterra(2.0)
    plain = sa.solve(prob, sa.Tsit5())
    riding, _ = sa.forward_sensitivities(prob, sa.Tsit5(), sensealg=sa.ForwardSensitivity(errors="state"))
    covered, _ = sa.forward_sensitivities(prob, sa.Tsit5())
    assert int(riding.stats.naccept) == int(plain.stats.naccept) < int(covered.stats.naccept)
    # The first derivative of f costs no evaluation of its own.
    assert int(riding.stats.nfe) == int(plain.stats.nfe)


def test_columns_without_any_ad():
    import math

    def f(t, u, p):
        return np.array([-float(p[0]) * math.sin(float(u[0]))])

    prob = sa.ODEProblem(f, np.array([1.0]), (0.0, 1.0), np.array([0.7]), vjp=lambda t, u, p, lam: (
        -p * np.cos(u) * lam, -np.sin(u) * lam))
    # tan(u/2) = tan(u0/2) e^{-kt}: du/dk = -t sin(u).
    u = 2.0 * np.arctan(np.tan(0.5) * np.exp(-0.7))
    for sensealg in FORWARD:
        _, S = sa.forward_sensitivities(prob, sa.Tsit5(), sensealg=sensealg, **TIGHT)
        np.testing.assert_allclose(S, [[[-np.sin(u)]]], rtol=1e-8)


def test_a_failed_solve(lab):
    with pytest.raises(sa.SolveError, match="max_steps=2"):
        sa.forward_sensitivities(decay(lab), sa.Tsit5(), max_steps=2, **TIGHT)
    _, S = sa.forward_sensitivities(decay(lab), sa.Tsit5(), max_steps=2, on_failure="nan", **TIGHT)
    assert np.isnan(lab.numpy(S)).all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"wrt": "q"}, sa.InputError, "choose from"),
        ({"wrt": "saveat"}, sa.InputError, "own time"),
        ({"seeds": np.ones(2)}, sa.InputError, r"expected \(2, r\)"),
        ({"sensealg": sa.DirectAdjoint()}, sa.UnsupportedCombination, "ForwardADSensitivity"),
        ({"saveat": "steps"}, sa.UnsupportedCombination, "RecursiveCheckpointAdjoint"),
        ({"sensealg": sa.ForwardADSensitivity(), "dense": True}, sa.UnsupportedCombination, "RecursiveCheckpoint"),
    ],
)
def test_refused(numpy_lab, options, error, words):
    with pytest.raises(error, match=words):
        sa.forward_sensitivities(decay(numpy_lab), sa.Tsit5(), **options)


def test_refused_values(numpy_lab):
    with pytest.raises(sa.InputError, match="'all' and 'state'"):
        sa.ForwardSensitivity(errors="none")
    with pytest.raises(sa.InputError, match="no floating-point"):
        sa.forward_sensitivities(decay(numpy_lab).remake(f=lambda t, u, p: -u, p=None), sa.Tsit5())
