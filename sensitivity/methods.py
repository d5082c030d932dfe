"""The methods that users name. A method says how it is bound to a vector field; the rest is its stepper's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from . import tableaus
from .explicit import Explicit
from .stepper import Stepper
from .tableaus import Tableau


@dataclass(frozen=True)
class Method:
    """Base of all methods."""

    references: ClassVar[tuple[str, ...]] = ()
    implicit: ClassVar[bool] = False
    one_step: ClassVar[bool] = True

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

    def bind(self, be: Any, rhs: Any, dense: bool, jac: Any = None) -> Stepper:
        """The method for `u' = rhs(t, u)`; `dense` asks for output between the steps, `jac` is what is known of
        the derivative of `rhs` (a `Jacobian`)."""
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

    def bind(self, be: Any, rhs: Any, dense: bool, jac: Any = None) -> Stepper:
        return Explicit(be, self.tableau(dense), rhs)


@cache
def _form(base: Tableau, endpoint: bool) -> Tableau:
    return base.with_endpoint() if endpoint else base


class Euler(RungeKutta):
    """Explicit Euler, order 1; fixed step."""

    base = tableaus.EULER


class Heun(RungeKutta):
    """Explicit trapezoidal rule, order 2(1) (Hairer, Norsett, Wanner I, table II.1.1)."""

    base = tableaus.HEUN


class Midpoint(RungeKutta):
    """Explicit midpoint rule, order 2(1) (Hairer, Norsett, Wanner I, table II.1.1)."""

    base = tableaus.MIDPOINT


class RK4(RungeKutta):
    """The classical method of Kutta (1901), order 4; fixed step."""

    base = tableaus.RK4


class BS3(RungeKutta):
    """Bogacki and Shampine (1989), order 3(2), cubic dense output."""

    base = tableaus.BS3


class Dopri5(RungeKutta):
    """Dormand and Prince (1980), order 5(4), quartic dense output."""

    base = tableaus.DOPRI5


class Tsit5(RungeKutta):
    """Tsitouras (2011), order 5(4), quartic dense output; the default for nonstiff problems."""

    base = tableaus.TSIT5


class Dopri8(RungeKutta):
    """Prince and Dormand (1981), RK8(7)13M, dense output of order 5; for tight tolerances."""

    base = tableaus.DOPRI8
