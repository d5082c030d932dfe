"""The peers' side: `build(framework, name, problem)` returns a function of nothing that computes one gradient."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable

import numpy as np
from problems import Problem, jax_gradient, parameters, torch_gradient


def build(framework: str, name: str, problem: Problem) -> Callable[[], object]:
    library, variant = name.split(".")
    sides = {"bare": bare, "casadi": casadi, "diffrax": diffrax, "torchdiffeq": torchdiffeq, "torchode": torchode,
             "torchsde": torchsde, "scipy": scipy, "differences": differences, "jitcdde": jitcdde}  # fmt: skip
    return sides[library](variant, problem)


def differences(variant: str, problem: Problem):
    """Central differences of our own compiled solve, for what no peer computes."""
    import jax
    import ours

    solve = ours.solution("auto", problem)
    loss = jax.jit(lambda p: problem.loss(solve(p, problem.u0)))
    moves = 1e-5 * np.eye(problem.p.shape[0])
    return lambda: np.array([float(loss(problem.p + d) - loss(problem.p - d)) for d in moves]) / 2e-5


def diffrax(adjoint: str, problem: Problem):
    import diffrax

    fixed = problem.dt is not None
    stepping = diffrax.Heun() if problem.g is not None and problem.method else diffrax.Euler()
    solver = stepping if fixed else diffrax.Kvaerno5() if problem.stiff else diffrax.Tsit5()
    tolerances = {"rtol": problem.tol, "atol": problem.small * problem.tol}
    controller = diffrax.ConstantStepSize() if fixed else diffrax.PIDController(**tolerances)
    saveat = diffrax.SaveAt(t1=True) if problem.saveat is None else diffrax.SaveAt(ts=problem.saveat)

    term = diffrax.ODETerm(problem.f)
    if problem.g is not None:
        import jax
        import lineax

        path = diffrax.VirtualBrownianTree(*problem.tspan, problem.dt / 2, problem.u0.shape, jax.random.key(0))
        noise = diffrax.ControlTerm(lambda t, u, p: lineax.DiagonalLinearOperator(problem.g(t, u, p)), path)
        term = diffrax.MultiTerm(term, noise)

    def solve(p, u0):
        return diffrax.diffeqsolve(
            term, solver, *problem.tspan, problem.dt, u0, p,
            saveat=saveat, stepsize_controller=controller, adjoint=getattr(diffrax, adjoint)(),
        ).ys  # fmt: skip

    return jax_gradient(problem, solve)


def bare(_variant: str, problem: Problem):
    """The operations that the gradient of a reversible Euler solve consists of, in two loops, and nothing else.

    Two evaluations of `f` a step, then two with their products, for the pair with coupling 1.
    """
    import jax
    import jax.numpy as jnp

    (t0, t1), h, f = problem.tspan, problem.dt, problem.f
    steps = round((t1 - t0) / h)

    def ahead(p):
        def step(i, pair):
            y, z = pair
            y = y + h * f(t0 + i * h, z, p)
            return y, z + h * f(t0 + (i + 1) * h, y, p)

        return step

    def back(p):
        def step(i, state):
            y, z, y_bar, z_bar, p_bar = state
            t = t1 - i * h
            slope, pull = jax.vjp(lambda u, p: f(t, u, p), y, p)
            z = z - h * slope
            u_bar, one = pull(h * z_bar)
            y_bar = y_bar + u_bar
            slope, pull = jax.vjp(lambda u, p: f(t - h, u, p), z, p)
            y = y - h * slope
            u_bar, two = pull(h * y_bar)
            return y, z, y_bar, z_bar + u_bar, jax.tree.map(lambda a, b, c: a + b + c, p_bar, one, two)

        return step

    def gradient(p, u0, y_bar_of):
        y, z = jax.lax.fori_loop(0, steps, ahead(p), (u0, u0))
        y_bar = y_bar_of(y)
        nothing = jax.tree.map(jnp.zeros_like, p)
        return jax.lax.fori_loop(0, steps, back(p), (y, z, y_bar, jnp.zeros_like(y), nothing))[4]

    if problem.lanes:
        # The mean of the squares of all lanes.
        lanes = jax.vmap(lambda p, u0: gradient(p, u0, lambda y: 2 * y / problem.u0.size), in_axes=(None, 0))
        compiled = jax.jit(lambda p, u0: jax.tree.map(lambda x: x.sum(0), lanes(p, u0)))
    else:
        compiled = jax.jit(lambda p, u0: gradient(p, u0, jax.grad(problem.loss)))
    return lambda: jax.block_until_ready(compiled(problem.p, problem.u0))


def torchdiffeq(variant: str, problem: Problem):
    import torch
    import torchdiffeq

    times = torch.tensor(problem.tspan, dtype=torch.float64) if problem.saveat is None else problem.saveat
    tol = problem.peer_tol or problem.tol
    method = (
        {"method": "euler", "options": {"step_size": problem.dt}}
        if problem.dt is not None
        else {"method": "dopri5", "rtol": tol, "atol": tol}
    )

    def solve(p, u0):
        extra = {"adjoint_params": tuple(parameters(p))} if variant == "odeint_adjoint" else {}
        u = getattr(torchdiffeq, variant)(lambda t, u: problem.f(t, u, p), u0, times, **method, **extra)
        return u[-1:] if problem.saveat is None else u

    return torch_gradient(problem, solve)


def torchode(variant: str, problem: Problem):
    import torch
    import torchode

    single, batch = (True, 1) if problem.u0.ndim == 1 else (False, len(problem.u0))
    times = torch.tensor(problem.tspan, dtype=torch.float64) if problem.saveat is None else problem.saveat

    def f(t, u, p):
        return problem.f(t, u[0], p)[None] if single else problem.f(t, u, p)

    term = torchode.ODETerm(f, with_args=True)
    if problem.dt is not None:
        method, controller = torchode.Euler(term), torchode.FixedStepController()
        dt0 = torch.full((batch,), problem.dt, dtype=torch.float64)
    else:
        method, dt0 = torchode.Dopri5(term), None
        controller = torchode.IntegralController(atol=problem.tol, rtol=problem.tol, term=term)
    solver = getattr(torchode, variant)(method, controller)

    def solve(p, u0):
        initial = torchode.InitialValueProblem(y0=u0[None] if single else u0, t_eval=times.expand(batch, -1))
        u = solver.solve(initial, dt0=dt0, args=p).ys
        return u[:, -1:] if problem.saveat is None else u

    return torch_gradient(problem, solve)


def torchsde(variant: str, problem: Problem):
    """By backpropagation (`sdeint`), or by the adjoint, that of reversible Heun where that is the method."""
    import torch
    import torchsde

    times = torch.tensor(problem.tspan, dtype=torch.float64)
    method = {None: "euler", "StochasticHeun": "heun", "ReversibleHeun": "reversible_heun"}[problem.method]
    flat = problem.u0.ndim == 1

    class Equation(torch.nn.Module):
        noise_type = "diagonal"
        sde_type = "stratonovich" if problem.method else "ito"

        def __init__(self, p):
            super().__init__()
            self.p = p

        def f(self, t, u):
            return problem.f(t, u, self.p)

        def g(self, t, u):
            return problem.g(t, u, self.p)

    options = {"dt": problem.dt, "method": method}
    if variant == "sdeint_adjoint":
        options["adjoint_method"] = "adjoint_reversible_heun" if method == "reversible_heun" else method

    def solve(p, u0):
        extra = {"adjoint_params": tuple(parameters(p))} if variant == "sdeint_adjoint" else {}
        u = getattr(torchsde, variant)(Equation(p), u0[None] if flat else u0, times, **options, **extra)
        return u[-1] if flat else u[-1:]

    return torch_gradient(problem, solve)


def scipy(variant: str, problem: Problem):
    from scipy.integrate import solve_ivp

    u0, p = problem.u0, problem.p
    t0, t1 = problem.tspan
    options = {"rtol": problem.tol, "atol": problem.small * problem.tol, "max_step": problem.dtmax or np.inf}
    options |= {"method": "LSODA"} if problem.stiff else {}

    def forward(p):
        return solve_ivp(problem.f, problem.tspan, u0, args=(p,), **options).y[:, -1]

    def differences():
        steps = np.diag(np.cbrt(np.finfo(float).eps) * np.abs(p))
        return np.array([(problem.loss(forward(p + d)) - problem.loss(forward(p - d))) / (2 * d.sum()) for d in steps])

    def adjoint():
        u = solve_ivp(problem.f, problem.tspan, u0, args=(p,), dense_output=True, **options).sol

        def backward(t, state):
            return -np.concatenate(problem.vjp(t, u(t), p, state[: len(u0)]))

        end = np.concatenate([np.ones_like(u0), np.zeros_like(p)])  # the loss is the sum of the final state
        return solve_ivp(backward, (t1, t0), end, **options).y[len(u0) :, -1]

    return {"RK45": lambda: forward(p), "differences": differences, "adjoint": adjoint}[variant]


def casadi(variant: str, problem: Problem):
    """CVODES through CasADi, its adjoint at the tolerances of the solve, from the same `f` in symbols."""
    import casadi as ca

    n, m = problem.u0.size, problem.p.size
    x, p, t = ca.SX.sym("x", n), ca.SX.sym("p", m), ca.SX.sym("t")
    slopes = problem.f(t, entries(x), entries(p))
    grid = [problem.tspan[1]] if problem.saveat is None else list(problem.saveat)
    tol = problem.peer_tol or problem.tol
    options = {"reltol": tol, "abstol": problem.small * tol, "max_num_steps": 100_000}
    options |= {"linear_solver": "ldl"} if variant == "cvodes-ldl" else {}
    ode = {"x": x, "p": p, "t": t, "ode": ca.vertcat(*slopes)}
    solve = ca.integrator("solve", "cvodes", ode, problem.tspan[0], grid, options)
    q = ca.MX.sym("q", m)
    states = entries(ca.SX.sym("u", n * len(grid))).reshape(len(grid), n)
    loss = ca.Function("loss", [ca.vertcat(*states.ravel())], [problem.loss(states)])
    value = loss(ca.vec(solve(x0=problem.u0, p=q)["xf"]))
    gradient = ca.Function("gradient", [q], [ca.gradient(value, q)])
    return lambda: np.asarray(gradient(problem.p)).ravel()


def jitcdde(_variant: str, problem: Problem):
    """The last state by JiTCDDE, which writes `f` out in C and compiles it at the first call."""
    import jitcdde as jit

    p, n = np.asarray(problem.p), problem.u0.shape[0]
    history, tol = np.asarray(problem.past[0](0.0, p)), problem.peer_tol or problem.tol

    def state(*time):
        return np.array([jit.y(i, *time) for i in range(n)], dtype=object)

    slopes = list(problem.f(jit.t, state(), state, p))
    made = []

    def call():
        if not made:
            made.append(jit.jitcdde(slopes, verbose=False))
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # where it finds no pyproject.toml
                made[0].compile_C()
        made[0].purge_past()
        made[0].constant_past(history, time=problem.tspan[0])
        made[0].reset_integrator(idc_unhandled=True)
        made[0].set_integration_parameters(rtol=tol, atol=problem.small * tol, max_step=100.0)
        made[0].step_on_discontinuities()
        return np.array(made[0].integrate(problem.tspan[1]))

    return call


def entries(x) -> np.ndarray:
    """The entries of a symbolic vector as an array of objects."""
    out = np.empty(x.shape[0], dtype=object)
    out[:] = [x[i] for i in range(x.shape[0])]
    return out
