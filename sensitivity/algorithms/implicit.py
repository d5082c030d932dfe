"""Implicit function theorem: derivatives of a steady state by one linear solve, whatever found it.

From `f(u(p), p) = 0` follows `f_u du/dp = -f_p`. With `A = -f_u` at the steady state,

    reverse:  A^T lam = l_u,      dG/dp = f_p^T lam + l_p,
    forward:  A du = f_p dp,

and nothing depends on the guess `u0`. A steady state that is not isolated has no derivative, and a linear solver may
fail silently, so two checks follow each adjoint solve, both with products that the solver did not make:

- the residual `|A^T lam - l_u|` is small beside `|l_u|`;
- a known vector is found again: from `A^T y`, disturbed by the precision that products have, with `y_i = s_i lam_i` and
  fixed `s_i` between 1/2 and 3/2. The error of the answer is the one that `lam` has.

Second derivatives along `dp` are those of the pair `f = 0, f_u w + f_p dp = 0`, whose matrix is block triangular. With
cotangents `(g_u, g_w)` of u and w,

    A w = f_p dp,    A^T lam = g_w,    A^T nu = g_u + (f_uu w + f_up dp)^T lam,
    row = f_p^T nu + (f_pu w + f_pp dp)^T lam,

four solves with A (one of them the check) and no other matrix.

References: Krantz, Parks 2003, The Implicit Function Theorem; Christianson 1994, Optim. Methods Softw. 3, 311 (the
adjoint of a fixed point needs only the fixed point).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ..backend import Array
from ..errors import SolveError, UnsupportedCombination
from ..estimates import Effort, Work
from ..integrate import Run
from ..linear import refuse, suggested, systems
from ..linearsolver import DENSE_LIMIT, check_choice
from ..retcode import RetCode
from ..steadymethods import SteadyStateMethod
from ..system import Inputs
from ..vjp import FiniteDifferenceVJP
from . import base

SINGULAR = 0.01


class Root(NamedTuple):
    """A steady state and what it belongs to."""

    x: Inputs
    u: Array
    status: Any


@dataclass(frozen=True)
class ImplicitAdjoint(base.SensitivityAlgorithm):
    """Derivatives of a steady state by the implicit function theorem.

    Parameters
    ----------
    linear_solver : None, "dense", "sparse", "krylov", or an object
        How the (transposed) system with `f_u` is solved. None: sparse where the problem has `jac_sparsity` or a sparse
        `jac` that the backend can factorise, dense up to 500 unknowns, GMRES on products beyond.
    vjp : VJP, optional

    Only for `SteadyStateProblem`. One gradient costs two transposed solves, one of them a check, and three products
    with transposed derivatives of `f`, for any number of parameters. The gradient with respect to the guess `u0` is
    exactly zero. A singular `f_u`, or a linear solver that did not converge, is an
    error (NaN inside `jax.jit`), never a wrong number.

    References: Christianson 1994, Optim. Methods Softw. 3, 311.
    """

    vjp: Any = field(default=None, kw_only=True)
    linear_solver: Any = None

    exact: ClassVar[bool] = True
    keeps: ClassVar[str] = "end"
    closed: ClassVar[bool] = True
    second_order: ClassVar[bool] = True
    twice: ClassVar[str] = "derivatives in p of order two, as sa.hessian and torch.func.hessian make them"
    kinds: ClassVar[frozenset[str]] = frozenset({"steady"})
    references: ClassVar[tuple[str, ...]] = ("christianson1994",)

    def __post_init__(self) -> None:
        check_choice(self.name, self.linear_solver)

    def work(self, w: Work) -> Effort:
        return Effort(0, 0, 3, w.n * w.n)

    def refuse(self, run: Run) -> None:
        if not isinstance(run.method, SteadyStateMethod):
            raise base.unsupported(self.name, "a problem that evolves in time", "auto")
        refuse(run, self.name, self.linear_solver)
        n = run.field.u.size
        known = run.vjp is not None and not run.vjp.transposes
        if known and n > DENSE_LIMIT and (self.linear_solver or suggested(run)) == "krylov":
            raise UnsupportedCombination(
                f"{self.name} by GMRES does not go with {run.vjp.name} for {n} unknowns",
                f"each transposed product would take at least {n} evaluations of f",
                "jac_sparsity= with linear_solver='sparse', SteadyStateProblem(vjp=...), f in the AD's namespace, or "
                "linear_solver='dense'")

    def plain(self, run: Run, x: Inputs) -> tuple[base.Outputs, base.Aux]:
        be, method = run.be, run.method
        assert isinstance(method, SteadyStateMethod)
        (u, _, size, correction, _, accepted, rejected, nfe, solves, status), njac, nlu = method.iterate(run, x)
        t = be.scalar(x.t0)
        aux = base.Aux([t], t, accepted, rejected, nfe, status, correction, size, None,
                       algebra=(njac, nlu, solves))
        return base.Outputs(u[None, :], None, None), aux

    def residuals(self, run: Run, x: Inputs, out: base.Outputs, aux: base.Aux) -> Root:
        del run
        return Root(x, out.u[0, :], aux.status)

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Root]:
        del wanted
        out, aux = self.plain(run, x)
        return out, aux, self.residuals(run, x, out, aux)

    def reverse(self, run: Run, residuals: Root, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be, (x, u, status) = run.be, residuals
        t = be.time(be.scalar(x.t0))
        theta, nvjp, algebra = be.zeros(x.theta), 0, (0, 0, 0)
        if "theta" in wanted and x.theta:
            spaces = self.systems(run, x, t)
            solve = spaces.at(u, 0.0)
            g = ct.u[0, :]
            lam = solve(g, transposed=True)
            theta = run.vjp.pullback(run, x)(t, u, lam)[1]
            bad = self.distrusted(run, spaces, solve, u, g, lam)
            failed = be.choose(bad, int(RetCode.NewtonFailure), int(RetCode.Success))
            status = be.choose(status == int(RetCode.Success), failed, status)
            nvjp, algebra = 3, (spaces.jacobians, spaces.factorisations, 2)
        return base.Cotangents(0.0 * x.u0, theta, 0.0, 0.0, None, nvjp, 0, status, algebra=algebra)

    def tangent(self, run: Run, residuals: Root, d: base.Tangents) -> Array:
        be, (x, u, _) = run.be, residuals
        t = be.time(be.scalar(x.t0))
        rows = run.vjp.pushforward(run, x, d.theta)(t, u, 0.0 * d.u0, None)[1]
        spaces = self.systems(run, x, t)
        return self.moved(spaces, spaces.at(u, 0.0), u, rows)[:, None, :]

    def moved(self, spaces: Any, solve: Any, u: Array, rows: Array) -> Array:
        """`A^-1` times each row, checked."""
        be = spaces.be
        du = solve(rows)
        bad = False
        for i in range(rows.shape[0]):
            bad = _unequal(be, spaces.apply(u, 0.0, du[i, :]), rows[i, :]) | bad
        if be.concrete(bad):
            raise self.reverse_failure()
        return be.nan_where(bad, du)

    @property
    def of_pair(self) -> ImplicitPair:
        return ImplicitPair(vjp=self.vjp, inner=self)

    def reverse_failure(self, solution: Any = None) -> SolveError:
        return SolveError("the linear system with f_u at the steady state could not be solved",
                          "f_u is singular there, so the steady state is not isolated (a conserved quantity?), or the "
                          "linear solver did not converge",
                          "replace one equation by the conserved total; ImplicitAdjoint(linear_solver='dense'), or "
                          "'sparse' with jac_sparsity=", RetCode.NewtonFailure, math.inf, solution)

    def systems(self, run: Run, x: Inputs, t: Any) -> Any:
        """How systems with A are solved."""
        return systems(run, x, t, self.linear_solver, max(1e-10, 100.0 * run.be.eps(x.u0.dtype)))

    def distrusted(self, run: Run, spaces: Any, solve: Any, u: Array, g: Array, lam: Array) -> Any:
        """Whether one of the two checks of an adjoint solve fails; see the top of this module."""
        be = run.be
        n = u.shape[0]
        eps = be.eps(u.dtype)
        precision = eps ** (2 / 3) if isinstance(run.vjp, FiniteDifferenceVJP) else 10.0 * eps
        weights = be.vector([1.0 + 0.5 * math.sin(1.0 + 7.0 * i) for i in range(n)], u)
        noise = be.vector([1.0 + precision * math.cos(3.0 + 11.0 * i) for i in range(n)], u)
        known = weights * lam
        found = solve(noise * spaces.transposed(u, 0.0, known), transposed=True)
        return _unequal(be, spaces.transposed(u, 0.0, lam), g) | _unequal(be, found, known, SINGULAR)


class Pair(NamedTuple):
    """A steady state with its tangent, and the inputs of both."""

    x: Inputs
    u: Array
    w: Array
    status: Any


@dataclass(frozen=True)
class ImplicitPair(base.SensitivityAlgorithm):
    """`inner` for a steady state and its tangent, the formulas at the top of this module; see `sensitivity.second`."""

    inner: Any = None

    exact: ClassVar[bool] = True

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Pair]:
        del wanted
        be = run.be
        own, state, d_theta, t = self._opened(run, x)
        out, aux = self.inner.plain(own, state)
        u, spaces = out.u[0, :], self.inner.systems(own, state, t)
        solve = spaces.at(u, 0.0)
        be.keep(u, solve)
        push = own.vjp.pushforward(own, state, tuple(v[None, ...] for v in d_theta))
        w = self.inner.moved(spaces, solve, u, push(t, u, 0.0 * u[None, :], None)[1])[0, :]
        return base.Outputs(be.xp.concat([u, w])[None, :], None, None), aux, Pair(x, u, w, aux.status)

    def reverse(self, run: Run, residuals: Pair, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        del wanted
        be, (x, u, w, status) = run.be, residuals
        n, (own, state, _, t) = u.shape[0], self._opened(run, x)
        pull, both = run.vjp.pullback(run, x), be.xp.concat([u, w])
        spaces = self.inner.systems(own, state, t)
        solve = be.kept(u) or spaces.at(u, 0.0)
        g_u, g_w = ct.u[0, :n], ct.u[0, n:]
        lam = solve(g_w, transposed=True)
        right = g_u + pull(t, both, be.xp.concat([0.0 * lam, lam]))[0][:n]
        nu = solve(right, transposed=True)
        theta = pull(t, both, be.xp.concat([nu, lam]))[1]
        bad = self.inner.distrusted(own, spaces, solve, u, g_w, lam)
        bad = bad | _unequal(be, spaces.transposed(u, 0.0, nu), right)
        failed = be.choose(bad, int(RetCode.NewtonFailure), int(RetCode.Success))
        status = be.choose(status == int(RetCode.Success), failed, status)
        return base.Cotangents(0.0 * both, theta, 0.0, 0.0, None, 0, 0, status)

    def _opened(self, run: Run, x: Inputs) -> tuple[Run, Inputs, tuple[Array, ...], Any]:
        """Run and inputs of the state alone, the direction of the parameters, the time that `f` is called with."""
        field: Any = run.field
        n, (state, d_theta) = field.n, field.opened(x.theta, x.constants)
        rtol, atol = (v[:n] if getattr(v, "ndim", 0) else v for v in (x.rtol, x.atol))
        state = state._replace(t0=x.t0, t1=x.t1, rtol=rtol, atol=atol)
        return field.run, state, d_theta, run.be.time(run.be.scalar(x.t0))

    def reverse_failure(self, solution: Any = None) -> SolveError:
        return self.inner.reverse_failure(solution)


def _unequal(be: Any, a: Array, b: Array, rtol: float | None = None) -> Any:
    """Whether vectors differ by more than `rtol |b|`; so does one that is not finite."""
    gap = be.rms(a - b)
    bound = (be.eps(b.dtype) ** 0.4 if rtol is None else rtol) * be.rms(b)
    return be.choose(gap <= bound, 0, 1) > 0
