"""Sweeps of small systems on PyTorch, whole blocks of steps at once, give what single products give."""

import pytest

import sensitivity as sa

torch = pytest.importorskip("torch")
_ahead = pytest.importorskip("sensitivity_torch._ahead")

METHODS = {"Tsit5": (sa.Tsit5(), {"rtol": 1e-7}), "BS3": (sa.BS3(), {"rtol": 1e-4}), "RK4": (sa.RK4(), {"dt": 0.05}),
           "Euler": (sa.Euler(), {"dt": 0.02})}
SAVES = {"end": None, "steps": "steps", "count": 5,
         "times": torch.tensor([1.9, 0.1, 0.4, 0.41], dtype=torch.float64)}


def vec(*x):
    return torch.tensor(x, dtype=torch.float64)


def driven(t, u, p):
    """Lotka-Volterra with a harvest that depends on time."""
    return torch.stack([p[0] * u[0] - p[1] * u[0] * u[1] - 0.1 * torch.sin(3.0 * t) * u[0],
                        -p[2] * u[1] + p[3] * u[0] * u[1]])


def gradients(monkeypatch, method, **options):
    """In one block of all steps, in blocks of a few, and by single products."""
    alg, steps = METHODS[method]
    prob = sa.ODEProblem(driven, vec(1.0, 0.8), (0.0, 2.0), vec(1.5, 1.0, 3.0, 1.0))
    out = []
    for few, entries, largest in ((48, 1024, 16), (5, 10, 16), (48, 1024, 0)):
        for name, value in {"FEW": few, "ENTRIES": entries, "LARGEST": largest}.items():
            monkeypatch.setattr(_ahead, name, value)
        monkeypatch.setattr("sensitivity_torch._taped.suits", lambda *_: False)
        out.append(sa.gradient(prob, alg, lambda sol: (sol.u**3).sum() + sol.t.sum(), **steps, **options))
    return out


def assert_close(new, old):
    """To round-off of the largest entry: entries that nearly cancel are small."""
    torch.testing.assert_close(new, old, rtol=0.0, atol=1e-13 * max(1.0, float(old.abs().max())))


@pytest.mark.parametrize("wrt", [("u0", "p"), ("u0", "p", "t0", "t1")], ids=len)
@pytest.mark.parametrize("saves", SAVES)
@pytest.mark.parametrize("method", METHODS)
def test_equals_single_products(monkeypatch, method, saves, wrt):
    *blocks, single = gradients(monkeypatch, method, saveat=SAVES[saves], wrt=wrt)
    for new in blocks:
        for name in wrt:
            assert_close(getattr(new, name), getattr(single, name))
        assert new.stats == single.stats


@pytest.mark.parametrize("method", METHODS)
def test_equals_single_products_within_a_budget(monkeypatch, method):
    *blocks, single = gradients(monkeypatch, method, saveat=SAVES["times"],
                                sensealg=sa.RecursiveCheckpointAdjoint(checkpoints=3))
    for new in blocks:
        assert_close(new.p, single.p)
        assert new.stats == single.stats


def test_few_steps_are_one_product_for_each_unknown(monkeypatch):
    """Two rows of the Jacobian and the parameters: three calls of autograd, however few steps there are."""
    made = []
    product = _ahead.product
    monkeypatch.setattr(_ahead, "product", lambda *args: made.append(args) or product(*args))
    prob = sa.ODEProblem(driven, vec(1.0, 0.8), (0.0, 0.1), vec(1.5, 1.0, 3.0, 1.0))
    r = sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u.sum())
    assert 0 < r.stats.naccept <= 4
    assert len(made) == 3


def test_a_derivative_that_nothing_asks_for_may_be_infinite():
    """The last stage is for the error estimate only: there `sqrt` has no derivative."""

    def f(t, u, p):
        return -p * torch.sqrt(torch.clamp(u - 1.0, min=0.0)) - 1.0

    prob = sa.ODEProblem(f, vec(2.0), (0.0, 1.0), vec(0.0))
    r = sa.gradient(prob, sa.BS3(), lambda sol: sol.u.sum(), wrt="u0", dt=1.0, controller=sa.FixedStep())
    torch.testing.assert_close(r.u0, vec(1.0), rtol=1e-14, atol=0.0)
