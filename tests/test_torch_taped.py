"""Recorded steps on PyTorch give the products that single stages give."""

import numpy as np
import pytest

import sensitivity as sa

torch = pytest.importorskip("torch")
_ahead = pytest.importorskip("sensitivity_torch._ahead")
_taped = pytest.importorskip("sensitivity_torch._taped")
peak = pytest.importorskip("sensitivity_torch._memory").peak

N = _ahead.LARGEST + 4
METHODS = {"Tsit5": (sa.Tsit5(), {"rtol": 1e-6}), "RK4": (sa.RK4(), {"dt": 0.05}), "Euler": (sa.Euler(), {"dt": 0.02})}
SAVES = {"end": None, "steps": "steps", "times": torch.tensor([0.9, 0.1, 0.4], dtype=torch.float64)}


def weights(hidden, scale=0.3):
    rng = np.random.default_rng(0)
    return [torch.tensor(scale * rng.normal(size=shape)) for shape in ((N, hidden), (hidden, N))]


def state():
    return torch.linspace(-1.0, 1.0, N, dtype=torch.float64)


def net(t, u, p):
    return torch.tanh(u @ p[0]) @ p[1] + torch.sin(t)


def branching(t, u, p):
    """Reads a value, so that it cannot be evaluated at many points at once."""
    return net(t, u, p) * (1.0 if u.sum().item() > -1e9 else 2.0)


def apart(t, u, p):
    """Does not depend on the state."""
    return torch.cos(t) * torch.tanh(p[0]).sum(1)


def wide(t, u, p):
    """Few parameters, and fifty numbers for each of the state on the way."""
    return p[1] * torch.tanh(p[0] * u[:, None] * torch.linspace(-1.0, 2.0, 50, dtype=u.dtype)).mean(1) - 0.1 * u


def scalar(t, u, p):
    return p[0] * torch.tanh(torch.roll(u, 1)) - p[1] * u * t


def gradients(monkeypatch, f, p, method, saveat, sensealg):
    """The gradient by recorded steps and the one by single stages."""
    alg, options = METHODS[method]
    prob = sa.ODEProblem(f, state(), (0.0, 1.0), p)
    out = []
    for suits in (_taped.suits, lambda *_: False):
        monkeypatch.setattr(_taped, "suits", suits)
        out.append(sa.gradient(prob, alg, loss=lambda sol: (sol.u**2).sum(), saveat=saveat, sensealg=sensealg,
                               **options))
    monkeypatch.undo()
    return out


def assert_same(new, old):
    assert new.value == pytest.approx(float(old.value), rel=1e-14)
    torch.testing.assert_close(new.u0, old.u0, rtol=1e-12, atol=1e-13)
    for a, b in zip(new.p, old.p, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert new.stats == old.stats


@pytest.mark.parametrize("budget", [{}, {"checkpoints": 3}], ids=str)
@pytest.mark.parametrize("saves", SAVES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["few parameters", "many parameters", "not batched", "independent of the state"])
def test_equals_single_stages(monkeypatch, kind, method, saves, budget):
    """Few parameters: joint products; many: deferred to blocks; those fall back on single points where they must."""
    f, p = {"few parameters": (scalar, [torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.3).double()]),
            "many parameters": (net, weights(60)), "not batched": (branching, weights(60)),
            "independent of the state": (apart, weights(60))}[kind]
    assert (sum(v.numel() for v in p) > _taped.DEFERRED * N) == (kind != "few parameters")
    assert_same(*gradients(monkeypatch, f, p, method, SAVES[saves], sa.RecursiveCheckpointAdjoint(**budget)))


@pytest.mark.parametrize("method", METHODS)
def test_steps_beyond_the_room_are_taken_again(monkeypatch, method):
    monkeypatch.setattr(_taped, "ROOM", 20_000)
    assert_same(*gradients(monkeypatch, net, weights(60), method, None, sa.RecursiveCheckpointAdjoint()))


@pytest.mark.parametrize("few", [1, 10**9], ids=["deferred", "at once"])
def test_products_with_parameters_within_a_budget(monkeypatch, few):
    """Blocks of few steps leave no batch of stages whose products with the parameters are worth a pass of their own."""
    monkeypatch.setattr(_taped, "FEW", few)
    flushed, flush = [], _taped.Tape.flush
    monkeypatch.setattr(_taped.Tape, "flush", lambda tape: flushed.append(len(tape.block)) or flush(tape))
    p, out = weights(60), []
    for sensealg in (sa.RecursiveCheckpointAdjoint(memory=400_000), sa.RecursiveCheckpointAdjoint()):
        out.append(sa.gradient(sa.ODEProblem(net, state(), (0.0, 1.0), p), sa.Euler(), dt=0.005, sensealg=sensealg,
                               loss=lambda sol: (sol.u**2).sum()))
        assert bool(flushed) == (few == 1)
        flushed.clear()
    for a, b in zip(out[0].p, out[1].p, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("method", "options"), [
    (sa.Euler(), {"dt": 0.02}), (sa.Tsit5(), {"rtol": 1e-11, "atol": 1e-12})], ids=["Euler", "Tsit5"])
def test_memory_counts_what_autograd_keeps(method, options):
    """What `f` makes on the way is far larger than the state: the peak of all tensors stays within the budget, and no
    step of fixed size is taken more than twice, but one for its size."""
    memory = 250_000
    prob = sa.ODEProblem(wide, state(), (0.0, 20.0), [torch.tensor(0.8).double(), torch.tensor(0.3).double()])
    out = []

    def gradient(sensealg):
        out.append(sa.gradient(prob, method, loss=lambda sol: (sol.u**2).sum(), sensealg=sensealg, **options))

    small = peak(lambda: gradient(sa.RecursiveCheckpointAdjoint(memory=memory)), torch.device("cpu"))
    large = peak(lambda: gradient(sa.RecursiveCheckpointAdjoint()), torch.device("cpu"))
    assert small < memory < large / 4
    for a, b in zip(out[0].p, out[1].p, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    if not method.adaptive:
        assert out[0].stats.nfe == 2 * out[1].stats.nfe


def test_room_is_what_autograd_keeps():
    """A tanh layer keeps its input and its output; parameters are not counted."""
    p = weights(50)
    with torch.enable_grad():
        measured = _taped._Measured(p)
        with measured:
            net(torch.tensor(0.0), state().requires_grad_(), [w.requires_grad_() for w in p])
    assert measured.bytes == 8 * (N + 50)


@pytest.mark.parametrize("hidden", [2, 60])
def test_module_parameters(hidden):
    """Parameters that f finds by itself, with gradients by `backward`, twice over one graph."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(N, hidden).double(), torch.nn.Linear(hidden, N).double()

        def forward(self, t, u, p):
            return self.b(torch.tanh(self.a(u)))

    torch.manual_seed(0)
    module, found = Net(), []
    for sensealg in (sa.RecursiveCheckpointAdjoint(), sa.RecursiveCheckpointAdjoint(checkpoints=2),
                     sa.DirectAdjoint()):
        loss = sa.solve(sa.ODEProblem(module, state(), (0.0, 1.0)), sa.Tsit5(), sensealg=sensealg).u.sum()
        first = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
        found += [first, torch.autograd.grad(loss, list(module.parameters()))]
    for other in found[:-1]:
        for a, b in zip(other, found[-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_rows_of_a_jacobian():
    """`jacrev` pulls many cotangents back through one solve."""
    p = weights(4)

    def end(w):
        return sa.solve(sa.ODEProblem(net, state(), (0.0, 1.0), [w, p[1]]), sa.Tsit5()).u[-1, :3]

    jacobian = torch.func.jacrev(end)(p[0])
    w = p[0].clone().requires_grad_()
    rows = [torch.autograd.grad(end(w)[i], w)[0] for i in range(3)]
    torch.testing.assert_close(jacobian, torch.stack(rows), rtol=1e-11, atol=1e-13)


def test_a_parameter_changed_in_place_is_noticed():
    """Between solve and gradient, as PyTorch itself does."""
    w = weights(60)
    w = [v.requires_grad_() for v in w]
    loss = sa.solve(sa.ODEProblem(net, state(), (0.0, 1.0), w), sa.Tsit5()).u.sum()
    with torch.no_grad():
        w[0] *= 2.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
