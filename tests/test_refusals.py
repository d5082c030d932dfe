"""Combinations that are refused: before any work, by name, with what to use instead."""

import contextlib

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.testing import models

PROB = sa.ODEProblem(lambda t, u, p: -p * u, np.array([1.0, 2.0]), (0.0, 1.0), np.array(0.5))


def ones(sol):
    return np.ones_like(sol.u)


def gradient(**options):
    return sa.gradient(PROB, options.pop("alg", sa.Tsit5()), lambda sol: sol.u.sum(), dloss=ones, **options)


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        ({"sensealg": sa.InterpolatingAdjoint(), "dense": True}, "RecursiveCheckpointAdjoint"),
        ({"sensealg": sa.ForwardSensitivity(), "dense": True}, "RecursiveCheckpointAdjoint"),
        ({"sensealg": sa.ForwardSensitivity(), "saveat": "steps"}, "RecursiveCheckpointAdjoint"),
        ({"sensealg": sa.InterpolatingAdjoint(), "saveat": "steps", "wrt": "t0"}, "RecursiveCheckpointAdjoint"),
        ({"sensealg": sa.RecursiveCheckpointAdjoint(vjp=sa.UserVJP())}, "FiniteDifferenceVJP"),
        ({"alg": sa.RK4(), "controller": sa.PIController()}, "Tsit5"),
    ],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, dict) else None,
)
def test_refused_with_an_alternative(options, instead):
    with pytest.raises(sa.UnsupportedCombination) as e:
        gradient(**options)
    assert instead in str(e.value)


def test_a_singular_mass_matrix_is_refused_by_explicit_methods():
    with pytest.raises(sa.UnsupportedCombination, match=r"singular mass matrix(.|\n)*Kvaerno5"):
        sa.solve(PROB.remake(mass_matrix=np.diag([1.0, 0.0])), sa.Tsit5())


@pytest.mark.parametrize("name", ["u0", "p", "t0", "t1", "saveat"])
@pytest.mark.parametrize("sensealg", [sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint()])
def test_what_was_not_asked_for_is_none(sensealg, name):
    r = gradient(sensealg=sensealg, wrt=name, saveat=np.array([0.5, 1.0]))
    assert [n for n in ("u0", "p", "t0", "t1", "saveat") if getattr(r, n) is not None] == [name]


def test_signatures_of_the_algorithms():
    jvp = sa.FiniteDifferenceVJP()
    assert sa.ForwardSensitivity(jvp=jvp).vjp == jvp
    assert sa.ForwardSensitivity(jvp).jvp == jvp
    assert sa.InterpolatingAdjoint(jvp, checkpointing="auto", checkpoints=None).vjp == jvp
    assert sa.RecursiveCheckpointAdjoint(None, None) == sa.RecursiveCheckpointAdjoint(checkpoints=None, memory=None)
    assert gradient(sensealg=sa.ForwardSensitivity(jvp=jvp)).sensealg.jvp == jvp


def test_an_option_without_effect_is_not_silent(lab):
    """Products are compiled where everything is; elsewhere the request is answered. PyTorch has tests of its own."""
    if lab.be.compiles:
        pytest.skip("steps are compiled there")
    prob = models.lotka_volterra(lab.xp).remake(tspan=(0.0, 0.1))
    asked = sa.RecursiveCheckpointAdjoint(vjp=sa.ReverseVJP(compile=True))
    expected = contextlib.nullcontext() if lab.be.traced else pytest.warns(sa.SensitivityWarning, match="compile=True")
    with expected:
        r = sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u.sum(), sensealg=asked)
    plain = sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u.sum())
    np.testing.assert_allclose(lab.numpy(r.p), lab.numpy(plain.p), rtol=1e-13)
