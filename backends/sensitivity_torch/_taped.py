"""Explicit steps that autograd records, so that one call pulls a whole step back.

For states too large for `_ahead`. A step's stages are recorded as they are computed, from leaves for its state and its
first slope; where no record was kept, the step is taken again with one. Where the parameters outnumber the state by
far, only cotangents of the stages are wanted step by step, and one product for a block of stages serves the parameters.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from sensitivity.algorithms.discrete import RecursiveCheckpointAdjoint
from sensitivity.backend import Record
from sensitivity.explicit import Explicit
from sensitivity.methods import RungeKutta
from sensitivity.stepper import Adjoint
from sensitivity.stochasticmethods import Driven, ReversibleHeun, StochasticMethod
from sensitivity.vjp import ReverseVJP

from . import _ahead, _autodiff, _levels

ROOM = 2**28  # bytes of records that one solve keeps
DEFERRED = 32  # parameters per unknown from which on their products are made for many stages at once
BLOCK = 64


def suits(algorithm, run, x, wanted):
    """Whether the steps of this solve can be recorded."""
    return (type(algorithm) is RecursiveCheckpointAdjoint and _explicit(run) and not run.events
            and type(run.vjp) is ReverseVJP and not wanted & {"t0", "t1", "saveat"} and not x.u0.is_complex()
            and x.u0.shape[0] > _ahead.LARGEST and not _levels.active()
            and torch._C._autograd._saved_tensors_hooks_is_enabled())  # not inside torch.func transforms


def _explicit(run):
    """Whether steps are stages of a tableau and nothing else, with or without noise."""
    noisy = isinstance(run.method, StochasticMethod) and not isinstance(run.method, ReversibleHeun)
    return isinstance(run.method, RungeKutta) or (noisy and not run.controller.adaptive)


def forward(algorithm, run, x, wanted):
    """`algorithm.forward` with steps that are recorded while there is room."""
    tape = Tape(run, x, wanted, 0 if algorithm.budgeted else ROOM)
    return algorithm.forward(tape.run, x, wanted)


def reverse(algorithm, run, residuals, ct, wanted):
    """`algorithm.reverse` along the records."""
    tape = Tape(run, residuals.x, wanted, 0)
    bar = algorithm.reverse(tape.run, residuals, ct, wanted)
    return bar._replace(theta=tape.collected(bar.theta))


class Recorded(NamedTuple):
    """The leaves of a recorded step, where its stages were evaluated, and these."""

    u: torch.Tensor
    k: torch.Tensor | None
    points: list
    rows: list
    leaves: tuple


class Tape:
    """A method whose steps are recorded, and the parameters' share of their products."""

    implicit, one_step = False, True

    def __init__(self, run, x, wanted, room):
        self.method, self.room, self.needs = run.method, room, None
        self.params = "theta" in wanted
        size = sum(v.numel() for v in x.theta)
        self.deferred = self.params and size > DEFERRED * x.u0.shape[0]
        self.captured = any(v.requires_grad for v in x.theta)
        self.leaves = _autodiff.parameters(x.theta, self.params and not self.deferred)
        self.rhs = run.field.bind(run.be.differentiable(), self.leaves, x.constants)
        self.field = lambda leaves: run.field.bind(run.be, leaves, x.constants)
        self.theta, self.block = x.theta, []
        self.sums = None
        self.run = replace(run, method=self)

    def bind(self, be, rhs, dense, jac=None):
        if isinstance(self.method, RungeKutta):
            return Taped(be, self.method.tableau(dense), rhs, self)
        return TapedDriven(be, self.method.scheme, rhs, self)

    def defer(self, stages):
        """Stages `(t, u, k, ct)` whose products with the parameters are due later."""
        self.block += stages
        if len(self.block) >= BLOCK:
            self.flush()

    def flush(self):
        t, *columns = zip(*self.block, strict=True)
        u, k, ct = (torch.stack(column).detach() for column in columns)
        t = torch.stack(t) if isinstance(t[0], torch.Tensor) else torch.tensor(t, dtype=u.dtype, device=u.device)
        self.block = []
        bars = _parameter_products(self.field, self.theta, t, u, k, ct, self.captured)
        self.sums = bars if self.sums is None else [a if b is None else b if a is None else a.add_(b)
                                                    for a, b in zip(self.sums, bars, strict=True)]

    def collected(self, theta):
        """The parameters' cotangents, those due included."""
        if self.block:
            self.flush()
        if self.sums is None:
            return theta
        return tuple(x if y is None else x.add_(y) for x, y in zip(theta, self.sums, strict=True))


class Taped(Explicit):
    """An explicit method with recorded steps."""

    def __init__(self, be, tab, rhs, tape):
        super().__init__(be, tab, rhs)
        self.tape = tape
        self.weights = be._rows(tab.a)

    def step(self, t, h, u, k):
        tape = self.tape
        if tape.room <= 0:
            return super().step(t, h, u, k)
        if tape.needs is None:
            measured = _Measured(tape.leaves)
            with measured:
                out = self.recorded(t, h, u, k)
            tape.needs = measured.bytes + out[1].nbytes * 2
        else:
            out = self.recorded(t, h, u, k)
        tape.room -= tape.needs
        return out

    def retake(self, t, h, u, k):
        return Record(t, h, u, self.recorded(t, h, u, k)[1])

    def recorded(self, t, h, u, k):
        """A step with a record of its stages on `K`."""
        tab, rhs = self.tab, self.tape.rhs
        times = self.times(t, h)
        with torch.enable_grad():
            v = u_leaf = u.detach().requires_grad_()
            k_leaf = None if k is None else k.detach().requires_grad_()
            rows, points = [] if k is None else [k_leaf], []
            for i in range(len(rows), tab.stages):
                w = self.weights[i]
                v = u_leaf if w is None else torch.addmv(u_leaf, torch.stack(rows).t(), w, alpha=h)
                points.append(v)
                rows.append(rhs(times[i], v))
        K = torch.stack(rows) if len(rows) > 1 else rows[0].detach().unsqueeze(0)
        K.recorded = Recorded(u_leaf, k_leaf, points, rows, self.tape.leaves)
        return v.detach() if tab.fsal else self.be.combine(u, h, tab.b, K), K

    def times(self, t, h):
        """The first arguments of the stages."""
        return self.be.times(t, h, self.tab.c)

    def places(self, t, h):
        """The same as the loops keep them."""
        return [t + c * h for c in self.tab.c]

    def vjp(self, pull, record, out, last, time, state, add=None):
        be, tab, tape = self.be, self.tab, self.tape
        t, h, _, K = record
        if add is not None or (tab.fsal and state.kappa is None and (out is None or out.k is None)):
            return super().vjp(pull, record, out, last, time, state, add)
        recorded, keep = getattr(K, "recorded", None), True
        if recorded is None:
            recorded, keep = self._again(record), tape.captured
        seeds = be.seeds(tab.b, h, state.lam, None if out is None else out.k, state.kappa)
        targets = [recorded.u, *([recorded.k] if tab.fsal else ())]
        rows = recorded.rows[int(tab.fsal):]
        if tape.deferred:
            targets += rows
        elif tape.params:
            targets += recorded.leaves
        u_bar, *bars = _grad(recorded.rows, seeds, targets, keep)
        kappa = bars.pop(0) if tab.fsal else None
        lam, theta = state.lam, state.theta
        if u_bar is not None:
            lam = lam + u_bar
        if out is not None and out.u is not None:
            lam = lam + out.u
        if tape.deferred:
            times = self.places(t, h)[int(tab.fsal):]
            stages = zip(times, recorded.points, rows, bars, strict=True)
            tape.defer([stage for stage in stages if stage[-1] is not None])
        elif tape.params:
            theta = tuple(x if b is None else x.add_(b) for x, b in zip(theta, bars, strict=True))
        return Adjoint(lam, kappa, theta, state.t0, state.h)

    def _again(self, record):
        t, h, u, K = record
        return self.recorded(t, h, u, K[0] if self.tab.fsal else None)[1].recorded


class TapedDriven(Taped, Driven):
    """The same for stages that are driven by a path."""

    def __init__(self, be, scheme, rhs, tape):
        Driven.__init__(self, be, scheme, rhs)
        self.tape, self.weights = tape, be._rows(self.tab.a)

    def times(self, t, h):
        return self.drive(t, h).unbind()

    places = times


def _parameter_products(field, theta, t, u, k, ct, captured):
    """Cotangents of the parameters, from those of `f` at many points; one by one where `f` cannot be batched."""
    leaves = _autodiff.parameters(theta, True)
    try:
        with _ahead.refusing(), torch.enable_grad():
            out = torch.func.vmap(field(leaves))(t, u)
        _ahead.check(out, k)
        return list(_ahead.product(out, leaves, ct, captured))
    except _ahead.Refused:
        pass
    pull = _autodiff.vjp(field, theta, False, True)
    sums = [torch.zeros_like(x, requires_grad=False) for x in theta]
    for point in zip(t, u, ct, strict=True):
        sums = [x.add_(y) for x, y in zip(sums, pull(*point)[1], strict=True)]
    return sums


def _grad(rows, seeds, targets, keep):
    """Cotangents of `targets`; None where nothing depends on them."""
    moving = [(r, s) for r, s in zip(rows, seeds.unbind(), strict=True) if r.requires_grad]
    places = [i for i, x in enumerate(targets) if x.requires_grad]
    bars = [None] * len(targets)
    if moving and places:
        outputs, given = zip(*moving, strict=True)
        found = _autodiff.run_backward(outputs, given, keep, False, tuple(targets[i] for i in places), True, False)
        for i, bar in zip(places, found, strict=True):
            bars[i] = bar
    return bars


class _Measured(torch.autograd.graph.saved_tensors_hooks):
    """How many bytes autograd keeps beside the parameters."""

    def __init__(self, leaves):
        self.known, self.bytes = {x.untyped_storage().data_ptr() for x in leaves}, 0
        super().__init__(self._pack, lambda x: x)

    def _pack(self, x):
        place = x.untyped_storage().data_ptr()
        if place not in self.known:
            self.known.add(place)
            self.bytes += x.untyped_storage().nbytes()
        return x
