"""Steady states: the problem, what is checked before the work, and what a failure says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import probe as first_call
from .arguments import choice, count, laid_out, tolerances
from .errors import InputError, SignatureError, SolveError, UnsupportedCombination
from .integrate import Run
from .matrices import is_sparse
from .problems import Problem
from .promise import check_pattern
from .registry import registry
from .retcode import RetCode
from .sparsity import Pattern, pattern_of
from .steadymethods import Newton, PseudoTransient, SteadyStateMethod
from .system import Field, Inputs, Partition
from .system import Products as UserProducts

MAX_ITERATIONS = 1000
TIMELESS = ("saveat", "dt", "events", "dtmin", "dtmax", "dense", "controller", "tstops", "progress",
            "max_events")


@dataclass(frozen=True, eq=False)
class SteadyStateProblem(Problem):
    """The steady state `f(inf, u, p) = 0` of `u' = f(t, u, p)`.

    Parameters
    ----------
    f : callable
        `f(t, u, p)`, as for `ODEProblem`; it is called with `t = inf`.
    u0 : pytree of arrays
        Where to start looking. The steady state found there does not depend on it, as long as `u0` stays closer to
        this one than to others: gradients with respect to `u0` are exactly zero.
    p : pytree, optional
        Parameters handed to `f`.
    jac : callable, optional
        `jac(t, u, p)` = df/du, shape `(n, n)` for a raveled state; NumPy and PyTorch also take a SciPy sparse matrix.
    jac_sparsity : SciPy sparse matrix or array `(n, n)`, optional
        Where df/du may differ from zero; makes "sparse" the way to solve linear systems.
    vjp, jvp, paramjac : callable, optional
        As for `ODEProblem`.

    Raises
    ------
    SignatureError
        `f` is not callable.
    """

    f: Callable[..., Any]
    u0: Any
    p: Any = None
    _: dataclasses.KW_ONLY
    jac: Callable[..., Any] | None = None
    jac_sparsity: Any = None
    vjp: Callable[..., Any] | None = None
    jvp: Callable[..., Any] | None = None
    paramjac: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not callable(self.f):
            raise SignatureError(f"f is {type(self.f).__name__}, which cannot be called",
                                 "the vector field is a function of time, state and parameters",
                                 "SteadyStateProblem(f, u0, p) with def f(t, u, p): ...")


@dataclass(frozen=True)
class SteadyState:
    """What only these runs have: where `f_u` is zero, if that is known, and whether `jac` returns SciPy matrices."""

    pattern: Pattern | None = None
    sparse_jac: bool = False
    name = "steady"

    def algorithm(self, sensealg: Any) -> Any:
        """The algorithm, refused with `UnsupportedCombination` if it is for other problems."""
        if "steady" not in sensealg.kinds:
            raise UnsupportedCombination(f"{sensealg.name} does not go with a SteadyStateProblem",
                                         "it follows an evolution in time", "sensealg=ImplicitAdjoint(), or auto")
        return sensealg

    def products(self, run: Run, x: Inputs) -> tuple[Run, Inputs]:
        """The run and inputs that products are chosen for."""
        return run, x

    def failure(self, sol: Any, run: Run, aux: Any, code: RetCode) -> SolveError:
        """The error that says where an iteration stood."""
        residual, correction = (float(run.be.concrete(v) or 0.0) for v in (aux.h, aux.ratio))
        count = int(run.be.concrete(aux.accepted) or 0)
        where = f"after {count} iterations; |f| = {residual:.3g}, last correction {correction:.1e} tolerances"
        other = "PseudoTransient()" if isinstance(run.method, Newton) and run.method.fallback is None else "another u0"
        what, why, fix = {
            RetCode.MaxSteps: (f"max_steps={run.max_steps} reached {where}",
                               "there may be no steady state near u0, or only a limit cycle",
                               f"{other}, max_steps= larger, or looser tolerances"),
            RetCode.NewtonFailure: (
                f"{run.method.name} found no steady state {where}",
                "no correction makes f smaller: u0 is far off, f_u is singular (a conserved quantity?), or the linear "
                "solver did not converge",
                f"{other}; replace one equation by the conserved total; linear_solver='dense' or 'sparse'"),
            RetCode.NonFinite: ("f(inf, u0, p) is not finite", "f is called with t = inf, and at u0",
                                "check f there: sin(t) has no limit, log and sqrt want positive numbers"),
        }[code]
        return SolveError(what, why, fix, code, math.inf, sol)


def prepare(prob: SteadyStateProblem, alg: Any, *, rtol: Any = None, atol: Any = None, max_steps: int | None = None,
            norm: Any = None, backend: str | None = None, device: Any = None, dtype: Any = None,
            probe: str = "raise", wrt: tuple[str, ...] | None = None, **timeless: Any) -> tuple[Run, Inputs]:
    """As `prepare.prepare`, for a steady state.

    Raises
    ------
    InputError, ToleranceError, UnsupportedCombination, and the errors of the first-call check.
    """
    for name, value in timeless.items():
        if value is not None and value is not False:
            raise InputError(f"{name}={value!r} was given with a SteadyStateProblem", "a steady state has no times",
                             f"leave {name} out")
    method = _method(alg)
    choice("probe", probe, ("raise", "warn", "off"))
    limit = count("max_steps", max_steps, MAX_ITERATIONS)
    be = registry().backend(backend) if backend else registry().backend_for(_labelled(prob))
    be, layout, u0 = laid_out(be, prob.u0, dtype, device)
    if be.is_complex(u0):
        raise UnsupportedCombination("a SteadyStateProblem cannot have a complex state",
                                     "the derivative of a function that is not analytic is no complex matrix",
                                     "u0 with real and imaginary parts as separate entries")
    partition, theta, constants = Partition.of(be, prob.p)
    t = be.asarray(math.inf, dtype=be.time_dtype(u0.dtype), device=be.device(u0))
    u_tree, p_tree = layout.opener(be)(u0), partition.join(be, theta, constants)
    if probe != "off":
        first_call.check(be, prob, t, u_tree, p_tree, probe, wrt)
    f, captured = be.hoist(prob.f, be.time(be.scalar(t)), u_tree, p_tree)
    rtol, atol = tolerances(be, rtol, atol, u0.dtype, layout, u0)
    run = Run(
        be=be, backend=be.name, field=Field(f, layout, partition, len(captured)), method=method, controller=None,
        vjp=None, products=UserProducts(prob.vjp, prob.jvp, prob.jac, prob.paramjac), saves=None, dense=False, dt=None,
        dtmin=None, dtmax=None, tstops=(), max_steps=limit, capacity=limit, norm=norm, progress=None,
        kind=SteadyState(pattern_of(prob.jac_sparsity, layout.size), _sparse_jac(be, prob, t, u_tree, p_tree)),
    )
    method.refuse(run)
    x = Inputs(u0, (*theta, *captured), t, t, None, constants, rtol, atol)
    if run.kind.pattern is not None and probe != "off":
        check_pattern(run, x, first_call.identity(be, prob.f)[0], probe)
    return run, x


def _method(alg: Any) -> SteadyStateMethod:
    if alg is None:
        return Newton(fallback=PseudoTransient())
    if isinstance(alg, SteadyStateMethod):
        return alg
    if isinstance(alg, type) and issubclass(alg, SteadyStateMethod):
        raise InputError(f"alg={alg.__name__} is a class, not a method", "methods have options",
                         f"alg={alg.__name__}()")
    raise UnsupportedCombination(f"alg={alg!r} cannot solve a SteadyStateProblem", "it finds no roots",
                                 "alg=Newton(), alg=PseudoTransient() or alg=None")


def _labelled(prob: SteadyStateProblem) -> list[tuple[str, Any]]:
    from . import tree

    return [(name, x) for name, value in (("u0", prob.u0), ("p", prob.p)) for x in tree.flatten(value)[0]]


def _sparse_jac(be: Any, prob: SteadyStateProblem, t: Any, u: Any, p: Any) -> bool:
    """Whether the user's `jac` returns SciPy matrices."""
    return prob.jac is not None and be.sparse_lu and is_sparse(prob.jac(be.time(be.scalar(t)), u, p))
