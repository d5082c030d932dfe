"""Tables, HTML and citations."""

import sys
import types

import numpy as np
import pytest

import sensitivity as sa
from sensitivity.citation import REFERENCES
from sensitivity.report import columns


@pytest.fixture(scope="module")
def solved(lab):
    prob = sa.ODEProblem(lambda t, u, p: {"x": -p * u["x"], "y": 0.0 * u["y"]},
                         {"x": lab.array(1.0), "y": lab.array([[1.0, 2.0], [3.0, 4.0]])}, (0.0, 1.0), lab.array(0.5))
    return sa.solve(prob, sa.Tsit5(), saveat=lab.array([0.0, 0.5, 1.0]), rtol=1e-8)


def test_columns(solved):
    table = columns(solved)
    assert list(table) == ["t", "x", "y[0,0]", "y[0,1]", "y[1,0]", "y[1,1]"]
    np.testing.assert_array_equal(table["t"], [0.0, 0.5, 1.0])
    np.testing.assert_allclose(table["x"], np.exp([0.0, -0.25, -0.5]), rtol=1e-7)
    np.testing.assert_array_equal(table["y[1,0]"], [3.0, 3.0, 3.0])


def stand_in(monkeypatch, name, **members):
    """A package that records what it is given."""
    module = types.ModuleType(name)
    for k, v in members.items():
        setattr(module, k, v)
    monkeypatch.setitem(sys.modules, name, module)


def test_what_pandas_and_xarray_get(solved, monkeypatch):
    stand_in(monkeypatch, "pandas", DataFrame=lambda data, index: (data, index), Index=lambda t, name: (t, name))
    data, (t, name) = solved.to_frame()
    assert name == "t"
    assert list(data) == ["x", "y[0,0]", "y[0,1]", "y[1,0]", "y[1,1]"]
    stand_in(monkeypatch, "xarray", Dataset=lambda variables, coords, attrs: (variables, coords, attrs))
    variables, coordinates, attributes = solved.to_xarray()
    assert variables["y"][0] == ("time", "y_0", "y_1")
    assert variables["y"][1].shape == (3, 2, 2)
    assert variables["x"][0] == ("time",)
    np.testing.assert_array_equal(coordinates["time"], t)
    assert "Tsit5" in attributes["method"]


def test_with_the_real_packages(solved):
    pytest.importorskip("pandas")
    frame = solved.to_frame()
    assert frame.index.name == "t"
    assert frame.loc[0.0, "y[1,1]"] == 4.0
    pytest.importorskip("xarray")
    assert dict(solved.to_xarray().sizes) == {"time": 3, "y_0": 2, "y_1": 2}


def test_missing_packages_are_named(solved, monkeypatch):
    for name, call in (("pandas", solved.to_frame), ("xarray", solved.to_xarray)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(sa.BackendMissingError, match=f"pip install {name}"):
            call()


def test_ensembles(numpy_lab, monkeypatch):
    prob = sa.ODEProblem(lambda t, u, p: -p * u, np.array([1.0, 2.0]), (0.0, 1.0), np.array(0.5))
    ensemble = sa.EnsembleProblem(prob, p=np.array([0.5, 1.0, 2.0]))
    sol = sa.solve(ensemble, sa.Tsit5())
    with pytest.raises(sa.InputError, match="ensemble"):
        columns(sol)
    stand_in(monkeypatch, "xarray", Dataset=lambda variables, coords, attrs: variables)
    assert sol.to_xarray()["u"][0] == ("member", "time", "u_0")
    assert sol.to_xarray()["t"][1].shape == (3, 1)
    assert "EnsembleProblem" in ensemble._repr_html_()


def test_html(numpy_lab):
    def field_name(t, u, p):
        return -p * u

    prob = sa.ODEProblem(field_name, np.ones(20), (0.0, 1.0), np.array(0.5))
    page = prob._repr_html_()
    assert all(word in page for word in ("ODEProblem", "field_name", "tspan", "array (20,), float64"))
    sol = sa.solve(prob, sa.Tsit5())
    assert all(word in sol._repr_html_() for word in ("Success", "Tsit5", "nfe", "because"))
    steady = sa.SteadyStateProblem(lambda t, u, p: 1.0 - u, np.array([0.0]))
    assert "&lt;lambda&gt;" in steady._repr_html_()
    assert "<lambda>" not in steady._repr_html_()
    r = sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u.sum(), dloss=lambda sol: np.ones_like(sol.u))
    assert "value" in r._repr_html_()


def test_citation(numpy_lab):
    prob = numpy_lab.lotka_volterra()
    text = sa.citation(prob)
    assert all(word in text for word in ("Tsitouras", "RecursiveCheckpointAdjoint", "Hager", sa.__version__))
    assert "Dormand" in sa.citation(prob, sa.Dopri5(), sa.ForwardSensitivity())
    steady = sa.SteadyStateProblem(lambda t, u, p: 1.0 - u, np.array([0.0]))
    assert "Christianson" in sa.citation(steady)
    assert "Tsitouras" in sa.citation(sa.EnsembleProblem(prob, p=np.ones((2, 4))), saveat=3)
    with pytest.raises(sa.UnsupportedCombination):
        sa.citation(steady, sensealg=sa.ForwardSensitivity())


def public(base):
    found = [getattr(sa, name) for name in sa.__all__]
    return [c for c in found if isinstance(c, type) and issubclass(c, base)]


def test_every_reference_is_known():
    from sensitivity.methods import Method

    for cls in (*public(Method), *public(sa.SensitivityAlgorithm)):
        assert set(cls.references) <= set(REFERENCES), cls
