"""Products with the derivatives of `f` that users write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .backend import Array
from .errors import UnsupportedCombination
from .integrate import Run
from .sparsity import Pattern, by_rows
from .system import Inputs
from .vjp import VJP, FiniteDifferenceVJP, Pull, Push


class UserVJP(VJP):
    """Products given with the problem: `vjp` (or `jac` and `paramjac`) and `jvp`."""

    def missing(self, run: Run) -> str | None:
        given = run.products
        if given.vjp is not None or (given.jac is not None and (given.paramjac is not None or not run.field.p.count)):
            return None
        return "the problem carries neither vjp nor jac and paramjac"

    def pullback(self, run: Run, x: Inputs, *, time: bool = False, params: bool = True) -> Pull:
        be, prob, field = run.be, run.products, run.field
        if field.captured:
            raise UnsupportedCombination("UserVJP cannot reach what f closes over",
                                         "the problem's vjp covers u and p only", "pass these values through p")
        p = field.p.join(be, x.theta[:field.p.count], x.constants)
        in_time = FiniteDifferenceVJP().pullback(run, x, time=True, params=False) if time else None
        own, rest = x.theta[:field.p.count], be.zeros(x.theta[field.p.count:])
        opened, closed, cotangents = field.u.opener(be), field.u.closer(be), field.p.cotangents(be)

        def pull(t: Any, u: Array, ct: Array) -> tuple[Array, tuple[Array, ...], Any]:
            state = opened(u)
            if prob.vjp is not None:
                u_bar, p_bar = prob.vjp(t, state, p, opened(ct))
                u_bar, theta_bar = closed(u_bar), cotangents(p_bar)
            else:
                u_bar = ct @ prob.jac(t, state, p)
                theta_bar = be.split(ct @ prob.paramjac(t, state, p), own) if own else ()
            return u_bar, (*theta_bar, *rest) if params else (), in_time(t, u, ct)[2] if in_time else 0.0

        return pull

    def entries(self, run: Run, x: Inputs, pattern: Pattern) -> Callable[[Any, Array], Array]:
        if run.products.jvp is not None:
            return super().entries(run, x, pattern)
        be, pull = run.be, self.pullback(run, x, params=False)
        return by_rows(be, pattern, lambda t, u, rows: be.gathered(
            be.scan(lambda _, x: (0, pull(t, u, x[0])[0]), 0, (rows,))[1]))

    def pushforward(self, run: Run, x: Inputs, d_theta: tuple[Array, ...]) -> Push:
        be, prob, field = run.be, run.products, run.field
        rhs = field.bind(be, x.theta, x.constants)
        own = field.p.count
        p = field.p.join(be, x.theta[:own], x.constants)
        numeric = FiniteDifferenceVJP().pushforward(run, x, be.zeros(d_theta))
        opened, closed = field.u.opener(be), field.u.closer(be)

        def push(t: Any, u: Array, du: Array, dt: Any) -> tuple[Array, Array]:
            f = rhs(t, u)
            state = opened(u)
            m = du.shape[0]
            if prob.jvp is not None:
                rows = []
                for i in range(m):
                    d_p = field.p.join(be, [v[i, ...] for v in d_theta[:own]], x.constants)
                    rows.append(closed(prob.jvp(t, state, p, opened(du[i, :]), d_p)))
                df = be.xp.stack(rows)
            elif prob.jac is not None and (prob.paramjac is not None or not own):
                df = du @ prob.jac(t, state, p).T
                if own:
                    flat = be.xp.concat([be.xp.reshape(v, (m, -1)) for v in d_theta[:own]], axis=1)
                    df = df + flat @ prob.paramjac(t, state, p).T
            else:
                df = _rows(be, self.pullback(run, x), t, u, du, d_theta)
            if dt is not None:
                df = df + numeric(t, u, 0.0 * du, dt)[1]
            return f, df

        return push


def _rows(be: Any, pull: Pull, t: Any, u: Array, du: Array, d_theta: tuple[Array, ...]) -> Array:
    """Forward products from reverse ones: one pullback per output."""
    columns = []
    for j in range(u.shape[0]):
        u_bar, theta_bar, _ = pull(t, u, be.unit_rows(1, u.shape[0], -j, u)[0, :])
        column = du @ u_bar
        for d, bar in zip(d_theta, theta_bar, strict=True):
            column = column + be.xp.reshape(d, (d.shape[0], -1)) @ be.xp.reshape(bar, (-1,))
        columns.append(column)
    return be.xp.stack(columns, axis=1)
