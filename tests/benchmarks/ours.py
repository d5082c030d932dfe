"""Our side, through the public interface only: `build(framework, name, problem)` as in `peers`."""

from __future__ import annotations

from collections.abc import Callable

from problems import Problem, jax_gradient, torch_gradient

import sensitivity as sa


def build(framework: str, name: str, problem: Problem) -> Callable[[], object]:
    if framework == "numpy":
        return numpy_call(name, problem)
    alg, options = method(problem)
    if name == type(alg).__name__:
        return forward(problem, alg, options)
    differentiate = {"jax": jax_gradient, "torch": torch_gradient}[framework]
    return differentiate(problem, solution(name, problem))


def forward(problem: Problem, alg, options: dict) -> Callable[[], object]:
    """The last state by the compiled solve of JAX."""
    import jax

    solve = jax.jit(lambda p, u0: sa.solve(posed(problem, p, u0), alg, **options).u[-1])
    return lambda: jax.block_until_ready(solve(problem.p, problem.u0))


def posed(problem: Problem, p, u0, pattern: bool = False):
    """The problem as we state it."""
    if problem.past is not None:
        history, lags = problem.past
        return sa.DDEProblem(problem.f, u0, history, problem.tspan, p, lags=lags)
    if problem.g is not None:
        return sa.SDEProblem(problem.f, problem.g, u0, problem.tspan, p,
                             interpretation="stratonovich" if problem.method else "ito")
    return sa.ODEProblem(problem.f, u0, problem.tspan, p, jac_sparsity=problem.pattern if pattern else None)


def algorithm(name: str):
    """The sensitivity algorithm; "Name:10MB" has a budget of memory, "Name:compile" compiles its steps."""
    name, _, option = name.partition(":")
    compiled = {"vjp": sa.ReverseVJP(compile=True)}
    options = compiled if option == "compile" else {"memory": option} if option else {}
    return sa.auto if name == "auto" else getattr(sa, name)(**options)


def method(problem: Problem):
    """The solver and its keywords."""
    if problem.g is not None:
        return getattr(sa, problem.method or "EulerMaruyama")(), {"dt": problem.dt}
    if problem.dt is not None:
        return sa.Euler(), {"dt": problem.dt, "controller": sa.FixedStep()}
    options = {"rtol": problem.tol, "atol": problem.small * problem.tol, "saveat": problem.saveat,
               "dtmax": problem.dtmax}  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    return getattr(sa, problem.method or ("Kvaerno5" if problem.stiff else "Tsit5"))(), given


def solution(name: str, problem: Problem) -> Callable:
    """The differentiable map from `(p, u0)` to the saved states; `+pattern` declares that of the Jacobian."""
    alg, options = method(problem)
    name, _, pattern = name.partition("+")

    def solve(p, u0):
        return sa.solve(posed(problem, p, u0, bool(pattern)), alg, sensealg=algorithm(name), **options).u

    return solve


def numpy_call(name: str, problem: Problem):
    """A forward solve for the name of a method, a gradient for the name of a sensitivity algorithm."""
    alg, options = method(problem)
    name, _, hand_written = name.partition("+")
    vjp, jac = (problem.vjp, problem.jac) if hand_written else (None, None)
    prob = posed(problem, problem.p, problem.u0)
    if hand_written:
        prob = prob.remake(vjp=vjp, jac=jac)
    if name == type(alg).__name__:
        return lambda: sa.solve(prob, alg, **options).u[-1]

    def loss(solution):
        return problem.loss(solution.u)

    def dloss(solution):
        return problem.dloss(solution.u)

    return lambda: sa.gradient(prob, alg, loss, dloss=dloss, wrt="p", sensealg=algorithm(name), **options).p
