"""The demonstration: what it finds, says and saves; the same numbers on every backend."""

import subprocess
import sys

import numpy as np
import pytest

from sensitivity.cli import main
from sensitivity.demo import fit, record


def test_record_is_the_published_series():
    years, counts = record()
    assert years == list(map(float, range(1900, 1921)))
    assert counts[0] == [30.0, 4.0]
    assert counts[-1] == [24.7, 8.6]
    np.testing.assert_allclose(np.sum(counts, axis=0), [715.7, 423.5], atol=1e-9)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_backends_find_the_same_parameters(backend):
    pytest.importorskip(backend)
    values = {}
    for name in ("numpy", backend):
        code = f"from sensitivity.demo import fit; print(*map(repr, fit({name!r}).values))"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        values[name] = np.array(out.stdout.split(), float)
    np.testing.assert_allclose(values[backend], values["numpy"], rtol=1e-6)


def test_the_fit_is_a_minimum():
    found = fit("numpy")
    assert found.loss < 2.02
    assert found.sensealg.because


def test_command_prints_the_fit_and_saves_the_picture(tmp_path, capsys):
    picture = tmp_path / "fit.png"
    assert main(["demo", "--output", str(picture)]) == 0
    text = capsys.readouterr().out
    for word in ("RecursiveCheckpointAdjoint", "chosen automatically", "gradients through solve", "1900-1920"):
        assert word in text
    assert picture.read_bytes().startswith(b"\x89PNG")
