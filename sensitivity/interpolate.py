"""Dense output of one step, its transpose, and its derivative in time.

With `x = (t - t_n) / h`: `u(t) = u_n + h sum_i b_i(x) k_i` and `u'(t) = sum_i b_i'(x) k_i`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from .backend import Array, Contribution, Record, Scalar
from .tableaus import Tableau


@cache
def _weights(tab: Tableau) -> tuple[tuple[float, ...], ...]:
    assert tab.dense is not None
    return tuple((0.0, *row) for row in tab.dense)


@cache
def _slopes(tab: Tableau) -> tuple[tuple[float, ...], ...]:
    assert tab.dense is not None
    return tuple(tuple((k + 1) * d for k, d in enumerate(row)) for row in tab.dense)


def weights_at(be: Any, tab: Tableau, x: Any, like: Array) -> tuple[Array, Array]:
    """`b_i(x)` and `b_i'(x)` as matrices, one row per point."""
    return be.poly(_weights(tab), x, like), be.poly(_slopes(tab), x, like)


def interpolant(be: Any, tab: Tableau) -> Callable[[Record, Any], Array]:
    """`interpolate(record, ts) -> (len(ts), n)`."""
    weights = _weights(tab)

    def interpolate(record: Record, ts: Any) -> Array:
        t, h, u, k = record
        x = [(s - t) / h for s in ts]
        return be.blended(u, h, be.poly(weights, x, u), k)

    return interpolate


def slope(be: Any, tab: Tableau) -> Callable[[Record, Any], Array]:
    """`slope(record, ts) -> (len(ts), n)`, the derivative of the dense output in time."""
    slopes = _slopes(tab)

    def derivative(record: Record, ts: Any) -> Array:
        t, h, u, k = record
        return be.poly(slopes, [(s - t) / h for s in ts], u) @ k

    return derivative


def transpose(be: Any, tab: Tableau, time: bool) -> Callable[[Record, Any, Array], tuple[Contribution, list[Scalar]]]:
    """Pullback of `interpolant` for one step: `(record, ts, ct) -> (Contribution, ct of ts)`.

    With frozen `t_n`, `d u(t)/dt = u'(t)` and `d u(t)/dh = sum_i (b_i(x) - x b_i'(x)) k_i`.
    """
    weights, slopes = _weights(tab), _slopes(tab)

    def pull(record: Record, ts: Any, ct: Array) -> tuple[Contribution, list[Scalar]]:
        t, h, u, k = record
        x = [(s - t) / h for s in ts]
        w = be.poly(weights, x, u)
        u_bar, k_bar = be.blended_vjp(h, w, ct)
        if not time:
            return Contribution(u_bar, k_bar, 0.0), [0.0] * len(ts)
        v, d = w @ k, be.poly(slopes, x, u) @ k
        t_bar = [be.dot(ct[i, :], d[i, :]) for i in range(len(ts))]
        h_bar = start_bar = 0.0
        for i, x_i in enumerate(x):
            h_bar = h_bar + be.dot(ct[i, :], v[i, :]) - x_i * t_bar[i]
            start_bar = start_bar - t_bar[i]
        return Contribution(u_bar, k_bar, h_bar, start_bar), t_bar

    return pull
