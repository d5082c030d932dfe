"""The reverse sweep of small systems with all products made ahead.

The states at which the discrete adjoint needs derivatives are known before the sweep starts. So `f` is evaluated at a
block of them at once under `vmap`, its Jacobians are read off the graph row by row, all steps of the block are made
small matrices together, and one product at the end of the block serves the parameters.
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
FEW = 48  # steps in a block, where memory is short
ENTRIES = 1024  # of the states at which the steps of a block start


def reverse(algorithm, run, residuals, ct, wanted):
    """`algorithm.reverse`, ahead where that pays and `f` allows it."""
    plain = type(algorithm) is RecursiveCheckpointAdjoint and isinstance(run.method, RungeKutta) and not run.events
    if plain and type(run.vjp) is ReverseVJP:
        u0 = residuals.x.u0
        # A product with complex derivatives is linear over the reals only, so no matrix stands for it.
        if u0.shape[0] <= LARGEST and not u0.is_complex():
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
    """A backend that goes back through a block of steps at once, and the VJP choice that goes with it.

    Pulled back across one step, the cotangents of state and slope `v = (lam, kappa, 1)` become `M v`, and `W v` are
    those of its stages; the last columns hold what outputs inside the step add. The recursion of `explicit` makes these
    matrices for all steps of a block together, so that one small product for each step remains.
    """

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
        return self._first

    def _first(self, t, u, ct):
        """The product at the start, which is the first stage of the oldest block."""
        self.handed[0, 0] = ct
        moved = torch.dot(self.in_time[0, 0], ct).item() if self.timed else 0.0
        return torch.mv(self.jacobians[0, 0], ct), (), moved

    # -- as a backend ---------------------------------------------------------------------------------------------

    def add(self, a, b):
        return a

    def recall(self, kept, stepper, crossing=None):
        run, x = self.original, self.x
        return run.be.recall(kept, run.stepper(run.field.bind(run.be, x.theta, x.constants)))

    def replay(self, body, state, log, extra=None):
        recalled = isinstance(log, Recall)
        steps = log.backwards() if recalled else ((n, log[n]) for n in reversed(range(len(log))))
        count = FEW if recalled else max(FEW, ENTRIES // state.lam.shape[0])
        while block := list(itertools.islice(steps, count))[::-1]:
            outs = [extra.at(n, record) if isinstance(extra, Pulled) else None if extra is None else extra[n]
                    for n, record in block]
            records = [record for _, record in block]
            self._close()
            self._open(records)
            state = self._back(state, records, outs, block[-1][0] == len(log) - 1)
        return state

    def _open(self, log):
        """Evaluate `f` at all stages of some steps, and its Jacobians, transposed: `(steps, s, n, n)`."""
        tab = self.tableau
        u, k = torch.stack([r.u for r in log]), torch.stack([r.k for r in log])
        h = torch.tensor([r.h for r in log], dtype=u.dtype, device=u.device)[:, None, None]
        t = [r.t + c * r.h for r in log for c in tab.c]
        u = (u[:, None, :] + h * (self._square(tab.a) @ k)).flatten(0, 1).requires_grad_()
        t = torch.tensor(t, dtype=self.dtype.to_real(), device=u.device, requires_grad=self.timed)
        stages, k = k.shape[:2], k.flatten(0, 1)
        with refusing(), torch.enable_grad():
            out = self.rhs(t, u)
        check(out, k)
        rows = []
        for i in range(u.shape[1]):
            ct = torch.zeros_like(k)
            ct[:, i] = 1.0
            g = product(out, (u, t) if self.timed else (u,), ct, True)
            rows.append([torch.zeros_like(v) if w is None else w for w, v in zip(g, (u, t), strict=False)])
        columns = [torch.stack(x, -1).unflatten(0, stages) for x in zip(*rows, strict=True)]
        self.jacobians, self.in_time = columns[0], columns[1].to(k.dtype) if self.timed else None
        self.graph, self.handed = out, torch.zeros_like(k).unflatten(0, stages)

    def _back(self, state, log, outs, newest):
        """The state before a block of steps from the one behind it; `handed` gets the cotangents of the stages."""
        tab, n = self.tableau, state.lam.shape[0]
        lam, kappa = slice(n), slice(n, 2 * n)
        if newest and tab.fsal and state.kappa is None and (outs[-1] is None or outs[-1].k is None):
            self.jacobians[-1, -1] = 0.0  # nothing depends on that stage, whatever its derivatives are
        M, W = self._matrices(log, outs)
        V = M.new_zeros(len(log) + 1, M.shape[-1])
        V[-1, lam] = state.lam
        V[-1, -1] = 1.0
        if state.kappa is not None:
            V[-1, kappa] = state.kappa
        rows = V.unbind()
        for i, matrix in reversed(list(enumerate(M.unbind()))):
            torch.mv(matrix, rows[i + 1], out=rows[i])
        self.handed.copy_((W.flatten(1, 2) @ V[1:, :, None]).view_as(self.handed))
        if tab.fsal:
            self.handed[:, 0] = 0.0  # part of the step before, whose last stage is the same
        t_bar, h_bar = state.t0, state.h
        if self.timed:
            moved = (self.in_time * self.handed).sum(-1)
            t_bar += moved.sum().item() + sum(out.t for out in outs if out is not None)
            if newest:
                h_bar = self._stretched(log[-1].k, V[-1, lam], moved[-1]) + (0.0 if outs[-1] is None else outs[-1].h)
        return state._replace(lam=V[0, lam], kappa=V[0, kappa] if tab.fsal else None, t0=t_bar, h=h_bar)

    def _matrices(self, log, outs):
        """`M` and `W` of some steps: `(steps, m, m)` and `(steps, s, n, m)`."""
        tab, J = self.tableau, self.jacobians
        n = J.shape[-1]
        m = n * (1 + tab.fsal) + 1
        h, one = J.new_tensor([r.h for r in log])[:, None], torch.eye(n, dtype=J.dtype, device=J.device)
        M, W = J.new_zeros(len(log), m, m), J.new_zeros(*J.shape[:3], m)
        M[:, :n, :n], M[:, -1, -1] = one, 1.0
        W[..., :n] = (h * self._constant(tab.b))[..., None, None] * one
        if tab.fsal:
            W[:, -1, :, n:-1] = one
        for i, out in enumerate(outs):
            if out is not None and out.u is not None:
                M[i, :n, -1] = out.u
            if out is not None and out.k is not None:
                W[i, :, :, -1] = out.k
        for i in range(tab.stages - 1, tab.fsal - 1, -1):
            y = J[:, i] @ W[:, i]
            M[:, :n] += y
            if any(tab.a[i]):
                W[:, :i].addcmul_((h * self._constant(tab.a[i]))[..., None, None], y[:, None])
        if tab.fsal:
            M[:, n:-1] = W[:, 0]
        return M, W

    def _stretched(self, k, lam, moved):
        """The cotangent of the newest step's size, but for outputs."""
        tab = self.tableau
        y = (self.jacobians[-1] @ self.handed[-1][:, :, None])[:, :, 0]
        along = torch.dot(lam, self._constant(tab.b) @ k) + torch.dot(self._constant(tab.c), moved)
        return (along + (y * (self._square(tab.a) @ k)).sum()).item()

    def _close(self):
        """The parameters' share of a block."""
        if self.graph is not None and self.wanted:
            captured = any(x.requires_grad for x in self.x.theta)
            bars = product(self.graph, self.wanted, self.handed.flatten(0, 1), captured)
            self.theta = tuple(x if y is None else x.add_(y) for x, y in zip(self.theta, bars, strict=True))
        self.graph = None
