"""The problems that are timed, written once for every framework, and the table of what is compared with what."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from sensitivity.testing import models


class Ops(NamedTuple):
    """How a framework spells the few operations the problems need."""

    array: Callable
    stack: Callable
    concat: Callable
    spread: Callable  # product of a sparse matrix and a vector
    linear: Callable
    tanh: Callable
    relu: Callable


def product(matrix, vector):
    return matrix @ vector


def numpy_ops() -> Ops:
    return Ops(np.asarray, np.array, np.concatenate, product, lambda u, w, b: u @ w + b, np.tanh,
               lambda x: np.maximum(x, 0))  # fmt: skip


def jax_ops() -> Ops:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    jax.block_until_ready(jax.jit(jnp.sin)(1.0))  # start the runtime before any clock
    return Ops(jnp.asarray, jnp.stack, jnp.concatenate, product, lambda u, w, b: u @ w + b, jnp.tanh, jax.nn.relu)


def torch_ops() -> Ops:
    import torch

    torch.set_num_threads(1)
    return Ops(
        torch.as_tensor, torch.stack, torch.cat, product, lambda u, w, b: torch.nn.functional.linear(u, w.T, b),
        torch.tanh, torch.relu,
    )


def casadi_ops() -> Ops:
    """Expressions in arrays of objects; only what the stiff problems need."""

    def stack(parts):
        out = np.empty(len(parts), dtype=object)
        out[:] = parts
        return out

    def spread(matrix, u):
        out = [0.0] * matrix.shape[0]
        for i, j, weight in zip(*sp.find(matrix), strict=True):
            out[i] = out[i] + weight * u[j]
        return stack(out)

    return Ops(np.asarray, stack, np.concatenate, spread, lambda u, w, b: u @ w + b, np.tanh, np.abs)


OPS = {"numpy": numpy_ops, "jax": jax_ops, "torch": torch_ops, "casadi": casadi_ops}


class Problem(NamedTuple):
    """A vector field `f(t, u, p)` with its data, in one framework's arrays, and what is asked of the solver."""

    f: Callable
    u0: Any
    tspan: tuple[float, float]
    p: Any
    loss: Callable = lambda u: u.sum()
    saveat: Any = None
    tol: float = 1e-8  # rtol and atol
    dt: float | None = None  # Euler with this step
    dtmax: float | None = None
    members: bool = False  # p has a leading axis of ensemble members
    lanes: bool = False  # u0 has a leading axis, and the solve is batched over it by the framework
    vjp: Callable | None = None
    dloss: Callable = np.ones_like  # derivative of the loss, where no framework makes it
    stiff: bool = False
    jac: Callable | None = None
    small: float = 1.0  # atol in units of rtol
    peer_tol: float | None = None  # where a peer needs another tolerance for an error of about the same size
    tight: float = 1e-11  # tolerance of the reference; it changes nothing where the step is fixed
    pattern: Any = None  # of the Jacobian, as a SciPy sparse matrix
    method: str | None = None  # ours, where it is not Kvaerno5 for a stiff problem or Tsit5
    past: tuple[Callable, Callable] | None = None  # history and lags; f is then f(t, u, h, p)
    g: Callable | None = None  # diagonal noise, with step dt; Ito by Euler and Maruyama, or Stratonovich by `method`


def jax_gradient(problem: Problem, solve: Callable) -> Callable[[], object]:
    """The compiled gradient of `loss(solve(p, u0))` with respect to `p`, for either side's `solve`."""
    import jax

    solve = jax.vmap(solve, in_axes=(None, 0)) if problem.lanes else solve
    gradient = jax.value_and_grad(lambda p, u0: problem.loss(solve(p, u0)))
    gradient = jax.jit(jax.vmap(gradient, in_axes=(0, None)) if problem.members else gradient)
    return lambda: jax.block_until_ready(gradient(problem.p, problem.u0))[1]


def torch_gradient(problem: Problem, solve: Callable) -> Callable[[], object]:
    """The same by backpropagation."""
    import torch

    leaves = [leaf.requires_grad_() for leaf in parameters(problem.p)]
    return lambda: torch.autograd.grad(problem.loss(solve(problem.p, problem.u0)), leaves)


def parameters(p) -> list:
    return p if isinstance(p, list) else [p]


def mean_square(u):
    return (u**2).mean()


def lotka_volterra(ops: Ops, members: int = 0) -> Problem:
    def f(t, u, p):
        x, y = u[0], u[1]
        a, b, c, d = p
        return ops.stack([a * x - b * x * y, -c * y + d * x * y])

    def vjp(t, u, p, lam):
        (x, y), (a, b, c, d), (l0, l1) = u, p, lam
        return (
            np.array([l0 * (a - b * y) + l1 * d * y, -l0 * b * x + l1 * (d * x - c)]),
            np.array([l0 * x, -l0 * x * y, -l1 * y, l1 * x * y]),
        )

    p = np.array([1.5, 1.0, 3.0, 1.0])
    if members:
        p = p * np.random.default_rng(0).uniform(0.8, 1.2, (members, 4))
    return Problem(f, ops.array(np.ones(2)), (0.0, 10.0), ops.array(p), members=bool(members), vjp=vjp)


def robertson(ops: Ops) -> Problem:
    """Chemical kinetics with rates that differ by nine orders; how much of the third species there is at the end."""

    def f(t, u, p):
        x, y, z = u[0], u[1], u[2]
        slow, fast = p[0] * x - p[2] * y * z, p[1] * y * y
        return ops.stack([-slow, slow - fast, fast])

    def jac(t, u, p):
        (_, y, z), (k1, k2, k3) = u, p
        return np.array([[-k1, k3 * z, k3 * y], [k1, -2 * k2 * y - k3 * z, -k3 * y], [0.0, 2 * k2 * y, 0.0]])

    def vjp(t, u, p, lam):
        x, y, z = u
        slow, fast = lam[1] - lam[0], lam[2] - lam[1]
        return lam @ jac(t, u, p), np.array([slow * x, fast * y * y, -slow * y * z])

    def dloss(u):
        return np.zeros_like(u) + np.array([0.0, 0.0, 1.0])

    # At tighter tolerances diffrax runs out of steps.
    return Problem(f, ops.array(np.array([1.0, 0.0, 0.0])), (0.0, 1e5), ops.array(np.array([0.04, 3e7, 1e4])),
                   lambda u: u[..., 2].sum(), tol=1e-6, vjp=vjp, dloss=dloss, stiff=True, jac=jac, small=1e-4,
                   tight=1e-9)  # fmt: skip


def pollu(ops: Ops) -> Problem:
    """Air pollution: 20 species, 25 rates, compared with one at 121 times (Verwer 1994); p multiplies the rates."""
    published = np.array([rate for rate, _, _ in models.POLLU])
    stoichiometry, first, second = np.zeros((20, 25)), np.zeros((25, 20)), np.zeros((25, 20))
    plain = np.zeros(25)  # one for reactions of a single species
    for k, (_, before, after) in enumerate(models.POLLU):
        for i in before:
            stoichiometry[i - 1, k] -= 1.0
        for i in after:
            stoichiometry[i - 1, k] += 1.0
        first[k, before[0] - 1] = 1.0
        plain[k] = len(before) == 1
        if len(before) == 2:
            second[k, before[1] - 1] = 1.0

    def f(t, u, p):
        return stoichiometry @ (p * published * (first @ u) * (second @ u + plain))

    def jac(t, u, p):
        x, y, rates = first @ u, second @ u + plain, p * published
        return stoichiometry @ ((rates * y)[:, None] * first + (rates * x)[:, None] * second)

    def vjp(t, u, p, lam):
        x, y, rates = first @ u, second @ u + plain, (lam @ stoichiometry) * published
        scaled = rates * p
        return (scaled * y) @ first + (scaled * x) @ second, rates * x * y

    u0 = np.array([models.POLLU_START.get(i + 1, 0.0) for i in range(20)])
    return Problem(f, ops.array(u0), (0.0, 60.0), ops.array(np.ones(25)), from_one, np.linspace(0.0, 60.0, 121),
                   tol=2e-5, vjp=vjp, jac=jac, dloss=lambda u: u - 1.0, stiff=True,
                   small=1e-3, tight=1e-10, method="Rodas5P", peer_tol=1e-7)  # fmt: skip


def from_one(u):
    return 0.5 * ((1.0 - u) ** 2).sum()


def brusselator(ops: Ops, n: int, tol: float = 1e-6, peer_tol: float = 1e-8) -> Problem:
    """Two species on an n x n periodic grid, with rates and diffusion of their own in every cell: 2 n^2 states, 4 n^2
    parameters, and products written by hand."""
    cells, scale, x = n * n, float(n - 1) ** 2, np.linspace(0.0, 1.0, n)
    ring = scale * (sp.eye_array(n, k=1) + sp.eye_array(n, k=-1) + sp.eye_array(n, k=n - 1) + sp.eye_array(n, k=1 - n)
                    - 2.0 * sp.eye_array(n))  # fmt: skip
    spread = sp.csr_array(sp.kron(ring, sp.eye_array(n)) + sp.kron(sp.eye_array(n), ring))
    row, column, weight = sp.find(spread)
    cell = np.arange(cells)
    below, size = cell + cells, 2 * cells
    rows = np.concatenate([row, cell, cell, row + cells, below, below])
    columns = np.concatenate([column, cell, below, column + cells, cell, below])
    places, place = np.unique(columns * size + rows, return_inverse=True)
    ends = np.searchsorted(places, np.arange(size + 1) * size)

    def f(t, u, p):
        v, w, (a, b, dv, dw) = u[:cells], u[cells:], p.reshape(4, cells)
        reaction, av = v * v * w, a * v
        return np.concatenate([dv * ops.spread(spread, v) + b + reaction - av - v,
                               dw * ops.spread(spread, w) + av - reaction])  # fmt: skip

    def jac(t, u, p):
        v, w, (a, _, dv, dw) = u[:cells], u[cells:], p.reshape(4, cells)
        cross, square = 2.0 * v * w, v * v
        values = np.concatenate([dv[row] * weight, cross - a - 1.0, square, dw[row] * weight, a - cross, -square])
        return sp.csc_array((np.bincount(place, values), places % size, ends), shape=(size, size))

    def vjp(t, u, p, lam):
        v, w, (a, _, dv, dw), lv, lw = u[:cells], u[cells:], p.reshape(4, cells), lam[:cells], lam[cells:]
        moved = lv - lw
        over_v, over_w, of_v, of_w = (spread @ np.stack([dv * lv, dw * lw, v, w], axis=1)).T
        u_bar = np.concatenate([over_v + moved * (2.0 * v * w - a) - lv, over_w + moved * v * v])
        return u_bar, np.concatenate([-moved * v, lv, lv * of_v, lw * of_w])

    profile = (x * (1.0 - x)) ** 1.5
    u0 = np.concatenate([np.tile(22.0 * profile, n), np.repeat(27.0 * profile, n)])
    p = np.repeat([3.4, 1.0, 10.0, 10.0], cells)
    return Problem(f, u0, (0.0, 1.0), p, from_one, tol=tol, vjp=vjp, jac=jac, dloss=lambda u: u - 1.0, stiff=True,
                   tight=1e-9, method="Rodas5P", peer_tol=peer_tol)  # fmt: skip


def brusselator_line(ops: Ops) -> Problem:
    """Two species in 128 cells of a line, next to each other in the state, so that the Jacobian has five diagonals."""
    cells = 128
    scale = (cells + 1.0) ** 2
    ends = ops.array(np.array([[1.0, 3.0]]))
    band = sum(sp.eye_array(2 * cells, k=k) for k in range(-2, 3))

    def f(t, u, p):
        u = u.reshape(cells, 2)
        v, w = u[:, 0], u[:, 1]
        reaction = v * v * w
        spread = scale * (ops.concat([u[1:], ends]) + ops.concat([ends, u[:-1]]) - 2.0 * u)
        return (ops.stack([p[0] + reaction - (p[1] + 1.0) * v, p[1] * v - reaction]).T + p[2] * spread).reshape(-1)

    x = np.arange(1, cells + 1) / (cells + 1.0)
    u0 = np.stack([1.0 + np.sin(2.0 * np.pi * x), np.full(cells, 3.0)], axis=1).ravel()
    return Problem(f, ops.array(u0), (0.0, 10.0), ops.array(np.array([1.0, 3.0, 0.02])), from_one, tol=1e-6, stiff=True,
                   tight=1e-8, pattern=band, method="Rodas5P")  # fmt: skip


def layers(ops: Ops, sizes: tuple[int, ...], gain: float) -> list:
    """Weights and biases of a multilayer perceptron, one after the other, uniform in +-gain/sqrt(fan in)."""
    rng = np.random.default_rng(0)
    return [
        ops.array(gain / np.sqrt(n) * rng.uniform(-1, 1, shape)) for n, m in pairwise(sizes) for shape in [(n, m), (m,)]
    ]


def perceptron(ops: Ops, activation: Callable, u, p):
    for i in range(0, len(p) - 2, 2):
        u = activation(ops.linear(u, p[i], p[i + 1]))
    return ops.linear(u, p[-2], p[-1])


def initial_states(ops: Ops, batch: int, size: int):
    """One state vector, or a matrix with one state per row."""
    return ops.array(np.random.default_rng(1).normal(size=(batch, size) if batch > 1 else size))


def neural_ode(ops: Ops, batch: int, gain: float) -> Problem:
    def f(t, u, p):
        return perceptron(ops, ops.tanh, u**3, p)

    saveat = ops.array(np.linspace(0.0, 1.5, 30))
    p = layers(ops, (2, 64, 64, 2), gain)
    return Problem(f, initial_states(ops, batch, 2), (0.0, 1.5), p, mean_square, saveat, tol=1e-6)


def single(problem: Problem, tol: float = 2e-5, peer_tol: float | None = None) -> Problem:
    """The same in single precision (PyTorch), whose rounding allows no tighter tolerance."""
    return problem._replace(u0=problem.u0.float(), p=[x.float() for x in problem.p], tol=tol, peer_tol=peer_tol)


def euler_mlp(ops: Ops, batch: int, width: int = 100, steps: int = 1000, dt: float = 0.01,
              lanes: bool = False) -> Problem:
    def f(t, u, p):
        return perceptron(ops, ops.relu, u, p)

    p, u0 = layers(ops, (width,) * 6, 1.0), initial_states(ops, batch, width)
    return Problem(f, u0, (0.0, dt * steps), p, mean_square, dt=dt, lanes=lanes)


def delayed_network(ops: Ops) -> Problem:
    """Two delays, 192 weights in one vector, and the delays themselves behind them."""
    n, tau = 8, [0.6, 1.1]

    def f(t, u, h, p):
        a, b, c = (p[i * n * n : (i + 1) * n * n].reshape(n, n) for i in range(3))
        return ops.tanh(a @ u + b @ h(t - p[-2]) + c @ h(t - p[-1])) - u

    weights = 0.3 * np.random.default_rng(0).normal(size=3 * n * n)
    past = (lambda t, p: 0.0 * p[:n], lambda p: [p[-2], p[-1]])
    return Problem(f, ops.array(np.ones(n)), (0.0, 10.0), ops.array(np.concatenate([weights, tau])), mean_square,
                   tol=1e-7, past=past)  # fmt: skip


def mackey_glass(ops: Ops) -> Problem:
    """One state, five delays long; the delay is the last parameter. The history is constant and joins the start."""

    def f(t, u, h, p):
        v = h(t - p[3])
        return p[0] * v / (1.0 + v ** p[2]) - p[1] * u

    past = (lambda t, p: 0.5 + 0.0 * p[:1], lambda p: [p[3]])
    return Problem(f, ops.array(np.array([0.5])), (0.0, 85.0), ops.array(np.array([0.2, 0.1, 10.0, 17.0])),
                   tol=1e-7, peer_tol=2e-9, past=past)


def thousand_steps(ops: Ops) -> Problem:
    """Nothing to compute: what is left is the solver's own time, and milliseconds read as microseconds a step."""
    zero = ops.array(np.zeros(2))
    return Problem(lambda t, u, p: zero, ops.array(np.ones(2)), (0.0, 1000.0), ops.array(np.ones(1)), dtmax=1.0)


def geometric_motion(ops: Ops) -> Problem:
    """32 members of 3 entries, 200 steps. Each side draws its own path; the noise is too faint to tell them apart."""
    u0 = ops.array(np.ones((32, 3)))
    return Problem(lambda t, u, p: p * u, u0, (0.0, 1.0), ops.array(np.array([0.3, -0.5, 0.1])), mean_square, dt=0.005,
                   g=lambda t, u, p: 1e-9 * u)


def neural_noise(ops: Ops, method: str) -> Problem:
    """A neural equation with a network for the drift and one for the noise, 32 members of 4 entries, 100 steps, in the
    sense of Stratonovich; the noise is too faint to tell paths apart."""
    p = layers(ops, (4, 32, 4), 1.0) + layers(ops, (4, 32, 4), 1.0)

    def f(t, u, p):
        return perceptron(ops, ops.tanh, u, p[:4])

    def g(t, u, p):
        return 1e-9 * perceptron(ops, ops.tanh, u, p[4:])

    return Problem(f, initial_states(ops, 32, 4), (0.0, 1.0), p, mean_square, dt=0.01, g=g, method=method)


PROBLEMS: dict[str, Callable[[Ops], Problem]] = {
    "noise-96": geometric_motion,
    "neural-noise-heun": lambda ops: neural_noise(ops, "StochasticHeun"),
    "neural-noise-reversible": lambda ops: neural_noise(ops, "ReversibleHeun"),
    "lotka-volterra": lotka_volterra,
    "robertson": robertson,
    "pollu": pollu,
    "brusselator-8": lambda ops: brusselator(ops, 8, tol=3e-7, peer_tol=2e-9),  # errors of 1e-6
    "brusselator-16": lambda ops: brusselator(ops, 16),
    "brusselator-32": lambda ops: brusselator(ops, 32),
    "brusselator-line": brusselator_line,
    "ensemble-1000": lambda ops: lotka_volterra(ops, members=1000),
    "neural-ode-1": lambda ops: neural_ode(ops, 1, gain=1.0),
    "neural-ode-256": lambda ops: neural_ode(ops, 256, gain=1.0),
    "steep-neural-ode-1": lambda ops: neural_ode(ops, 1, gain=3.0),
    "steep-neural-ode-256": lambda ops: neural_ode(ops, 256, gain=3.0),
    "euler-mlp-1": lambda ops: euler_mlp(ops, 1),
    "euler-mlp-100": lambda ops: euler_mlp(ops, 100),
    "neural-ode-256-single": lambda ops: single(neural_ode(ops, 256, gain=1.0)),
    "neural-ode-256-equal-error": lambda ops: single(neural_ode(ops, 256, gain=1.0), 4e-4, 2e-5),  # errors of 1e-4
    "euler-mlp-100-single": lambda ops: single(euler_mlp(ops, 100)),
    "euler-mlp-wide": lambda ops: euler_mlp(ops, 1, width=1000, steps=100, dt=0.001),
    "euler-mlp-vmap-1000": lambda ops: euler_mlp(ops, 1000, steps=5, dt=0.001, lanes=True),
    "thousand-steps": thousand_steps,
    "delayed-network": delayed_network,
    "mackey-glass": mackey_glass,
}


class Row(NamedTuple):
    """One line of the report: our algorithm against a peer's, and the ratio peer/ours we aim at."""

    problem: str
    quantity: str  # "gradient", "forward", "compile" (first call in a fresh process), "memory" or "import"
    ours: str
    peer: str
    target: float | None = None


# Who gives, at a tight tolerance, the result from which errors are counted: by problem, with its quantity, or by
# framework and quantity.
REFERENCE = {
    "pollu": "RecursiveCheckpointAdjoint+vjp",
    ("mackey-glass", "forward"): "Tsit5",
    **dict.fromkeys(("brusselator-8", "brusselator-16", "brusselator-32"), "RecursiveCheckpointAdjoint+vjp"),
    ("jax", "gradient"): "diffrax.RecursiveCheckpointAdjoint",
    ("torch", "gradient"): "torchdiffeq.odeint",
    ("numpy", "gradient"): "scipy.adjoint",
    ("numpy", "forward"): "scipy.RK45",
}

_recursive, _backsolve = "diffrax.RecursiveCheckpointAdjoint", "diffrax.BacksolveAdjoint"

_compiled = "RecursiveCheckpointAdjoint:compile"
_backprop, _adjoint = "torchsde.sdeint", "torchsde.sdeint_adjoint"

ROWS: dict[str, list[Row]] = {
    "jax": [
        Row("lotka-volterra", "gradient", "auto", _recursive, 8),
        Row("lotka-volterra", "gradient", "RecursiveCheckpointAdjoint", _recursive, 8),
        Row("lotka-volterra", "gradient", "RecursiveCheckpointAdjoint", _backsolve, 1.3),
        Row("lotka-volterra", "gradient", "InterpolatingAdjoint", _backsolve),
        Row("lotka-volterra", "gradient", "GaussAdjoint", _backsolve),
        Row("lotka-volterra", "gradient", "BacksolveAdjoint", _backsolve),
        Row("lotka-volterra", "gradient", "ForwardSensitivity", _recursive),
        Row("lotka-volterra", "gradient", "DirectAdjoint", "diffrax.DirectAdjoint"),
        Row("lotka-volterra", "compile", "RecursiveCheckpointAdjoint", _recursive, 2.5),
        Row("robertson", "gradient", "RecursiveCheckpointAdjoint", _recursive, 4),
        Row("robertson", "compile", "RecursiveCheckpointAdjoint", _recursive, 3),
        Row("brusselator-line", "gradient", "RecursiveCheckpointAdjoint", _recursive, 30),
        Row("brusselator-line", "gradient", "RecursiveCheckpointAdjoint+pattern", _recursive, 300),
        Row("delayed-network", "gradient", "RecursiveCheckpointAdjoint", "differences.central", 20),
        Row("mackey-glass", "forward", "Tsit5", "jitcdde.compiled"),
        Row("mackey-glass", "compile", "Tsit5", "jitcdde.compiled"),
        Row("mackey-glass", "gradient", "RecursiveCheckpointAdjoint", "differences.central"),
        Row("steep-neural-ode-1", "gradient", "RecursiveCheckpointAdjoint", _recursive, 2.5),
        Row("steep-neural-ode-1", "gradient", "InterpolatingAdjoint", _backsolve),
        Row("steep-neural-ode-1", "gradient", "BacksolveAdjoint", _backsolve),
        Row("steep-neural-ode-1", "compile", "RecursiveCheckpointAdjoint", _recursive, 2.5),
        Row("steep-neural-ode-256", "gradient", "RecursiveCheckpointAdjoint", _recursive, 1.7),
        Row("steep-neural-ode-256", "gradient", "InterpolatingAdjoint", _backsolve),
        Row("steep-neural-ode-256", "compile", "RecursiveCheckpointAdjoint", _recursive, 2.5),
        Row("euler-mlp-1", "gradient", "RecursiveCheckpointAdjoint", _recursive, 1.6),
        Row("euler-mlp-1", "gradient", "InterpolatingAdjoint", _backsolve),
        Row("euler-mlp-1", "gradient", "ReversibleAdjoint", "bare.reversible", 1 / 1.2),
        Row("euler-mlp-1", "gradient", "ReversibleAdjoint", _recursive),
        Row("euler-mlp-wide", "gradient", "ReversibleAdjoint", "bare.reversible", 1 / 1.2),
        Row("euler-mlp-wide", "gradient", "ReversibleAdjoint", _recursive),
        Row("euler-mlp-vmap-1000", "gradient", "ReversibleAdjoint", "bare.reversible", 1 / 1.2),
        Row("euler-mlp-vmap-1000", "gradient", "ReversibleAdjoint", _recursive),
        Row("euler-mlp-1", "compile", "RecursiveCheckpointAdjoint", _recursive),
        Row("euler-mlp-100", "gradient", "RecursiveCheckpointAdjoint", _recursive, 1.6),
        Row("euler-mlp-100", "gradient", "InterpolatingAdjoint", _backsolve),
        Row("noise-96", "gradient", "RecursiveCheckpointAdjoint", _recursive, 10),
        Row("noise-96", "compile", "RecursiveCheckpointAdjoint", _recursive),
        Row("neural-noise-heun", "gradient", "RecursiveCheckpointAdjoint", _recursive, 3),
        Row("neural-noise-heun", "gradient", "BacksolveAdjoint", _backsolve, 3),
        Row("ensemble-1000", "gradient", "auto", _recursive, 2),
        Row("ensemble-1000", "gradient", "RecursiveCheckpointAdjoint", _recursive, 2),
        Row("ensemble-1000", "gradient", "ForwardSensitivity", _backsolve),
        Row("ensemble-1000", "compile", "RecursiveCheckpointAdjoint", _recursive),
    ],
    "torch": [
        Row("lotka-volterra", "gradient", "auto", "torchdiffeq.odeint", 6),
        Row("lotka-volterra", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint", 6),
        Row("lotka-volterra", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint_adjoint", 10),
        Row("lotka-volterra", "gradient", _compiled, "torchdiffeq.odeint", 20),
        Row("lotka-volterra", "gradient", _compiled, "torchdiffeq.odeint_adjoint", 40),
        Row("lotka-volterra", "gradient", "InterpolatingAdjoint", "torchdiffeq.odeint_adjoint"),
        Row("lotka-volterra", "gradient", "BacksolveAdjoint", "torchdiffeq.odeint_adjoint"),
        Row("lotka-volterra", "gradient", "ForwardSensitivity", "torchdiffeq.odeint"),
        Row("lotka-volterra", "gradient", "DirectAdjoint", "torchode.AutoDiffAdjoint"),
        Row("lotka-volterra", "compile", _compiled, "torchdiffeq.odeint"),
        Row("neural-ode-1", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint", 2.5),
        Row("neural-ode-1", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint_adjoint", 40),
        Row("neural-ode-1", "gradient", _compiled, "torchdiffeq.odeint"),
        Row("neural-ode-1", "gradient", "InterpolatingAdjoint", "torchdiffeq.odeint_adjoint"),
        Row("neural-ode-1", "gradient", "BacksolveAdjoint", "torchdiffeq.odeint_adjoint"),
        Row("neural-ode-1", "gradient", "GaussAdjoint", "torchdiffeq.odeint_adjoint"),
        Row("neural-ode-1", "gradient", "DirectAdjoint", "torchode.AutoDiffAdjoint"),
        Row("neural-ode-256", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint"),
        Row("neural-ode-256", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint_adjoint"),
        Row("neural-ode-256", "gradient", "DirectAdjoint", "torchode.AutoDiffAdjoint"),
        Row("neural-ode-256-single", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint"),
        Row("neural-ode-256-equal-error", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint", 1.6),
        Row("neural-ode-256-single", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint_adjoint", 15),
        Row("euler-mlp-1", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint", 1.2),
        Row("euler-mlp-1", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint_adjoint", 2.5),
        Row("euler-mlp-1", "gradient", _compiled, "torchdiffeq.odeint", 2.5),
        Row("euler-mlp-1", "gradient", "DirectAdjoint", "torchode.AutoDiffAdjoint"),
        Row("euler-mlp-1", "compile", _compiled, "torchdiffeq.odeint"),
        Row("euler-mlp-100", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint"),
        Row("euler-mlp-100", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint_adjoint"),
        Row("euler-mlp-100-single", "gradient", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint"),
        Row("euler-mlp-100-single", "gradient", "RecursiveCheckpointAdjoint:8MB", "torchdiffeq.odeint", 1 / 1.15),
        Row("euler-mlp-100-single", "gradient", "RecursiveCheckpointAdjoint:8MB", "torchdiffeq.odeint_adjoint"),
        Row("euler-mlp-100-single", "gradient", "RecursiveCheckpointAdjoint:12MB", "torchdiffeq.odeint", 1 / 1.15),
        Row("euler-mlp-100-single", "memory", "RecursiveCheckpointAdjoint", "torchdiffeq.odeint"),
        Row("euler-mlp-100-single", "memory", "RecursiveCheckpointAdjoint:12MB", "torchdiffeq.odeint", 15),
        Row("euler-mlp-100-single", "memory", "RecursiveCheckpointAdjoint:8MB", "torchdiffeq.odeint", 15),
        Row("euler-mlp-100-single", "memory", "RecursiveCheckpointAdjoint:8MB", "torchdiffeq.odeint_adjoint"),
        Row("noise-96", "gradient", "RecursiveCheckpointAdjoint", _backprop),
        Row("neural-noise-heun", "gradient", "RecursiveCheckpointAdjoint", _backprop),
        Row("neural-noise-heun", "gradient", "BacksolveAdjoint", _adjoint, 1.2),
        Row("neural-noise-reversible", "gradient", "RecursiveCheckpointAdjoint", _backprop),
        Row("neural-noise-reversible", "gradient", "ReversibleHeunAdjoint", _adjoint, 1.2),
    ],
    "numpy": [
        Row("lotka-volterra", "forward", "Tsit5", "scipy.RK45"),
        Row("lotka-volterra", "gradient", "auto", "scipy.differences"),
        Row("lotka-volterra", "gradient", "RecursiveCheckpointAdjoint", "scipy.differences"),
        Row("lotka-volterra", "gradient", "RecursiveCheckpointAdjoint+vjp", "scipy.adjoint"),
        Row("lotka-volterra", "gradient", "InterpolatingAdjoint+vjp", "scipy.adjoint"),
        Row("lotka-volterra", "gradient", "ForwardSensitivity", "scipy.differences"),
        Row("robertson", "gradient", "RecursiveCheckpointAdjoint", "scipy.differences"),
        Row("robertson", "gradient", "RecursiveCheckpointAdjoint+vjp", "scipy.differences", 1),
        Row("robertson", "gradient", "RecursiveCheckpointAdjoint+vjp", "casadi.cvodes"),
        Row("pollu", "gradient", "RecursiveCheckpointAdjoint+vjp", "scipy.differences", 7),
        Row("pollu", "gradient", "RecursiveCheckpointAdjoint+vjp", "casadi.cvodes"),
        *(Row(f"brusselator-{n}", "gradient", "RecursiveCheckpointAdjoint+vjp", f"casadi.{solver}", target)
          for n, targets in ((8, (1, None)), (16, (4, None)), (32, (None, 2.5)))
          for solver, target in zip(("cvodes", "cvodes-ldl"), targets, strict=True)),
        Row("thousand-steps", "forward", "Tsit5", "scipy.RK45"),
        Row("mackey-glass", "forward", "Tsit5", "jitcdde.compiled"),
    ],
    "import": [
        Row("import", "import", "sensitivity", "numpy"),
        Row("import", "import", "sensitivity", "scipy.integrate"),
        Row("import", "import", "sensitivity, jax", "diffrax"),
        Row("import", "import", "sensitivity, torch", "torchdiffeq"),
    ],
}
