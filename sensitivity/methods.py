"""The methods that users name. A method says how it is bound to a vector field; the rest is its stepper's."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from . import diagonal, tableaus
from .algebraic import Algebraic, AlgebraicRosenbrock
from .diagonal import Diagonal
from .explicit import Explicit
from .implicit import Implicit
from .linearsolver import check_choice
from .rosenbrock import RODAS5P, Linear, Rosenbrock
from .stepper import Stepper
from .tableaus import Tableau


@dataclass(frozen=True)
class Method:
    """Base of all methods.

    Attributes
    ----------
    because : tuple of str
        Why this was chosen, when no method was named.
    implicit, one_step : whether it solves for its stages, and whether it shows them.
    devices : where it runs, "cpu" and "gpu".
    """

    because: tuple[str, ...] = field(default=(), compare=False, repr=False, kw_only=True)

    references: ClassVar[tuple[str, ...]] = ()
    implicit: ClassVar[bool] = False
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "gpu"})
    one_step: ClassVar[bool] = True
    exact_jacobian: ClassVar[bool] = False

    def missing(self, be: Any) -> str | None:
        """Why this method cannot run on a backend, or None."""
        del be
        return None

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def adaptive(self) -> bool:
        """Whether steps have an error estimate."""
        raise NotImplementedError

    @property
    def algebraic(self) -> bool:
        """Whether constraints, from a singular mass matrix, can be solved for: the last stage is the new state."""
        return False

    def bind(self, be: Any, rhs: Any, dense: bool, jac: Any = None, mass: Any = None) -> Stepper:
        """The method for `M u' = rhs(t, u)`; `dense` asks for output between the steps.

        Implicit methods are also given `jac`, a `Jacobian`, which they make themselves from `rhs` where there is none,
        and `mass`, a singular `Mass` or None.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RungeKutta(Method):
    """Base of the explicit Runge-Kutta methods."""

    base: ClassVar[Tableau]

    @property
    def adaptive(self) -> bool:
        return self.base.error is not None

    def tableau(self, dense: bool) -> Tableau:
        """The form in use: with `f(t1, u1)` as last stage when errors are controlled or dense output needs it."""
        return _form(self.base, (dense and self.base.dense is None) or self.adaptive)

    def bind(self, be: Any, rhs: Any, dense: bool, jac: Any = None, mass: Any = None) -> Stepper:
        del jac, mass
        return Explicit(be, self.tableau(dense), rhs)


@cache
def _form(base: Tableau, endpoint: bool) -> Tableau:
    return base.with_endpoint() if endpoint else base


class Euler(RungeKutta):
    """Explicit Euler, order 1; fixed step."""

    base = tableaus.EULER
    references = ("hairer1993",)


class Heun(RungeKutta):
    """Explicit trapezoidal rule, order 2(1) (Hairer, Norsett, Wanner I, table II.1.1)."""

    base = tableaus.HEUN
    references = ("hairer1993",)


class Midpoint(RungeKutta):
    """Explicit midpoint rule, order 2(1) (Hairer, Norsett, Wanner I, table II.1.1)."""

    base = tableaus.MIDPOINT
    references = ("hairer1993",)


class RK4(RungeKutta):
    """The classical method of Kutta (1901), order 4; fixed step."""

    base = tableaus.RK4
    references = ("kutta1901",)


class EES25(RungeKutta):
    """EES(2,5; 1/10) of Shmelev, Ebrahimi-Fard, Tapia and Salvi (2025), three stages, order 2(1), nearly symmetric: a
    step and the step back are the identity up to O(h^6)."""

    base = tableaus.EES25


class EES27(RungeKutta):
    """EES(2,7) of Shmelev, Ebrahimi-Fard, Tapia and Salvi (2025), four stages, order 2(1), nearly symmetric: a step and
    the step back are the identity up to O(h^8)."""

    base = tableaus.EES27


class BS3(RungeKutta):
    """Bogacki and Shampine (1989), order 3(2), cubic dense output."""

    base = tableaus.BS3
    references = ("bogacki1989",)


class Dopri5(RungeKutta):
    """Dormand and Prince (1980), order 5(4), quartic dense output."""

    base = tableaus.DOPRI5
    references = ("dormand1980",)


class Tsit5(RungeKutta):
    """Tsitouras (2011), order 5(4), quartic dense output; the default for nonstiff problems."""

    base = tableaus.TSIT5
    references = ("tsitouras2011",)


class Dopri8(RungeKutta):
    """Prince and Dormand (1981), RK8(7)13M, dense output of order 5; for tight tolerances."""

    base = tableaus.DOPRI8
    references = ("prince1981",)


@dataclass(frozen=True, repr=False)
class ImplicitMethod(Method):
    """Base of the methods that solve linear equations in each step.

    Parameters
    ----------
    linear_solver : None, "dense", "sparse", "krylov", Krylov(preconditioner), or an object
        How equations with `M - c f_u` and its transpose are solved. "dense": LU of an array. "sparse": of the pattern
        `jac_sparsity`, as a band where that is narrow or by SuperLU, or of the SciPy matrices that `jac` returns.
        "krylov": GMRES on products with `f_u`, without a matrix; `Krylov` has a preconditioner too. None: sparse where
        the problem says how, dense up to 2000 unknowns, GMRES beyond. An object: its `factor(A)` returns
        `solve(b, transposed)` for vectors b; A is a SciPy matrix where the pattern is known (NumPy, PyTorch), else an
        array. What it solves is checked.
    """

    linear_solver: Any = None

    implicit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice(self.name, self.linear_solver, steps=True)

    def __repr__(self) -> str:
        chosen = "" if self.linear_solver is None else f"linear_solver={self.linear_solver!r}"
        return f"{self.name}({chosen})"


@dataclass(frozen=True, repr=False)
class DiagonallyImplicit(ImplicitMethod):
    """Base of the diagonally implicit Runge-Kutta methods, for stiff problems."""

    base: ClassVar[Diagonal]

    @property
    def adaptive(self) -> bool:
        return self.base.error is not None

    @property
    def algebraic(self) -> bool:
        return self.base.inner[-1] == self.base.b and self.base.fsal

    def bind(self, be: Any, rhs: Any, dense: bool, jac: Any = None, mass: Any = None) -> Stepper:
        del dense
        if mass is not None:
            return Algebraic(be, self.base, rhs, jac, mass)
        return Implicit(be, self.base, rhs, jac)


@dataclass(frozen=True, repr=False)
class RosenbrockMethod(ImplicitMethod):
    """Base of the Rosenbrock methods, for stiff problems."""

    base: ClassVar[Linear]
    exact_jacobian: ClassVar[bool] = True

    @property
    def adaptive(self) -> bool:
        return self.base.error is not None

    @property
    def algebraic(self) -> bool:
        return True

    def bind(self, be: Any, rhs: Any, dense: bool, jac: Any = None, mass: Any = None) -> Stepper:
        del dense
        if mass is not None:
            return AlgebraicRosenbrock(be, self.base, rhs, jac, mass)
        return Rosenbrock(be, self.base, rhs, jac)


class ImplicitEuler(DiagonallyImplicit):
    """Implicit Euler, order 1; the step before gives the slope for the trapezoidal rule, which estimates the error."""

    base = diagonal.IMPLICIT_EULER


class ImplicitMidpoint(DiagonallyImplicit):
    """Implicit midpoint rule, order 2, symplectic; fixed step."""

    base = diagonal.IMPLICIT_MIDPOINT


class Trapezoid(DiagonallyImplicit):
    """Trapezoidal rule, order 2(1); A-stable, but fast transients are damped slowly."""

    base = diagonal.TRAPEZOID


class Kvaerno3(DiagonallyImplicit):
    """Kvaerno (2004), order 3(2), L-stable, cubic dense output; for stiff problems and loose tolerances."""

    base = diagonal.KVAERNO3


class Kvaerno5(DiagonallyImplicit):
    """Kvaerno (2004), order 5(4), L-stable, quartic dense output; for stiff problems."""

    base = diagonal.KVAERNO5


class Rodas5P(RosenbrockMethod):
    """Steinebach (2023), Rosenbrock, order 5(4), L-stable, quartic dense output; no iteration: for stiff problems with
    a cheap Jacobian. Its discrete adjoint needs products with second derivatives of `f`."""

    base = RODAS5P
