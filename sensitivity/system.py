"""The user's vector field as a function of flat vectors; the only caller of user code inside a solve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .backend import Array, Backend, Tree


@dataclass(frozen=True)
class Layout:
    """How a pytree of arrays lies in one vector."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return sum(math.prod(s) for s in self.shapes)

    def ravel(self, be: Backend, leaves: Sequence[Array], batch: int = 0) -> Array:
        """One vector from leaves; the first `batch` axes are kept."""
        xp = be.xp
        flat = [x if x.ndim == batch + 1 else xp.reshape(x, (*x.shape[:batch], -1)) for x in leaves]
        return flat[0] if len(flat) == 1 else xp.concat(flat, axis=batch)

    def unravel(self, be: Backend, vector: Array) -> list[Array]:
        """Leaves from a vector; leading axes beyond the last one are kept."""
        lead = tuple(vector.shape[:-1])
        if len(self.shapes) == 1:
            return [vector if len(self.shapes[0]) == 1 else be.xp.reshape(vector, lead + self.shapes[0])]
        leaves, start = [], 0
        for shape in self.shapes:
            stop = start + math.prod(shape)
            leaves.append(be.xp.reshape(vector[..., start:stop], lead + shape))
            start = stop
        return leaves

    def bare(self, be: Backend) -> bool:
        """Whether the tree is one array, not a container."""
        marker = object()
        return len(self.shapes) == 1 and be.unflatten(self.structure, [marker]) is marker

    def opener(self, be: Backend) -> Callable[[Array], Tree]:
        """`vector -> tree`, without a walk where the tree is one array."""
        if self.bare(be):
            (shape,), reshape = self.shapes, be.xp.reshape
            return (lambda v: v) if len(shape) == 1 else lambda v: reshape(v, shape)
        return lambda v: be.unflatten(self.structure, self.unravel(be, v))

    def closer(self, be: Backend) -> Callable[[Tree], Array]:
        """`tree -> vector`, likewise."""
        bare, reshape = self.bare(be), be.xp.reshape

        def close(tree: Tree) -> Array:
            if bare and be.is_array(tree):
                return tree if tree.ndim == 1 else reshape(tree, (-1,))
            return self.ravel(be, be.flatten(tree)[0])

        return close


@dataclass(frozen=True)
class Partition:
    """Which leaves of `p` are differentiable arrays, other arrays, and plain objects."""

    structure: Any
    roles: tuple[str, ...]
    objects: tuple[Any, ...]

    @classmethod
    def of(cls, be: Backend, tree: Tree) -> tuple[Partition, tuple[Array, ...], tuple[Array, ...]]:
        """`(partition, differentiable arrays, other arrays)`; Python floats count as arrays."""
        leaves, structure = be.flatten(tree)
        roles, objects, theta, constants = [], [], [], []
        for x in leaves:
            if isinstance(x, float | complex) and not be.is_array(x):
                x = be.asarray(x, dtype=be.default_float() if isinstance(x, float) else None)
            if not be.is_array(x):
                roles.append("object")
                objects.append(x)
            elif be.is_float(x):
                roles.append("theta")
                theta.append(x)
            else:
                roles.append("constant")
                constants.append(x)
        return cls(structure, tuple(roles), tuple(objects)), tuple(theta), tuple(constants)

    def join(self, be: Backend, theta: Sequence[Any], constants: Sequence[Any]) -> Tree:
        sources = {"theta": iter(theta), "constant": iter(constants), "object": iter(self.objects)}
        return be.unflatten(self.structure, [next(sources[r]) for r in self.roles])

    @property
    def count(self) -> int:
        return self.roles.count("theta")

    def cotangents(self, be: Backend) -> Callable[[Tree], tuple[Array, ...]]:
        """From a tree shaped as `p` the leaves that are differentiable, without a walk where `p` is one array."""
        marker = object()
        bare = self.roles == ("theta",) and be.unflatten(self.structure, [marker]) is marker

        def leaves(tree: Tree) -> tuple[Array, ...]:
            if bare and be.is_array(tree):
                return (tree,)
            return tuple(v for v, r in zip(be.flatten(tree)[0], self.roles, strict=True) if r == "theta")

        return leaves


@dataclass(frozen=True)
class Products:
    """Derivatives that the user gave with the problem; see `ODEProblem`.

    With a nonsingular mass matrix they are made those of `M^-1 f`; `undivided` are the given ones.
    """

    vjp: Any = None
    jvp: Any = None
    jac: Any = None
    paramjac: Any = None
    sparsity: Any = field(default=None, compare=False)
    undivided: Any = None


class Inputs(NamedTuple):
    """Everything arrays of one solve; the first five groups are differentiable.

    `theta` holds the differentiable leaves of `p`, then what `f` closes over, then what events need.
    """

    u0: Array
    theta: tuple[Array, ...]
    t0: Any
    t1: Any
    saveat: Any
    constants: tuple[Array, ...]
    rtol: Any
    atol: Any


@dataclass(frozen=True)
class Field:
    """`f` on flat vectors: `field.bind(be, theta, constants)` gives `rhs(t, u) -> du`.

    `f` closes over `captured` arrays, which follow the parameters in `theta`.
    `mass` is a nonsingular mass matrix that the right-hand side is divided by.
    """

    f: Callable[..., Any]
    u: Layout
    p: Partition
    captured: int = 0
    mass: Any = None

    def bind(self, be: Backend, theta: tuple[Array, ...],
             constants: tuple[Array, ...]) -> Callable[[Any, Array], Array]:
        rhs = self._bind(be, theta, constants)
        return rhs if self.mass is None else self.mass.divide(be, rhs)

    def _bind(self, be: Backend, theta: tuple[Array, ...],
              constants: tuple[Array, ...]) -> Callable[[Any, Array], Array]:
        k = self.p.count
        p, captured, f = self.p.join(be, theta[:k], constants), theta[k:k + self.captured], self.f
        if self.u.bare(be):
            (shape,) = self.u.shapes
            if len(shape) == 1:
                return (lambda t, u: f(t, u, p, *captured)) if captured else (lambda t, u: f(t, u, p))
            reshape = be.xp.reshape
            return lambda t, u: reshape(f(t, reshape(u, shape), p, *captured), (-1,))
        opened = self.u.opener(be)
        return lambda t, u: self.u.ravel(be, be.flatten(f(t, opened(u), p, *captured))[0])

    def state(self, be: Backend, u: Array) -> Tree:
        """The state as `f` receives it."""
        return be.unflatten(self.u.structure, self.u.unravel(be, u))

    def argument(self, be: Backend, t: Any) -> Any:
        """What `rhs` takes as its first argument at time `t`."""
        return be.time(t)
