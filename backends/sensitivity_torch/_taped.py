"""Explicit steps that autograd records, so that one call pulls many of them back.

For states too large for `_ahead`. Steps are recorded as they are taken, one after the other in a segment that starts
with leaves for its state and its first slope; where no record was kept, they are taken again with one. Where the
parameters outnumber the state by far, only cotangents of the stages are wanted of a segment, and one product for a
block of stages serves the parameters.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from sensitivity.algorithms.discrete import RecursiveCheckpointAdjoint
from sensitivity.explicit import Explicit
from sensitivity.methods import RungeKutta
from sensitivity.stepper import Adjoint
from sensitivity.stochasticmethods import Driven, ReversibleHeun, StochasticMethod
from sensitivity.vjp import ReverseVJP

from . import _ahead, _autodiff, _levels

ROOM = 2**28  # bytes of records that one solve keeps
DEFERRED = 32  # parameters per unknown from which on their products are made for many stages at once
BLOCK, FEW = 64, 16  # stages; for fewer, a product of their own does not pay


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
    out, aux, residuals = algorithm.forward(tape.run, x, wanted)
    return out, aux._replace(nfe=aux.nfe + tape.extra), residuals


def reverse(algorithm, run, residuals, ct, wanted, keep):
    """`algorithm.reverse` along the records, which are not used again unless `keep`."""
    # Making the products of a batch of stages holds about four times as much as their records.
    limit = BLOCK if algorithm.memory is None else min(BLOCK, residuals.log.plan.block // 4)
    tape = Tape(run, residuals.x, wanted, 0, keep, limit)
    bar = algorithm.reverse(tape.run, residuals, ct, wanted)
    return bar._replace(theta=tape.collected(bar.theta))


class Recorded(NamedTuple):
    """A step in the graph: the state that it starts from, its stages, the state that it ends in, and the parameters.

    A segment starts from leaves: that state, and `slope` unless it is a stage of this step. `stages` are those of this
    step, evaluated at `points`; `rows` may have the last one of the step before in front.
    """

    u: torch.Tensor
    slope: torch.Tensor | None
    points: list
    stages: list
    rows: list
    end: torch.Tensor
    params: tuple


class Tape:
    """A method whose steps are recorded, and the parameters' share of their products."""

    implicit, one_step = False, True

    def __init__(self, run, x, wanted, room, keep=True, limit=BLOCK):
        self.method, self.room, self.keep, self.needs, self.extra = run.method, room, keep, 0, 0
        self.params = "theta" in wanted
        size = sum(v.numel() for v in x.theta)
        self.deferred = self.params and size > DEFERRED * x.u0.shape[0] and limit >= FEW
        self.captured = any(v.requires_grad for v in x.theta)
        self.leaves = _autodiff.parameters(x.theta, self.params and not self.deferred)
        self.bound = run.field.bind(run.be.differentiable(), self.leaves, x.constants)
        self.rhs = self.measured if room else self.bound
        self.field = lambda leaves: run.field.bind(run.be, leaves, x.constants)
        self.theta, self.block, self.limit, self.segment = x.theta, [], limit, []
        self.sums = None
        self.run = replace(run, method=self)

    def bind(self, be, rhs, dense, jac=None):
        if isinstance(self.method, RungeKutta):
            return Taped(be, self.method.tableau(dense), rhs, self)
        return TapedDriven(be, self.method.scheme, rhs, self)

    def measured(self, t, u):
        """The first evaluation of `f`, whose record says how large the others are."""
        measured = _Measured(self.leaves)
        with measured:
            out = self.bound(t, u)
        self.rhs, self.needs = self.bound, measured.bytes + 2 * out.nbytes
        return out

    def stage(self, t, u):
        """`f(t, u)`, whose cotangent can be asked for where the parameters will need it."""
        out = self.rhs(t, u)
        return out if out.requires_grad or not self.deferred else out.detach().requires_grad_()

    def defer(self, stages):
        """Stages `(t, u, k, ct)` whose products with the parameters are due later."""
        self.block += stages
        if len(self.block) >= self.limit:
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

    def lift(self, u):
        return _noted(u.detach().requires_grad_()) if self.tape.room > 0 else u

    def first(self, t, u):
        if not self.fsal or not hasattr(u, "recorded"):
            return super().first(t, u)
        with torch.enable_grad():
            return _noted(self.tape.stage(t, u.recorded))

    def carry(self, K):
        k = super().carry(K)
        if k is not None and hasattr(K, "recorded"):
            k.recorded = K.recorded.rows[-1]
        return k

    def step(self, t, h, u, k):
        tape = self.tape
        if tape.room <= 0:
            return super().step(t, h, u, k)
        out = self.recorded(t, h, u, k)
        tape.room -= tape.needs * self.stages
        return out

    def recorded(self, t, h, u, k):
        """A step with a record of its stages on `K`."""
        tab, tape, rows, points = self.tab, self.tape, [], []
        times = self.times(t, h)
        with torch.enable_grad():
            start = _graph(u)
            slope = None
            if k is not None:
                rows.append(_graph(k))
                if start.is_leaf and hasattr(k, "recorded"):
                    points.append(start)
                elif start.is_leaf:
                    slope = rows[0]
            known = len(rows) - len(points)
            v = start
            for i in range(len(rows), tab.stages):
                v = self._moved(start, h, tab.a[i], rows)
                points.append(v)
                rows.append(tape.stage(times[i], v))
            end = v if tab.fsal else self._moved(start, h, tab.b, rows)
        K = (torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)).detach()
        K.recorded = Recorded(start, slope, points, rows[known:], rows, end, tape.leaves)
        return _noted(end), K

    def retake(self, t, h, u, k):
        return *self.recorded(t, h, u, k), 0

    def retaken(self, x, dt, vector):
        """One evaluation of `f` says how much autograd keeps."""
        with torch.enable_grad():
            self.tape.measured(self.times(self.be.scalar(x.t0), dt or 0.0)[0], x.u0.detach().requires_grad_())
        self.tape.extra += 1
        return super().retaken(x, dt, vector) + self.tape.needs * self.stages

    def _moved(self, start, h, weights, rows):
        """As `combine`, term by term: autograd would pull a product with a matrix back to all of its rows anew."""
        out = start
        for w, row in zip(weights, rows, strict=False):
            if w:
                out = torch.add(out, row, alpha=h * w)
        return out

    def times(self, t, h):
        """The first arguments of the stages."""
        return self.be.times(t, h, self.tab.c)

    def places(self, t, h):
        """The same as the loops keep them."""
        return [t + c * h for c in self.tab.c]

    def vjp(self, pull, record, out, last, time, state, add=None):
        tape, t, h, K = self.tape, record.t, record.h, record.k
        kept = hasattr(K, "recorded")
        if not kept:
            K = self.recorded(t, h, record.u.detach(), K[0] if self.fsal else None)[1]
        step = K.recorded
        tape.segment.append((t, h, out, step))
        if not kept or not tape.keep:
            del K.recorded
        if not step.u.is_leaf:
            return state
        segment, tape.segment = tape.segment, []
        newest, slopes = segment[0][-1], [] if step.slope is None else [step.slope]
        seeds = [(newest.end, state.lam)]
        if state.kappa is not None:
            seeds.append((newest.rows[-1], state.kappa))
        for _, _, out, passed in segment:
            if out is not None and out.u is not None:
                seeds.append((passed.u, out.u))
            if out is not None and out.k is not None:
                seeds += zip(passed.rows, out.k.unbind(), strict=True)
        targets = [step.u, *slopes]
        if tape.deferred:
            targets += [k for *_, passed in segment for k in passed.stages]
        elif tape.params:
            targets += step.params
        lam, *bars = _grad(seeds, targets, tape.captured or (kept and tape.keep))
        kappa = bars.pop(0) if slopes else None
        theta = state.theta
        if tape.deferred:
            bars = iter(bars)
            for t, h, _, passed in segment:
                times = self.places(t, h)[-len(passed.stages):]
                stages = zip(times, passed.points, passed.stages, bars)  # noqa: B905
                tape.defer([stage for stage in stages if stage[-1] is not None])
        elif tape.params:
            theta = tuple(x if b is None else x.add_(b) for x, b in zip(theta, bars, strict=True))
        return Adjoint(lam, kappa, theta, state.t0, state.h)


class TapedDriven(Taped, Driven):
    """The same for stages that are driven by a path."""

    def __init__(self, be, scheme, rhs, tape):
        Driven.__init__(self, be, scheme, rhs)
        self.tape = tape

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


def _noted(x):
    """`x` for the loops, which see no graph."""
    out = x.detach()
    out.recorded = x
    return out


def _graph(x):
    """What `x` is in the graph, or a leaf to start from."""
    return x.recorded if hasattr(x, "recorded") else x.detach().requires_grad_()


def _grad(seeds, targets, keep):
    """Cotangents of `targets` from pairs of outputs and theirs; None where nothing depends on them."""
    moving = [(x, ct) for x, ct in seeds if x.requires_grad]
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
