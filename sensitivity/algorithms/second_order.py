"""Forward over adjoint: an adjoint whose derivative is there too; the mathematics is in `sensitivity.second`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..backend import Array
from ..errors import InputError
from ..estimates import Effort, Work
from ..integrate import Run
from ..system import Inputs
from . import base
from .discrete import RecursiveCheckpointAdjoint


@dataclass(frozen=True)
class ForwardOverAdjoint(base.SensitivityAlgorithm):
    """Second derivatives: the tangent of an adjoint, one adjoint of twice the size per direction.

    Parameters
    ----------
    inner : sensitivity algorithm or auto
        The adjoint; `auto` and None mean `RecursiveCheckpointAdjoint()`, whose second derivatives are those of the
        computed solution, exactly.
    vjp : VJP, optional
        That of `inner` if not given.

    For `hessian` and `hessian_vector_product`. In `solve` and `gradient` it is its inner algorithm.

    Raises
    ------
    InputError
        `inner` is not a sensitivity algorithm.

    References: Ozyurt and Barton 2005, SIAM J. Sci. Comput. 26, section 2.
    """

    inner: Any = None
    vjp: Any = field(default=None, kw_only=True)

    second_order: ClassVar[bool] = True
    order: ClassVar[int] = 2
    references: ClassVar[tuple[str, ...]] = ("ozyurt2005",)

    def __post_init__(self) -> None:
        given = self.inner
        if repr(given) == "auto":
            object.__setattr__(self, "inner", None)
        elif given is not None and not isinstance(given, base.SensitivityAlgorithm):
            raise InputError(f"inner={given!r} is not a sensitivity algorithm", "it is the adjoint to differentiate",
                             "ForwardOverAdjoint(RecursiveCheckpointAdjoint())")
        if self.vjp is None and isinstance(self.inner, base.SensitivityAlgorithm):
            object.__setattr__(self, "vjp", self.inner.vjp)

    @property
    def adjoint(self) -> Any:
        """The inner algorithm in use."""
        return RecursiveCheckpointAdjoint() if self.inner is None else self.inner

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return bool(self.adjoint.exact)

    @property
    def events(self) -> bool:  # type: ignore[override]
        return bool(self.adjoint.events)

    @property
    def kinds(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self.adjoint.kinds) & {"ode", "steady"}

    @property
    def algebraic(self) -> bool:  # type: ignore[override]
        return bool(self.adjoint.algebraic)

    def work(self, w: Work) -> Effort | None:
        return self.adjoint.work(w)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(self.adjoint.needs)

    @property
    def restarts(self) -> bool:  # type: ignore[override]
        return bool(self.adjoint.restarts)

    def refuse(self, run: Run) -> None:
        if not self.adjoint.second_order:
            raise base.unsupported(self.name, f"inner={self.adjoint.name}()",
                                   "ForwardOverAdjoint(RecursiveCheckpointAdjoint()), or ReversibleAdjoint() or a "
                                   "continuous adjoint inside")
        self.adjoint.refuse(run)

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> Any:
        return self.adjoint.forward(run, x, wanted)

    def reverse(self, run: Run, residuals: Any, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        return self.adjoint.reverse(run, residuals, ct, wanted)

    def tangent(self, run: Run, residuals: Any, d: base.Tangents) -> Array:
        return self.adjoint.tangent(run, residuals, d)
