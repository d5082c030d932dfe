"""States of a differential-algebraic equation at given times, made consistent, and the derivatives of that.

Between its steps a method knows the algebraic variables less well than the constraints do: an ESDIRK method of order 5
has stages of order 2 only. So the state at a save time is that of the dense output moved along the null space of M onto
the constraints, as the start is (`Stepper.start`), and `start_vjp`, `start_jvp` are the derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..backend import Array
from ..integrate import Span, State
from ..mass import LARGEST_CONDITION
from ..retcode import RetCode
from ..stepper import Stepper

LOOKS = 2  # Jacobians, factorisations and solves that `judged` takes


def states(be: Any, stepper: Stepper, ts: Any, rows: Array) -> tuple[Array, Any]:
    """The consistent states, `(k, n)`, and how many iterations they took."""

    def one(spent: Any, x: tuple) -> tuple[Any, Array]:
        u, count = stepper.start(be.time(x[0]), x[1])
        return spent + count, u

    spent, out = be.scan(one, 0, (ts, rows))
    return be.gathered(out), spent


def judged(be: Any, stepper: Any, s: Span, given: Array, start: Array, end: State, smooth: bool) -> State:
    """The end of a solve, with `RetCode.IndexTooHigh` where the constraints ceased to determine the algebraic
    variables, and in place of an error how large `|B^-1|` is beside `1 / |W^T f_u|`, or to what it grew, for
    `B = W^T f_u V`.

    A failure is put down to that if B came down by `eps^(1/4)` since the start: a turning point at a distance d in time
    has `B = O(sqrt(d))`, and steps end at d of some eps. A solve that came through went across a singular B if det B
    changed its sign; `smooth` says that B had no jumps. Where no start was found the `given` one is looked at.
    """
    xp = be.xp
    start = be.choose(be.isfinite(be.rms(start)), start, given)
    last = be.choose(be.isfinite(be.rms(end.u)), end.u, start)

    def look(_: int, x: tuple) -> tuple[int, Array]:
        return 0, be.vector(list(stepper.regularity(be.time(x[0]), x[1])), start)

    _, rows = be.scan(look, 0, (be.scalars([s.t0, end.t]), xp.stack([start, last])))
    before, after = ([be.scalar(row[k]) for k in range(3)] for row in be.gathered(rows))
    lost = after[0] < be.eps(start.dtype) ** 0.25 * before[0]
    singular = after[1] * LARGEST_CONDITION < 1.0
    crossed = (before[2] * after[2] < 0.0) & smooth
    failed = (end.status >= int(RetCode.MaxSteps)) & (end.status <= int(RetCode.NewtonFailure))
    bad = (failed & (lost | singular)) | ((end.status == int(RetCode.Success)) & (singular | crossed))
    regular = after[1] > 0.0
    condition = be.greatest(1.0 / be.choose(regular, after[1], 1.0), before[0] / be.choose(regular, after[0], 1.0))
    return end._replace(status=be.choose(bad, int(RetCode.IndexTooHigh), end.status),
                        ratio=be.choose(bad, be.choose(regular, condition, math.inf), end.ratio))


def complete(be: Any, rows: Array, end: State) -> State:
    """The end of a solve, failed where it was reached but a state could not be made consistent."""
    whole = be.isfinite(be.rms(be.xp.reshape(rows, (-1,))))
    reached = end.status == int(RetCode.Success)
    return end._replace(status=be.choose(reached, be.choose(whole, end.status, int(RetCode.IndexTooHigh)), end.status))


def worked(stepper: Stepper, made: tuple[Any, Any, Any], spent: Any) -> tuple[Any, Any, Any]:
    """Jacobians, factorisations and solves with those of consistent states and of `judged`."""
    looks = LOOKS * int(stepper.algebraic)
    matrices = spent * stepper.matrices + looks
    return made[0] + matrices, made[1] + matrices, made[2] + spent + looks


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
