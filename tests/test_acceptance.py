"""The automatic choice, of method, algorithm and products, is right on every problem of a varied set."""

import sys
from pathlib import Path

import pytest

import sensitivity as sa

sys.path.insert(0, str(Path(__file__).parent))
from acceptance_problems import CASES, error, gradient, numbers
from conftest import Lab, available

# Continuous solutions at rtol 1e-6 to 1e-8, whose errors the problems amplify; discrete ones are exact.
TOLERANCE = 2e-5
EXACT = ("fixed steps", "noise, ito", "noise, stratonovich", "steady, linear")


def test_the_problems_are_many():
    assert len(CASES) >= 25


@pytest.mark.parametrize("framework", ["numpy", pytest.param("torch", marks=pytest.mark.slow),
                                       pytest.param("jax", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::sensitivity.SensitivityWarning")
def test_the_automatic_choice_is_right(name, framework):
    if not available(framework):
        pytest.skip(f"the {framework} backend is not there")
    lab = Lab(framework)
    task = CASES[name](lab)
    r = gradient(lab, task, sa.auto)
    assert error(name, task, numbers(lab, task, r)) < (1e-12 if name in EXACT else TOLERANCE)
    assert r.sensealg.because
    if task.alg is None and isinstance(task.prob, sa.ODEProblem):
        assert r.solution.alg.because
