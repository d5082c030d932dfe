"""A solve as an autograd primitive; its work is done by the NumPy backend on plain arrays."""

from dataclasses import replace

import autograd.numpy as anp
import numpy as np
from autograd.builtins import DictBox, SequenceBox
from autograd.extend import Box, defvjp_argnums, primitive

from sensitivity.algorithms.base import Outputs
from sensitivity.errors import CapturedValueError, UnsupportedCombination
from sensitivity.registry import registry
from sensitivity.retcode import RetCode
from sensitivity.verdict import judge
from sensitivity_numpy._boxes import BoxBackend, value


@primitive
def _solve(task, *arrays):
    return task.forward(arrays)


def _pullback(argnums, answer, args, kwargs):
    task, *arrays = args
    del kwargs, answer
    twice = any(isinstance(a, Box) for a in arrays)
    residuals = task.residuals
    return lambda ct: task.reverse(residuals, ct, argnums, twice)


defvjp_argnums(_solve, _pullback)


class Task:
    """One solve: which arrays it takes, and what its forward pass left."""

    def __init__(self, algorithm, run, x):
        self.algorithm, self.run, self.x = algorithm, replace(run, be=registry().backend("numpy")), x
        self.names = ["u0", *(("theta", i) for i in range(len(x.theta))), "t0", "t1"]
        self.names += ["saveat"] if run.saves == "ts" else []
        self.aux = self.residuals = self.shapes = None

    def arrays(self):
        return tuple(self.x.theta[n[1]] if isinstance(n, tuple) else getattr(self.x, n) for n in self.names)

    def forward(self, arrays):
        k = len(self.x.theta)
        x = self.x._replace(u0=np.asarray(arrays[0]), theta=tuple(np.asarray(a) for a in arrays[1 : k + 1]),
                            t0=np.asarray(arrays[k + 1]), t1=np.asarray(arrays[k + 2]))
        if len(arrays) > k + 3:
            x = x._replace(saveat=np.asarray(arrays[k + 3]))
        every = frozenset({"u0", "theta", "t0", "t1", "saveat"})
        out, self.aux, self.residuals = self.algorithm.forward(self.run, x, every)
        self.shapes = [None if v is None else v.shape for v in out]
        return np.concatenate([np.ravel(v) for v in out if v is not None])

    def outputs(self, flat, reshape):
        """What `forward` returned, in its parts."""
        parts, start = [], 0
        for shape in self.shapes:
            stop = start + (0 if shape is None else int(np.prod(shape)))
            parts.append(None if shape is None else reshape(flat[start:stop], shape))
            start = stop
        return Outputs(*parts)

    def reverse(self, residuals, ct, argnums, twice):
        if twice or isinstance(ct, Box):
            raise UnsupportedCombination(f"{self.algorithm.name} has no second derivatives under autograd", "",
                                         self.algorithm.twice)
        asked = [self.names[i - 1] for i in argnums]
        wanted = frozenset("theta" if isinstance(n, tuple) else n for n in asked)
        bar = self.algorithm.reverse(self.run, residuals, self.outputs(np.asarray(ct), np.reshape), wanted)
        if self.aux.status == RetCode.Success:
            judge(self.algorithm, self.run.be, bar)
        return tuple(bar.theta[n[1]] if isinstance(n, tuple) else np.asarray(getattr(bar, n)) for n in asked)


class AutogradBackend(BoxBackend):
    name = "autograd"
    opaque = True
    attaches = True

    def flatten(self, tree):
        return super().flatten(_opened(tree))

    def hoist(self, f, t, u, p):
        """autograd cannot list what `f` closes over, but a box in the result of plain arguments gives it away."""
        out = self.evaluate(f, t, u, p)
        if any(isinstance(x, Box) for x in self.flatten(out)[0]):
            raise CapturedValueError("f closes over a value that autograd is differentiating",
                                     "what f closes over cannot be reached under autograd",
                                     "pass the value through p: ODEProblem(f, u0, tspan, p)")
        return f, ()

    def evaluate(self, f, t, u, p):
        leaves, structure = self.flatten((u, p))
        return f(value(t), *self.unflatten(structure, [value(x) for x in leaves]))

    def copy(self, x):
        return np.array(value(x))

    def vjp(self, f, theta, time, params):
        return registry().backend("numpy").vjp(f, tuple(value(v) for v in theta), time, params)

    def known(self, run, x):
        plain = x._replace(u0=value(x.u0), theta=tuple(value(v) for v in x.theta), t0=value(x.t0), t1=value(x.t1),
                           constants=tuple(value(v) for v in x.constants))
        return replace(run, be=registry().backend("numpy")), plain

    def look(self, at, run, x):
        known = self.known(run, x)
        return known[0].be.look(at, *known)

    def attach(self, algorithm, run, x):
        if not algorithm.boundary:
            return algorithm.plain(run, x)
        if run.dense:
            raise UnsupportedCombination("dense=True has no derivatives under autograd", "", "saveat=[...]")
        plain = x._replace(constants=tuple(value(v) for v in x.constants), rtol=value(x.rtol), atol=value(x.atol))
        task = Task(algorithm, run, plain)
        flat = _solve(task, *task.arrays())
        return task.outputs(flat, anp.reshape), task.aux

    def differentiable(self):
        return self


def _opened(tree):
    """Containers in place of autograd's boxes of containers, arrays in place of its boxes of Python numbers."""
    if isinstance(tree, Box) and isinstance(value(tree), float):
        return anp.reshape(tree, ())
    if isinstance(tree, SequenceBox):
        return tuple(_opened(tree[i]) for i in range(len(tree)))
    if isinstance(tree, DictBox):
        return {k: _opened(tree[k]) for k in tree._value}
    if isinstance(tree, tuple | list) and not hasattr(tree, "_fields"):
        return type(tree)(_opened(v) for v in tree)
    if isinstance(tree, dict):
        return {k: _opened(v) for k, v in tree.items()}
    return tree
