"""Solves whose steps, and the sweep back along them, are compiled: `ReverseVJP(compile=True)`.

TorchDynamo makes a graph of `f`, with every tensor that `f` reaches as an argument, and tells for every later solve
whether that graph still holds. The loops around it are traced and compiled once for each graph (`_traced`), and run in
blocks of steps. The parameters' share of the sweep is one batched product for many stages.
"""

import threading
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from sensitivity.algorithms import base
from sensitivity.algorithms.discrete import RecursiveCheckpointAdjoint
from sensitivity.assembled import WorstPart
from sensitivity.control import FixedStep, PIController
from sensitivity.errors import UnsupportedCombination
from sensitivity.integrate import Steps
from sensitivity.methods import RungeKutta
from sensitivity.records import Record

from . import _ahead, _autodiff, _traced
from ._backend import TorchBackend

POINTS = 1024  # stages whose products with the parameters are made together, where they are small
ENTRIES = 2**19
NAME = "ReverseVJP(compile=True)"


def unsuited(algorithm, run):
    """Why a solve cannot be compiled, or None."""
    exact = type(algorithm) is RecursiveCheckpointAdjoint
    reasons = {
        f"{algorithm.name}{' with a budget' * exact}": not exact or algorithm.budgeted,
        "a problem that is not an ODEProblem": run.kind is not None,
        f"{run.method.name}, which is no explicit Runge-Kutta method": not isinstance(run.method, RungeKutta),
        "events": bool(run.events),
        "a mass matrix": run.mass is not None or run.field.mass is not None,
        "norm=": run.norm is not None and not (type(run.norm) is WorstPart and run.norm.norm is None),
        "progress=": run.progress is not None,
        type(run.controller).__name__: type(run.controller) not in (PIController, FixedStep),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return _compiler() if found is None else f"there are no compiled loops for {found}"


@cache
def _compiler():
    """Why nothing can be compiled here, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing TorchInductor warns of deprecations in PyTorch itself
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        except (ImportError, RuntimeError) as e:
            return f"TorchInductor finds no C++ compiler ({' '.join(str(e).split())[:200]})"
    return None


def refuse(what, why):
    raise UnsupportedCombination(f"{NAME} cannot be used here", f"{what} {why}", "vjp=ReverseVJP()")


# -- the graph of f -----------------------------------------------------------------------------------------------


class Graph:
    """One graph of `f`: called by TorchDynamo in place of `f` while its guards hold."""

    def __init__(self, graph):
        self.graph, self.loops = graph, {}

    def __call__(self, *args):
        out = self.graph(*args)
        _seen.hit = self, args, out
        return out


_seen = threading.local()


def _capture(graph, _):
    return Graph(graph)


def _traced_call(be, f, t, u, p):
    """The leaves of `f(t, u, p)`, and the graph that made them with its arguments and results."""
    _seen.hit = None
    # With a state that requires grad, so that what f says about derivatives is in the graph.
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # importing TorchDynamo warns of deprecations in PyTorch itself
        try:
            out = torch.compile(f, backend=_capture, fullgraph=True, dynamic=False)(t, u, p)
        except Exception as e:
            if "LimitHit" in type(e).__name__:
                raise UnsupportedCombination(
                    f"{NAME} would compile f again and again", "f closes over numbers or objects that change",
                    "make what changes a tensor, or pass it through p") from e
            why = " ".join(line.strip() for line in str(e).strip().split("\n")[:2])
            raise UnsupportedCombination(f"{NAME} cannot compile f", why,
                                         "tensor operations only in f, or vjp=ReverseVJP()") from e
    hit, _seen.hit = _seen.hit, None
    if hit is None:
        refuse("f", "computes nothing")
    return be.flatten(out)[0], hit


class Source:
    """The graph of `f` for one solve, and the tensors that it needs beside `t` and `u`."""

    def __init__(self, run, x):
        be, field = run.be, run.field
        t = be.time(be.scalar(x.t0)).requires_grad_()
        leaves = [v.detach().requires_grad_() for v in field.u.unravel(be, x.u0)]
        state = be.unflatten(field.u.structure, leaves)
        p = field.p.join(be, x.theta[:field.p.count], x.constants)
        out, (self.graph, args, made) = _traced_call(be, field.f.f, t, state, p)
        own = {id(t): "t", **{id(v): i for i, v in enumerate(leaves)}}
        self.places = tuple(own.get(id(v), "input") for v in args)
        self.inputs = tuple(v.detach().contiguous() for v in args if id(v) not in own)
        sources = {id(v): ("state", i) for i, v in enumerate(leaves)}
        sources |= {id(v): ("made", i) for i, v in enumerate(made)}
        self.outputs = tuple(sources.get(id(v)) for v in out)
        if None in self.outputs:
            refuse("f", "returns something that it did not compute")
        self.layout, self.be = field.u, be

    def field(self, inputs):
        """The right-hand side on vectors, with other tensors in place of `inputs`."""

        def rhs(t, u):
            given, leaves = iter(inputs), self.layout.unravel(self.be, u)
            with torch.set_grad_enabled(torch.is_grad_enabled()):  # which the graph may change
                out = self.graph.graph(*(t if place == "t" else next(given) if place == "input" else leaves[place]
                                         for place in self.places))
            found = [out[i] if kind == "made" else leaves[i] for kind, i in self.outputs]
            return self.layout.ravel(self.be, found).to(u.dtype)

        return rhs

    def call(self, make, key, args):
        """The results of what `make(..., args)` compiles, once for each graph."""
        args = (*args, *self.inputs)
        key = (make, key, self.places, self.outputs, self.layout)
        if key not in self.graph.loops:
            self.graph.loops[key] = make(*key[1], self.field, args)
        return self.graph.loops[key](*args)


# -- a solve and its reverse pass ---------------------------------------------------------------------------------


def task(algorithm, name, run, x, *args):
    """`algorithm.forward` or `algorithm.plain` with compiled steps."""
    if name not in ("forward", "plain"):
        refuse("forward mode", "is not compiled")
    if run.field.f.names:
        refuse("a module f inside a torch.func transform", "is not compiled")
    if x.u0.is_complex() or x.u0.device.type != "cpu":
        refuse(f"a state of {x.u0.dtype} on {x.u0.device}", "is none of real numbers on the CPU")
    if not x.u0.shape[0]:
        refuse("a state", "has no entries")
    return getattr(algorithm, name)(replace(run, be=Compiled(run, x, Source(run, x))), x, *args)


def reverse(algorithm, run, residuals, ct, wanted):
    """`algorithm.reverse` with compiled products."""
    be = Compiled(run, residuals.x, residuals.log.source, wanted)
    return algorithm.reverse(replace(run, be=be), residuals, ct, wanted)


class Log(Sequence):
    """Accepted steps in the blocks `(T, U, K, count)` that they came in; records of single ones are made when asked."""

    def __init__(self, source):
        self.source, self.blocks, self.starts, self.records = source, [], [0], {}

    def add(self, *block):
        self.blocks.append(block)
        self.starts.append(self.starts[-1] + block[-1])

    def result(self):
        return self

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, n):
        if isinstance(n, slice):
            return [self[i] for i in range(*n.indices(len(self)))]
        n = range(len(self))[n]
        place = bisect_right(self.starts, n) - 1
        if place not in self.records:
            self.records[place] = _records(*self.blocks[place])
        return self.records[place][n - self.starts[place]]


def _records(T, U, K, count):
    return [Record(*times, u, k) for times, u, k in zip(T[:count].tolist(), U.unbind(), K.unbind(), strict=False)]


class Compiled(TorchBackend):
    """A backend whose loops over steps run in compiled blocks."""

    def __init__(self, run, x, source, wanted=frozenset()):
        super().__init__(run.be.dtype, run.be._device)
        self._constants = run.be._constants
        self.plain, self.x, self.source, self.wanted = run, x, source, wanted

    def store(self, capacity):
        del capacity
        return Log(self.source)

    def iterate(self, step, state, running, limit, sink=None):
        if not isinstance(step, Steps):
            return super().iterate(step, state, running, limit, sink)
        u, fsal, s = state.u.contiguous(), state.k is not None, step.span
        k = state.k.contiguous() if fsal else u.new_zeros(0)
        rtol, atol = (torch.as_tensor(v, dtype=torch.float64 if isinstance(v, float) else u.dtype, device=u.device)
                      for v in (step.rtol, step.atol))
        z, shape = self._numbers(*state[:2], *state[4:9]), _traced.Shape.of(self.plain, u)
        key = shape, rtol.shape, atol.shape
        left = limit
        while left > 0 and running(state):
            before, count = state.accepted + state.rejected, state.accepted
            span = self._numbers(s.t0, s.t1, s.direction, left + before)
            z, u, k, T, U, K, _ = self.source.call(_traced.forward, key, (z, u, k, span, rtol, atol))
            t, h, memory, ratio, *counts = z.tolist()
            state = state._replace(t=t, h=h, u=u, k=k if fsal else None, memory=memory, ratio=ratio)
            state = state._replace(**dict(zip(("accepted", "rejected", "status"), map(int, counts), strict=True)))
            left -= state.accepted + state.rejected - before
            filled = state.accepted - count
            if isinstance(sink, Log):
                sink.add(T, U, K, filled)
            elif sink is not None:
                for record in _records(T, U, K, filled):
                    sink.add(record)
        return state, None if sink is None else sink.result()

    def replay(self, body, state, log, extra=None):
        if not isinstance(log, Log) or not log:
            return super().replay(body, state, log, extra)
        run, lam, time = self.plain, state.lam.contiguous(), base.times_wanted(self.wanted)
        shape = _traced.Shape.of(run, lam)
        tab = shape.tableau
        silent = tab.fsal and tab.b[-1] == 0.0 and state.kappa is None and bool(self.silent_end(extra))
        kappa = torch.zeros_like(lam) if state.kappa is None else state.kappa.contiguous()
        products = _Products(run, self.x, tab, "theta" in self.wanted)
        none = [lam.new_zeros(shape.rows, *more) for more in ((shape.n,), (tab.stages, shape.n), (2,))]
        t_bar, h_bar, end = state.t0, state.h, len(log)
        for T, U, K, filled in reversed(log.blocks):
            newest = filled - 1 if end == len(log) else -1
            z = self._numbers(t_bar, h_bar, filled, newest, silent)
            outs = none if extra is None else _outs(extra[end - filled:end], none)
            z, lam, kappa, W = self.source.call(_traced.reverse, (shape, time), (z, lam, kappa, T, U, K, *outs))
            if time:
                t_bar, h_bar = z[:2].tolist()
            products.add(T[:filled], U[:filled], K[:filled], W[:filled], silent and newest >= 0)
            end -= filled
        theta = self.add(state.theta, products.result()) if products.params else state.theta
        return state._replace(lam=lam, kappa=kappa if tab.fsal else None, theta=theta, t0=t_bar, h=h_bar)

    def _numbers(self, *xs):
        return torch.tensor(xs, dtype=torch.float64, device=self._device)


def _outs(extra, none):
    """Contributions to the steps of a block as arrays of the shapes of `none`."""
    if all(out is None for out in extra):
        return none
    u, k, z = (torch.zeros_like(v) for v in none)
    for i, out in enumerate(extra):
        if out is not None:
            if out.u is not None:
                u[i] = out.u
            if out.k is not None:
                k[i] = out.k
            z[i, 0], z[i, 1] = out.h, out.t
    return u, k, z


class _Products:
    """The parameters' cotangents, from those of the stages of many steps at once."""

    def __init__(self, run, x, tab, params):
        self.params = params and bool(x.theta)
        self.run, self.x, self.tab = run, x, tab
        self.waiting, self.points, self.sums = [], 0, None
        if self.params:
            self.leaves = _autodiff.parameters(x.theta, True)
            self.captured = any(v.requires_grad for v in x.theta)
            self.rhs = torch.func.vmap(run.field.bind(run.be, self.leaves, x.constants))

    def add(self, T, U, K, W, silent):
        if not self.params:
            return
        tab, be = self.tab, self.run.be
        t, h = T[:, :1], T[:, 1:]
        times = t + h * torch.tensor(tab.c, dtype=T.dtype)
        u = U[:, None, :] + h[:, :, None].to(U.dtype) * (be._square(tab.a) @ K)
        columns = [v[:, tab.fsal:].flatten(0, 1) for v in (times.to(be.dtype.to_real()), u, K, W)]
        if silent:
            columns = [v[:-1] for v in columns]
        self.waiting.append(columns)
        self.points += columns[0].shape[0]
        if self.points >= min(POINTS, ENTRIES // u.shape[-1]):
            self._flush()

    def _flush(self):
        t, u, k, ct = (torch.cat(v) for v in zip(*self.waiting, strict=True))
        self.waiting, self.points = [], 0
        try:
            with _ahead.refusing(), torch.enable_grad():
                out = self.rhs(t, u)
            _ahead.check(out, k)
            bars = _ahead.product(out, self.leaves, ct, self.captured)
        except _ahead.Refused as e:
            why = f"with torch.func.vmap it fails ({e.__cause__})" if e.__cause__ else "there it has other values"
            refuse("f", f"cannot be evaluated at many points at once: {why}")
        if self.sums is None:
            self.sums = [torch.zeros_like(x, requires_grad=False) for x in self.leaves]
        for total, bar in zip(self.sums, bars, strict=True):
            if bar is not None:
                total.add_(bar)

    def result(self):
        if self.waiting:
            self._flush()
        return tuple(self.sums)
