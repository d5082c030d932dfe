"""NumPy and SciPy without autograd: everything that needs no AD works, by products of the user or by differences."""

import subprocess
import sys

import pytest

ALONE = """
import sys
import warnings

sys.modules["autograd"] = None  # as if it were not installed
warnings.simplefilter("error")
import numpy as np
import sensitivity as sa

def warned(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = call()
    assert seen and all(issubclass(w.category, sa.NumericalDerivativeWarning) for w in seen), seen
    return result

def loss(sol):
    return (sol.u**2).sum()

decay = sa.ODEProblem(lambda t, u, p: -p * u, np.array([1.0]), (0.0, 1.0), np.array(0.5),
                      vjp=lambda t, u, p, lam: (-p * lam, -(u @ lam)))
slope = -2.0 * np.exp(-1.0)
"""

SNIPPETS = {
    "loss by differences": """
r = warned(lambda: sa.gradient(decay, sa.Tsit5(), loss, rtol=1e-9))
np.testing.assert_allclose([r.p, r.u0[0]], [slope, -slope], rtol=1e-7)
""",
    "dloss": """
r = sa.gradient(decay, sa.Tsit5(), loss, dloss=lambda sol: 2.0 * sol.u, rtol=1e-9)
np.testing.assert_allclose([r.p, r.u0[0]], [slope, -slope], rtol=1e-8)
""",
    "running cost": """
cost = sa.ContinuousCost(lambda t, u, p: u[0], dgdu=lambda t, u, p: np.ones(1), dgdp=lambda t, u, p: np.array(0.0))
for sensealg in (sa.auto, sa.GaussAdjoint()):
    r = sa.gradient(decay, sa.Tsit5(), cost, sensealg=sensealg, rtol=1e-9)
    np.testing.assert_allclose(r.u0, 2.0 * (1.0 - np.exp(-0.5)), rtol=1e-7)
""",
    "complex steps": """
bare = decay.remake(vjp=None)
r = sa.gradient(bare, sa.Tsit5(), loss, dloss=lambda sol: 2.0 * sol.u, rtol=1e-9,
                sensealg=sa.RecursiveCheckpointAdjoint(vjp=sa.ComplexStepVJP()))
np.testing.assert_allclose([r.p, r.u0[0]], [slope, -slope], rtol=1e-8)
""",
    "forward sensitivities": """
sol, S = warned(lambda: sa.forward_sensitivities(decay.remake(vjp=None), sa.Tsit5(), saveat=[1.0], rtol=1e-9))
np.testing.assert_allclose(np.ravel(S), -np.exp(-0.5), rtol=1e-7)
""",
    "stiff": """
r = warned(lambda: sa.gradient(decay.remake(vjp=None), sa.Rodas5P(), loss, dloss=lambda sol: 2.0 * sol.u, rtol=1e-9))
np.testing.assert_allclose([r.p, r.u0[0]], [slope, -slope], rtol=1e-6)
""",
    "delays": """
late = sa.DDEProblem(lambda t, u, h, p: -p * h(t - 1.0), np.array([1.0]), lambda t, p: np.array([1.0]), (0.0, 1.0),
                     np.array(0.5), lags=[1.0])
r = warned(lambda: sa.gradient(late, sa.Tsit5(), loss, dloss=lambda sol: 2.0 * sol.u))
np.testing.assert_allclose(r.p, -1.0, rtol=1e-7)  # u(1) = 1 - p
""",
    "noise": """
noisy = sa.SDEProblem(lambda t, u, p: -p * u, lambda t, u, p: 0.1 * u, np.array([1.0]), (0.0, 1.0), np.array(0.5))
r = warned(lambda: sa.gradient(noisy, sa.EulerMaruyama(), loss, dloss=lambda sol: 2.0 * sol.u, dt=0.1))
members = sa.EnsembleProblem(noisy, key=np.arange(4))
assert sa.solve(members, sa.EulerMaruyama(), dt=0.1).u.shape == (4, 1, 1)
up, down = (loss(sa.solve(noisy.remake(p=np.array(0.5 + e)), sa.EulerMaruyama(), dt=0.1)) for e in (1e-5, -1e-5))
np.testing.assert_allclose(r.p, (up - down) / 2e-5, rtol=1e-6)
""",
    "steady state": """
steady = sa.SteadyStateProblem(lambda t, u, p: p - u**3, np.ones(1), np.array([8.0]))
r = warned(lambda: sa.gradient(steady, None, loss, dloss=lambda sol: 2.0 * sol.u))
np.testing.assert_allclose(r.p, 2.0 * 2.0 / 12.0, rtol=1e-6)
""",
    "events": """
ball = sa.ODEProblem(lambda t, u, p: np.array([u[1], -p[0]]), np.array([1.0, 0.0]), (0.0, 0.6), np.array([9.81]))
bounce = sa.Event(lambda t, u, p: u[0], lambda t, u, p: np.array([u[0], -0.8 * u[1]]), direction=-1)
r = warned(lambda: sa.gradient(ball, sa.Tsit5(), lambda sol: sol.u[-1, 0], dloss=lambda sol: np.array([[1.0, 0.0]]),
                               events=bounce, rtol=1e-9, wrt="p"))
up, down = (sa.solve(ball.remake(p=np.array([9.81 + e])), sa.Tsit5(), events=bounce, rtol=1e-10).u[-1, 0]
            for e in (1e-4, -1e-4))
np.testing.assert_allclose(r.p[0], (up - down) / 2e-4, rtol=1e-6)
""",
    "second derivatives": """
H = warned(lambda: sa.hessian(decay.remake(vjp=None), sa.Tsit5(), loss, wrt="p", dloss=lambda sol: 2.0 * sol.u,
                              rtol=1e-8))
np.testing.assert_allclose(np.ravel(H), 4.0 * np.exp(-1.0), rtol=1e-5)
try:
    warned(lambda: sa.hessian(decay.remake(vjp=None), sa.Tsit5(), loss, wrt="p"))
except sa.UnsupportedCombination as e:
    assert "dloss" in str(e)
""",
    "doctor": """
from sensitivity.doctor import examined
assert next(b for b in examined()["backends"] if b["name"] == "numpy")["ok"]
""",
    "advice": """
advice = sa.advise(decay.remake(vjp=None), sa.Tsit5())
assert isinstance(advice.vjp, sa.FiniteDifferenceVJP)
""",
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_without_autograd(name):
    done = subprocess.run([sys.executable, "-c", ALONE + SNIPPETS[name]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
