"""A problem and a loss as functions of one NumPy vector, as optimisers want them."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

from .algorithms.carried import carrying
from .algorithms.forward import ForwardSensitivity
from .choose import auto, choose
from .errors import InputError, UnsupportedCombination
from .gradient import gradient, loss_cotangent
from .hessians import hessian_vector_product
from .probe import through_ad
from .problems import ODEProblem
from .recommend import method_of
from .registry import registry
from .retcode import RetCode
from .solve import asked, checked, finished, prepare_options, solve, warn_numerical
from .system import Partition
from .verdict import reverse_failure


class Part:
    """The floating-point leaves of one part of a problem, packed into a NumPy vector."""

    def __init__(self, be: Any, name: str, tree: Any) -> None:
        self.be, self.name = be, name
        self.partition, self.leaves, self.constants = Partition.of(be, tree)
        if name == "u0" and self.constants:
            raise InputError("u0 holds whole numbers", "they are not varied", "u0 of floating-point numbers")
        if any(be.is_complex(v) for v in self.leaves):
            raise UnsupportedCombination(f"{name} holds complex numbers", "an optimiser varies real ones",
                                         f"real and imaginary parts as separate leaves of {name}")
        self.sizes = [math.prod(v.shape) for v in self.leaves]
        self.size = sum(self.sizes)

    def pack(self, leaves: Any) -> Any:
        """One float64 vector of these leaves."""
        be = self.be
        rows = [np.asarray(be.concrete_times(be.xp.reshape(v, (-1,))), dtype=float) for v in leaves]
        return np.concatenate(rows) if rows else np.zeros(0)

    def unpack(self, x: Any) -> Any:
        """The tree with the numbers of a vector."""
        be, leaves, start = self.be, [], 0
        for v, size in zip(self.leaves, self.sizes, strict=True):
            values = np.reshape(np.array(x[start:start + size]), tuple(v.shape))
            leaves.append(be.asarray(values, dtype=v.dtype, device=be.device(v)))
            start += size
        return self.partition.join(be, leaves, self.constants)

    def of(self, tree: Any) -> Any:
        """A tree like this one, packed."""
        return self.pack(Partition.of(self.be, tree)[1])


class Objective:
    """Functions of a NumPy vector `x`, made by `objective`; results are kept for the last `x`.

    Attributes
    ----------
    x0 : array `(m,)`
        The parameters of the problem, packed.
    """

    def __init__(self, prob: Any, alg: Any, loss: Any, residuals: Any, wrt: tuple[str, ...], sensealg: Any,
                 options: dict[str, Any]) -> None:
        self.prob, self.loss, self.of_residuals = prob, loss, residuals
        self.wrt, self.sensealg, self.options, self._alg = wrt, sensealg, options, alg
        self.be = _backend(prob, options.get("backend"))
        self.parts = [Part(self.be, name, getattr(prob, name)) for name in wrt]
        for part in self.parts:
            if not part.size:
                raise InputError(f"wrt holds {part.name!r}, which has no floating-point numbers",
                                 "there is nothing to vary", "p=np.array([...]), or another wrt")
        self.x0 = np.concatenate([part.pack(part.leaves) for part in self.parts])
        self._known: dict[str, tuple[Any, Any]] = {}

    @cached_property
    def alg(self) -> Any:
        """The method, one for all `x`; without a name, what `solve` takes at `x0`."""
        return method_of(self.prob, self._alg, self.options)

    def unpack(self, x: Any) -> Any:
        """What `x` stands for: the tree of the one part in `wrt`, or a dict of the parts."""
        trees = self._trees(x)
        return trees[self.wrt[0]] if len(self.wrt) == 1 else trees

    def pack(self, tree: Any) -> Any:
        """The inverse of `unpack`."""
        trees = {self.wrt[0]: tree} if len(self.wrt) == 1 else tree
        return np.concatenate([part.of(trees[part.name]) for part in self.parts])

    def problem(self, x: Any) -> Any:
        """The problem with the parameters `x`."""
        return self.prob.remake(**self._trees(x))

    def fun(self, x: Any) -> float:
        """The loss."""
        self._needs(self.loss, "loss")
        known = self._recalled("both", x) or self._recalled("fun", x)
        if known is not None:
            return known[0]
        sol = solve(self.problem(x), self.alg, sensealg=self.sensealg, **self._plain())
        return self._keep("fun", x, (float(self.loss(sol)),))[0]

    def jac(self, x: Any) -> Any:
        """The gradient of the loss, `(m,)`."""
        return self.fun_and_jac(x)[1]

    def fun_and_jac(self, x: Any) -> tuple[float, Any]:
        """Loss and gradient by one forward and one reverse solve: `minimize(obj.fun_and_jac, obj.x0, jac=True)`."""
        self._needs(self.loss, "loss")
        known = self._recalled("both", x)
        if known is not None:
            return known
        r = gradient(self.problem(x), self.alg, self.loss, wrt=self.wrt, sensealg=self.sensealg, **self.options)
        g = np.concatenate([part.of(getattr(r, part.name)) for part in self.parts])
        return self._keep("both", x, (float(r.value), g))

    def hessp(self, x: Any, v: Any) -> Any:
        """The second derivative of the loss times a vector, `(m,)`; see `hessian_vector_product`.

        Raises
        ------
        UnsupportedCombination
            The algorithm, or this kind of problem, has no second derivatives.
        """
        self._needs(self.loss, "loss")
        trees = self._trees(v)
        direction = trees[self.wrt[0]] if len(self.wrt) == 1 else tuple(trees[n] for n in self.wrt)
        options = {k: v for k, v in self.options.items() if k != "on_failure"}
        out = hessian_vector_product(self.problem(x), self.alg, self.loss, direction, wrt=self.wrt,
                                     sensealg=self.sensealg, **options)
        parts = (out,) if len(self.wrt) == 1 else out
        return np.concatenate([part.of(tree) for part, tree in zip(self.parts, parts, strict=True)])

    def residuals(self, x: Any) -> Any:
        """The residuals as one vector, for `least_squares(obj.residuals, obj.x0, jac=obj.residuals_jac)`."""
        self._needs(self.of_residuals, "residuals")
        known = self._recalled("rows", x) or self._recalled("residuals", x)
        if known is not None:
            return known[0]
        sol = solve(self.problem(x), self.alg, sensealg=self.sensealg, **self._plain())
        return self._keep("residuals", x, (self._flat(self.of_residuals(sol)),))[0]

    def residuals_jac(self, x: Any) -> Any:
        """The derivatives of the residuals, `(r, m)`.

        `auto` is `ForwardSensitivity` here if there are no more parameters than residuals; other algorithms make one
        reverse pass for each residual.
        """
        self._needs(self.of_residuals, "residuals")
        known = self._recalled("rows", x)
        return (known or self._keep("rows", x, self._rows(x)))[1]

    def _rows(self, x: Any) -> tuple[Any, Any]:
        prob = self.problem(x)
        options = {k: v for k, v in self.options.items() if k not in ("on_failure", "dloss")}
        on_failure = self.options.get("on_failure", "raise")
        sensealg = self.sensealg
        asked(sensealg, None, None)
        if sensealg is auto and isinstance(prob, ODEProblem) and self.x0.shape[0] <= self.residuals(x).shape[0]:
            if not self.options.get("events"):
                sensealg = ForwardSensitivity()  # a row then costs a product, not a reverse solve
        run, inputs = prepare_options(prob, self.alg, options, through_ad(prob, sensealg, self.wrt))
        algorithm, run = choose(run, inputs, checked(sensealg))
        if not algorithm.boundary:
            raise UnsupportedCombination(f"{algorithm.name} makes no rows of a Jacobian", "its tape gives one gradient",
                                         "sensealg=ForwardSensitivity() or auto")
        warn_numerical(algorithm)
        wanted = frozenset("theta" if n == "p" else n for n in self.wrt)
        worker = carrying(algorithm, run)
        out, aux, kept = run.be.run(worker, "forward", run, (inputs,), wanted)
        sol, out = finished(prob, run, inputs, algorithm, out, aux, on_failure)
        values = self._flat(self.of_residuals(sol))
        rows = []
        for i in range(len(values)):
            def entry(sol: Any, i: int = i) -> Any:
                return self._vector(self.of_residuals(sol))[i]

            _, ct, direct = loss_cotangent(prob, run, inputs, algorithm, out, aux, entry, None, sol, wanted)
            bar = run.be.run(worker, "reverse", run, (kept, ct), wanted)
            if (code := run.be.concrete(bar.status)) and on_failure == "raise":
                raise reverse_failure(algorithm, RetCode(int(code)), sol)
            row = []
            for part in self.parts:
                name = "theta" if part.name == "p" else part.name
                bars = bar.theta[:len(part.leaves)] if name == "theta" else (bar.u0,)
                bars = tuple(a + b for a, b in zip(bars, direct[name], strict=False))
                row.append(part.pack(bars))
            rows.append(np.concatenate(row))
        return values, np.stack(rows)

    def _trees(self, x: Any) -> dict[str, Any]:
        x = np.asarray(x, dtype=float)
        if x.shape != self.x0.shape:
            raise InputError(f"x has shape {x.shape}, expected {self.x0.shape}", "it holds the parameters in wrt",
                             "start from obj.x0")
        out, start = {}, 0
        for part in self.parts:
            out[part.name] = part.unpack(x[start:start + part.size])
            start += part.size
        return out

    def _plain(self) -> dict[str, Any]:
        return {k: v for k, v in self.options.items() if k != "dloss"}

    def _vector(self, tree: Any) -> Any:
        leaves = self.be.flatten(tree)[0]
        flat = [self.be.xp.reshape(v, (-1,)) for v in leaves]
        return flat[0] if len(flat) == 1 else self.be.xp.concat(flat, axis=0)

    def _flat(self, tree: Any) -> Any:
        return np.asarray(self.be.concrete_times(self._vector(tree)), dtype=float)

    def _recalled(self, name: str, x: Any) -> Any:
        known = self._known.get(name)
        return known[1] if known is not None and np.array_equal(known[0], x) else None

    def _keep(self, name: str, x: Any, result: Any) -> Any:
        self._known[name] = (np.array(x, dtype=float), result)
        return result

    def _needs(self, given: Any, name: str) -> None:
        if given is None:
            raise InputError(f"this objective was made without {name}=", f"{name} is a function of the solution",
                             f"sa.objective(prob, alg, {name}=lambda sol: ...)")


def _backend(prob: Any, name: str | None) -> Any:
    """The backend of a problem."""
    from . import tree

    if name:
        return registry().backend(name)
    return registry().backend_for([(k, x) for k in ("u0", "p") for x in tree.flatten(getattr(prob, k))[0]])
