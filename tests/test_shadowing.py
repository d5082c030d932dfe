"""Derivatives of long-time averages: against closed forms, dense algebra, statistics, and each other."""

from dataclasses import replace

import numpy as np
import pytest

import sensitivity as sa

MU, OMEGA = 1.7, 2.3
TURN = 2.0 * np.pi / OMEGA
EVERY = ("ForwardLSS", "AdjointLSS", "NILSS", "NILSAS")
ALGORITHMS = {name: getattr(sa, name)() for name in EVERY[:2]} | {name: getattr(sa, name)(20) for name in EVERY[2:]}


def stuart_landau(lab, turns, sign=1.0):
    """A limit cycle, the circle of radius sqrt(mu): <x^2> = mu / 2, <x^4> = 3 mu^2 / 8, and omega changes neither."""

    def f(t, u, p):
        x, y = u[0], u[1]
        r = x * x + y * y
        return sign * lab.xp.stack([p[0] * x - p[1] * y - r * x, p[1] * x + p[0] * y - r * y])

    return sa.ODEProblem(f, lab.array([MU**0.5, 0.0]), (0.0, sign * turns * TURN), lab.array([MU, OMEGA]))


def lorenz_field(u, p):
    return np.array([p[0] * (u[1] - u[0]), u[0] * (p[1] - u[2]) - u[1], u[0] * u[1] - p[2] * u[2]])


def lorenz_jac(u, p):
    return np.array([[-p[0], p[0], 0.0], [p[1] - u[2], -1.0, -u[0]], [u[1], u[0], -p[2]]])


def lorenz_paramjac(u):
    return np.array([[u[1] - u[0], 0.0, 0.0], [0.0, u[0], 0.0], [0.0, 0.0, -u[2]]])


def lorenz(span, seed=0):
    """Chaos with products of its own, from a point on the attractor."""
    p = np.array([10.0, 28.0, 8.0 / 3.0])
    prob = sa.ODEProblem(lambda t, u, p: lorenz_field(u, p), np.array([1.0, 2.0 + seed, 20.0]), (0.0, 20.0), p)
    u0 = sa.solve(prob, sa.Tsit5()).u[-1]
    return prob.remake(u0=u0, tspan=(0.0, span), jac=lambda t, u, p: lorenz_jac(u, p),
                       paramjac=lambda t, u, p: lorenz_paramjac(u))


HEIGHT = sa.ContinuousCost(lambda t, u, p: u[2], dgdu=lambda t, u, p: np.array([0.0, 0.0, 1.0]))


def averaged(lab, prob, g, sensealg, method=None, **options):
    """Derivative of the average of g."""
    r = sa.gradient(prob, method or sa.Tsit5(), sa.ContinuousCost(g), sensealg=sensealg, **options)
    return lab.numpy(r.p) / (prob.tspan[1] - prob.tspan[0])


def extrapolated(lab, g, sensealg, turns=2, **options):
    """The error of a shadow is that of its ends, so that it falls like 1/T over whole turns."""
    short, long = (averaged(lab, stuart_landau(lab, k * turns), g, sensealg, **options) for k in (1, 2))
    return 2.0 * long - short


# -- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NILSS", "NILSAS"])
def test_averages_over_a_limit_cycle(lab, name):
    algorithm = getattr(sa, name)(segments=20)
    g = lambda t, u, p: p[0] * u[0] ** 2  # noqa: E731
    d = extrapolated(lab, g, algorithm, rtol=1e-7, atol=1e-9)
    # d(mu mu/2)/dmu. The conditions that choose the shadow are integrals by the trapezoidal rule.
    assert np.allclose(d, [MU, 0.0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["ForwardLSS", "AdjointLSS"])
def test_averages_over_a_limit_cycle_on_the_grid_of_the_solve(lab, name):
    # the ends of the span are felt over times alpha
    d = extrapolated(lab, lambda t, u, p: u[0] ** 4, getattr(sa, name)(alpha=0.5), method=sa.RK4(),
                     controller=sa.FixedStep(), dt=TURN / 64)
    assert np.allclose(d, [0.75 * MU, 0.0], rtol=0, atol=2e-3)  # of the trapezoidal rule


def test_a_span_that_runs_backwards(numpy_lab):
    g = lambda t, u, p: u[0] ** 2  # noqa: E731
    for name, algorithm in ALGORITHMS.items():
        there, back = (averaged(numpy_lab, stuart_landau(numpy_lab, 1, sign), g, algorithm, rtol=1e-4)
                       for sign in (1.0, -1.0))
        assert np.allclose(there, back, rtol=0, atol=1e-9), name


# -- chaos --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_lorenz(name):
    # 1.0030(5) by brute force over 4.5e7 units of time; a shadow is off by what is called its unstable contribution,
    # about 0.012 here, and by the ends of so short a span.
    found = [sa.gradient(lorenz(40.0, seed), sa.Tsit5(), HEIGHT, sensealg=getattr(sa, name)()).p / 40.0
             for seed in range(2 if name.endswith("LSS") else 1)]
    assert np.all(np.abs(np.array(found)[:, 1] - 1.003) < 0.05)
    assert abs(np.mean(found, axis=0)[2] + 1.66) < 0.1


def test_forward_is_adjoint(lab):
    """Also where steps are padded, and with more parameters than states."""
    def f(t, u, p):
        s, r, b, extra = p["s"], p["r"], p["b"], p["x"]
        force = lab.xp.stack([extra[0], extra[1] * u[0], 0.0 * u[1]])
        return lab.xp.stack([s * (u[1] - u[0]), u[0] * (r - u[2]) - u[1], u[0] * u[1] - b * u[2]]) + force

    p = {"s": lab.array(10.0), "r": lab.array(28.0), "b": lab.array(2.5), "x": lab.array([0.1, 0.2])}
    prob = sa.ODEProblem(f, lab.array([-8.0, -7.0, 27.0]), (0.0, 2.0), p)
    cost = sa.ContinuousCost(lambda t, u, p: u[2] * p["r"] + u[0] ** 2) + sa.ContinuousCost(lambda t, u, p: p["b"])
    forward, adjoint = (lab.tree(sa.gradient(prob, sa.Tsit5(), cost, sensealg=a, max_steps=200).p)
                        for a in (sa.ForwardLSS(), sa.AdjointLSS()))
    for key, value in forward.items():
        assert np.allclose(adjoint[key], value, rtol=1e-10, atol=1e-10), key


def test_the_answer_is_that_of_a_dense_solve():
    """Least squares written out: the smallest (v, eta) that satisfies all equations of the trapezoidal rule."""
    prob, alpha, n = lorenz(1.5), 3.0, 3
    steps = {"controller": sa.FixedStep(), "dt": 0.027}  # the last is shorter
    pair = prob.remake(f=lambda t, y, p: np.append(lorenz_field(y, p), y[2]), u0=np.append(prob.u0, 0.0), jac=None,
                       paramjac=None)
    sol = sa.solve(pair, sa.RK4(), saveat="steps", **steps)
    us, ts = np.concatenate([pair.u0[None], sol.u]), np.concatenate([[0.0], sol.t])
    us, q = us[:, :n], us[:, n]
    h, N, p = np.diff(ts), len(sol.t), prob.p
    A, b = np.zeros((n * N, n * (N + 1) + N)), np.zeros((n * N, 3))
    for i in range(N):
        rows = slice(n * i, n * i + n)
        A[rows, rows] = -(np.eye(n) + h[i] / 2 * lorenz_jac(us[i], p))
        A[rows, n * i + n:n * i + 2 * n] = np.eye(n) - h[i] / 2 * lorenz_jac(us[i + 1], p)
        A[rows, n * (N + 1) + i] = -(us[i + 1] - us[i])
        b[rows] = h[i] / 2 * (lorenz_paramjac(us[i]) + lorenz_paramjac(us[i + 1]))
    w = np.concatenate([h, [0.0]]) / 2 + np.concatenate([[0.0], h]) / 2
    sizes = np.sqrt(np.concatenate([np.repeat(w, n), alpha**2 * h]))
    x = np.linalg.lstsq(A / sizes, b, rcond=None)[0] / sizes[:, None]
    excess = np.diff(q) - h * q[-1] / ts[-1]
    v, eta = x[:n * (N + 1)].reshape(N + 1, n, 3), x[n * (N + 1):]
    r = sa.gradient(prob, sa.RK4(), HEIGHT, sensealg=sa.AdjointLSS(alpha=alpha), **steps)
    assert np.allclose(r.p, np.einsum("i,ij->j", w, v[:, 2]) + excess @ eta, rtol=1e-9, atol=1e-9)


def test_coefficients_are_those_of_a_dense_solve(lab):
    """The shortest chain of segments by its optimality conditions."""
    from sensitivity_shadowing._chain import shortest

    rng = np.random.default_rng(1)
    K, M, m = 6, 3, 2
    root = rng.normal(size=(K, M, M + 2))
    C, R = root @ root.transpose(0, 2, 1), 2.0 * rng.normal(size=(K, M, M))
    d, b = rng.normal(size=(2, K, m, M))
    size = K * M
    kkt, right = np.zeros((2 * size - M, 2 * size - M)), np.zeros((2 * size - M, m))
    for k in range(K):
        here = slice(k * M, k * M + M)
        kkt[here, here], right[here] = C[k], -d[k].T
        if k + 1 < K:
            tie, after = slice(size + k * M, size + k * M + M), slice(k * M + M, k * M + 2 * M)
            kkt[tie, here], kkt[tie, after], right[tie] = -R[k], np.eye(M), b[k].T
            kkt[here, tie], kkt[after, tie] = -R[k].T, np.eye(M)
    exact = np.linalg.solve(kkt, right)[:size].T.reshape(m, K, M).transpose(1, 0, 2)
    found = lab.numpy(shortest(lab.be, *(lab.array(v) for v in (C, d, R, b))))
    assert np.allclose(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["NILSS", "NILSAS"])
def test_segments_do_not_matter(name):
    """Where tangents are made orthonormal again changes how they are written, not the shadow."""
    prob = lorenz(12.0)
    few, many = (sa.gradient(prob, sa.Tsit5(), HEIGHT, sensealg=getattr(sa, name)(segments=k), rtol=1e-8).p
                 for k in (20, 45))
    assert np.allclose(few, many, rtol=2e-3)  # the norm is an integral over pieces, by the trapezoidal rule


def test_one_unstable_direction_is_enough():
    prob = lorenz(40.0)
    d = sa.gradient(prob, sa.Tsit5(), HEIGHT, sensealg=sa.NILSS(unstable=1)).p / 40.0
    assert abs(d[1] - 1.003) < 0.05


# -- counts -------------------------------------------------------------------------------------------------------


class Counted:
    """A function that counts its calls."""

    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, *args):
        self.calls += 1
        return self.f(*args)


@pytest.mark.parametrize("method", [sa.Tsit5(), sa.RK4()], ids=["Tsit5", "RK4"])
@pytest.mark.parametrize("name", EVERY)
def test_counts(name, method):
    f = Counted(lambda t, u, p: lorenz_field(u, p))
    vjp = Counted(lambda t, u, p, w: (w @ lorenz_jac(u, p), w @ lorenz_paramjac(u)))
    jac = Counted(lambda t, u, p: lorenz_jac(u, p))
    jvp = Counted(lambda t, u, p, du, dp: lorenz_jac(u, p) @ du + lorenz_paramjac(u) @ dp)
    prob = lorenz(2.0).remake(f=f, vjp=vjp, jac=jac, jvp=jvp, paramjac=None)
    options = {"dt": 0.02, "controller": sa.FixedStep()} if isinstance(method, sa.RungeKutta) else {}
    options = options if method.name == "RK4" else {}
    r = sa.gradient(prob, method, HEIGHT, sensealg=ALGORITHMS[name], probe="off", **options)
    N, stages = r.stats.naccept, method.base.stages - method.base.fsal
    sweeps = {"NILSAS": (3 + 2) * stages * N, "AdjointLSS": N + 1}
    assert r.stats.nvjp == sweeps.get(name, 0)
    lss = name in ("ForwardLSS", "AdjointLSS")
    assert (r.stats.njac, r.stats.nlu, r.stats.nsolve) == ((N + 1, N, N) if lss else (0, 0, 0))
    # a Jacobian of the pair is made row by row, four of them
    assert vjp.calls == r.stats.nvjp + (4 * (N + 1) if lss else 0)
    # a product with tangents evaluates f beside them: once for all six at a stage, or once for all parameters at a node
    beside = {"NILSS": stages * N + method.base.fsal * (1 + 20), "ForwardLSS": N + 1}.get(name, 0)
    assert f.calls == r.stats.nfe + beside
    assert jvp.calls == {"NILSS": (2 + 3) * beside, "ForwardLSS": 3 * beside}.get(name, 0)


# -- how it is asked for ------------------------------------------------------------------------------------------


def test_value_and_gradient_belong_to_the_integral(numpy_lab):
    prob, cost = stuart_landau(numpy_lab, 3), sa.ContinuousCost(lambda t, u, p: u[0] ** 2)
    r = sa.adjoint_sensitivities(prob, sa.Tsit5(), cost, sa.AdjointLSS())
    plain = sa.gradient(prob, sa.Tsit5(), cost, sensealg=sa.RecursiveCheckpointAdjoint())
    assert r.value == plain.value
    assert (r.u0, r.t0, r.t1, r.saveat) == (None,) * 4
    double = sa.gradient(prob, sa.Tsit5(), cost + cost, sensealg=sa.AdjointLSS(), wrt="p", saveat=np.array([0.5, 1.0]))
    assert double.solution.u.shape == (2, 2)
    assert np.allclose(double.p, 2.0 * r.p, rtol=1e-3)  # its own steps


def test_inside_jit(jax_lab):
    import jax

    prob, cost = stuart_landau(jax_lab, 2), sa.ContinuousCost(lambda t, u, p: u[0] ** 2)
    options = {"sensealg": sa.AdjointLSS(), "max_steps": 200}
    eager = sa.gradient(prob, sa.Tsit5(), cost, **options).p
    traced = jax.jit(lambda p: sa.gradient(prob.remake(p=p), sa.Tsit5(), cost, **options).p)(prob.p)
    assert np.allclose(eager, traced, rtol=1e-12)


@pytest.mark.parametrize("name", ["AdjointLSS", "NILSAS"])
def test_ensembles_of_shadows(lab, name):
    prob, cost = stuart_landau(lab, 1), sa.ContinuousCost(lambda t, u, p: u[0] ** 2)
    options = {"sensealg": ALGORITHMS[name], "rtol": 1e-4, "max_steps": 64}
    rows = lab.array([[MU, OMEGA], [1.1 * MU, OMEGA]])
    both = sa.gradient(sa.EnsembleProblem(prob, p=rows), sa.Tsit5(), cost, **options).p
    for i in range(2):
        one = sa.gradient(prob.remake(p=rows[i]), sa.Tsit5(), cost, **options).p
        assert np.allclose(lab.numpy(both[i]), lab.numpy(one), rtol=1e-9, atol=1e-9)


def test_parameters_of_a_module(torch_lab):
    import torch

    prob, cost = stuart_landau(torch_lab, 1), sa.ContinuousCost(lambda t, u, p: u[0] ** 2)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(prob.p.clone())

        def forward(self, t, u, p):
            return prob.f(t, u, self.p)

    for algorithm in ALGORITHMS.values():
        inside, given = (sa.gradient(q, sa.Tsit5(), cost, sensealg=algorithm, rtol=1e-4).p
                         for q in (sa.ODEProblem(Module(), prob.u0, prob.tspan), prob))
        assert torch.equal(inside[0], given)


def test_a_stiff_method_and_a_mass_matrix(numpy_lab):
    prob, g = stuart_landau(numpy_lab, 1), lambda t, u, p: u[0] ** 2
    twice = prob.remake(f=lambda t, u, p: 2.0 * prob.f(t, u, p), mass_matrix=2.0 * np.eye(2))
    for name, algorithm in ALGORITHMS.items():
        plain, heavy = (averaged(numpy_lab, q, g, algorithm, rtol=1e-4) for q in (prob, twice))
        assert np.allclose(plain, heavy, rtol=1e-10, atol=1e-10), name
    explicit, implicit = (averaged(numpy_lab, prob, g, sa.NILSAS(20), method=m, rtol=1e-5, atol=1e-7)
                          for m in (sa.Tsit5(), sa.Kvaerno5()))
    assert np.allclose(explicit, implicit, rtol=0, atol=1e-2)  # of the trapezoidal rules, on other steps


def test_named_like_the_others():
    for name in EVERY:
        kind = getattr(sa, name)
        assert issubclass(kind, sa.SensitivityAlgorithm)
        assert kind().name == name
        assert replace(kind(), vjp=sa.ReverseVJP()) == kind(vjp=sa.ReverseVJP())
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = sa.NoSuchName
    prob = lorenz(1.0)
    for name, author in (("AdjointLSS", "Blonigan"), ("NILSS", "Ni, Q. Wang"), ("NILSAS", "Talnikar")):
        assert author in sa.citation(prob, sa.Tsit5(), getattr(sa, name)())


# -- refusals -----------------------------------------------------------------------------------------------------


def ask(name="AdjointLSS", loss=HEIGHT, prob=None, alg=None, **options):
    return sa.gradient(prob or lorenz(1.0), alg or sa.Tsit5(), loss, sensealg=getattr(sa, name)(), **options)


def no_work(*args):
    raise AssertionError("f was evaluated")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("loss", [lambda sol: sol.u[-1, 2], sa.DiscreteCost([0.5], lambda t, u, p: u),
                                  HEIGHT + sa.DiscreteCost([0.5], lambda t, u, p: u), HEIGHT + (lambda sol: 0.0)],
                         ids=["callable", "discrete", "sum", "sum-callable"])
def test_losses_that_are_no_averages(name, loss):
    with pytest.raises(sa.UnsupportedCombination, match="long-time average"):
        ask(name, loss, lorenz(1.0).remake(f=no_work))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("wrt", ["u0", "t0", "t1", "saveat", ("p", "u0")])
def test_inputs_that_an_average_does_not_depend_on(name, wrt):
    with pytest.raises(sa.UnsupportedCombination, match=r"does not depend on|uses no save time"):
        ask(name, prob=lorenz(1.0).remake(f=no_work), wrt=wrt)


@pytest.mark.parametrize("name", EVERY)
def test_other_questions(name):
    algorithm, prob = getattr(sa, name)(), lorenz(1.0)
    with pytest.raises(sa.UnsupportedCombination, match="long-time average"):
        sa.solve(prob.remake(f=no_work), sa.Tsit5(), sensealg=algorithm)
    with pytest.raises(sa.UnsupportedCombination, match="long-time average"):
        sa.forward_sensitivities(prob.remake(f=no_work), sa.Tsit5(), sensealg=algorithm)
    with pytest.raises(sa.UnsupportedCombination, match="long-time average"):
        sa.objective(prob, sa.Tsit5(), residuals=lambda sol: sol.u[-1], sensealg=algorithm).residuals_jac(prob.p)
    with pytest.raises(sa.UnsupportedCombination, match=f"ForwardOverAdjoint does not go with inner={name}"):
        sa.hessian(prob, sa.Tsit5(), HEIGHT, sensealg=algorithm)
    with pytest.raises(sa.InputError, match="no floating-point parameters"):
        ask(name, prob=sa.ODEProblem(lambda t, u, p: -u, np.ones(3), (0.0, 1.0)))


def test_problems_that_have_no_shadow():
    prob, name = lorenz(1.0), "AdjointLSS"
    with pytest.raises(sa.UnsupportedCombination, match="events"):
        ask(name, events=sa.Event(lambda t, u, p: u[0]))
    with pytest.raises(sa.UnsupportedCombination, match="ScipySolver"):
        ask(name, alg=sa.ScipySolver("RK45"))
    with pytest.raises(sa.UnsupportedCombination, match="singular mass matrix"):
        ask(name, prob=prob.remake(mass_matrix=np.diag([1.0, 1.0, 0.0])), alg=sa.Kvaerno5())
    noisy = sa.SDEProblem(lambda t, u, p: -p * u, lambda t, u, p: u, np.ones(3), (0.0, 1.0), np.ones(3))
    with pytest.raises(sa.UnsupportedCombination):
        ask(name, prob=noisy, alg=sa.EulerMaruyama(), dt=0.1)
    late = sa.DDEProblem(lambda t, u, h, p: -p * h(t - 0.5), np.ones(3), lambda t, p: np.ones(3), (0.0, 1.0),
                         np.ones(3), lags=[0.5])
    with pytest.raises(sa.UnsupportedCombination):
        ask(name, prob=late)
    with pytest.raises(sa.UnsupportedCombination):
        ask(name, prob=sa.SteadyStateProblem(lambda t, u, p: p - u, np.ones(3), np.ones(3)), alg=sa.Newton())
    for kind in EVERY:
        with pytest.raises(sa.UnsupportedCombination, match="single state"):
            ask(kind, prob=sa.ODEProblem(lambda t, u, p: -p * u, np.ones(1), (0.0, 1.0), np.ones(1)),
                loss=sa.ContinuousCost(lambda t, u, p: u[0]))


@pytest.mark.parametrize("options", [{"segments": 1}, {"segments": 2.5}, {"unstable": 0}, {"unstable": True}])
def test_counts_that_are_none(options):
    for kind in (sa.NILSS, sa.NILSAS):
        with pytest.raises(sa.InputError, match="whole number"):
            kind(**options)
    with pytest.raises(sa.InputError, match="alpha"):
        sa.AdjointLSS(alpha=0.0)


def test_too_many_and_too_few_directions():
    for kind in (sa.NILSS, sa.NILSAS):
        with pytest.raises(sa.InputError, match="unstable=3, and the state has 3 entries"):
            sa.gradient(lorenz(1.0), sa.Tsit5(), HEIGHT, sensealg=kind(unstable=3))
        # two attractors side by side have two unstable directions
        one, two = lorenz(25.0), lorenz(25.0, seed=3)

        def field(t, u, p):
            return np.concatenate([lorenz_field(u[:3], p), lorenz_field(u[3:], p)])

        def jac(t, u, p):
            return np.block([[lorenz_jac(u[:3], p), np.zeros((3, 3))], [np.zeros((3, 3)), lorenz_jac(u[3:], p)]])

        pair = sa.ODEProblem(field, np.concatenate([one.u0, two.u0]), one.tspan, one.p, jac=jac,
                             paramjac=lambda t, u, p: np.concatenate([lorenz_paramjac(u[:3]), lorenz_paramjac(u[3:])]))
        cost = sa.ContinuousCost(lambda t, u, p: u[2], dgdu=lambda t, u, p: np.eye(6)[2])
        with pytest.raises(sa.SolveError, match="no bounded shadow") as e:
            sa.gradient(pair, sa.Tsit5(), cost, sensealg=kind(unstable=1))
        assert e.value.retcode == sa.RetCode.Unstable


@pytest.mark.parametrize("name", EVERY)
def test_what_depends_on_time(name, numpy_lab):
    prob = stuart_landau(numpy_lab, 1)
    forced = prob.remake(f=lambda t, u, p: prob.f(t, u, p) + 0.1 * numpy_lab.xp.cos(t))
    for q, g in ((forced, lambda t, u, p: u[0]), (prob, lambda t, u, p: t * u[0])):
        with pytest.raises(sa.SolveError, match="depends on the time") as e:
            ask(name, sa.ContinuousCost(g), q)
        assert e.value.retcode == sa.RetCode.NotAutonomous


def test_few_segments_are_warned_of(numpy_lab):
    prob, cost = stuart_landau(numpy_lab, 1), sa.ContinuousCost(lambda t, u, p: u[0] ** 2)
    for kind in (sa.NILSS, sa.NILSAS):
        with pytest.warns(sa.SensitivityWarning, match="few segments") as seen:
            sa.gradient(prob, sa.Tsit5(), cost, sensealg=kind(segments=5), rtol=1e-3)
        assert seen[0].filename == __file__


def test_who_asks_others_is_told():
    with pytest.warns(sa.SensitivityWarning, match=r"costates grow(.|\n)*AdjointLSS"):
        sa.gradient(lorenz(20.0), sa.Tsit5(), HEIGHT, sensealg=sa.RecursiveCheckpointAdjoint())
    sa.gradient(lorenz(2.0), sa.Tsit5(), HEIGHT, sensealg=sa.RecursiveCheckpointAdjoint())
    # an integral of squares that are nearly zero depends on u0 as much, relatively
    still = sa.ODEProblem(lambda t, u, p: -p * u, np.ones(2), (0.0, 1.0), np.array([1e-9, 2e-9]))
    misfit = sa.ContinuousCost(lambda t, u, p: ((u - 1.0) ** 2).sum())
    sa.gradient(still, sa.Tsit5(), misfit, sensealg=sa.InterpolatingAdjoint())


def test_the_advisor_knows_them_and_takes_others():
    advice = sa.advise(lorenz(1.0), sa.Tsit5())
    rows = {type(r.sensealg).__name__: r for r in advice.table}
    assert advice.sensealg.name == "RecursiveCheckpointAdjoint"
    for name in EVERY:
        assert rows[name].verdict == "ruled out"
        assert "sa.ContinuousCost" in rows[name].why
