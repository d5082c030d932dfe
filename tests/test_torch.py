"""The PyTorch backend: derivatives through every entry point, captured tensors, dtypes, failures."""

import math
from dataclasses import dataclass

import pytest

import sensitivity as sa

torch = pytest.importorskip("torch")
fwad = torch.autograd.forward_ad
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

GOLD_P = [-7.5558620739812871819748548007526, -16.824915246868327154249355119176, 5.1114038569799057826764185212522,
          -37.335193444966730494458000995863]
GOLD_U0 = [-7.4651778929941023335320113786463, -1.93713346614898805459307524238]
ADJOINTS = [sa.RecursiveCheckpointAdjoint(), sa.InterpolatingAdjoint(), sa.ForwardSensitivity()]
ALL = [*ADJOINTS, sa.DirectAdjoint()]
LONG = {"rtol": 1e-10, "atol": 1e-10}
SHORT = {"rtol": 1e-9, "atol": 1e-9}


def name(x):
    return type(x).__name__


def vec(values, grad=False, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def lotka_volterra(t, u, p):
    x, y = u[0], u[1]
    a, b, c, d = p
    return torch.stack([a * x - b * x * y, -c * y + d * x * y])


def decay(t, u, p):
    return -p * u


def mlp(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(dtype)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, t, u, p):
        return self.net(u) * (1.0 if p is None else p)


def states(u0, p, sensealg=sa.auto, tspan=(0.0, 2.0), saveat=3, **options):
    return sa.solve(sa.ODEProblem(lotka_volterra, u0, tspan, p), saveat=saveat, sensealg=sensealg,
                    **{**SHORT, **options}).u


def close(a, b, tol):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol)


def differences(fun, x, step=1e-5):
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        e = torch.zeros_like(x).flatten()
        e[i] = step
        e = e.reshape(x.shape)
        out.flatten()[i] = (fun(x + e) - fun(x - e)) / (2 * step)
    return out


# -- values of derivatives, by every entry point ------------------------------------------------------------------


@pytest.mark.parametrize("sensealg", ALL, ids=name)
def test_gold_gradient(sensealg):
    u0, p = vec([1.0, 1.0], True), vec([1.5, 1.0, 3.0, 1.0], True)
    prob = sa.ODEProblem(lotka_volterra, u0, (0.0, 10.0), p)
    sa.solve(prob, sa.Tsit5(), saveat=torch.arange(1.0, 11.0), sensealg=sensealg, **LONG).u.sum().backward()
    close(p.grad, vec(GOLD_P), 2e-9)
    close(u0.grad, vec(GOLD_U0), 2e-9)


@pytest.mark.parametrize("sensealg", ALL, ids=name)
def test_sa_gradient(sensealg):
    prob = sa.ODEProblem(lotka_volterra, vec([1.0, 1.0]), (0.0, 10.0), vec([1.5, 1.0, 3.0, 1.0]))
    with torch.no_grad():
        r = sa.gradient(prob, sa.Tsit5(), lambda sol: sol.u.sum(), saveat=torch.arange(1.0, 11.0), sensealg=sensealg,
                        **LONG)
    close(r.p, vec(GOLD_P), 2e-9)
    close(r.u0, vec(GOLD_U0), 2e-9)
    assert not r.value.requires_grad


@pytest.mark.parametrize("sensealg", ALL, ids=name)
def test_entry_points(sensealg):
    u0, p, v = vec([1.0, 0.8]), vec([1.5, 1.0, 3.0, 1.0]), vec([0.3, -0.2, 0.1, 0.5])
    w = torch.linspace(0.3, 1.0, 6, dtype=torch.float64).reshape(3, 2)
    tol = 1e-12 if sensealg.exact else 2e-7

    def f(p):
        return states(u0, p, sensealg)

    def loss(p):
        return (w * f(p)).sum()

    q = p.clone().requires_grad_()
    (expected,) = torch.autograd.grad((w * states(u0, q, sa.DirectAdjoint())).sum(), q)
    (grad,) = torch.autograd.grad(loss(q), q)
    close(grad, expected, tol)
    close(torch.func.grad(loss)(p), expected, tol)
    close(torch.func.vjp(f, p)[1](w)[0], expected, tol)
    close(torch.func.jvp(loss, (p,), (v,))[1], expected @ v, tol)
    with fwad.dual_level():
        close(fwad.unpack_dual(loss(fwad.make_dual(p, v))).tangent, expected @ v, tol)
    jacobian = torch.func.jacrev(f)(p)
    close(torch.einsum("ki,kij->j", w, jacobian), expected, tol)
    close(torch.func.jacfwd(f)(p), jacobian, tol)


@pytest.mark.parametrize("sensealg", ADJOINTS, ids=name)
def test_vmap(sensealg):
    u0, ps = vec([1.0, 0.8]), torch.stack([vec([1.5, 1.0, 3.0, 1.0]), vec([1.2, 0.9, 2.0, 1.1])])

    def loss(p):
        return (states(u0, p, sensealg) ** 2).sum()

    close(torch.func.vmap(loss)(ps), torch.stack([loss(p) for p in ps]), 1e-13)
    expected = torch.stack([torch.func.grad(loss)(p) for p in ps])
    close(torch.func.vmap(torch.func.grad(loss))(ps), expected, 1e-6)
    close(torch.func.grad(lambda ps: torch.func.vmap(loss)(ps).sum())(ps), expected, 1e-6)
    leaf = ps.clone().requires_grad_()
    torch.func.vmap(loss, in_dims=1)(leaf.T.contiguous()).sum().backward()
    close(leaf.grad, expected, 1e-6)
    for outer in (torch.func.jacrev, torch.func.jacfwd):
        close(torch.func.vmap(outer(loss))(ps), expected, 1e-6)


def test_vmap_maps_every_input():
    rates, starts, ends = vec([0.5, 1.0]), vec([0.0, 0.2]), vec([1.0, 2.0])
    times = torch.stack([vec([0.5, 1.0]), vec([2.0, 0.7])])

    def f(k, t0, t1, ts):
        sol = sa.solve(sa.ODEProblem(decay, vec([2.0]), (t0, t1), k), saveat=ts, **LONG)
        return sol.u[:, 0], sol.t, sol.stats.nfe

    u, t, nfe = torch.func.vmap(f)(rates, starts, ends, times)
    close(u, 2.0 * torch.exp(-rates[:, None] * (times - starts[:, None])), 1e-8)
    close(t, times, 0.0)
    assert nfe.shape == (2,)

    def end(t0, t1, saveat):
        return sa.solve(sa.ODEProblem(decay, vec([2.0]), (t0, t1), 1.0), saveat=saveat, **LONG).u[-1, 0]

    for saveat in (None, 3):
        d0, d1 = torch.func.vmap(torch.func.grad(lambda a, b, s=saveat: end(a, b, s), (0, 1)))(starts, ends)
        close(d0, 2.0 * torch.exp(starts - ends), 1e-8)
        close(d1, -2.0 * torch.exp(starts - ends), 1e-8)
    with pytest.raises(sa.UnsupportedCombination, match="vmap"):
        torch.func.vmap(lambda k: sa.solve(sa.ODEProblem(decay, vec([1.0]), (0.0, 1.0), k), saveat="steps").u)(rates)
    with pytest.raises(sa.UnsupportedCombination, match="vmap"):
        torch.func.vmap(lambda p: states(vec([1.0, 1.0]), p, sa.DirectAdjoint()))(torch.ones(2, 4).double())


def test_vmap_over_states_reaches_captured_parameters():
    net = Network()
    batch = torch.randn(3, 2, dtype=torch.float64)

    def end(u0):
        return sa.solve(sa.ODEProblem(net, u0, (0.0, 1.0)), **SHORT).u[-1]

    torch.func.vmap(end)(batch).sum().backward()
    grads = [q.grad.clone() for q in net.parameters()]
    net.zero_grad()
    sum(end(u0).sum() for u0 in batch).backward()
    for g, q in zip(grads, net.parameters(), strict=True):
        close(g, q.grad, 1e-12)


@pytest.mark.parametrize("method", [sa.Euler(), sa.Heun(), sa.RK4(), sa.BS3(), sa.Dopri5(), sa.Tsit5(), sa.Dopri8()],
                         ids=name)
@pytest.mark.parametrize("tspan", [(0.0, 1.5), (1.5, -0.5)])
def test_discrete_adjoint_equals_direct(method, tspan):
    options = {"dt": 0.05, "controller": sa.FixedStep()}
    saves = [None, 4, "steps", torch.tensor([0.3, 1.1, 0.3, 1.5, 0.0]).double()]
    for saveat in saves:
        results = []
        for sensealg in (sa.RecursiveCheckpointAdjoint(), sa.DirectAdjoint()):
            x = [vec([1.0, 0.7], True), vec([1.5, 1.0, 3.0, 1.0], True), *(vec(t, True) for t in tspan)]
            ts = saveat
            if isinstance(saveat, torch.Tensor):
                ts = saveat.clone().requires_grad_()
                x.append(ts)
            u = sa.solve(sa.ODEProblem(lambda t, u, p: lotka_volterra(t, u, p) * (1 + 0.1 * torch.sin(t)), x[0],
                                       (x[2], x[3]), x[1]), method, saveat=ts, sensealg=sensealg, **options).u
            loss = (u * torch.linspace(0.5, 1.0, u.numel()).double().reshape(u.shape)).sum()
            results.append(torch.autograd.grad(loss, x))
        for a, b in zip(*results, strict=True):
            close(a, b, 1e-11)


@pytest.mark.parametrize("sensealg", ALL, ids=name)
def test_gradients_of_times(sensealg):
    k, u0 = vec(0.8, True), vec([2.0], True)
    t0, t1, ts = vec(0.1, True), vec(1.7, True), vec([1.2, 0.4, 1.2], True)
    sol = sa.solve(sa.ODEProblem(decay, u0, (t0, t1), k), saveat=ts, sensealg=sensealg, **LONG)
    w = vec([1.0, 2.0, -0.5])
    exact = 2.0 * torch.exp(-0.8 * (ts - t0)).detach()
    grads = torch.autograd.grad((w * sol.u[:, 0]).sum(), (k, t0, ts))
    close(grads[0], (-w * (ts - t0) * exact).sum().detach(), 1e-8)
    close(grads[1], (0.8 * w * exact).sum(), 1e-8)
    close(grads[2], -0.8 * w * exact, 2e-5 if sensealg.exact else 1e-8)
    (d0, d1) = torch.autograd.grad(sa.solve(sa.ODEProblem(decay, u0, (t0, t1), k), sensealg=sensealg, **LONG).u.sum(),
                                   (t0, t1))
    end = 2.0 * math.exp(-0.8 * 1.6)
    close(d0, vec(0.8 * end), 1e-8)
    close(d1, vec(-0.8 * end), 1e-8)


def test_jvp_moves_times():
    def f(t0, t1, ts):
        return sa.solve(sa.ODEProblem(decay, vec([2.0]), (t0, t1), vec(0.8)), saveat=ts, **LONG).u[:, 0]

    args = (vec(0.1), vec(1.7), vec([1.2, 0.4]))
    for i, exact in ((0, 0.8), (2, -0.8)):
        d = tuple(torch.ones_like(v) if i == j else torch.zeros_like(v) for j, v in enumerate(args))
        u, du = torch.func.jvp(f, args, d)
        close(du, exact * u, 2e-5)


# -- problems of every form ---------------------------------------------------------------------------------------


@dataclass
class Parameters:
    rate: object
    label: str


def test_pytrees():
    u0 = {"a": vec([[1.0, 2.0], [0.5, 1.5]], True), "b": vec(0.3, True)}
    p = Parameters({"k": vec(0.7, True), "n": torch.tensor(2)}, "decay")

    def f(t, u, p):
        assert p.label == "decay"
        assert p.rate["n"].dtype == torch.int64
        return {"a": -p.rate["k"] * u["a"] * p.rate["n"], "b": u["a"].sum() - u["b"]}

    sol = sa.solve(sa.ODEProblem(f, u0, (0.0, 1.0), p), saveat=[0.5, 1.0], **LONG)
    assert sol.u["a"].shape == (2, 2, 2)
    assert sol.u["b"].shape == (2,)
    k = p.rate["k"]
    ga, gk = torch.autograd.grad(sol.u["a"].sum(), (u0["a"], k))
    decays = [math.exp(-0.7 * 2 * t) for t in (0.5, 1.0)]
    close(ga, torch.full((2, 2), sum(decays)).double(), 1e-7)
    close(gk, vec(sum(-2 * t * d * 5.0 for t, d in zip((0.5, 1.0), decays, strict=True))), 1e-7)


@pytest.mark.parametrize("sensealg", ALL, ids=name)
def test_matrix_state_and_unused_parameter(sensealg):
    u0, p = torch.eye(3, dtype=torch.float64).requires_grad_(), [vec(0.2, True), vec([1.0, 2.0], True)]
    sol = sa.solve(sa.ODEProblem(lambda t, u, p: p[0] * u, u0, (0.0, 1.0), p), sensealg=sensealg, **LONG)
    sol.u.sum().backward()
    close(u0.grad, torch.full((3, 3), math.exp(0.2)).double(), 1e-8)
    close(p[0].grad, vec(3 * math.exp(0.2)), 1e-8)
    assert p[1].grad is None or not p[1].grad.any()


def test_field_without_state_or_parameters():
    u0, p = vec([1.0], True), vec(3.0, True)
    sa.solve(sa.ODEProblem(lambda t, u, p: p * torch.ones(1, dtype=u.dtype), u0, (0.0, 2.0), p), **LONG,
             probe="off").u.sum().backward()
    close(u0.grad, vec([1.0]), 1e-12)
    close(p.grad, vec(2.0), 1e-12)


@pytest.mark.parametrize("sensealg", ALL, ids=name)
def test_float32(sensealg):
    seen = []

    def f(t, u, p):
        seen.append((t.dtype, t.ndim, u.dtype))
        return -p * u * (1 + 0 * t)

    u0, p = vec([1.0, 2.0], True, torch.float32), vec(0.5, True, torch.float32)
    sol = sa.solve(sa.ODEProblem(f, u0, (0.0, 1.0), p), saveat=[0.5, 1.0], sensealg=sensealg)
    assert sol.u.dtype == torch.float32
    assert sol.t.dtype == torch.float64
    sol.u[-1].sum().backward()
    assert u0.grad.dtype == p.grad.dtype == torch.float32
    close(p.grad, vec(-3 * math.exp(-0.5), dtype=torch.float32), 1e-3)
    assert set(seen) == {(torch.float32, 0, torch.float32)}


def test_complex_state():
    u0, k = torch.tensor([1.0 + 0.5j], dtype=torch.complex128, requires_grad=True), vec(0.3, True)
    for sensealg in (sa.RecursiveCheckpointAdjoint(), sa.DirectAdjoint()):
        u = sa.solve(sa.ODEProblem(lambda t, u, p: 1j * p * u, u0, (0.0, 2.0), k), sensealg=sensealg, **LONG).u[-1]
        g = torch.autograd.grad(u.real.sum(), (u0, k))
        exact = torch.autograd.grad((u0 * torch.exp(2j * k)).real.sum(), (u0, k))
        for a, b in zip(g, exact, strict=True):
            close(a, b, 1e-8)
        u = sa.solve(sa.ODEProblem(lambda t, u, p: -p * u.real + 0j, u0, (0.0, 2.0), k), sensealg=sensealg, **LONG).u
        (g,) = torch.autograd.grad((u * (1 - 2j)).real.sum(), u0)
        close(g, (torch.exp(-2 * k) + 2j).detach()[None], 1e-8)


def test_save_modes():
    prob = sa.ODEProblem(decay, vec([1.0]), (0.0, 1.0), vec(1.0))
    assert sa.solve(prob).u.shape == (1, 1)
    sol = sa.solve(prob, saveat=[0.9, 0.1, 0.9, 0.0], **LONG)
    close(sol.u[:, 0], torch.exp(-vec([0.9, 0.1, 0.9, 0.0])), 1e-8)
    close(sa.solve(prob, saveat=5).t, torch.linspace(0, 1, 5).double(), 1e-15)
    sol = sa.solve(prob, saveat="steps")
    assert len(sol.t) == sol.n_steps == sol.u.shape[0]
    assert sol.u.grad_fn is None


def test_dense_output_is_differentiable():
    u0, k = vec([2.0, 1.0], True), vec(0.8, True)
    sol = sa.solve(sa.ODEProblem(decay, u0, (0.0, 2.0), k), dense=True, saveat=[1.0], **LONG)
    gk, gu = torch.autograd.grad(sol(0.7).sum() + sol(vec([0.2, 1.9])).sum() + sol.u.sum(), (k, u0))
    ts = vec([0.7, 0.2, 1.9, 1.0])
    close(gk, -(3 * ts * torch.exp(-0.8 * ts)).sum(), 1e-7)
    close(gu, torch.exp(-0.8 * ts).sum().expand(2), 1e-7)


# -- what f closes over -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sensealg", ALL, ids=name)
def test_module_parameters(sensealg):
    net, u0 = Network(), vec([0.4, -0.2], True)

    def loss():
        return (sa.solve(sa.ODEProblem(net, u0, (0.0, 1.0)), saveat=3, sensealg=sensealg, **LONG).u ** 2).sum()

    loss().backward()
    weight = net.net[0].weight
    grad = weight.grad[0, 1].item()
    with torch.no_grad():
        values = []
        for e in (1e-5, -2e-5):
            weight[0, 1] += e
            values.append(loss().item())
    assert grad == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("sensealg", ALL, ids=name)
def test_captured_tensors(sensealg):
    leaf, base, p = vec(0.5, True), vec(0.1, True), vec(0.2, True)
    product = base * 3.0
    box = {"net": vec(0.05, True)}

    def f(t, u, q):
        return -(leaf + product + q + box["net"]) * u

    sa.solve(sa.ODEProblem(f, vec([1.0]), (0.0, 1.0), p), sensealg=sensealg, **LONG).u.sum().backward()
    exact = vec(-math.exp(-1.05))
    for x, factor in ((leaf, 1), (base, 3), (p, 1), (box["net"], 1)):
        close(x.grad, factor * exact, 1e-8)


def test_field_that_hands_tensors_through():
    w = vec([0.5, 0.2], True)
    u0 = {"x": vec([1.0, 2.0], True), "v": vec([0.3, 0.4], True)}
    sa.solve(sa.ODEProblem(lambda t, u, p: {"x": u["v"], "v": w}, u0, (0.0, 2.0)), **LONG).u["x"].sum().backward()
    close(w.grad, vec([2.0, 2.0]), 1e-10)
    close(u0["v"].grad, vec([2.0, 2.0]), 1e-10)


def test_capture_and_p_share_a_tensor():
    p = vec(0.5, True)
    sa.solve(sa.ODEProblem(lambda t, u, q: -(p + q) * u, vec([1.0]), (0.0, 1.0), p), **LONG).u.sum().backward()
    close(p.grad, vec(-2 * math.exp(-1.0)), 1e-8)


def test_module_inside_p():
    net = mlp()
    prob = sa.ODEProblem(lambda t, u, p: p["scale"] * p["net"](u), vec([0.4, -0.2]), (0.0, 1.0),
                         {"net": net, "scale": vec(0.5, True)})
    sa.solve(prob, **SHORT).u.sum().backward()
    assert all(q.grad is not None and q.grad.abs().max() > 0 for q in net.parameters())


def test_functional_call():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.field = Network()

        def forward(self, u0):
            return sa.solve(sa.ODEProblem(self.field, u0, (0.0, 1.0)), **SHORT).u.sum()

    model, u0 = Model(), vec([0.4, -0.2])
    params = {k: v.detach() for k, v in model.named_parameters()}
    grads = torch.func.grad(lambda q: torch.func.functional_call(model, q, (u0,)))(params)
    model(u0).backward()
    for k, v in model.named_parameters():
        close(grads[k], v.grad, 1e-10)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    loss = torch.func.functional_call(model, leaves, (u0,))
    with pytest.raises(sa.CapturedValueError):
        loss.backward()


def test_transforms_inside_f():
    u0, w = vec([1.0, 0.5]), vec(0.7)

    def rotated(g):
        return torch.stack([g[1], -g[0]])

    def loss(w, explicit=False):
        def f(t, u, p):
            if explicit:
                return rotated(2 * p * u)
            return rotated(torch.func.grad(lambda q: (p * q**2).sum())(u))

        return sa.solve(sa.ODEProblem(f, u0, (0.0, 1.0), w), **SHORT).u.sum()

    expected = torch.func.grad(loss)(w, explicit=True)
    leaf = w.clone().requires_grad_()
    close(torch.autograd.grad(loss(leaf), leaf)[0], expected, 1e-10)
    close(torch.func.grad(loss)(w), expected, 1e-10)
    close(torch.func.jvp(loss, (w,), (vec(1.0),))[1], expected, 1e-10)
    close(torch.func.vmap(torch.func.grad(loss))(w[None])[0], expected, 1e-10)

    def capturing(w):
        def f(t, u, p):
            return rotated(torch.func.grad(lambda q: (w * q**2).sum())(u))

        return sa.solve(sa.ODEProblem(f, u0, (0.0, 1.0)), **SHORT).u.sum()

    close(torch.autograd.grad(capturing(leaf), leaf)[0], expected, 1e-10)
    for transformed, x in ((torch.func.grad(capturing), w), (torch.func.vmap(torch.func.grad(capturing)), w[None]),
                           (torch.func.vmap(capturing), w[None]),
                           (lambda w: torch.func.jvp(capturing, (w,), (w,)), w)):
        with pytest.raises(sa.CapturedValueError):
            transformed(x)


def test_checkpointed_field():
    p = vec(0.7, True)

    def f(t, u, p):
        return -p * torch.utils.checkpoint.checkpoint(torch.sin, u, use_reentrant=False)

    prob = sa.ODEProblem(f, vec([1.0]), (0.0, 1.0), p)
    grads = [torch.autograd.grad(sa.solve(prob, sensealg=s, **SHORT).u.sum(), p)[0]
             for s in (sa.RecursiveCheckpointAdjoint(), sa.DirectAdjoint())]
    close(*grads, 1e-11)


def test_captured_tensor_of_a_transform_is_refused():
    def loss(w):
        return sa.solve(sa.ODEProblem(lambda t, u, p: -w * u, vec([1.0]), (0.0, 1.0))).u.sum()

    with pytest.raises(sa.CapturedValueError, match="pass it through p"):
        torch.func.grad(loss)(vec(0.5))
    with pytest.raises(sa.CapturedValueError), fwad.dual_level():
        loss(fwad.make_dual(vec(0.5), vec(1.0)))


@pytest.mark.parametrize("sensealg", ALL, ids=name)
def test_hooks_fire_once(sensealg):
    net, other, calls = Network(), Network(), []
    net.net[0].weight.register_hook(lambda g: calls.append(1) or 2 * g)
    for f in (net, other):
        sa.solve(sa.ODEProblem(f, vec([0.4, -0.2]), (0.0, 1.0)), sensealg=sensealg, **SHORT).u.sum().backward()
    assert len(calls) == 1
    close(net.net[0].weight.grad, 2 * other.net[0].weight.grad, 1e-12)


@pytest.mark.parametrize("sensealg", ALL, ids=name)
def test_autograd_inside_f(sensealg):
    w = vec([[1.0, 0.2], [0.2, 2.0]], True)

    def hamiltonian_field(t, u, p):
        energy = 0.5 * u @ p @ u
        (g,) = torch.autograd.grad(energy, u, create_graph=True)
        return torch.stack([g[1], -g[0]])

    def explicit(t, u, p):
        g = p @ u
        return torch.stack([g[1], -g[0]])

    results = []
    for f in (hamiltonian_field, explicit):
        prob = sa.ODEProblem(f, vec([1.0, 0.0]), (0.0, 1.0), w)
        u = sa.solve(prob, sensealg=sensealg, **SHORT).u
        with torch.no_grad():
            close(sa.solve(prob, **SHORT).u, u.detach(), 1e-8)
        (g,) = torch.autograd.grad(u[-1, 0], w)
        results.append((g + g.T) / 2)
    close(*results, 1e-7)


# -- what is recorded, refused, counted -----------------------------------------------------------------------------


def test_nothing_recorded_without_need():
    p = vec([1.5, 1.0, 3.0, 1.0], True)
    assert states(vec([1.0, 1.0]), p.detach()).grad_fn is None
    with torch.no_grad():
        assert states(vec([1.0, 1.0]), p).grad_fn is None
        assert states(vec([1.0, 1.0]), p, sa.DirectAdjoint()).grad_fn is None


def test_change_in_place_before_backward_raises():
    p, net = vec([1.5, 1.0, 3.0, 1.0], True), Network()
    for loss, x in ((states(vec([1.0, 1.0]), p).sum(), p),
                    (sa.solve(sa.ODEProblem(net, vec([0.4, -0.2]), (0.0, 1.0))).u.sum(), net.net[0].weight)):
        with torch.no_grad():
            x.mul_(1.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_changing_the_output_leaves_the_gradient():
    p = vec(0.5, True)
    u = sa.solve(sa.ODEProblem(decay, vec([1.0]), (0.0, 1.0), p), **LONG).u
    u.mul_(2.0)
    u.sum().backward()
    close(p.grad, vec(-2 * math.exp(-0.5)), 1e-8)


def squares(sensealg, u0=(1.0, 0.8)):
    return lambda p: (states(vec(list(u0)), p, sensealg) ** 2).sum()


@pytest.mark.parametrize("sensealg", [*ADJOINTS[:2], sa.ForwardOverAdjoint()], ids=name)
def test_second_order_in_every_composition(sensealg):
    loss, p = squares(sensealg), vec([1.5, 1.0, 3.0, 1.0])
    H = torch.func.hessian(loss)(p)
    # Two continuous solves are each as wrong as their tolerance; the discrete ones are the same numbers.
    tolerance = 1e-11 if sensealg.exact else 1e-6
    close(torch.func.jacrev(torch.func.jacrev(loss))(p), H, tolerance)
    close(torch.func.jacrev(torch.func.jacfwd(loss))(p), H, tolerance)
    close(torch.autograd.functional.hessian(loss, p), H, tolerance)
    close(torch.func.hessian(squares(sa.DirectAdjoint()))(p), H, 1e-6 if not sensealg.exact else 1e-10)
    with pytest.raises(sa.UnsupportedCombination, match="forward mode was asked for twice"):
        torch.func.jacfwd(torch.func.jacfwd(loss))(p)


def test_double_backward_through_a_module():
    torch.manual_seed(0)
    net = Network()

    def loss():
        return sa.solve(sa.ODEProblem(net, vec([0.4, -0.2]), (0.0, 1.0)), saveat=[0.5, 1.0]).u.square().sum()

    w = net.net[0].weight
    (g,) = torch.autograd.grad(loss(), w, create_graph=True)
    v = torch.linspace(-1.0, 1.0, w.numel(), dtype=w.dtype).reshape(w.shape)
    (Hv,) = torch.autograd.grad((g * v).sum(), w)
    e, ends = 1e-5, []
    for s in (e, -2 * e):
        with torch.no_grad():
            w += s * v
        ends.append(torch.autograd.grad(loss(), w)[0])
    close(Hv, (ends[0] - ends[1]) / (2 * e), 1e-7)


def test_second_order_is_refused_where_there_is_none():
    loss, p = squares(sa.ForwardSensitivity()), vec([1.5, 1.0, 3.0, 1.0], True)
    (g,) = torch.autograd.grad(loss(p), p, create_graph=True)
    with pytest.raises(sa.UnsupportedCombination, match="ForwardOverAdjoint"):
        torch.autograd.grad(g.sum(), p)
    with pytest.raises(sa.UnsupportedCombination, match="first derivatives only"):
        torch.func.hessian(loss)(p.detach())
    with pytest.raises(sa.UnsupportedCombination, match="not in times"):
        torch.func.hessian(lambda t1: sa.solve(sa.ODEProblem(decay, vec([1.0]), (0.0, t1), vec(0.5))).u.sum())(vec(1.0))
    with pytest.raises(sa.UnsupportedCombination, match="third"):
        torch.func.jacrev(torch.func.hessian(squares(sa.auto)))(p.detach())


def test_second_order_by_direct_adjoint():
    def loss(k):
        return sa.solve(sa.ODEProblem(decay, vec([1.0]), (0.0, 1.0), k), sensealg=sa.DirectAdjoint(), **LONG).u.sum()

    close(torch.func.hessian(loss)(vec(0.5)), vec(math.exp(-0.5)), 1e-7)
    k = vec(0.5, True)
    (g,) = torch.autograd.grad(loss(k), k, create_graph=True)
    close(torch.autograd.grad(g, k)[0], vec(math.exp(-0.5)), 1e-7)


def blowup(t, u, p):
    return p * u * u


def test_failures():
    k = vec(1.0, True)
    prob = sa.ODEProblem(blowup, vec([1.0]), (0.0, 2.0), k)
    with pytest.raises(sa.SolveError):
        sa.solve(prob, max_steps=200)
    sol = sa.solve(prob, max_steps=200, on_failure="nan")
    assert sol.u.isnan().all()
    sol.u.sum().backward()
    assert k.grad.isnan()

    def lane(k):
        return sa.solve(prob.remake(p=k), max_steps=200, on_failure="nan", **SHORT).u[-1, 0]

    u = torch.func.vmap(lane)(vec([0.2, 1.0]))
    close(u[0], vec(1 / (1 - 0.4)), 1e-7)
    assert u[1].isnan()
    g = torch.func.vmap(torch.func.grad(lane))(vec([0.2, 1.0]))
    close(g[0], vec(2 / (1 - 0.4) ** 2), 1e-6)
    assert g[1].isnan()


@pytest.mark.parametrize("method", [sa.Tsit5(), sa.BS3(), sa.RK4()], ids=name)
def test_counts(method):
    calls = []

    def f(t, u, p):
        calls.append(1)
        return lotka_volterra(t, u, p)

    options = {"dt": 0.05, "probe": "off"} if not method.adaptive else {"probe": "off"}
    prob = sa.ODEProblem(f, vec([1.0, 1.0]), (0.0, 2.0), vec([1.5, 1.0, 3.0, 1.0]))
    with torch.no_grad():
        sol = sa.solve(prob, method, **options)
        assert len(calls) == sol.stats.nfe
        for vjp in (sa.ForwardVJP(), sa.ReverseVJP()):
            calls.clear()
            big = prob.remake(u0=torch.ones(2, 9, dtype=torch.float64))  # products one by one
            r = sa.gradient(big, method, lambda sol: sol.u.sum(), sensealg=sa.RecursiveCheckpointAdjoint(vjp=vjp),
                            **options)
            # Steps that autograd recorded need no evaluation again.
            assert len(calls) == r.stats.nfe + (r.stats.nvjp if vjp == sa.ForwardVJP() else 0)


def test_products_made_ahead_agree_with_single_ones():
    u0, p = torch.tensor([[1.0, 1.0]] * 9).double().T, vec([1.5, 1.0, 3.0, 1.0])
    options = {"saveat": 4, "wrt": ("u0", "p", "t0", "t1"), **SHORT}

    def loss(sol):
        return (sol.u[:, :, 0] ** 2).sum()

    single = sa.gradient(sa.ODEProblem(lotka_volterra, u0, (0.0, 9.0), p), loss=loss, **options)
    ahead = sa.gradient(sa.ODEProblem(lotka_volterra, u0[:, :1], (0.0, 9.0), p), loss=loss, **options)
    close(single.p, ahead.p, 1e-9)
    close(single.u0[:, 0], ahead.u0[:, 0], 1e-9)
    close(single.t0, ahead.t0, 1e-9)
    close(single.t1, ahead.t1, 1e-9)


def test_branches_on_values_are_allowed():
    def f(t, u, p):
        return -p * u if u[0] > 0.5 or t > 10.0 else -(p * u)

    k = vec(0.9, True)
    prob = sa.ODEProblem(f, vec([1.0, 2.0]), (0.0, 1.5), k)
    grads = [torch.autograd.grad(sa.solve(prob, sensealg=s, **SHORT).u.sum(), k)[0]
             for s in (sa.RecursiveCheckpointAdjoint(), sa.DirectAdjoint())]
    close(*grads, 1e-11)


@pytest.mark.parametrize("vjp", [sa.ForwardVJP(), sa.FiniteDifferenceVJP(), sa.ComplexStepVJP()], ids=name)
def test_other_products(vjp):
    u0, p = vec([1.0, 0.8]), vec([1.5, 1.0, 3.0, 1.0], True)

    def f(t, u, p):
        return torch.stack([p[0] * u[0] - p[1] * u[0] * u[1], -p[2] * u[1] + p[3] * u[0] * u[1]])

    grads = []
    for sensealg in (sa.RecursiveCheckpointAdjoint(vjp=vjp), sa.RecursiveCheckpointAdjoint()):
        u = sa.solve(sa.ODEProblem(f, u0, (0.0, 1.0), p), sensealg=sensealg, **SHORT).u
        grads.append(torch.autograd.grad(u.sum(), p)[0])
    close(*grads, 1e-7 if isinstance(vjp, sa.FiniteDifferenceVJP) else 1e-11)


def test_user_products():
    k = vec(0.5, True)
    prob = sa.ODEProblem(decay, vec([1.0, 2.0]), (0.0, 1.0), k,
                         vjp=lambda t, u, p, lam: (-p * lam, -(u * lam).sum()))
    sol = sa.solve(prob, **LONG)
    assert isinstance(sol.sensealg.vjp, sa.UserVJP)
    sol.u.sum().backward()
    close(k.grad, vec(-3 * math.exp(-0.5)), 1e-8)


def test_training_step():
    net, data = Network(), torch.randn(4, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = ((sa.solve(sa.ODEProblem(net, vec([0.4, -0.2]), (0.0, 1.0)), saveat=4).u - data) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_tangents_by_rows_and_by_directions(count):
    """With no more entries than directions the rows of the Jacobian are made, with more a product per direction; both
    are the derivative by hand, a parameter that f ignores and one number among the parameters included."""
    torch.manual_seed(0)
    n, matrix, t, u = 2, *(torch.randn(shape, dtype=torch.float64) for shape in ((2, 2), (), (2,)))
    theta = (matrix, torch.tensor(0.7).double(), torch.ones(3).double())
    d = tuple(torch.randn(count, *v.shape, dtype=torch.float64) for v in (u, *theta, t))

    def f(leaves):
        return lambda t, u: torch.stack([(leaves[0][0] * u).sum() * t, u[1] ** 2 * leaves[1]])

    from sensitivity_torch import _autodiff

    out, moved = _autodiff.jvp(f, theta, d[1:4])(t, u, d[0], d[4])
    torch.testing.assert_close(out, f(theta)(t, u))
    du, dm, da, _, dt = d
    first = (du @ matrix[0] + dm[:, 0] @ u) * t + (matrix[0] @ u) * dt
    second = 2.0 * u[1] * du[:, 1] * theta[1] + u[1] ** 2 * da
    torch.testing.assert_close(moved, torch.stack([first, second], dim=1), rtol=1e-14, atol=1e-14)
    assert moved.shape == (count, n)
    assert not moved.requires_grad
