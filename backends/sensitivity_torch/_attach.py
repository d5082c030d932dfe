"""The solve as autograd and `torch.func` see it: a function, its transpose and its tangent.

Each is a Function of its own whose `forward` sees plain tensors only, whatever transforms are running; so step
control reads numbers, and `vmap` is a loop over lanes. What belongs to one solve but is no tensor is in a `Call`.
"""

import torch

from sensitivity.algorithms.base import Aux, Outputs, Tangents, fractions
from sensitivity.errors import CapturedValueError, UnsupportedCombination
from sensitivity.retcode import RetCode
from sensitivity.second import refuse_second, turned
from sensitivity.system import Inputs
from sensitivity.verdict import judge
from sensitivity.vjp import ReverseVJP

from . import _autodiff, _levels


class Call:
    """One solve: what it computes, and afterwards what it left; under `vmap`, one `Call` per lane."""

    def __init__(self, algorithm, run, wanted, constants):
        self.algorithm, self.run, self.wanted, self.constants = algorithm, run, wanted, constants
        self.aux = self.residuals = self.lanes = None
        self.keep = True

    def inputs(self, flat):
        u0, t0, t1, saveat, rtol, atol, *rest = flat
        k = self.constants
        return Inputs(u0, tuple(rest[k:]), t0, t1, saveat, tuple(rest[:k]), rtol, atol)

    def outputs(self, given):
        """The tensors of one `Outputs`, in its order, put where they belong."""
        given, dense, events = iter(given), self.run.dense, bool(self.run.events)
        return Outputs(*(next(given) if there else None for there in (True, dense, dense, events, events)))

    def slots(self, count):
        """Positions in the flat inputs, with their names, that derivatives are wanted of."""
        names = ["u0", "t0", "t1", "saveat", *[None] * (2 + self.constants)]
        names += ["theta"] * (count - len(names))
        return [(i, name) for i, name in enumerate(names) if name in self.wanted]


def flattened(x):
    return (x.u0, x.t0, x.t1, x.saveat, x.rtol, x.atol, *x.constants, *x.theta)


def bare(run, x):
    """Inputs that autograd does not know, except what `f` closes over, which it has to."""
    live = run.field.f.live
    known, k = {id(v) for v in live}, run.field.p.count
    plain = Inputs(*(v.detach() if isinstance(v, torch.Tensor) else v for v in x))
    return plain._replace(theta=(*(v.detach() for v in x.theta[:k]),
                                 *(v if id(v) in known else v.detach() for v in x.theta[k:])))


def attach(be, algorithm, run, x):
    """`algorithm.plain(run, x)`, differentiable; see `Backend.attach`."""
    flat = flattened(x)
    tensors = [v for v in flat if isinstance(v, torch.Tensor)]
    transformed = _levels.transformed()
    moving = any(_levels.moving(v) for v in tensors)
    if not algorithm.boundary:
        if transformed and any(_levels.batched(v) for v in tensors):
            raise UnsupportedCombination(f"{algorithm.name} cannot run under vmap",
                                         "lanes that take different steps cannot share one recorded loop",
                                         "sensealg=RecursiveCheckpointAdjoint(), or a loop in place of vmap")
        with torch.set_grad_enabled(torch.is_grad_enabled() and moving):
            return algorithm.plain(run, x)
    if not transformed and not moving:
        with torch.no_grad():
            return task(algorithm, "plain", run, x)
    wanted = {name for name in ("u0", "t0", "t1", "saveat")
              if getattr(x, name) is not None and _levels.moving(getattr(x, name))}
    if any(_levels.moving(v) for v in x.theta):
        wanted.add("theta")
    call = Call(algorithm, run, frozenset(wanted), len(x.constants))
    *out, summary = Solve.apply(call, *flat)
    out = call.outputs(out)
    return out, call.aux if call.lanes is None else _aux_of_lanes(be, run, x, summary)


def compiling(run):
    return type(run.vjp) is ReverseVJP and run.vjp.compile


def task(algorithm, name, run, x, *args):
    """`algorithm.<name>(run, x, *args)` on plain tensors."""
    from . import _taped

    with _autodiff.silent(run.field.f.live):
        x = bare(run, x)
        if compiling(run):
            from . import _compiled

            return _compiled.task(algorithm, name, run, x, *args)
        if name == "forward" and _taped.suits(algorithm, run, x, *args):
            return _taped.forward(algorithm, run, x, *args)
        return getattr(algorithm, name)(run, x, *args)


def reverse(algorithm, run, residuals, ct, wanted, keep=True):
    """`algorithm.reverse`, with what `f` closes over in the state of the solve; `keep` if there may be another one."""
    from . import _ahead, _taped

    _same_captured(run, residuals.x)
    with _autodiff.silent(run.field.f.live):
        if compiling(run):
            from . import _compiled

            return _compiled.reverse(algorithm, run, residuals, ct, wanted)
        if _taped.suits(algorithm, run, residuals.x, wanted):
            return _taped.reverse(algorithm, run, residuals, ct, wanted, keep)
        return _ahead.reverse(algorithm, run, residuals, ct, wanted)


def _aux_of_lanes(be, run, x, summary):
    t, ratio, h = summary[:3].unbind()
    accepted, rejected, nfe, status, *algebra = summary[3:].to(torch.int64).unbind()
    ts = x.saveat
    if run.saves is None:
        ts = [t]
    elif isinstance(run.saves, int):
        ts = be.spread(x.t0, x.t1, fractions(run.saves))
    return Aux(ts, t, accepted, rejected, nfe, status, ratio, h, None, algebra=tuple(algebra))


def _summary(aux, like):
    numbers = [aux.t, aux.ratio, aux.h, aux.accepted, aux.rejected, aux.nfe, aux.status, *aux.algebra]
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)


def _loop(function, size, in_dims, heads, args):
    """`function.apply(*heads[i], *slices)` for every lane i of a batch, stacked."""
    lanes = []
    for i in range(size):
        slices = [v if d is None else v.select(d, i) for v, d in zip(args, in_dims, strict=True)]
        lanes.append(function.apply(*heads[i], *slices))
    out = tuple(torch.stack(column) for column in zip(*lanes, strict=True))
    return out, (0,) * len(out)


class Solve(torch.autograd.Function):
    """`call, *inputs -> *outputs, summary`."""

    @staticmethod
    def forward(call, *flat):
        x = call.inputs(flat)
        if call.wanted:
            out, call.aux, call.residuals = task(call.algorithm, "forward", call.run, x, call.wanted)
        else:
            out, call.aux = task(call.algorithm, "plain", call.run, x)
        return (*(v.clone() for v in out if v is not None), _summary(call.aux, x.u0))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *flat = inputs
        ctx.others = [None if isinstance(v, torch.Tensor) else v for v in flat]
        ctx.places = [i for i, v in enumerate(flat) if isinstance(v, torch.Tensor)]
        tensors = [flat[i] for i in ctx.places]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(output[-1])

    @staticmethod
    def _flat(ctx):
        flat = list(ctx.others)
        for i, v in zip(ctx.places, ctx.saved_tensors, strict=True):
            flat[i] = v
        return flat

    @staticmethod
    def backward(ctx, *ct):
        flat = Solve._flat(ctx)
        bars = [None] * len(flat)
        slots = ctx.call.slots(len(flat))
        if slots:
            ctx.call.keep = _autodiff.graph_is_kept()
            # Where nothing differentiates this derivative, a Function would only cost time.
            again = torch.is_grad_enabled() or _levels.active()
            reversed_ = Reverse.apply if again else Reverse.forward
            for (i, _), bar in zip(slots, reversed_(ctx.call, len(flat), *flat, *ct[:-1]), strict=True):
                bars[i] = bar
        return None, *bars

    @staticmethod
    def jvp(ctx, _, *tangents):
        flat = Solve._flat(ctx)
        if ctx.call.run.dense:
            raise UnsupportedCombination("dense=True has no forward-mode derivative", "", "saveat=[...]")
        d = [torch.zeros_like(flat[i]) if tangents[i] is None else tangents[i]
             for i, _ in ctx.call.slots(len(flat))]
        moved = Tangent.apply(ctx.call, len(flat), *flat, *(v.unsqueeze(0) for v in d))
        return *(v[0] for v in moved), None

    @staticmethod
    def vmap(info, in_dims, call, *flat):
        if call.run.dense or call.run.saves == "steps":
            raise UnsupportedCombination("dense=True and saveat='steps' cannot be used under vmap",
                                         "lanes take different numbers of steps", "saveat=[...]")
        if call.run.events:
            raise UnsupportedCombination("events cannot be used under vmap in PyTorch",
                                         "lanes have different numbers of events", "a loop in place of vmap")
        call.lanes = [Call(call.algorithm, call.run, call.wanted, call.constants) for _ in range(info.batch_size)]
        return _loop(Solve, info.batch_size, in_dims[1:], [(lane,) for lane in call.lanes], flat)


class _Once(torch.autograd.Function):
    """A derivative of a solve: it belongs to a `Call`, and its first argument count says where its inputs end."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, ctx.count, *args = inputs
        ctx.others = [None if isinstance(v, torch.Tensor) else v for v in args]
        ctx.places = [i for i, v in enumerate(args) if isinstance(v, torch.Tensor)]
        tensors = [args[i] for i in ctx.places]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def split(ctx):
        """The flat inputs of the solve, and the rest."""
        args = list(ctx.others)
        for i, v in zip(ctx.places, ctx.saved_tensors, strict=True):
            args[i] = v
        return args[:ctx.count], args[ctx.count:]

    @staticmethod
    def moved(ctx, flat, given):
        """Directions of the inputs wanted; zeros where there is none."""
        return [torch.zeros_like(flat[i]) if v is None else v
                for (i, _), v in zip(ctx.call.slots(ctx.count), given, strict=True)]

    @staticmethod
    def scattered(ctx, bars):
        """Cotangents of the inputs wanted, at their places among all."""
        out = [None] * ctx.count
        for (i, _), bar in zip(ctx.call.slots(ctx.count), bars, strict=True):
            out[i] = bar
        return out

    @staticmethod
    def lanes(size, in_dims, call, count):
        """The calls that a batch of derivatives belongs to: lanes of the solve, or one solve for all."""
        if any(d is not None for d in in_dims[2:2 + count]):
            return [(lane, count) for lane in call.lanes]
        return [(call, count)] * size


class Reverse(_Once):
    """`call, count, *inputs, *cotangents of the outputs -> *cotangents of the inputs wanted`."""

    @staticmethod
    def forward(call, count, *args):
        flat, ct = args[:count], args[count:]
        run = call.run
        bar = reverse(call.algorithm, run, call.residuals, call.outputs(ct), call.wanted, call.keep)
        if call.aux.status == RetCode.Success:
            judge(call.algorithm, run.be, bar)
        theta = iter(bar.theta)
        out = []
        for i, name in call.slots(count):
            value = next(theta) if name == "theta" else getattr(bar, name)
            out.append(torch.as_tensor(value, dtype=flat[i].dtype, device=flat[i].device).clone())
        return tuple(out)

    @staticmethod
    def backward(ctx, *w):
        refuse_second(ctx.call.algorithm, ctx.call.run, ctx.call.wanted)
        flat, ct = _Once.split(ctx)
        d = _Once.moved(ctx, flat, w)
        *bars, du = Second.apply(ctx.call, ctx.count, *flat, *ct, *(torch.zeros_like(v) for v in ct), *d)
        return None, None, *_Once.scattered(ctx, bars), du

    @staticmethod
    def jvp(ctx, _, __, *tangents):
        refuse_second(ctx.call.algorithm, ctx.call.run, ctx.call.wanted)
        flat, ct = _Once.split(ctx)
        d = _Once.moved(ctx, flat, [tangents[i] for i, _ in ctx.call.slots(ctx.count)])
        dct = [torch.zeros_like(v) if w is None else w for v, w in zip(ct, tangents[ctx.count:], strict=True)]
        return Second.apply(ctx.call, ctx.count, *flat, *ct, *dct, *d)[:-1]

    @staticmethod
    def vmap(info, in_dims, call, count, *args):
        heads = _Once.lanes(info.batch_size, in_dims, call, count)
        return _loop(Reverse, info.batch_size, in_dims[2:], heads, args)


def _only_eager(run, what):
    if compiling(run):
        raise UnsupportedCombination(f"ReverseVJP(compile=True) has no {what}", "it compiles the reverse pass",
                                     "vjp=ReverseVJP()")


def _same_captured(run, x):
    """A closure or module that changed since the solve would leave a wrong gradient behind."""
    field = run.field.f
    if not field.live:
        return
    be, k = run.be, run.field.p.count
    own = x.theta[k:k + run.field.captured]
    u = run.field.state(be, x.u0)
    now = _autodiff.found(be, field, be.time(x.t0), u, run.field.p.join(be, x.theta[:k], x.constants), own)
    if {id(v) for v in now} != {id(v) for v in field.live}:
        raise CapturedValueError("f closes over other tensors now than when it was solved",
                                 "their derivatives cannot be told apart", "pass these tensors through p")


class Tangent(_Once):
    """`call, count, *inputs, *directions of the inputs wanted (m, ...) -> tangents of the outputs (m, ...)`."""

    @staticmethod
    def forward(call, count, *args):
        _only_eager(call.run, "forward mode")
        d, x = args[count:], call.residuals.x
        theta, times = [], {"t0": None, "t1": None, "saveat": None}
        u0 = torch.zeros((d[0].shape[0], x.u0.shape[0]), dtype=x.u0.dtype, device=x.u0.device)
        for (_, name), v in zip(call.slots(count), d, strict=True):
            if name == "u0":
                u0 = v
            elif name == "theta":
                theta.append(v)
            else:
                times[name] = v.to(x.u0.dtype)
        if not theta:
            theta = [v.new_zeros((u0.shape[0], *v.shape)) for v in x.theta]
        with _autodiff.silent(call.run.field.f.live):
            moved = call.algorithm.tangent(call.run, call.residuals, Tangents(u0, tuple(theta), **times))
        return tuple(v for v in moved if v is not None) if isinstance(moved, Outputs) else (moved,)

    @staticmethod
    def backward(ctx, w, *_):
        refuse_second(ctx.call.algorithm, ctx.call.run, ctx.call.wanted)
        flat, d = _Once.split(ctx)
        totals, rows = None, []
        for i in range(w.shape[0]):
            zero = torch.zeros_like(w[i])
            *bars, _ = Second.apply(ctx.call, ctx.count, *flat, w[i], zero, *(v[i] for v in d))
            totals = bars if totals is None else [a + b for a, b in zip(totals, bars, strict=True)]
            rows.append(Reverse.apply(ctx.call, ctx.count, *flat, w[i]))
        return None, None, *_Once.scattered(ctx, totals), *(torch.stack(v) for v in zip(*rows, strict=True))

    @staticmethod
    def jvp(ctx, *_):
        raise UnsupportedCombination(f"{ctx.call.algorithm.name} has no tangent of a tangent",
                                     "forward mode was asked for twice",
                                     "torch.func.hessian (forward over reverse), sa.hessian, or DirectAdjoint()")

    @staticmethod
    def vmap(info, in_dims, call, count, *args):
        heads = _Once.lanes(info.batch_size, in_dims, call, count)
        return _loop(Tangent, info.batch_size, in_dims[2:], heads, args)


class Second(_Once):
    """`call, count, *inputs, ct, change of ct, *directions of the inputs -> *changes of the cotangents, of the states`.

    The tangent of `Reverse`, which is also the transpose of itself: see `sensitivity.second`.
    """

    @staticmethod
    def forward(call, count, *args):
        _only_eager(call.run, "second derivatives")
        flat, (ct, dct, *given) = args[:count], args[count:]
        x, slots = call.inputs(flat), call.slots(count)
        theta = [v for (_, name), v in zip(slots, given, strict=True) if name == "theta"]
        u0 = [v for (_, name), v in zip(slots, given, strict=True) if name == "u0"]
        d = Tangents(u0[0][None] if u0 else torch.zeros_like(x.u0)[None],
                     tuple(v[None] for v in theta or [torch.zeros_like(v) for v in x.theta]), None, None, None)
        _same_captured(call.run, x)
        with _autodiff.silent(call.run.field.f.live):
            u0_bar, theta_bar, du = turned(call.algorithm, call.run, bare(call.run, x), d, ct, dct, call.wanted)
        rest = iter(theta_bar)
        bars = (next(rest) if name == "theta" else u0_bar for _, name in slots)
        return (*(v.clone() for v in bars), du.clone())

    @staticmethod
    def backward(ctx, *_):
        raise UnsupportedCombination(f"{ctx.call.algorithm.name} gives no third derivatives", "one was asked for",
                                     "sensealg=DirectAdjoint()")

    jvp = backward

    @staticmethod
    def vmap(info, in_dims, call, count, *args):
        heads = _Once.lanes(info.batch_size, in_dims, call, count)
        return _loop(Second, info.batch_size, in_dims[2:], heads, args)
