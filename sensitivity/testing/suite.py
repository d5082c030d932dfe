"""One generator of checks, used by `python -m sensitivity.testing` and by pytest alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from .. import vjp as products
from ..registry import algorithms
from ..uservjp import UserVJP
from . import arrays, derivatives, lookback, loops, solves
from .harness import Harness, require


@dataclass(frozen=True)
class Check:
    """A named check of one backend; call it, and it raises what is wrong."""

    name: str
    backend: str
    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()

    def __call__(self) -> None:
        self.function(harness(self.backend), *self.arguments)

    def __str__(self) -> str:
        return self.name


@cache
def harness(name: str) -> Harness:
    return Harness(name)


VJPS = (products.ReverseVJP, products.ForwardVJP, products.FiniteDifferenceVJP, products.ComplexStepVJP, UserVJP)


def checks(name: str) -> Iterator[Check]:
    """All checks for the backend called `name`; making the list imports no framework."""
    for module in (arrays, loops, lookback, derivatives, solves):
        for title, function in vars(module).items():
            if not title.startswith("check_"):
                continue
            title = title.removeprefix("check_")
            wants = list(inspect.signature(function).parameters)[1:]
            if wants == ["algorithm"]:
                for algorithm in (kind() for kind in algorithms().values()):
                    if "ode" in algorithm.kinds:
                        yield Check(f"{title}[{algorithm.name}]", name, function, (algorithm,))
            elif wants == ["vjp"]:
                for choice in VJPS:
                    yield Check(f"{title}[{choice.__name__}]", name, function, (choice(),))
            else:
                yield Check(title, name, function)


def run(name: str, report: Callable[[str], Any] = print) -> int:
    """Run every check, report a table, return the number of failures."""
    failures = total = 0
    for check in checks(name):
        total += 1
        try:
            check()
        except Exception as e:  # a check may fail in any way; all are failures
            failures += 1
            first = (str(e) or type(e).__name__).splitlines()[0]
            report(f"{check.name:<52} FAILED  {type(e).__name__}: {first}")
        else:
            report(f"{check.name:<52} ok")
    report(f"{name}: {total - failures} of {total} checks passed")
    return failures


class BackendConformance:
    """Subclass in a test module, name it `Test...`, set `backend`, run pytest.

    Attributes
    ----------
    backend : str
        Name of the registered backend.
    expected_failures : dict
        Known gaps, check name to reason. They must fail: a gap that was closed has to be taken off the list.
    """

    backend: ClassVar[str]
    expected_failures: ClassVar[dict[str, str]] = {}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "check" in metafunc.fixturenames:
            metafunc.parametrize("check", list(checks(self.backend)), ids=str)

    def test_expected_failures_exist(self) -> None:
        unknown = set(self.expected_failures) - {check.name for check in checks(self.backend)}
        require(not unknown, f"no such checks: {sorted(unknown)}")

    def test_conformance(self, check: Check) -> None:
        reason = self.expected_failures.get(check.name)
        if reason is None:
            check()
            return
        try:
            check()
        except Exception:  # any failure is the expected one
            return
        raise AssertionError(f"{check.name} passes now, although it was expected to fail: {reason}")
