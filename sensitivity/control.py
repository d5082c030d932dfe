"""Step-size controllers: `init()` and `propose(be, ratio, memory) -> keep, factor, memory`.

`ratio` is the error norm in units of the tolerance; a step is kept when it is at most 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PIController:
    """Proportional-integral control (Hairer, Norsett, Wanner I, II.4; Gustafsson 1991).

    After an accepted step `factor = safety ratio^(-1/k + 3/4 beta) previous^beta` with k the order of the
    error estimate plus one, within `[factor_min, factor_max]`; never above 1 after a rejection.
    """

    safety: float = 0.9
    beta: float = 0.04
    factor_min: float = 0.2
    factor_max: float = 10.0

    adaptive = True

    def init(self) -> float:
        return 1e-4

    def propose(self, be: Any, ratio: Any, memory: Any, k: int) -> tuple[Any, Any, Any]:
        finite = be.isfinite(ratio)
        keep = ratio <= 1.0
        r = be.greatest(be.choose(finite, ratio, 1e10), 1e-10)
        grow = self.safety * r ** (0.75 * self.beta - 1.0 / k) * memory**self.beta
        shrink = self.safety * r ** (0.75 * self.beta - 1.0 / k)
        factor = be.choose(keep, be.least(grow, self.factor_max), be.least(shrink, 1.0))
        return keep, be.greatest(factor, self.factor_min), be.choose(keep, be.greatest(r, 1e-4), memory)


@dataclass(frozen=True)
class FixedStep:
    """Every step has size `dt`; the last one is shortened to land on `t1`."""

    adaptive = False

    def init(self) -> float:
        return 1.0

    def propose(self, be: Any, ratio: Any, memory: Any, k: int) -> tuple[Any, Any, Any]:
        del be, ratio, k
        return True, 1.0, memory
