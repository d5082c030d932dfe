"""The reverse sweep of small systems with all products made ahead.

The states at which the discrete adjoint needs derivatives are known before the sweep starts. So `f` is evaluated at a
block of them at once under `vmap`, its Jacobians are read off the graph row by row, the sweep multiplies by small
matrices, and one product at the end of the block serves the parameters.
"""

import itertools
import warnings
from contextlib import contextmanager
from dataclasses import replace

import torch

from sensitivity.algorithms.discrete import RecursiveCheckpointAdjoint
from sensitivity.methods import RungeKutta
from sensitivity.recompute import Pulled, Recall
from sensitivity.vjp import ReverseVJP

from . import _autodiff
from ._backend import TorchBackend

LARGEST = 16
BLOCK = 48


def reverse(algorithm, run, residuals, ct, wanted):
    """`algorithm.reverse`, ahead where that pays and `f` allows it."""
    plain = type(algorithm) is RecursiveCheckpointAdjoint and isinstance(run.method, RungeKutta) and not run.events
    if plain and type(run.vjp) is ReverseVJP:
        u0 = residuals.x.u0
        # A product with complex derivatives is linear over the reals only, so no matrix stands for it.
        if u0.shape[0] <= LARGEST and not u0.is_complex() and len(residuals.log) > 3:
            try:
                return _Sweep(run, residuals.x).reverse(algorithm, residuals, ct, wanted)
            except Refused:
                pass
    return algorithm.reverse(run, residuals, ct, wanted)


class Refused(Exception):
    """`f` cannot be evaluated at many points at once."""


@contextmanager
def refusing():
    """Whatever keeps a user's function from being batched leads back to single products."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as e:
            raise Refused from e


def check(out, k):
    """What `f` gave for many points at once must be what it gave one by one."""
    if out.shape != k.shape or out.dtype != k.dtype:
        raise Refused
    close = 1e5 * torch.finfo(k.dtype).eps
    if not torch.allclose(out, k, rtol=close, atol=close * max(k.abs().max().item(), 1e-300)):
        raise Refused


def product(out, inputs, ct, keep):
    """Cotangents of `inputs`; None where `out` does not depend on them."""
    if not out.requires_grad:
        return [None] * len(inputs)
    with refusing():
        return torch.autograd.grad(out, inputs, ct, keep, allow_unused=True)


class _Sweep(TorchBackend):
    """A backend whose times are numbers of points in the block at hand, and the VJP choice that goes with it."""

    def __init__(self, run, x):
        super().__init__(run.be.dtype, run.be._device)
        self._constants = run.be._constants
        self.tableau, self.x = run.method.tableau(run.inside), x
        self.original = run
        self.graph = None

    def reverse(self, algorithm, residuals, ct, wanted):
        bar = algorithm.reverse(replace(self.original, be=self, vjp=self), residuals, ct, wanted)
        self._close()
        return bar._replace(theta=self.theta)

    # -- as a VJP choice ------------------------------------------------------------------------------------------

    def pullback(self, run, x, *, time, params):
        be = self.original.be
        self.leaves = _autodiff.parameters(x.theta, params)
        self.wanted = self.leaves if params else ()
        self.rhs = torch.func.vmap(run.field.bind(be, self.leaves, x.constants))
        self.theta = be.zeros(self.wanted)
        self.timed = time
        return self._pull

    def _pull(self, k, u, ct):
        self.handed[k].copy_(ct)
        moved = torch.vdot(self.in_time[k], ct).real.item() if self.timed else 0.0
        return torch.mv(self.jacobians[k], ct), (), moved

    # -- as a backend ---------------------------------------------------------------------------------------------

    def add(self, a, b):
        return a

    def time(self, t):
        return 0

    def times(self, t, h, c):
        return range(self.start, self.start + len(c))

    def inputs(self, a, base, scale, rows):
        return super().inputs(a, base, scale, rows) if self.timed else (None,) * len(a)

    def recall(self, kept, stepper):
        run, x = self.original, self.x
        return run.be.recall(kept, run.stepper(run.field.bind(run.be, x.theta, x.constants)))

    def replay(self, body, state, log, extra=None):
        s, last = self.tableau.stages, len(log) - 1
        steps = log.backwards() if isinstance(log, Recall) else ((n, log[n]) for n in reversed(range(len(log))))
        while block := list(itertools.islice(steps, BLOCK)):
            self._close()
            self._open([record for _, record in reversed(block)])
            for position, (n, record) in zip(reversed(range(len(block))), block, strict=True):
                self.start = position * s
                out = extra.at(n, record) if isinstance(extra, Pulled) else None if extra is None else extra[n]
                state = body(state, record, out, n == last)
        return state

    def _open(self, log):
        """Evaluate `f` at all stages of some steps, and its Jacobians."""
        tab = self.tableau
        u, k = torch.stack([r.u for r in log]), torch.stack([r.k for r in log])
        h = torch.tensor([r.h for r in log], dtype=u.dtype, device=u.device)[:, None, None]
        t = [r.t + c * r.h for r in log for c in tab.c]
        u = u[:, None, :] + h * (self._square(tab.a) @ k)
        u = u.flatten(0, 1).requires_grad_()
        t = torch.tensor(t, dtype=self.dtype.to_real(), device=u.device, requires_grad=self.timed)
        k = k.flatten(0, 1)
        with refusing(), torch.enable_grad():
            out = self.rhs(t, u)
        check(out, k)
        rows = []
        for i in range(u.shape[1]):
            ct = torch.zeros_like(k)
            ct[:, i] = 1.0
            g = product(out, (u, t) if self.timed else (u,), ct, True)
            rows.append([torch.zeros_like(v) if w is None else w for w, v in zip(g, (u, t), strict=False)])
        columns = [torch.stack(x, -1) for x in zip(*rows, strict=True)]
        self.jacobians = columns[0].unbind()
        self.in_time = columns[1].to(k.dtype).unbind() if self.timed else None
        self.graph, self.block = out, torch.zeros_like(k)
        self.handed = self.block.unbind()

    def _close(self):
        """The parameters' share of a block."""
        if self.graph is not None and self.wanted:
            captured = any(x.requires_grad for x in self.x.theta)
            bars = product(self.graph, self.wanted, self.block, captured)
            self.theta = tuple(x if y is None else x.add_(y) for x, y in zip(self.theta, bars, strict=True))
        self.graph = None
