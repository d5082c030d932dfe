"""Exceptions and warnings: each says what was seen, why it matters and what to type instead."""

from __future__ import annotations

from typing import Any


class SensitivityError(Exception):
    """Base of every error raised here; `code` is stable and listed in the documentation.

    `args` are what was seen, why it matters, and what to type instead; all state lives there, so instances pickle
    across process pools.
    """

    code = "SN100"

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)

    def __str__(self) -> str:
        what, why, fix = self.args[:3]
        lines = [f"[{self.code}] {what}"]
        if why:
            lines.append(f"  why: {why}")
        if fix:
            lines.append(f"  fix: {fix}")
        return "\n".join(lines)


class SignatureError(SensitivityError, TypeError):
    """`f` cannot be called as `f(t, u, p)`: it takes fewer or more arguments, or is not callable."""

    code = "SN101"


class OutputError(SensitivityError, ValueError):
    """`f` returned something that does not have the structure, shape or kind of `u`, or takes its arguments in another
    order, so that it would."""

    code = "SN102"


class ImpureFunctionError(SensitivityError, ValueError):
    """`f` changes its arguments in place, or gives two answers for one input (random numbers, hidden state)."""

    code = "SN103"


class BrokenGradientError(SensitivityError, ValueError):
    """The framework's AD cannot see through `f` (detached, `.item()`, NumPy): gradients would silently lack a part."""

    code = "SN104"


class TracingError(SensitivityError, TypeError):
    """`f` needs the value of something that is only traced: a Python `if`, `float()`, or a NumPy function in JAX."""

    code = "SN105"


class MixedFrameworksError(SensitivityError, TypeError):
    """Arrays of two frameworks meet in one problem."""

    code = "SN106"


class InputError(SensitivityError, ValueError):
    """An argument has a value that is not accepted; base of the two that follow."""

    code = "SN107"


class TimesError(InputError):
    """Times lie outside `tspan`, or are not numbers."""

    code = "SN108"


class ToleranceError(InputError):
    """A tolerance cannot be met in the precision of the state, or is no positive number."""

    code = "SN109"


class UnsupportedCombination(SensitivityError, NotImplementedError):
    """This algorithm, method, backend and problem do not go together; the message names what does."""

    code = "SN110"


class IndexTooHigh(UnsupportedCombination):
    """A differential-algebraic equation has index 2 or more, or dependent constraints."""

    code = "SN112"


def undefined(name: str) -> tuple[str, str, str]:
    """The words of the `UnsupportedCombination` for a derivative that a random path does not have."""
    return (f"a derivative with respect to {name} of a stochastic problem was asked for",
            "a Brownian path has no derivative in time, and the path itself is given",
            "differentiate with respect to u0 and p")


class CapturedValueError(SensitivityError, ValueError):
    """`f` closes over a value that is being differentiated and that cannot be reached."""

    code = "SN111"


class SolveError(SensitivityError, RuntimeError):
    """The solve did not reach the end.

    Attributes
    ----------
    retcode : RetCode
    t : float
        Time reached.
    solution : Solution or None
        What was computed up to there (not carried through pickling of framework tensors).
    """

    code = "SN201"

    def __init__(self, what: str, why: str = "", fix: str = "", retcode: Any = None, t: float | None = None,
                 solution: Any = None) -> None:
        Exception.__init__(self, what, why, fix, retcode, t, solution)

    retcode = property(lambda self: self.args[3])
    t = property(lambda self: self.args[4])
    solution = property(lambda self: self.args[5])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args[:5], None), self.__dict__ or None


class UnstableSensealgError(SolveError):
    """The state could not be integrated backwards, so that the gradient would have been nonsense."""

    code = "SN202"


class BackendMissingError(SensitivityError, ImportError):
    """The package that a backend needs is not installed."""

    code = "SN401"


class SensitivityWarning(UserWarning):
    """Base of every warning issued here."""


class NumericalDerivativeWarning(SensitivityWarning):
    """A derivative was replaced by finite differences without having been asked for."""


class ReconstructionWarning(SensitivityWarning):
    """A solution that was undone step by step did not come back to where it started, so its gradient is inexact."""


class ProbeWarning(SensitivityWarning):
    """What the first-call check found in `f`, as a warning: with `probe="warn"`, and for an unexpected precision."""


class UnstableSensealgWarning(SensitivityWarning):
    """The state integrated backwards misses the stored one by more than 100 tolerances: the gradient loses digits."""
