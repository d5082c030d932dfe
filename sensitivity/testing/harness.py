"""What a check is given: one backend, and a few ways to make and compare its arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..algorithms.base import SensitivityAlgorithm
from ..choose import choose
from ..gradient import gradient
from ..prepare import prepare
from ..registry import registry
from ..vjp import VJP, FiniteDifferenceVJP, ReverseVJP


class Harness:
    """One backend under test.

    Parameters
    ----------
    name : str
        A registered backend.

    Raises
    ------
    RuntimeError
        The backend has no float64 here.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.be = registry().backend(name)
        if self.be.eps(self.array([1.0]).dtype) > 1e-10:
            raise RuntimeError(f"the {name} backend makes float32 of float64; the checks need float64 "
                               "(JAX: set JAX_ENABLE_X64=1)")

    # -- arrays -----------------------------------------------------------------------------------------------

    def array(self, values: Any, dtype: Any = None) -> Any:
        """An array of nested lists of numbers, float64 unless told."""
        return self.be.asarray(values, dtype=dtype or self.be.xp.float64)

    def numbers(self, x: Any) -> list[float]:
        """Every number in a pytree of arrays and scalars, in order."""
        out: list[float] = []
        for leaf in self.be.flatten(x)[0]:
            if not self.be.is_array(leaf):
                out.append(float(leaf))
                continue
            flat = self.be.xp.reshape(leaf, (-1,))
            for i in range(flat.shape[0]):
                value = self.be.concrete(flat[i])
                require(value is not None, f"{leaf!r} has no value")
                out.append(value)
        return out

    def close(self, got: Any, want: Any, tol: float, what: str) -> None:
        """Every number within `tol * (largest number expected)`, or within `tol` where that is below 1."""
        a, b = self.numbers(got), self.numbers(want)
        require(len(a) == len(b), f"{what}: {len(a)} numbers, expected {len(b)}")
        bound = tol * max([1.0, *map(abs, b)])
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            require(abs(x - y) <= bound, f"{what}: entry {i} is {x!r}, expected {y!r} within {bound:.1e}")

    # -- solves -----------------------------------------------------------------------------------------------

    def vjp(self) -> VJP:
        """The best products that the backend has."""
        return ReverseVJP() if "reverse" in self.be.modes else FiniteDifferenceVJP()

    def refuses(self, algorithm: SensitivityAlgorithm) -> bool:
        """Whether this algorithm cannot work here: without AD, nothing can be differentiated directly."""
        return not algorithm.boundary and not self.be.modes

    def prepared(self, prob: Any, method: Any, sensealg: SensitivityAlgorithm, **options: Any) -> tuple[Any, Any, Any]:
        """`(algorithm, run, inputs)` as `solve` makes them."""
        run, x = prepare(prob, method, backend=self.name, **options)
        algorithm, run = choose(run, x, sensealg)
        return algorithm, run, x

    def gradient(self, prob: Any, method: Any, sensealg: SensitivityAlgorithm, weights: Any, **options: Any) -> Any:
        """Gradient of `sum(weights * sol.u)`, `weights` shaped like `sol.u`; needs no AD of the loss."""
        be = self.be
        w = be.flatten(weights)[0]

        def loss(sol: Any) -> Any:
            return sum(be.xp.sum(a * b) for a, b in zip(w, be.flatten(sol.u)[0], strict=True))

        if sensealg.boundary:
            options["dloss"] = lambda sol: weights
        return gradient(prob, method, loss, sensealg=replace(sensealg, vjp=sensealg.vjp or self.vjp()),
                        backend=self.name, **options)


def require(condition: Any, message: str) -> None:
    """Fail a check; unlike `assert` this also holds under `python -O`."""
    if not condition:
        raise AssertionError(message)


def matvec(a: Sequence[Sequence[float]], x: Sequence[float]) -> list[float]:
    return [sum(v * y for v, y in zip(row, x, strict=True)) for row in a]


def transposed(a: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*a, strict=True)]
