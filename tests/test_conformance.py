"""The conformance suite: on our own backends, on a stranger's, and on backends that are broken on purpose."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sensitivity.backend import Contribution
from sensitivity.plugins import BackendInfo, hookimpl
from sensitivity.registry import registry
from sensitivity.testing import BackendConformance, Harness, checks, run
from sensitivity_numpy._backend import NumpyBackend

THIRD_PARTY = Path(__file__).parent / "thirdparty"


def needs(module, backend):
    there = importlib.util.find_spec(module) is not None and backend in registry().backends
    return pytest.mark.skipif(not there, reason=f"the {backend} backend is not there")


class TestNumpy(BackendConformance):
    backend = "numpy"


@needs("torch", "torch")
class TestTorch(BackendConformance):
    backend = "torch"


# Compiling takes most of the time, so the JAX checks that are not quick wait for --slow.
@needs("jax", "jax")
class TestJax(BackendConformance):
    backend = "jax"

    def pytest_generate_tests(self, metafunc):
        if "check" in metafunc.fixturenames:
            metafunc.parametrize("check", [pytest.param(c, id=str(c), marks=[pytest.mark.slow] if slow(c) else [])
                                           for c in checks(self.backend)])


def slow(check):
    heavy = ("times", "single", "adjoint_identity", "attached", "tree", "lotka_volterra", "pullback[ForwardVJP]")
    return check.name.startswith(heavy) and check.name not in ("lotka_volterra[RecursiveCheckpointAdjoint]",
                                                               "tree[RecursiveCheckpointAdjoint]")


# -- a stranger's distribution ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stranger(tmp_path_factory):
    """`sensealg-strict`, built and installed into a folder of its own; found there by its entry point."""
    pytest.importorskip("array_api_strict")
    target = tmp_path_factory.mktemp("stranger")
    offline = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", *offline, "--no-compile",
                           "--disable-pip-version-check", "--target", target, THIRD_PARTY],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def python(stranger, *args):
    path = [str(stranger), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run([sys.executable, "-P", "-W", "error", *args], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(path)})


def test_stranger_is_found_by_its_arrays(stranger):
    code = ("import array_api_strict as xp, sensitivity as sa\n"
            "prob = sa.ODEProblem(lambda t, u, p: -u, xp.asarray([1.0]), (0.0, 1.0))\n"
            "sol = sa.solve(prob, sa.Tsit5(), sensealg=sa.RecursiveCheckpointAdjoint(vjp=sa.FiniteDifferenceVJP()))\n"
            "print(type(sol.u).__module__, round(float(sol.u[0, 0]), 6))")
    done = python(stranger, "-c", code)
    assert done.stdout.split() == ["array_api_strict._array_object", "0.367879"], done.stderr


@pytest.mark.slow
def test_stranger_conforms(stranger):
    done = python(stranger, "-m", "sensitivity.testing", "strict")
    assert done.returncode == 0, done.stdout + done.stderr
    count = sum(1 for _ in checks("strict"))
    assert done.stdout.splitlines()[-1] == f"strict: {count} of {count} checks passed"


QUICK = ("ownership", "dtypes", "scalars", "choose", "vectors", "iterate", "recursion", "combine", "sample", "replay",
         "tree[RecursiveCheckpointAdjoint]", "lotka_volterra[DirectAdjoint]", "pullback[ReverseVJP]",
         "pullback[FiniteDifferenceVJP]")


def test_stranger_conforms_in_short(stranger):
    """The quick part of the suite; all of it is the slow test."""
    code = ("import sys\nfrom sensitivity.testing import checks\n"
            f"for c in checks('strict'):\n    if c.name.startswith({QUICK!r}):\n        c(); print(c.name)")
    done = python(stranger, "-c", code)
    assert done.returncode == 0, done.stderr
    assert {"choose", "recursion", "tree[RecursiveCheckpointAdjoint]"} <= set(done.stdout.split())


def test_unknown_names_are_refused():
    done = subprocess.run([sys.executable, "-m", "sensitivity.testing", "nobody"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "numpy" in done.stderr


# -- the suite itself ---------------------------------------------------------------------------------------------


class DoubleProducts(NumpyBackend):
    """A factor of 2 in the transposed products."""

    def vjp(self, f, theta, time, params):
        pull = super().vjp(f, theta, time, params)

        def twice(t, u, ct):
            u_bar, theta_bar, t_bar = pull(t, u, ct)
            return 2.0 * u_bar, theta_bar, t_bar

        return twice


class DoubleParameters(NumpyBackend):
    """A factor of 2 in one parameter only."""

    def vjp(self, f, theta, time, params):
        pull = super().vjp(f, theta, time, params)

        def twice(t, u, ct):
            u_bar, theta_bar, t_bar = pull(t, u, ct)
            return u_bar, (*theta_bar[:-1], 2.0 * theta_bar[-1]) if theta_bar else (), t_bar

        return twice


class WrongSign(NumpyBackend):
    """Time derivatives with the wrong sign."""

    def vjp(self, f, theta, time, params):
        pull = super().vjp(f, theta, time, params)

        def minus(t, u, ct):
            u_bar, theta_bar, t_bar = pull(t, u, ct)
            return u_bar, theta_bar, -t_bar

        return minus


class DroppedRecord(NumpyBackend):
    """The newest step is left out of the reverse pass."""

    def replay(self, body, state, log, extra=None):
        for n in reversed(range(len(log) - 1)):
            state = body(state, log[n], None if extra is None else extra[n], n == len(log) - 1)
        return state


class OldestFirst(NumpyBackend):
    """The reverse pass runs forwards."""

    def replay(self, body, state, log, extra=None):
        for n in range(len(log)):
            state = body(state, log[n], None if extra is None else extra[n], n == len(log) - 1)
        return state


class WrongChoice(NumpyBackend):
    def choose(self, pred, a, b):
        return b if pred else a


class StaleStage(NumpyBackend):
    """Every stage sees the rows of the recursion one stage late."""

    def recursion(self, a, base, scale, xs, row, carry, first=None):
        a = tuple((*r[:-1], 0.0) if len(r) > 2 else r for r in a)
        return super().recursion(a, base, scale, xs, row, carry, first)


class NoFirstRow(NumpyBackend):
    """The given first row is used, but not returned."""

    def recursion(self, a, base, scale, xs, row, carry, first=None):
        carry, rows = super().recursion(a, base, scale, xs, row, carry, first)
        if first is not None:
            rows[0] = 0.0
        return carry, rows


class KeepsRejected(NumpyBackend):
    """Rejected steps are recorded as well."""

    def iterate(self, step, state, running, limit, sink=None):
        def keep(s):
            s, record, _ = step(s)
            return s, record, True

        return super().iterate(keep, state, running, limit, sink)


class NoLimit(NumpyBackend):
    """A loop that takes one step more than it may."""

    def iterate(self, step, state, running, limit, sink=None):
        return super().iterate(step, state, running, limit + 1, sink)


class SortedSaves(NumpyBackend):
    """Outputs in the order of time, not in the order asked for."""

    def sample(self, interpolate, log, ts, u0, direction):
        return super().sample(interpolate, log, sorted(ts), u0, direction)


class LastSave(NumpyBackend):
    """Of several save times in one step only the last one's cotangent arrives."""

    def sample_vjp(self, transpose, log, ts, ct, direction):
        def only(record, times, rows):
            out, bars = transpose(record, times[-1:], rows[-1:, :])
            return out, [0.0] * (len(times) - 1) + bars

        return super().sample_vjp(only, log, ts, ct, direction)


class LostStages(NumpyBackend):
    """Contributions to the stages are forgotten."""

    def sample_vjp(self, transpose, log, ts, ct, direction):
        extra, bars = super().sample_vjp(transpose, log, ts, ct, direction)
        return [None if x is None else Contribution(x.u, 0.0 * x.k, x.h) for x in extra], bars


class DoublePrecision(NumpyBackend):
    """float32 is quietly computed in float64."""

    def combine(self, base, scale, weights, rows):
        out = super().combine(base, scale, weights, rows)
        return out.astype("float64")


class WrongSeeds(NumpyBackend):
    """The carried cotangent of the last stage is left out."""

    def seeds(self, b, h, lam, rows, last):
        return super().seeds(b, h, lam, rows, None)


BROKEN = {
    DoubleProducts: "pullback[ReverseVJP]",
    DoubleParameters: "pullback[ReverseVJP]",
    WrongSign: "transposition[ReverseVJP]",
    DroppedRecord: "replay",
    OldestFirst: "replay",
    WrongChoice: "choose",
    StaleStage: "recursion",
    NoFirstRow: "recursion",
    KeepsRejected: "iterate",
    NoLimit: "iterate_limit",
    SortedSaves: "sample",
    LastSave: "sample_transposed",
    LostStages: "sample_transposed",
    DoublePrecision: "single[RecursiveCheckpointAdjoint]",
    WrongSeeds: "combine",
}
# Seen through whole solves as well: these checks would find the bug if no law had been written for it.
BY_GRADIENT = {
    DoubleProducts: "lotka_volterra[RecursiveCheckpointAdjoint]",
    WrongSign: "times[RecursiveCheckpointAdjoint]",
    DroppedRecord: "tree[RecursiveCheckpointAdjoint]",
    OldestFirst: "lotka_volterra[RecursiveCheckpointAdjoint]",
    LastSave: "times[RecursiveCheckpointAdjoint]",
    WrongSeeds: "adjoint_identity[RecursiveCheckpointAdjoint]",
}


@pytest.fixture
def broken():
    """Registers a backend class under its own name for one test."""
    plugins = []

    def register(kind):
        name = kind.__name__

        class Plugin:
            @hookimpl
            def sensitivity_backends(self):
                return [BackendInfo(name, (), kind, name)]

        plugins.append(Plugin())
        registry().register(plugins[-1])
        return name

    yield register
    for plugin in plugins:
        registry().manager.unregister(plugin)
    registry().refresh()


def named(backend, name):
    return next(c for c in checks(backend) if c.name == name)


@pytest.mark.parametrize(("kind", "name"), [*BROKEN.items(), *BY_GRADIENT.items()],
                         ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_broken_backends_are_caught(broken, kind, name):
    named("numpy", name)()
    with pytest.raises(AssertionError):
        named(broken(kind), name)()


def test_a_sound_backend_under_another_name(broken):
    """The fixture itself breaks nothing: only ownership, which goes by type, is another's."""

    class Sound(NumpyBackend):
        pass

    name = broken(Sound)
    for check in checks(name):
        if check.name != "ownership" and "[" not in check.name:
            check()


@pytest.mark.slow
def test_the_table(broken):
    lines = []
    assert run(broken(WrongSeeds), lines.append) > 0
    assert any(line.startswith("combine ") and "FAILED" in line for line in lines)
    assert any(line.startswith("choose ") and line.endswith("ok") for line in lines)
    assert "checks passed" in lines[-1]


def test_expected_failures_must_fail(broken):
    gaps = {"backend": broken(WrongSeeds), "expected_failures": {"combine": "known"}}
    suite = type("Suite", (BackendConformance,), gaps)
    suite().test_expected_failures_exist()
    suite().test_conformance(named(suite.backend, "combine"))
    suite.expected_failures = {"choose": "a mistake"}
    with pytest.raises(AssertionError, match="passes now"):
        suite().test_conformance(named(suite.backend, "choose"))
    suite.expected_failures = {"nothing": "a typo"}
    with pytest.raises(AssertionError, match="nothing"):
        suite().test_expected_failures_exist()


def test_float64_is_needed(broken):
    class Half(NumpyBackend):
        def asarray(self, x, dtype=None, device=None):
            return super().asarray(x, "float32")

    with pytest.raises(RuntimeError, match="float64"):
        Harness(broken(Half))


def test_names_are_unique():
    names = [c.name for c in checks("numpy")]
    assert len(names) == len(set(names)) > 50
