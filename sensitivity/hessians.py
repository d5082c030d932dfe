"""`hessian_vector_product` and `hessian`: second derivatives of a loss of the solution, on every backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .algorithms.base import Outputs, SensitivityAlgorithm, columns, directions
from .algorithms.second_order import ForwardOverAdjoint
from .assembled import assemble
from .backend import Array
from .choose import auto, choose, choose_vjp, suggested
from .costs import Cost
from .errors import InputError, NumericalDerivativeWarning, UnsupportedCombination
from .gradient import _moved, _replaced, _selected, checked_names
from .integrate import Run
from .probe import through_ad
from .retcode import RetCode
from .second import paired, refuse_second, warn_differences
from .solve import build, checked, finished, prepare_options
from .system import Inputs
from .uservjp import UserVJP
from .verdict import judge
from .vjp import VJP, ReverseVJP


def hessian_vector_product(prob: Any, alg: Any = None, loss: Any = None, v: Any = None, *, wrt: Any = None,
                           sensealg: Any = auto, dloss: Any = None, **options: Any) -> Any:
    """The second derivative of a loss times a direction, by the tangent of the adjoint.

    Parameters
    ----------
    prob, alg, loss, dloss, options
        As for `gradient`. With `dloss`, its own derivative is a central difference, with a warning, unless the
        framework's AD differentiates `loss`.
    v : pytree
        The direction, in the structure of `p` for `wrt="p"` and of `u0` for `wrt="u0"`; for several a tuple in the
        order of `wrt`.
    wrt : str or tuple of str, optional
        "p" or "u0", or both; `p` unless the problem has none.
    sensealg : ForwardOverAdjoint, an adjoint algorithm, or auto
        What the rules of second order take unless given, mostly `ForwardOverAdjoint()`; an adjoint algorithm stands
        for `ForwardOverAdjoint` of it.

    Returns
    -------
    pytree
        In the structure of `v`.

    Raises
    ------
    InputError
        `v` or `wrt` does not fit.
    UnsupportedCombination
        The algorithm has no second derivatives, or those in times were asked for.
    SolveError
        The solve failed.
    """
    product = _Product(prob, alg, loss, wrt, sensealg, dloss, options)
    return product.tree(product(product.row(v)))


def hessian(prob: Any, alg: Any = None, loss: Any = None, *, wrt: Any = None, sensealg: Any = auto, dloss: Any = None,
            **options: Any) -> Any:
    """The matrix of second derivatives of a loss: one `hessian_vector_product` per column.

    Parameters
    ----------
    prob, alg, loss, wrt, sensealg, dloss, options
        As for `hessian_vector_product`.

    Returns
    -------
    array `(m, m)`
        Rows and columns are the inputs of `wrt` in its order, raveled leaf after leaf. It is not made symmetric:
        how far it is from that shows its error.

    Raises
    ------
    InputError, UnsupportedCombination, SolveError
        As `hessian_vector_product`.
    """
    product = _Product(prob, alg, loss, wrt, sensealg, dloss, options)
    m = product.size
    eye = product.run.be.unit_rows(m, m, 0, product.x.u0)
    return product.run.be.xp.stack([product(eye[j, :]) for j in range(m)], axis=1)


def choose_again(run: Run, x: Inputs) -> tuple[VJP, str]:
    """Products that are differentiated again, and why: a user's come last, because AD of `f` can be, they cannot."""
    vjp, why = choose_vjp(replace(run, products=replace(run.products, vjp=None, jac=None)), x)
    if (not run.be.modes or vjp.numeric) and UserVJP().missing(run) is None:
        return UserVJP(), "the problem carries its own derivatives, and AD does not see f"
    return vjp, why


class _Product:
    """A loss prepared for products `row (m,) -> row (m,)` with its second derivative."""

    def __init__(self, prob: Any, alg: Any, loss: Any, wrt: Any, sensealg: Any, dloss: Any,
                 options: dict[str, Any]) -> None:
        names = checked_names(wrt)
        if set(names) - {"u0", "p"}:
            others = ", ".join(sorted(set(names) - {"u0", "p"}))
            raise UnsupportedCombination(f"second derivatives in {others} are not there",
                                         "the tangent equation moves the state and the parameters",
                                         "wrt='p', wrt='u0' or wrt=('u0', 'p')")
        if not callable(loss) and not isinstance(loss, Cost):
            raise InputError("loss is not callable", "a second derivative is that of a number",
                             "loss=lambda sol: (sol.u ** 2).sum()")
        outer = ForwardOverAdjoint() if sensealg is auto else checked(sensealg)
        if not isinstance(outer, ForwardOverAdjoint):
            outer = ForwardOverAdjoint(outer)
        run, x = prepare_options(prob, alg, options, through_ad(prob, outer, names))
        if sensealg is auto:
            outer = suggested(run, x, ReverseVJP(), None, order=2)[1]
        self.prob, self.loss, self.dloss, self.extra = prob, loss, dloss, 0
        if isinstance(loss, Cost):
            plan = assemble(prob, loss, options, run, x, through_ad(prob, outer, names))
            if any(cost.g is None for cost, _, _ in plan.discrete):
                raise InputError("a DiscreteCost without g has no second derivative",
                                 "g is differentiated twice by the framework", "DiscreteCost(at, dgdu, dgdp, g)")
            self.prob, be = plan.prob, run.be
            self.loss, self.extra = (lambda sol: plan.whole(be, sol)), int(plan.running)
            run, x = prepare_options(plan.prob, run.method, plan.options, ())
        if wrt is None:
            names = ("p",) if x.theta else ("u0",)
        if "p" in names and not x.theta:
            raise InputError("wrt holds 'p', but the problem has no floating-point parameters",
                             "nothing can be differentiated", "ODEProblem(f, u0, tspan, p), or wrt='u0'")
        self.names = names
        order = ["theta" if n == "p" else n for n in names]
        self.wanted, self.parts = frozenset(order), columns(x, order)
        outer.refuse(run)
        if outer.vjp is None:
            outer = replace(outer, vjp=choose_again(run, x)[0])
        algorithm, run = choose(run, x, outer)
        refuse_second(algorithm, run, self.wanted)
        if run.be.is_complex(x.u0):
            raise UnsupportedCombination("second derivatives of a complex state are not there",
                                         "a product with complex derivatives is linear over the reals only",
                                         "real and imaginary part as a real state")
        warn_differences(run)
        self.algorithm: SensitivityAlgorithm = algorithm.adjoint
        self.worker = self.algorithm.of_pair
        self.run, self.x = run, x
        self.size = sum(size for _, size in self.parts) - self.extra * ("u0" in names)

    def __call__(self, row: Array) -> Array:
        run, x, be = self.run, self.x, self.run.be
        xp, n = be.xp, self.x.u0.shape[0]
        d = directions(be, x, self.parts, self._widened(row)[None, :])
        pair, both = paired(self.algorithm, run, x, d)
        out, aux, residuals = be.run(self.worker, "forward", pair, (both,), self.wanted)
        u, w = out.u[:, :n], out.u[:, n:]
        finished(self.prob, run, x, self.algorithm, Outputs(u, None, None), aux, "raise")
        l_u, turned_u, turned = self._loss(Outputs(u, None, None), aux, w, d)
        ct = Outputs(xp.concat([turned_u, l_u], axis=1), None, None)
        bar = be.run(self.worker, "reverse", pair, (residuals, ct), self.wanted)
        judge(self.algorithm, be, bar)
        pieces: list[Array] = []
        for name, size in self.parts:
            blocks = [bar.u0[:n]] if name == "u0" else bar.theta
            flat = [xp.reshape(a + b, (-1,)) for a, b in zip(blocks, turned[name], strict=True)]
            pieces += [xp.astype(v, x.u0.dtype) for v in flat]
            if name == "u0" and self.extra:
                pieces[-1] = pieces[-1][:size - self.extra]
        total = xp.concat(pieces) if len(pieces) > 1 else pieces[0]
        return be.nan_where(aux.status != int(RetCode.Success), total)

    def _widened(self, row: Array) -> Array:
        """The direction with a zero for the integral of a running cost."""
        if not (self.extra and "u0" in self.names):
            return row
        end = 0
        for name, size in self.parts:
            end += size
            if name == "u0":
                break
        return self.run.be.xp.concat([row[:end - 1], 0.0 * row[:1], row[end - 1:]])

    def _loss(self, out: Outputs, aux: Any, w: Array, d: Any) -> tuple[Array, Array, dict[str, tuple[Array, ...]]]:
        """Derivative of the loss in the saved states, and the change along the direction of all its derivatives."""
        run, x, be = self.run, self.x, self.run.be
        order = [name for name, _ in self.parts]
        boxed = replace(run, be=be.differentiable())

        def of(u: Array, *arrays: Any) -> Any:
            moved = _replaced(x, order, arrays)
            sol = build(*_moved(self.prob, boxed, moved, aux, order, self.algorithm, Outputs(u, None, None)))
            return self.loss(sol)

        given: list[Any] = []
        for name in order:
            given += [v[0, ...] for v in d.theta] if name == "theta" else [d.u0[0, :]]
        args, along = (out.u, *_selected(x, order)), (w, *given)
        answer = be.loss_second(of, args, along)
        if answer is None:
            answer = self._differences(of, out, aux, args, along)
        _, grads, rows = answer
        rest, turned = list(rows[1:]), {}
        for name in order:
            take = len(x.theta) if name == "theta" else 1
            turned[name], rest = tuple(rest[:take]), rest[take:]
        return grads[0], rows[0], turned

    def _differences(self, of: Callable, out: Outputs, aux: Any, args: tuple, along: tuple) -> Any:
        """Central differences of the derivative that the user gave."""
        run, x, be = self.run, self.x, self.run.be
        if self.dloss is None:
            raise UnsupportedCombination(f"{be.name} AD fails on the loss", "its second derivative is needed",
                                         f"write it in the AD's namespace{be.how_to_get_ad}, or pass dloss=")
        warnings.warn("the second derivative of the loss is a central difference of dloss, because AD fails on loss",
                      NumericalDerivativeWarning, stacklevel=5)

        def derivative(u: Array) -> Array:
            sol = build(self.prob, run, x, self.algorithm, Outputs(u, None, None), aux)
            leaves = [be.asarray(v, dtype=u.dtype, device=be.device(u)) for v in be.flatten(self.dloss(sol))[0]]
            return run.field.u.ravel(be, leaves, batch=1)

        u, w = args[0], along[0]
        e = be.eps(u.dtype) ** (1 / 3) / max(1.0, float(be.xp.max(be.xp.abs(w))))
        change = (derivative(u + e * w) - derivative(u - e * w)) / (2.0 * e)
        return None, (derivative(u),), (change, *(0.0 * v for v in along[1:]))

    # -- structures -------------------------------------------------------------------------------------------------

    def row(self, v: Any) -> Array:
        """A direction as one vector, in the order of the parts."""
        be, x = self.run.be, self.x
        trees = dict(zip(self.names, (v,) if len(self.names) == 1 else tuple(v), strict=True))
        out = []
        for name in self.names:
            leaves = be.flatten(trees[name])[0]
            roles = self.run.field.p.roles
            shapes = [tuple(s) for s in self.run.field.u.shapes]
            shapes = shapes[:len(shapes) - self.extra]
            if name == "p":
                if len(leaves) == len(roles):
                    leaves = [w for w, role in zip(leaves, roles, strict=True) if role == "theta"]
                shapes = [tuple(w.shape) for w in x.theta]
            leaves = [be.asarray(w, dtype=x.u0.dtype, device=be.device(x.u0)) for w in leaves]
            if [tuple(w.shape) for w in leaves] != shapes:
                raise InputError(f"v has shapes {[tuple(w.shape) for w in leaves]} for {name}, expected {shapes}",
                                 "it is a direction in the inputs", f"v in the structure of {name}")
            out += [be.xp.reshape(w, (-1,)) for w in leaves]
        return be.xp.concat(out) if len(out) > 1 else out[0]

    def tree(self, row: Array) -> Any:
        """A vector in the structures of the inputs, in the order of `wrt`."""
        be, x, field, start = self.run.be, self.x, self.run.field, 0
        found: dict[str, Any] = {}
        for name, size in self.parts:
            if name == "u0":
                flat = row[start:start + size - self.extra]
                whole = be.xp.concat([flat, 0.0 * flat[:1]]) if self.extra else flat
                tree = be.unflatten(field.u.structure, field.u.unravel(be, whole))
                found["u0"], start = tree[0] if self.extra else tree, start + size - self.extra
            else:
                leaves, start = be.split(row[start:start + size], x.theta), start + size
                k = field.p.count
                found["p"] = field.p.join(be, leaves[:k], x.constants) if k else leaves
        return found[self.names[0]] if len(self.names) == 1 else tuple(found[n] for n in self.names)
