"""Parameters that events change, carried as part of the state.

With `affect(t, u, p) -> (u, p)` the parameters are piecewise constant. So the solve integrates `z = (u, q)` with
`q' = 0`, `q(t0) = p`, and an affect is a jump of z. Whatever an algorithm does for `u0` then serves `p`: the cotangent
of `q(t0)` is that of `p`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..backend import Array
from ..events import changes_parameters
from ..integrate import Run
from ..system import Field, Inputs, Layout, Partition, Products
from . import base


class Carrying(NamedTuple):
    """Residuals of a solve with carried parameters."""

    x: Inputs
    inner: Any


@dataclass(frozen=True)
class CarriedAlgorithm(base.SensitivityAlgorithm):
    """Another algorithm, on the state with the parameters."""

    inner: Any = None

    @property
    def name(self) -> str:
        return self.inner.name

    def plain(self, run: Run, x: Inputs) -> tuple[base.Outputs, base.Aux]:
        out, aux = self.inner.plain(_extended(run), _joined(run, x))
        return _own(x, out), aux

    def forward(self, run: Run, x: Inputs, wanted: frozenset[str]) -> tuple[base.Outputs, base.Aux, Carrying]:
        out, aux, residuals = self.inner.forward(_extended(run), _joined(run, x), wanted | {"u0"})
        return _own(x, out), aux, Carrying(x, residuals)

    def reverse(self, run: Run, residuals: Carrying, ct: base.Outputs, wanted: frozenset[str]) -> base.Cotangents:
        be, x = run.be, residuals.x
        n, k = x.u0.shape[0], run.field.p.count
        size = sum(base.size_of(v) for v in x.theta[:k])
        wide = base.Outputs(*(v if v is None or v.ndim == 1 else _padded(be, v, size) for v in ct))
        bar = self.inner.reverse(_extended(run), residuals.inner, wide, wanted | {"u0"})
        theta = bar.theta
        if theta:
            theta = (*be.split(bar.u0[n:], x.theta[:k]), *theta[k:])
        return bar._replace(u0=bar.u0[:n], theta=theta)

    def tangent(self, run: Run, residuals: Carrying, d: base.Tangents) -> Any:
        xp = run.be.xp
        x, k = residuals.x, run.field.p.count
        rows = [d.u0, *(xp.astype(xp.reshape(v, (d.u0.shape[0], -1)), d.u0.dtype) for v in d.theta[:k])]
        moved = self.inner.tangent(_extended(run), residuals.inner, d._replace(u0=xp.concat(rows, axis=1)))
        return _own(x, moved) if isinstance(moved, base.Outputs) else moved[..., :x.u0.shape[0]]


def carrying(algorithm: Any, run: Run) -> Any:
    """The algorithm itself, or the same for a state that carries the parameters."""
    return CarriedAlgorithm(inner=algorithm) if run.carried else algorithm


def _padded(be: Any, rows: Array, size: int) -> Array:
    more = be.xp.zeros((*rows.shape[:-1], size), dtype=rows.dtype, device=be.device(rows))
    return be.xp.concat([rows, more], axis=-1)


def _own(x: Inputs, out: base.Outputs) -> base.Outputs:
    """Outputs without the parameters; event times are the only ones without a state axis."""
    n = x.u0.shape[0]
    u, nodes, stages, event_u = (None if v is None else v[..., :n] for v in (out.u, out.nodes, out.stages, out.event_u))
    return base.Outputs(u, nodes, stages, out.event_t, event_u)


def _joined(run: Run, x: Inputs) -> Inputs:
    xp = run.be.xp
    flat = [xp.astype(xp.reshape(v, (-1,)), x.u0.dtype) for v in x.theta[:run.field.p.count]]
    return x._replace(u0=xp.concat([x.u0, *flat]), atol=_wide(run, x, x.atol), rtol=_wide(run, x, x.rtol))


def _wide(run: Run, x: Inputs, tolerance: Any) -> Any:
    """A tolerance for each entry of the state, with ones behind it for the parameters, which never change."""
    if getattr(tolerance, "ndim", 0) == 0:
        return tolerance
    size = sum(base.size_of(v) for v in x.theta[:run.field.p.count])
    more = run.be.xp.ones((size,), dtype=tolerance.dtype, device=run.be.device(tolerance))
    return run.be.xp.concat([tolerance, more])


def _extended(run: Run) -> Run:
    be, f = run.be, run.field
    n = f.u.size
    _, structure = be.flatten((be.unflatten(f.u.structure, [0.0] * len(f.u.shapes)), [0.0] * f.p.count))
    layout = Layout(structure, f.u.shapes + run.carried)
    own = Carried(be, f)
    events = tuple(replace(e, condition=_function(own, "condition", e.condition),
                           affect=_function(own, "affect", e.affect)) for e in run.events)
    norm = run.norm or be.rms
    given = run.products
    vjp = given.vjp or (_FromJacobians(own, given.jac, given.paramjac) if given.jac and given.paramjac else None)
    products = Products(own.bound("vjp", vjp), own.bound("jvp", given.jvp))
    return replace(run, field=Field(own.bound("field", f.f), layout, f.p, f.captured), events=events, products=products,
                   norm=_OwnNorm(norm, n), carried=())


def _function(own: Carried, role: str, given: Any) -> Any:
    return None if given is None else (own.bound(role, given[0]), *given[1:])


@dataclass(frozen=True)
class Carried:
    """What parameters carried in the state look like to the user's functions."""

    be: Any = dataclasses.field(compare=False)
    field: Field

    @property
    def p(self) -> Partition:
        return self.field.p

    def bound(self, role: str, function: Any) -> Any:
        return None if function is None else _Bound(self, role, function)

    def parameters(self, p: Any, leaves: Any) -> Any:
        """`p` with other values of what is differentiable in it."""
        constants = [v for v, role in zip(self.be.flatten(p)[0], self.p.roles, strict=True) if role == "constant"]
        return self.p.join(self.be, leaves, constants)

    def leaves(self, p: Any) -> list[Any]:
        """The differentiable leaves of `p`."""
        return [v for v, role in zip(self.be.flatten(p)[0], self.p.roles, strict=True) if role == "theta"]


@dataclass(frozen=True)
class _OwnNorm:
    """An error norm that sees the state only."""

    norm: Any
    size: int

    def __call__(self, e: Array) -> Any:
        return self.norm(e[:self.size])


@dataclass(frozen=True)
class _FromJacobians:
    """`vjp(t, u, p, lam)` from `jac` and `paramjac`."""

    own: Carried
    jac: Any
    paramjac: Any

    def __call__(self, t: Any, u: Any, p: Any, lam: Any) -> Any:
        own, be, layout = self.own, self.own.be, self.own.field.u
        flat = layout.ravel(be, be.flatten(lam)[0])
        u_bar = be.unflatten(layout.structure, layout.unravel(be, flat @ self.jac(t, u, p)))
        return u_bar, own.parameters(p, be.split(flat @ self.paramjac(t, u, p), tuple(own.leaves(p))))


@dataclass(frozen=True)
class _Bound:
    """A user's function of `(t, u, p)` as one of `(t, (u, q), p)`."""

    own: Carried
    role: str
    function: Any

    def __call__(self, t: Any, z: Any, p: Any, *rest: Any) -> Any:
        u, leaves = z
        own, q = self.own, self.own.parameters(p, leaves)
        if self.role == "vjp":
            u_bar, p_bar = self.function(t, u, q, rest[0][0])
            return (u_bar, own.leaves(p_bar)), own.parameters(p, [0.0 * v for v in leaves])
        if self.role == "jvp":
            return self.function(t, u, q, rest[0][0], own.parameters(p, rest[0][1])), [0.0 * v for v in leaves]
        out = self.function(t, u, q, *rest)
        if self.role == "condition":
            return out
        if self.role == "field":
            return out, [0.0 * v for v in leaves]
        if changes_parameters(out, u):
            return out[0], own.leaves(out[1])
        return out, leaves
