"""How products with the derivatives of `f` are made: `pullback` for reverse mode, `pushforward` for forward mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from .backend import Array, Backend
from .errors import UnsupportedCombination
from .integrate import Run
from .jacobian import compressed_differences, sizes
from .sparsity import Pattern, by_columns, by_rows
from .system import Inputs

MATRIX = 2000  # entries of a state whose unit vectors are kept as a matrix
Pull = Callable[[Any, Array, Array], tuple[Array, tuple[Array, ...], Any]]
At = Callable[[Any, Array], tuple[Array, Callable[[Array], tuple[Array, tuple[Array, ...], Any]]]]
Push = Callable[[Any, Array, Array, Any], tuple[Array, Array]]


def _bound(run: Run, x: Inputs) -> Callable[[tuple[Array, ...]], Callable]:
    return lambda theta: run.field.bind(run.be, theta, x.constants)


def _through(run: Run, x: Inputs) -> Callable[[tuple[Array, ...]], Callable]:
    """As `_bound`, for functions that the framework's AD runs through, reshapes and concatenations included."""
    be = run.be.differentiable()
    return lambda theta: run.field.bind(be, theta, x.constants)


@dataclass(frozen=True)
class VJP:
    """Base of the VJP choices.

    `transposes` says that a transposed product costs about as much as one evaluation of `f`, not one per entry of `u`;
    `numeric` that products are differences; `devices` where they are made.
    """

    transposes: ClassVar[bool] = True
    numeric: ClassVar[bool] = False
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "gpu"})

    @property
    def name(self) -> str:
        return type(self).__name__

    def missing(self, run: Run) -> str | None:
        """Why this choice cannot serve here, or None."""
        return None

    def unused(self, run: Run) -> str | None:
        """What was asked for and changes nothing here, in a sentence, or None."""
        return None

    def refuse(self, run: Run, algorithm: Any) -> None:
        """Raise `UnsupportedCombination` where this choice does not go with the algorithm."""

    def pullback(self, run: Run, x: Inputs, *, time: bool = False, params: bool = True) -> Pull:
        """`pull(t, u, ct) -> (f_u^T ct, f_p^T ct, f_t . ct)`; the last is 0.0 unless `time`, the second () unless
        `params`."""
        raise NotImplementedError

    def value_and_pullback(self, run: Run, x: Inputs, *, time: bool = False, params: bool = True) -> At:
        """`at(t, u) -> (f, pull)` with `pull(ct)` as in `pullback`, for when the value is needed before the product."""
        rhs, pull = run.field.bind(run.be, x.theta, x.constants), self.pullback(run, x, time=time, params=params)
        return lambda t, u: (rhs(t, u), lambda ct: pull(t, u, ct))

    def extra(self, run: Run) -> int:
        """Evaluations of `f` that `value_and_pullback` makes beside its product."""
        del run
        return 1

    def pushforward(self, run: Run, x: Inputs, d_theta: tuple[Array, ...]) -> Push:
        """`push(t, u, du, dt) -> (f, f_u du + f_p d_theta + f_t dt)`, one row per direction."""
        raise NotImplementedError

    def jacobian(self, run: Run, x: Inputs) -> Callable[[Any, Array], Array]:
        """`jac(t, u) -> f_u`, shape `(n, n)`: one product for each row."""
        pull, n = self.pullback(run, x, params=False), run.field.u.size
        units = run.be.unit_rows(n, n, 0, x.u0)
        return lambda t, u: run.be.xp.stack([pull(t, u, units[i, :])[0] for i in range(n)])

    def entries(self, run: Run, x: Inputs, pattern: Pattern) -> Callable[[Any, Array], Array]:
        """`entries(t, u)`: those of `f_u` in the places of a pattern, one product for each colour."""
        return by_columns(run.be, pattern, self.pushes(run, x))

    def pushes(self, run: Run, x: Inputs) -> Callable[[Any, Array, Array], Array]:
        """`push(t, u, rows)`: products of `f_u` with the rows, while parameters stay still."""
        be = run.be

        def push(t: Any, u: Array, rows: Array) -> Array:
            still = tuple(be.xp.zeros((rows.shape[0], *v.shape), dtype=v.dtype, device=be.device(v)) for v in x.theta)
            return self.pushforward(run, x, still)(t, u, rows, None)[1]

        return push


@dataclass(frozen=True)
class ReverseVJP(VJP):
    """The framework's reverse mode (and its forward mode for tangents).

    Parameters
    ----------
    compile : bool
        On PyTorch, compile the steps and the reverse pass of `RecursiveCheckpointAdjoint`, once for each `f` and
        shape; it takes a C++ compiler and tens of seconds. JAX always compiles, and NumPy cannot, which a warning says.

    Raises
    ------
    UnsupportedCombination
        With `compile=True` on PyTorch: there is no C++ compiler, `f` has other than tensor operations, or the
        algorithm, the method or the problem has no compiled loops (budgets of memory, implicit methods, events, mass
        matrices, `norm`, `progress`, complex states, other devices, forward mode and second derivatives).
    """

    compile: bool = False

    def missing(self, run: Run) -> str | None:
        be = run.be
        return None if "reverse" in be.modes else f"the {be.name} backend has no reverse-mode AD" + be.how_to_get_ad

    def unused(self, run: Run) -> str | None:
        if not self.compile or run.be.traced or run.be.compiles:
            return None
        return f"compile=True of ReverseVJP changes nothing on {run.be.name}: its products are not compiled separately"

    def refuse(self, run: Run, algorithm: Any) -> None:
        if self.compile and run.be.compiles and (why := run.be.uncompiled(algorithm, run)):
            raise UnsupportedCombination("ReverseVJP(compile=True) cannot be used here", why, "vjp=ReverseVJP()")

    def pullback(self, run: Run, x: Inputs, *, time: bool = False, params: bool = True) -> Pull:
        return run.be.vjp(_through(run, x), x.theta, time=time, params=params)

    def value_and_pullback(self, run: Run, x: Inputs, *, time: bool = False, params: bool = True) -> At:
        return run.be.value_and_vjp(_through(run, x), x.theta, time=time, params=params)

    def extra(self, run: Run) -> int:
        return int(type(run.be).value_and_vjp is Backend.value_and_vjp)

    def pushforward(self, run: Run, x: Inputs, d_theta: tuple[Array, ...]) -> Push:
        return run.be.jvp(_through(run, x), x.theta, d_theta)

    def jacobian(self, run: Run, x: Inputs) -> Callable[[Any, Array], Array]:
        return run.be.jacobian(_through(run, x)(x.theta))

    def entries(self, run: Run, x: Inputs, pattern: Pattern) -> Callable[[Any, Array], Array]:
        """By columns or rows, whichever have fewer colours; an eager framework has one graph for all rows."""
        few = len(set(pattern.row_colours.tolist())) - len(set(pattern.column_colours.tolist()))
        if few < 0 or (few == 0 and not run.be.traced):
            return by_rows(run.be, pattern, run.be.pulls(_through(run, x)(x.theta)))
        return super().entries(run, x, pattern)

    def pushes(self, run: Run, x: Inputs) -> Callable[[Any, Array, Array], Array]:
        return _pushes(run, x)


class _Columns(VJP):
    """Reverse products from forward ones: `f_x^T ct` entry by entry, one direction per input."""

    transposes = False

    def pullback(self, run: Run, x: Inputs, *, time: bool = False, params: bool = True) -> Pull:
        be = run.be
        n = run.field.u.size
        theta = x.theta if params else ()
        sizes = [math.prod(v.shape) for v in theta]
        m = n + sum(sizes) + time
        du = be.unit_rows(m, n, 0, x.u0)
        seeds, start = [], n
        for v, size in zip(theta, sizes, strict=True):
            seeds.append(be.xp.reshape(be.unit_rows(m, size, start, v), (m, *v.shape)))
            start += size
        d_theta = tuple(seeds) if params else tuple(
            be.xp.reshape(be.unit_rows(m, math.prod(v.shape), m, v), (m, *v.shape)) for v in x.theta)
        dt = be.unit_rows(m, 1, m - 1, x.u0)[:, 0] if time else None
        push = self.pushforward(run, x, d_theta)

        def pull(t: Any, u: Array, ct: Array) -> tuple[Array, tuple[Array, ...], Any]:
            _, df = push(t, u, du, dt)
            g = df @ ct
            parts, at = [], n
            for v, size in zip(theta, sizes, strict=True):
                parts.append(be.xp.astype(be.xp.reshape(g[at:at + size], v.shape), v.dtype))
                at += size
            return g[:n], tuple(parts), be.scalar(g[m - 1]) if time else 0.0

        return pull

    def jacobian(self, run: Run, x: Inputs) -> Callable[[Any, Array], Array]:
        """All columns at once."""
        be, n = run.be, run.field.u.size
        units = be.unit_rows(n, n, 0, x.u0)
        still = tuple(be.xp.zeros((n, *v.shape), dtype=v.dtype, device=be.device(v)) for v in x.theta)
        push = self.pushforward(run, x, still)
        return lambda t, u: push(t, u, units, None)[1].T


class ForwardVJP(_Columns):
    """Columns of the Jacobians by the framework's forward mode; for few inputs, or where reverse mode fails."""

    def missing(self, run: Run) -> str | None:
        be = run.be
        return None if "forward" in be.modes else f"the {be.name} backend has no forward-mode AD" + be.how_to_get_ad

    def pushforward(self, run: Run, x: Inputs, d_theta: tuple[Array, ...]) -> Push:
        return run.be.jvp(_through(run, x), x.theta, d_theta)

    def jacobian(self, run: Run, x: Inputs) -> Callable[[Any, Array], Array]:
        return run.be.jacobian(_through(run, x)(x.theta))

    def pushes(self, run: Run, x: Inputs) -> Callable[[Any, Array, Array], Array]:
        return _pushes(run, x)


class FiniteDifferenceVJP(VJP):
    """Central differences with step `eps^(1/3)` times the size of what is moved: about nine digits in float64.

    The size of a parameter is its own (1 for a zero); that of a state entry is at least a thousandth of the largest.
    """

    transposes = False
    numeric = True

    def pullback(self, run: Run, x: Inputs, *, time: bool = False, params: bool = True) -> Pull:
        be, bound = run.be, _bound(run, x)
        xp = be.xp
        n, step = run.field.u.size, be.eps(x.u0.dtype) ** (1 / 3)
        rhs, units = bound(x.theta), be.unit_rows(n, n, 0, x.u0) if n <= MATRIX else None

        def moved(i: int, j: int) -> tuple[Any, Any, Any]:
            """The right-hand sides with entry j of leaf i moved up and down, and by how much they are apart."""
            v = x.theta[i]
            flat = xp.reshape(v, (-1,))
            unit = be.unit_rows(1, flat.shape[0], -j, flat)[0, :]
            e = step * sizes(be, flat, 0.0)[j]
            up, down = (bound((*x.theta[:i], xp.reshape(flat + d * unit, v.shape), *x.theta[i + 1:])) for d in (e, -e))
            return up, down, 2.0 * e

        entries = [(i, j) for i, v in enumerate(x.theta) for j in range(math.prod(v.shape))] if params else []
        few = [moved(i, j) for i, j in entries] if len(entries) <= 64 else None

        def pull(t: Any, u: Array, ct: Array) -> tuple[Array, tuple[Array, ...], Any]:
            e = step * sizes(be, u, 1e-3)
            g = [xp.sum(ct * (rhs(t, u + e * unit) - rhs(t, u - e * unit))) / (2.0 * e[j])
                 for j in range(n) for unit in (be.unit_rows(1, n, -j, u)[0, :] if units is None else units[j, :],)]
            pairs = few or (moved(i, j) for i, j in entries)
            h = [xp.sum(ct * (up(t, u) - down(t, u))) / gap for up, down, gap in pairs]
            t_bar = 0.0
            if time:
                d = step * be.greatest(1.0, abs(be.scalar(t)))
                t_bar = be.scalar(xp.sum(ct * (rhs(t + d, u) - rhs(t - d, u)))) / (2.0 * d)
            theta_bar = be.split(xp.stack(h), x.theta) if h else be.zeros(x.theta) if params else ()
            return xp.stack(g), theta_bar, t_bar

        return pull

    def pushforward(self, run: Run, x: Inputs, d_theta: tuple[Array, ...]) -> Push:
        be, bound = run.be, _bound(run, x)
        xp = be.xp
        rhs = bound(x.theta)
        step = be.eps(x.u0.dtype) ** (1 / 3)

        def push(t: Any, u: Array, du: Array, dt: Any) -> tuple[Array, Array]:
            moves = (sizes(be, u, 1e-3), *(sizes(be, v, 0.0) for v in x.theta))
            rows = []
            for i in range(du.shape[0]):
                d = (du[i, :], *(v[i, ...] for v in d_theta))
                longest = 0.0 if dt is None else abs(be.scalar(dt[i])) / be.greatest(1.0, abs(be.scalar(t)))
                for v, size in zip(d, moves, strict=True):
                    longest = be.greatest(longest, be.scalar(xp.max(xp.abs(v) / size)))
                e = step / be.choose(longest > 0.0, longest, 1.0)
                ends = []
                for s in (e, -e):
                    f = bound(tuple(v + s * dv for v, dv in zip(x.theta, d[1:], strict=True)))
                    ends.append(f(t if dt is None else t + s * dt[i], u + s * d[0]))
                rows.append((ends[0] - ends[1]) / (2.0 * e))
            return rhs(t, u), xp.stack(rows)

        return push

    def jacobian(self, run: Run, x: Inputs) -> Callable[[Any, Array], Array]:
        """Column by column, with the steps of `pullback`."""
        be = run.be
        n, step, rhs = run.field.u.size, be.eps(x.u0.dtype) ** (1 / 3), _bound(run, x)(x.theta)
        units = be.unit_rows(n, n, 0, x.u0)

        def jac(t: Any, u: Array) -> Array:
            e = step * sizes(be, u, 1e-3)
            columns = [(rhs(t, u + e * units[j, :]) - rhs(t, u - e * units[j, :])) / (2.0 * e[j]) for j in range(n)]
            return be.xp.stack(columns, axis=1)

        return jac

    def entries(self, run: Run, x: Inputs, pattern: Pattern) -> Callable[[Any, Array], Array]:
        return compressed_differences(run.be, _bound(run, x)(x.theta), pattern)


class ComplexStepVJP(_Columns):
    """`Im f(x + i e d) / e` with `e = 1e-30`: exact to round-off for an analytic `f` written without branches, `abs`
    or conjugation (Squire, Trapp 1998)."""

    def missing(self, run: Run) -> str | None:
        return None if run.be.complex else f"the {run.be.name} backend has no complex numbers"

    def pushforward(self, run: Run, x: Inputs, d_theta: tuple[Array, ...]) -> Push:
        be, bound = run.be, _bound(run, x)
        if be.is_complex(x.u0):
            raise UnsupportedCombination("ComplexStepVJP cannot differentiate a complex state",
                                         "the imaginary part carries the derivative", "vjp=ReverseVJP()")
        rhs = bound(x.theta)
        e = 1e-30

        def push(t: Any, u: Array, du: Array, dt: Any) -> tuple[Array, Array]:
            rows = []
            for i in range(du.shape[0]):
                moved = bound(tuple(v + (1j * e) * dv[i, ...] for v, dv in zip(x.theta, d_theta, strict=True)))
                t_i = t if dt is None else t + (1j * e) * dt[i]
                rows.append(be.xp.imag(moved(t_i, u + (1j * e) * du[i, :])) / e)
            return rhs(t, u), be.xp.stack(rows)

        return push


def _pushes(run: Run, x: Inputs) -> Callable[[Any, Array, Array], Array]:
    """As `VJP.pushes`, by the framework's forward mode."""
    rhs = _through(run, x)(x.theta)
    push = run.be.jvp(lambda _: rhs, (), ())
    return lambda t, u, rows: push(t, u, rows, None)[1]
