"""`ReverseVJP(compile=True)` on PyTorch against the ordinary path."""

from collections import deque

import numpy as np
import pytest

import sensitivity as sa

torch = pytest.importorskip("torch")
compiled = pytest.importorskip("sensitivity_torch._compiled")

COMPILED = sa.RecursiveCheckpointAdjoint(vjp=sa.ReverseVJP(compile=True))
EAGER = sa.RecursiveCheckpointAdjoint()


@pytest.fixture(autouse=True)
def compiler():
    why = compiled._compiler()
    if why is not None:
        pytest.skip(why)


def lotka_volterra(t, u, p):
    x, y = u
    return torch.stack([p[0] * x - p[1] * x * y, p[2] * x * y - p[3] * y])


def tensor(*values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


def problem(**changes):
    given = {"f": lotka_volterra, "u0": tensor(1.0, 1.0), "tspan": (0.0, 3.0), "p": tensor(1.5, 1.0, 1.0, 3.0)}
    given |= changes
    return sa.ODEProblem(given["f"], given["u0"], given["tspan"], given["p"])


def both(prob, loss, alg=None, **options):
    alg = alg or sa.Tsit5()
    options = {"rtol": 1e-8, "atol": 1e-8, "wrt": ("u0", "p")} | options
    return [sa.gradient(prob, alg, loss, sensealg=s, **options) for s in (EAGER, COMPILED)]


def close(a, b, rtol=1e-11):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(a.abs().max()))


def same_steps(a, b):
    for name in ("naccept", "nreject", "nfe", "nvjp"):
        assert getattr(a.stats, name) == getattr(b.stats, name), name


@pytest.fixture
def count(monkeypatch):
    """How many loops are compiled."""
    from sensitivity_torch import _traced

    made, original = [], _traced._compiled
    monkeypatch.setattr(_traced, "_compiled", lambda *args: made.append(args) or original(*args))
    return made


def quick(t, u, p):
    return p * u


def test_gradient_by_backward(monkeypatch):
    """One compiled pair of loops, shared by the tests that follow: exact, with inputs that change between solves."""
    # Without vector instructions: PyTorch tries the compiler on each kind of them, which takes longer than the rest.
    monkeypatch.setattr(torch._inductor.cpu_vec_isa, "valid_vec_isa_list", lambda: [])
    for value, end in ((-0.5, 1.0), (0.3, 2.0), (-0.7, -1.0)):
        p, u0 = tensor(value, requires_grad=True), tensor(2.0, requires_grad=True)
        sol = sa.solve(sa.ODEProblem(quick, u0, (0.0, end), p), sa.Tsit5(), sensealg=COMPILED, rtol=1e-10, atol=1e-12)
        sol.u[-1, 0].backward()
        exact = np.exp(value * end)
        np.testing.assert_allclose(u0.grad.item(), exact, rtol=1e-8)
        np.testing.assert_allclose(p.grad.item(), 2.0 * end * exact, rtol=1e-8)


@pytest.mark.slow
def test_saves_inside_steps_and_times():
    """Contributions of outputs, cotangents of times, several blocks, and steps that are rejected."""
    ts = torch.linspace(0.1, 10.0, 7, dtype=torch.float64)
    weights = torch.linspace(1.0, 2.0, 14, dtype=torch.float64).reshape(7, 2)
    a, b = both(problem(tspan=(0.0, 10.0)), lambda sol: (weights * sol.u**2).sum(), saveat=ts,
                wrt=("u0", "p", "t0", "t1", "saveat"))
    assert a.stats.naccept > 128
    assert a.stats.nreject > 0
    same_steps(a, b)
    for name in ("u0", "p", "t0", "saveat"):
        close(getattr(a, name), getattr(b, name), 1e-10)
    assert max(abs(a.t1), abs(b.t1)) < 1e-10 * abs(a.t0)  # save times are fixed


@pytest.mark.slow
def test_training_compiles_once(count):
    """Parameters of a module, closures made anew for every solve, and other numbers in the same places."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    found = []
    for n in range(3):
        scale = torch.tensor([1.0 + n])
        grads = []
        for sensealg in (EAGER, COMPILED):
            optimiser.zero_grad()

            def f(t, u, p, scale=scale):
                return scale * module(u) - p * t

            prob = sa.ODEProblem(f, torch.ones(3), (0.0, 1.0 + 0.1 * n), 0.5)
            sol = sa.solve(prob, sa.Euler(), controller=sa.FixedStep(), dt=0.01, sensealg=sensealg)
            (sol.u**2).mean().backward()
            grads.append([v.grad.clone() for v in module.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)  # single precision, 100 steps
        optimiser.step()
        found.append(sol.u[-1])
    assert len(count) == 2
    assert all((found[i] - found[i + 1]).abs().max() > 1e-2 for i in range(2))


@pytest.mark.slow
def test_numbers_that_f_closes_over(count):
    """A number is part of the graph: another one is another graph."""
    for rate in (0.5, 0.25, 0.5):
        def f(t, u, p, rate=rate):
            return -rate * p * u

        r = sa.gradient(sa.ODEProblem(f, tensor(1.0), (0.0, 1.0), tensor(1.0)), sa.Tsit5(), lambda sol: sol.u[-1, 0],
                        sensealg=COMPILED, wrt="p")
        np.testing.assert_allclose(r.p.item(), -rate * np.exp(-rate), rtol=1e-6)
    assert len(count) == 4


@pytest.mark.slow
def test_states_in_a_dictionary():
    """What `f` hands through, the states of every step, and what `f` does inside `no_grad` or makes itself."""
    def f(t, u, p):
        with torch.no_grad():
            still = u["x"] * 0.1
        return {"x": u["v"], "v": -p["k"] * u["x"] + still * torch.tensor([0.5, 2.0], dtype=torch.float64)}

    prob = sa.ODEProblem(f, {"x": tensor(1.0, 2.0), "v": tensor(0.0, -1.0)}, (1.0, 0.0), {"k": tensor(2.0, 5.0)})
    a, b = both(prob, lambda sol: (sol.u["x"] ** 2 * sol.u["v"]).sum(), sa.Dopri5(), saveat="steps",
                controller=sa.FixedStep(), dt=0.03)  # step control would move the steps by rounding / tolerance
    same_steps(a, b)
    for name in ("x", "v"):
        close(a.u0[name], b.u0[name])
    close(a.p["k"], b.p["k"])


@pytest.mark.slow
def test_running_costs():
    """The norm that they bring is compiled too; a dense solution has the steps of the compiled solve."""
    cost = sa.ContinuousCost(lambda t, u, p: p[0] * (u**2).sum())
    a, b = both(problem(), cost)
    same_steps(a, b)
    close(a.p, b.p)
    close(a.u0, b.u0)
    a, b = both(problem(), lambda sol: (sol(0.3) ** 2).sum(), dense=True)
    close(a.p, b.p)


@pytest.mark.slow
def test_a_product_that_is_not_needed():
    """The last stage of the last step has no derivative here, and no weight."""
    prob = problem(f=lambda t, u, p: -p * torch.sqrt((1.0 - t) * u), u0=tensor(4.0), tspan=(0.0, 1.0), p=tensor(1.0))
    a, b = both(prob, lambda sol: sol.u[-1, 0], sa.BS3(), controller=sa.FixedStep(), dt=0.25)
    assert a.p.isfinite().all()
    close(a.p, b.p)
    close(a.u0, b.u0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # by the first use of torch.func.jvp
def test_transforms():
    """`torch.func.grad` and `vmap` go through; nothing else does."""
    def end(p, sensealg=COMPILED):
        return sa.solve(sa.ODEProblem(quick, tensor(2.0), (0.0, 1.0), p), sa.Tsit5(), sensealg=sensealg).u[-1, 0]

    close(torch.func.grad(end)(tensor(0.3)), torch.func.grad(lambda p: end(p, EAGER))(tensor(0.3)))
    ps = tensor(0.3, -0.2)[:, None]
    close(torch.func.vmap(torch.func.grad(end))(ps), torch.func.vmap(torch.func.grad(lambda p: end(p, EAGER)))(ps))
    with pytest.raises(sa.UnsupportedCombination, match="no forward mode"):
        torch.func.jvp(end, (tensor(0.3),), (tensor(1.0),))
    with pytest.raises(sa.UnsupportedCombination, match="no second derivatives"):
        torch.func.jacrev(torch.func.grad(end))(tensor(0.3))


def test_functions_that_cannot_be_compiled():
    def branches(t, u, p):
        return u if u[0] > 0 else -u

    words = r"cannot compile f(.|\n)*Data-dependent(.|\n)*tensor operations"
    with pytest.raises(sa.UnsupportedCombination, match=words):
        both(problem(f=branches), lambda sol: sol.u.sum())


REFUSED = {
    "a budget": ({"sensealg": sa.RecursiveCheckpointAdjoint(checkpoints=2, vjp=sa.ReverseVJP(compile=True))}, None),
    "InterpolatingAdjoint": ({"sensealg": sa.InterpolatingAdjoint(vjp=sa.ReverseVJP(compile=True))}, None),
    "no explicit Runge-Kutta method": ({}, sa.Kvaerno3()),
    "norm=": ({"norm": lambda e: float(e.abs().max())}, None),
    "progress=": ({"progress": print}, None),
    "events": ({"events": [sa.Event(lambda t, u, p: u[0] - 100.0)]}, None),
}


@pytest.mark.parametrize("cause", REFUSED)
def test_refusals(cause):
    options, alg = REFUSED[cause]
    with pytest.raises(sa.UnsupportedCombination, match=cause) as error:
        sa.gradient(problem(), alg or sa.Tsit5(), lambda sol: sol.u.sum(), **{"sensealg": COMPILED} | options)
    assert "vjp=ReverseVJP()" in str(error.value)


def test_complex_states_are_refused():
    with pytest.raises(sa.UnsupportedCombination, match="complex128"):
        sa.solve(problem(f=quick, u0=tensor(1.0) + 1j, p=tensor(1.0)), sa.Tsit5(), sensealg=COMPILED)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "_compiler", lambda: "TorchInductor finds no C++ compiler")
    with pytest.raises(sa.UnsupportedCombination, match=r"no C\+\+ compiler"):
        sa.solve(problem(), sa.Tsit5(), sensealg=COMPILED)


def test_numbers_that_never_stay_are_refused():
    """TorchDynamo gives up on a function after some graphs of it; that is no reason to go on without."""
    from sensitivity_torch._backend import TorchBackend

    def solve(rate):
        def f(t, u, p):
            return -rate * u

        be = TorchBackend()
        return compiled._traced_call(be, f, be.time(0.0), tensor(1.0).requires_grad_(), None)

    out = [solve(float(rate))[0][0].item() for rate in range(1, 4)]
    assert out == [-1.0, -2.0, -3.0]
    with pytest.raises(sa.UnsupportedCombination, match=r"again and again(.|\n)*make what changes a tensor"):
        deque(map(solve, range(4, 40)))
