"""Derivatives along directions for backends without forward mode: central differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .loops import Loops
from .records import Array, Scalar


class Directional(Loops):
    """Differences of what loops evaluate; a part of `Backend`."""

    eps: Any
    default_float: Any
    rms: Any

    def directional(self, g: Callable[[Scalar], tuple], size: Scalar) -> tuple:
        """Derivative at 0 of a tuple of arrays `g(e)`: here by central differences, for a direction of this size."""
        e = self.eps(self.default_float()) ** (1 / 3) / self.choose(size > 0.0, size, 1.0)
        return tuple((a - b) / (2.0 * e) for a, b in zip(g(e), g(-e), strict=True))

    def bent(self, pull: Callable, t: Any, u: Array, rows: tuple[Array, Array, Array], state: tuple,
             add: Callable) -> tuple:
        """`state`, cotangents of u, of the parameters and of t, with `sum_i d/de pull(t + e d_i, u + e k_i, w_i)` at 0
        added, for rows `d`, `k` and `w`; `add` as in `Stepper.vjp`."""
        size, least = self.spans(u, rows[1])

        def along(state: tuple, x: tuple) -> tuple[tuple, int]:
            lam, theta, moved = state
            d_i, k_i, w = x

            def flat(e: Scalar) -> tuple:
                u_bar, theta_bar, t_bar = pull(t + e * d_i, u + e * k_i, w)
                return u_bar, *theta_bar, t_bar

            u_bar, *theta_bar, t_bar = self.directional(flat, (self.rms(k_i) + least) / size)
            return (lam + u_bar, add(theta, tuple(theta_bar), t, u), moved + t_bar), 0

        return self.scan(along, state, rows)[0]

    def spans(self, u: Array, K: Array) -> tuple[Scalar, Scalar]:
        """The size of a state, 1 for zero, and of the least direction of some to be told from rounding."""
        size = self.rms(u)
        return self.choose(size > 0.0, size, 1.0), 1e-3 * self.rms(self.xp.reshape(K, (-1,)))
