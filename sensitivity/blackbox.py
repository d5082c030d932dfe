"""Methods that choose their own steps: a solver from elsewhere, seen through its steps and its dense output.

A record's `k` is then the dense output of the step, a function of time. Whatever only asks a trajectory for `u(t)`,
its nodes and its end takes such a method: plain solves, the continuous adjoints, forward sensitivities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

from .backend import Array, Record, Scalar
from .errors import InputError, UnsupportedCombination
from .integrate import Run, Span, State
from .jacobian import Jacobian
from .matrices import is_sparse
from .methods import Method
from .retcode import RetCode
from .stepper import Stepper

SCIPY = ("RK45", "DOP853", "Radau", "BDF", "LSODA")
ORDERS = {"RK45": 5, "DOP853": 8, "Radau": 5, "BDF": 5, "LSODA": 8}


class Step(NamedTuple):
    """One step of a black box: where it ends, and `dense(ts)`, the states `(n, len(ts))` at times inside it."""

    t: float
    u: Array
    dense: Callable[[Array], Array]


class Counts:
    """Work done by a black box, which it adds to itself; `code` is how it ended."""

    def __init__(self) -> None:
        self.nfe = self.njac = self.nlu = 0
        self.code = RetCode.Success


@dataclass(frozen=True)
class BlackBox(Method):
    """Base of the methods that choose their own steps; subclasses write `steps` and give their `order`.

    `order` is that of the dense output, from which `GaussAdjoint` takes the number of its nodes. `guided` says that the
    method survives a first step that is far too long, so that it can begin
    with a step found elsewhere.
    """

    one_step: ClassVar[bool] = False
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})
    adaptive: ClassVar[bool] = True

    @property
    def order(self) -> int:
        raise NotImplementedError

    @property
    def guided(self) -> bool:
        return True

    def steps(self, rhs: Callable, jac: Jacobian | None, t0: float, t1: float, u0: Array, rtol: Any, atol: Any,
              first: float | None, longest: float, counts: Counts) -> Iterator[Step]:
        """Yield the steps from `t0` to `t1`; set `counts.code` and stop where that fails. `rhs` counts itself."""
        raise NotImplementedError

    def missing(self, be: Any) -> str | None:
        if be.holds_numpy:
            return None
        return f"it calls f with NumPy arrays, and the arrays are those of {be.name}"

    def bind(self, be: Any, rhs: Any, dense: bool, jac: Any = None, mass: Any = None) -> Stepper:
        return Marching(be, self, rhs, jac)

    def accept(self, controller: Any, **options: Any) -> None:
        """Raise for options of `solve` that a method with its own steps cannot follow."""
        given = [name for name, value in options.items() if value is not None]
        if controller is not None:
            given.append("controller")
        if given:
            raise UnsupportedCombination(f"{self.name} does not take {given[0]}=", "it chooses its own steps",
                                         f"leave {given[0]} out, or alg=sa.Dopri5()")


class Marching(Stepper):
    """A black box bound to a vector field."""

    one_step = False

    def __init__(self, be: Any, method: BlackBox, rhs: Any, jac: Jacobian | None) -> None:
        self.be, self.method, self.rhs, self.jac = be, method, rhs, jac
        self.order, self.counts = method.order, Counts()

    def march(self, run: Run, s: Span, u0: Array, rtol: Any, atol: Any, sink: Any, h: Scalar | None,
              limit: int) -> tuple[State, Any]:
        counts, end = self.counts, State(s.t0, 0.0 if h is None else h, u0, None, 0.0, 0.0, 0, 0, int(RetCode.Success))
        length = abs(s.t1 - s.t0)
        if length == 0.0:
            return end, None if sink is None else sink.result()
        counts.code = RetCode.Success
        first = run.dt if h is None else abs(h) if self.method.guided else None
        longest = math.inf if run.dtmax is None else run.dtmax

        def counted(t: float, u: Array) -> Array:
            counts.nfe += 1
            return self.rhs(t, u)

        first = None if not first else min(first, length, longest)
        for step in self.method.steps(counted, self.jac, s.t0, s.t1, u0, rtol, atol, first, longest, counts):
            if not bool(self.be.xp.all(self.be.xp.isfinite(step.u))):
                counts.code = RetCode.NonFinite
                break
            size = step.t - end.t
            if sink is not None:
                sink.add(Record(end.t, size, end.u, step.dense))
            end = end._replace(t=step.t, h=size, u=step.u.astype(u0.dtype), accepted=end.accepted + 1)
            if run.progress is not None:
                self.be.report(run.progress, abs(end.t - s.t0) / length, end.t)
            if end.accepted == limit and end.t != s.t1:
                counts.code = RetCode.MaxSteps
                break
        return end._replace(status=int(counts.code)), None if sink is None else sink.result()

    def interpolate(self, record: Record, ts: Any) -> Array:
        xp, u = self.be.xp, record.u
        return xp.astype(record.k(xp.asarray(ts, dtype=xp.float64)).T, u.dtype)

    def restage(self, record: Record) -> Array:
        return record.k

    def evaluations(self, attempts: Any, known: bool) -> int:
        return self.counts.nfe

    def algebra(self, attempts: Any, iterations: Any, adaptive: bool) -> tuple[int, int, int]:
        return self.counts.njac, self.counts.nlu, 0

    def dilution(self, parts: Any) -> float:
        """A mean over everything is within the tolerance of its smallest part only if this much smaller."""
        sizes = [size for size in parts if size]
        return math.sqrt(min(sizes) / sum(sizes)) if sizes else 1.0


@dataclass(frozen=True)
class ScipySolver(BlackBox):
    """One of SciPy's solvers, on the NumPy backend.

    `jac` and `jac_sparsity` of the problem are handed to the implicit ones. Derivatives come from the continuous
    adjoints and `ForwardSensitivity`; `auto` takes `GaussAdjoint`, whose backward solve uses the transposed Jacobian.

    Parameters
    ----------
    method : "RK45", "DOP853", "Radau", "BDF" or "LSODA"
        See `scipy.integrate.solve_ivp`. RK45 and DOP853 are for nonstiff problems, the others for stiff ones.

    Raises
    ------
    InputError
        There is no such method.
    """

    method: str = "RK45"

    references: ClassVar[tuple[str, ...]] = ("virtanen2020",)

    def __post_init__(self) -> None:
        if self.method not in SCIPY:
            raise InputError(f"ScipySolver({self.method!r}) does not exist", f"SciPy has {', '.join(SCIPY)}",
                             'sa.ScipySolver("BDF") for stiff problems, sa.ScipySolver("DOP853") for others')

    @property
    def name(self) -> str:
        return f'ScipySolver("{self.method}")'

    @property
    def implicit(self) -> bool:  # type: ignore[override]
        return self.method in ("Radau", "BDF", "LSODA")

    @property
    def order(self) -> int:
        return ORDERS[self.method]

    @property
    def guided(self) -> bool:
        """LSODA gives up after ten steps that fail."""
        return self.method != "LSODA"

    def steps(self, rhs: Callable, jac: Jacobian | None, t0: float, t1: float, u0: Array, rtol: Any, atol: Any,
              first: float | None, longest: float, counts: Counts) -> Iterator[Step]:
        import numpy as np
        from scipy import integrate

        options: dict[str, Any] = {"rtol": np.maximum(rtol, 100 * np.finfo(float).eps), "atol": atol,
                                   "first_step": first, "max_step": longest}
        if self.implicit and jac is not None:
            options["jac"] = jac.near
            if self.method != "LSODA":
                options["jac_sparsity"] = jac.sparsity
            elif jac.near is not None:
                options["jac"] = partial(_full, jac.near)
        if self.method == "LSODA" and np.iscomplexobj(u0):
            raise UnsupportedCombination(f"{self.name} cannot solve for a complex state", "LSODA is real",
                                         'sa.ScipySolver("BDF")')
        before = counts.njac, counts.nlu
        finite = True

        def watched(t: float, u: Array) -> Array:
            nonlocal finite
            out = rhs(t, u)
            finite = bool(np.all(np.isfinite(out)))
            return out

        solver = getattr(integrate, self.method)(watched, t0, u0, t1, **options)
        while solver.status == "running":
            try:
                solver.step()
            except (ValueError, np.linalg.LinAlgError):
                if finite:
                    raise
                solver.status = "failed"
            counts.njac, counts.nlu = before[0] + solver.njev, before[1] + solver.nlu
            if solver.status == "failed":
                counts.code = RetCode.DtMin if finite and np.all(np.isfinite(solver.y)) else RetCode.NonFinite
                return
            yield Step(float(solver.t), solver.y.copy(), solver.dense_output())


def _full(jac: Callable[[float, Array], Any], t: float, u: Array) -> Array:
    """The matrix as an array, which is all that LSODA takes."""
    J = jac(t, u)
    return J.toarray() if is_sparse(J) else J
