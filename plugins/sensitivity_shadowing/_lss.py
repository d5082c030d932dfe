"""Least squares shadowing with time dilation, as a tangent and as an adjoint.

Over the span of a solve, the shadowing direction is the smallest solution of the tangent equation that may also change
its speed (Wang, Hu, Blonigan 2014, J. Comput. Phys. 267, eqs. 12, 19, 20):

    min int |v|^2 + alpha^2 eta^2 dt   subject to   v' = f_u v + f_p + eta f,
    dG/dp = int g_u v + g_p + eta (g - <g>) dt.

On the accepted steps h_i between the nodes u_i, by the trapezoidal rule,

    E_i v_i + G_i v_{i+1} - c_i eta_i = b_i,
    E_i = -(I + h_i J_i / 2),  G_i = I - h_i J_{i+1} / 2,  c_i = u_{i+1} - u_i,  b_i = h_i (f_{p,i} + f_{p,i+1}) / 2;

with the weights w_i of the rule at the nodes the multipliers y solve a block tridiagonal system,

    (E W^-1 E^T + c c^T / (alpha^2 h)) y = b,   v = W^-1 E^T y,   eta_i = -c_i^T y_i / (alpha^2 h_i)

(E for the bidiagonal matrix of E_i and G_i). The adjoint solves with the same matrix A for what weighs v and eta in G,
`dG/dp = s^T A^-1 b = (A^-1 s)^T b`, once for all parameters. `int g` over a step is what the solve gave for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from sensitivity.algorithms import base
from sensitivity.backend import Array
from sensitivity.errors import InputError
from sensitivity.integrate import Run
from sensitivity.system import Inputs

from ._averages import Shadowing, concluded, timeless
from ._chain import tridiagonal


class Nodes(NamedTuple):
    """The nodes of a solve and the steps between them; steps of length zero pad both on some backends.

    `ts`, `u` `(N + 1, n)`; `h`, `c` `(N, n)`, `excess` `(N,)`: steps, changes of the state, of the integral beyond its
    mean; `w` `(N + 1,)` weights of the nodes in an integral; `J` `(N + 1, n, n)`, `g_u` `(N + 1, n)`.
    """

    ts: Any
    full: Array
    h: Array
    c: Array
    excess: Array
    w: Array
    J: Array
    g_u: Array


class System(NamedTuple):
    """The normal equations: blocks, and what they are made of."""

    D: Array
    U: Array
    E: Array
    G: Array
    weight: Array
    cost: Array


@dataclass(frozen=True)
class _LSS(Shadowing):
    """Base of the two forms.

    Parameters
    ----------
    alpha : float
        How dear it is to change speed; large values forbid it.
    vjp : VJP, optional
    """

    alpha: float = 10.0
    vjp: Any = field(default=None, kw_only=True)

    references: ClassVar[tuple[str, ...]] = ("wang2014",)

    def __post_init__(self) -> None:
        if not (isinstance(self.alpha, int | float) and 0.0 < self.alpha < float("inf")):
            raise InputError(f"alpha={self.alpha!r} is not a positive number", "it weighs the change of speed",
                             "alpha=10.0")

    def reverse(self, run: Run, residuals: base.Solved, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        del wanted
        be, x = run.be, residuals.x
        solved, stepper = base.opened(run, residuals)
        del stepper
        nodes = _nodes(run, solved)
        theta, products = self.weighed(run, x, nodes, _system(be, nodes, self.alpha))
        scale = ct.u[-1, -1]
        theta = tuple(scale * v for v in theta)
        steps = solved.end.accepted
        status = concluded(run, solved.end.status, timeless(run, x, solved.end.u), True)
        return base.Cotangents(0.0 * x.u0, theta, 0.0, 0.0, None, products * (steps + 1), 3, status,
                               algebra=(steps + 1, steps, steps))

    def weighed(self, run: Run, x: Inputs, nodes: Nodes, system: System) -> tuple[tuple[Array, ...], int]:
        """The gradient of the integral, and how many transposed products it took at each node."""
        raise NotImplementedError


@dataclass(frozen=True)
class ForwardLSS(_LSS):
    """Least squares shadowing, tangent form: derivatives of the long-time average of a chaotic solution.

    For `gradient` with a `ContinuousCost`; the gradient is the span times that of the average. Experimental.

    Parameters
    ----------
    alpha : float
        How dear it is for the shadow to run at another speed; large values forbid it.
    vjp : VJP, optional

    Raises
    ------
    UnsupportedCombination
        The loss is no time integral; derivatives in anything but `p`; events, constraints, delays, noise.
    SolveError
        `f` or `g` depends on `t`.

    One right-hand side per parameter. All accepted steps are kept, and one Jacobian of each node; their size is the
    step of the trapezoidal rule, so `dtmax` bounds its error.

    References: Wang, Hu, Blonigan 2014, J. Comput. Phys. 267, section 4.
    """

    per_input: ClassVar[bool] = True

    def weighed(self, run: Run, x: Inputs, nodes: Nodes, system: System) -> tuple[tuple[Array, ...], int]:
        be, xp = run.be, run.be.xp
        parts = base.columns(x, ("theta",))
        m, n = parts[0][1], nodes.c.shape[1]
        push = run.vjp.pushforward(run, x, base.directions(be, x, parts, be.unit_rows(m, m, 0, x.u0)).theta)
        still = be.unit_rows(m, n + 1, m, x.u0)
        _, moved = be.scan(lambda _, at: (0, push(be.time(at[0]), at[1], still, None)[1]), 0, (nodes.ts, nodes.full))
        moved = be.gathered(moved)
        f_p, g_p = moved[:, :, :n], moved[:, :, n]
        b = nodes.h[:, None, None] * (f_p[:-1, ...] + f_p[1:, ...]) / 2.0
        y = tridiagonal(be, system.D, system.U, b)
        none = 0.0 * f_p[:1, ...]
        v = (xp.concat([y @ system.E, none]) + xp.concat([none, y @ system.G])) / system.weight[:, None, None]
        eta = -xp.sum(y * nodes.c[:, None, :], axis=-1) / system.cost[:, None]
        total = xp.sum(nodes.w[:, None] * (xp.sum(v * nodes.g_u[:, None, :], axis=-1) + g_p), axis=0)
        return be.split(total + xp.sum(eta * nodes.excess[:, None], axis=0), x.theta), 0


@dataclass(frozen=True)
class AdjointLSS(_LSS):
    """Least squares shadowing, adjoint form: the same numbers as `ForwardLSS`, at a price without the parameters.

    For `gradient` with a `ContinuousCost`; the gradient is the span times that of the average. Experimental.

    Parameters
    ----------
    alpha : float
        How dear it is for the shadow to run at another speed; large values forbid it.
    vjp : VJP, optional

    Raises
    ------
    UnsupportedCombination
        The loss is no time integral; derivatives in anything but `p`; events, constraints, delays, noise.
    SolveError
        `f` or `g` depends on `t`.

    One block tridiagonal solve, O(N n^3), and one VJP at each node. All accepted steps are kept, and one Jacobian of
    each node; their size is the step of the trapezoidal rule, so `dtmax` bounds its error.

    References: Wang, Hu, Blonigan 2014, J. Comput. Phys. 267, section 5.
    """

    def weighed(self, run: Run, x: Inputs, nodes: Nodes, system: System) -> tuple[tuple[Array, ...], int]:
        be, xp = run.be, run.be.xp
        force = nodes.w[:, None] * nodes.g_u / system.weight[:, None]
        s = (system.E @ force[:-1, :, None])[:, :, 0] + (system.G @ force[1:, :, None])[:, :, 0]
        s = s - nodes.c * (nodes.excess / system.cost)[:, None]
        z = tridiagonal(be, system.D, system.U, s[:, None, :])[:, 0, :] * nodes.h[:, None] / 2.0
        none = 0.0 * z[:1, :]
        rows = xp.concat([xp.concat([z, none]) + xp.concat([none, z]), nodes.w[:, None]], axis=1)
        pull = run.vjp.pullback(run, x)
        theta, _ = be.scan(lambda total, at: (be.add(total, pull(be.time(at[0]), at[1], at[2])[1]), 0),
                           be.zeros(x.theta), (nodes.ts, nodes.full, rows))
        return theta, 1


def _nodes(run: Run, solved: base.Solved) -> Nodes:
    """The nodes of a solve of `[u, q]`, q the running cost, with the Jacobians there."""
    be, xp, x = run.be, run.be.xp, solved.x
    n = x.u0.shape[0] - 1
    full, times = be.nodes(solved.log, solved.end.u, solved.end.t)
    full, times = xp.concat([x.u0[None, :], full]), be.joined([be.scalar(x.t0)], times)
    exact = be.time_vector(times, x.u0)
    h = xp.astype(exact[1:] - exact[:-1], x.u0.dtype)
    change = full[1:, :] - full[:-1, :]
    mean = change[:, n].sum() / h.sum()
    none = 0.0 * h[:1]
    w = (xp.concat([h, none]) + xp.concat([none, h])) / 2.0
    jac = run.vjp.jacobian(run, x)
    J = be.gathered(be.scan(lambda _, at: (0, jac(be.time(at[0]), at[1])), 0, (times, full))[1])
    return Nodes(times, full, h, change[:, :n], change[:, n] - h * mean, w, J[:, :n, :n], J[:, n, :n])


def _system(be: Any, nodes: Nodes, alpha: float) -> System:
    """The normal equations; a step of length zero asks for v = 0 behind it, and nothing else."""
    xp, h = be.xp, nodes.h
    n = nodes.c.shape[1]
    size = xp.abs(h)
    there = xp.astype(size > 0.0, h.dtype)[:, None, None]
    unit = be.unit_rows(n, n, 0, nodes.c)[None, :, :]
    half = h[:, None, None] / 2.0
    E, G = -there * (unit + half * nodes.J[:-1, ...]), unit - half * nodes.J[1:, ...]
    weight = xp.abs(nodes.w)
    weight = xp.where(weight > 0.0, weight, xp.ones_like(weight))
    cost = alpha**2 * xp.where(size > 0.0, size, xp.ones_like(size))
    E_w, G_w = E / weight[:-1, None, None], G / weight[1:, None, None]
    turned = lambda A: xp.permute_dims(A, (0, 2, 1))  # noqa: E731
    c = nodes.c[:, :, None]
    D = E_w @ turned(E) + G_w @ turned(G) + (c / cost[:, None, None]) @ turned(c)
    U = xp.concat([G_w[:-1, ...] @ turned(E[1:, ...]), 0.0 * D[:1, ...]])
    return System(D, U, E, G, weight, cost)
