"""States of a differential-algebraic equation at given times, made consistent, and the derivatives of that.

Between its steps a method knows the algebraic variables less well than the constraints do: an ESDIRK method of order 5
has stages of order 2 only. So the state at a save time is that of the dense output moved along the null space of M onto
the constraints, as the start is (`Stepper.start`), and `start_vjp`, `start_jvp` are the derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Array
from ..stepper import Stepper


def states(be: Any, stepper: Stepper, ts: Any, rows: Array) -> tuple[Array, Any]:
    """The consistent states, `(k, n)`, and how many iterations they took."""

    def one(spent: Any, x: tuple) -> tuple[Any, Array]:
        u, count = stepper.start(be.time(x[0]), x[1])
        return spent + count, u

    spent, out = be.scan(one, 0, (ts, rows))
    return be.gathered(out), spent


def pulled(be: Any, stepper: Stepper, pull: Callable, theta: tuple[Array, ...], ts: Any, u: Array,
           ct: Array) -> tuple[tuple[Array, ...], Array, Any]:
    """`theta` with what the cotangents give to the parameters, those of the dense output, and those of the times."""

    def one(theta: tuple, x: tuple) -> tuple[tuple, tuple]:
        t, u, bar = x
        u_bar, theta_bar, t_bar = stepper.start_vjp(pull, be.time(t), u, bar)
        return be.add(theta, theta_bar), (u_bar, t_bar)

    theta, found = be.scan(one, theta, (ts, u, ct))
    rows, ts_bar = zip(*found, strict=True) if isinstance(found, list) else found
    return theta, be.gathered(rows), ts_bar


def pushed(be: Any, stepper: Stepper, push: Callable, ts: Any, u: Array, du: Array, dts: Array | None) -> Array:
    """Tangents `(m, k, n)` of the consistent states, from those of the dense output and of the times."""
    xp = be.xp
    along = xp.permute_dims(du, (1, 0, 2))
    moves = 0.0 * along[:, :, 0] if dts is None else dts.T

    def one(_: Any, x: tuple) -> tuple[Any, Array]:
        t, u, du, dt = x
        return 0, stepper.start_jvp(push, be.time(t), u, du, None if dts is None else dt)

    _, rows = be.scan(one, 0, (ts, u, along, moves))
    return xp.permute_dims(be.gathered(rows), (1, 0, 2))
