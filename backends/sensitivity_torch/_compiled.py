"""Solves whose steps, and the sweep back along them, are compiled: `ReverseVJP(compile=True)`.

TorchDynamo makes a graph of `f`, with every tensor that `f` reaches as an argument, and tells for every later solve
whether that graph still holds. The loops around it are traced and compiled once for each graph (`_traced`), and run in
blocks of steps. The parameters' share of the sweep is one batched product for many stages.
"""

import threading
import warnings
from dataclasses import replace

import torch

from sensitivity.algorithms import base
from sensitivity.algorithms.discrete import RecursiveCheckpointAdjoint
from sensitivity.control import FixedStep, PIController
from sensitivity.errors import UnsupportedCombination
from sensitivity.integrate import Steps
from sensitivity.methods import RungeKutta
from sensitivity.records import Record
from sensitivity.vjp import ReverseVJP

from . import _ahead, _autodiff, _levels
from ._backend import TorchBackend

POINTS = 1024  # stages whose products with the parameters are made together
NAME = "ReverseVJP(compile=True)"


def asked(run):
    return type(run.vjp) is ReverseVJP and run.vjp.compile


def unsuited(algorithm, run):
    """What of a solve cannot be compiled, or None."""
    if type(algorithm) is not RecursiveCheckpointAdjoint or algorithm.budgeted:
        return f"{algorithm.name}{' with a budget' if type(algorithm) is RecursiveCheckpointAdjoint else ''}"
    reasons = {
        "a problem that is not an ODEProblem": run.kind is not None,
        f"{run.method.name}, which is no explicit Runge-Kutta method": not isinstance(run.method, RungeKutta),
        "events": bool(run.events),
        "a mass matrix": run.mass is not None or run.field.mass is not None,
        "norm=": run.norm is not None,
        "progress=": run.progress is not None,
        f"{type(run.controller).__name__}": type(run.controller) not in (PIController, FixedStep),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


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


class Source:
    """The graph of `f` for one solve, and the tensors that it needs beside `t` and `u`."""

    def __init__(self, run, x):
        be, field = run.be, run.field
        t, u = be.time(be.scalar(x.t0)), x.u0.detach()
        leaves = field.u.unravel(be, u)
        leaves = [v.view_as(v) if v is u else v for v in leaves]
        _seen.hit = None
        f = torch.compile(field.f.f, backend=_capture, fullgraph=True, dynamic=False)
        p = field.p.join(be, x.theta[:field.p.count], x.constants)
        state = be.unflatten(field.u.structure, leaves)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                out = be.flatten(f(t, state, p))[0]
            except torch._dynamo.exc.TorchDynamoException as e:
                raise UnsupportedCombination(f"{NAME} cannot compile f", str(e).strip().split("\n")[0],
                                             "write f with tensor operations only, or take vjp=ReverseVJP()") from e
        if _seen.hit is None:
            refuse("f", "does nothing that can be compiled")
        self.graph, args, made = _seen.hit
        own = {id(t): "t", **{id(v): i for i, v in enumerate(leaves)}}
        self.places = tuple(own.get(id(v), "input") for v in args)
        self.inputs = tuple(v.detach() for v in args if id(v) not in own)
        produced = {id(v): i for i, v in enumerate(made)}
        self.outputs = tuple(produced.get(id(v)) for v in out)
        if None in self.outputs:
            refuse("f", "returns something that it did not compute")
        self.layout, self.be = field.u, be

    def field(self, inputs):
        """The right-hand side on vectors, with other tensors in place of `inputs`."""

        def rhs(t, u):
            given, leaves = iter(inputs), self.layout.unravel(self.be, u)
            out = self.graph.graph(*(t if place == "t" else next(given) if place == "input" else leaves[place]
                                     for place in self.places))
            return self.layout.ravel(self.be, [out[i] for i in self.outputs]).to(u.dtype)

        return rhs

    def loop(self, key, make):
        """What `make()` compiles, once for each graph."""
        key = (key, self.places, self.outputs, self.layout)
        if key not in self.graph.loops:
            self.graph.loops[key] = make()
        return self.graph.loops[key]


# -- a solve and its reverse pass ---------------------------------------------------------------------------------


def task(algorithm, name, run, x, *args):
    """`algorithm.forward` or `algorithm.plain` with compiled steps."""
    if _levels.active():
        refuse("a torch.func transform or a dual level", "is running")
    if x.u0.is_complex() or x.u0.device.type != "cpu":
        refuse(f"a state of {x.u0.dtype} on {x.u0.device}", "is none of real numbers on the CPU")
    return getattr(algorithm, name)(replace(run, be=Compiled(run, x, Source(run, x))), x, *args)


def reverse(algorithm, run, residuals, ct, wanted):
    """`algorithm.reverse` with compiled products."""
    be = Compiled(run, residuals.x, residuals.log.source, wanted)
    return algorithm.reverse(replace(run, be=be), residuals, ct, wanted)


class Log(list):
    """Accepted steps, and the blocks `(T, U, K, count)` that they came in."""

    add = list.append

    def __init__(self, source):
        super().__init__()
        self.source, self.blocks = source, []

    def result(self):
        return self


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
        run, u, fsal = self.plain, state.u.contiguous(), state.k is not None
        n, s = u.shape[0], step.span
        count = _rows(run, n)
        rtol, atol = (torch.as_tensor(v, dtype=torch.float64 if isinstance(v, float) else u.dtype, device=u.device)
                      for v in (step.rtol, step.atol))
        z = self._numbers(*state[:2], *state[4:9])
        k = state.k.contiguous() if fsal else u
        key = ("forward", run.method, run.inside, run.controller, run.dtmin, run.dtmax, run.tstops, n, u.dtype,
               rtol.shape, atol.shape)
        function = None
        left = limit
        while left > 0 and running(state):
            taken = state.accepted + state.rejected
            span = self._numbers(s.t0, s.t1, s.direction, left - 0)
            args = (z, u, k, span, rtol, atol, *self.source.inputs)
            if function is None:
                from . import _traced

                function = self.source.loop(key, lambda: _traced.forward(run, self.source.field, count, n, args))
            z, u, k, T, U, K, _ = function(*args)
            t, h, memory, ratio, accepted, rejected, status = z.tolist()
            filled = int(accepted) - state.accepted
            state = state._replace(t=t, h=h, u=u, k=k if fsal else None, memory=memory, ratio=ratio,
                                   accepted=int(accepted), rejected=int(rejected), status=int(status))
            left -= state.accepted + state.rejected - taken
            if sink is not None and filled:
                times = T[:filled].tolist()
                for (t, h), u_n, k_n in zip(times, U.unbind(), K.unbind(), strict=False):
                    sink.add(Record(t, h, u_n, k_n))
                if isinstance(sink, Log):
                    sink.blocks.append((T, U, K, filled))
        return state, None if sink is None else sink.result()

    def replay(self, body, state, log, extra=None):
        if not isinstance(log, Log) or not log:
            return super().replay(body, state, log, extra)
        run, lam = self.plain, state.lam.contiguous()
        tab, n = run.method.tableau(run.inside), lam.shape[0]
        count, time = _rows(run, n), base.times_wanted(self.wanted)
        silent = float(tab.fsal and tab.b[-1] == 0.0 and state.kappa is None and bool(self.silent_end(extra)))
        kappa = torch.zeros_like(lam) if state.kappa is None else state.kappa.contiguous()
        products = _Products(run, self.x, tab, "theta" in self.wanted)
        none = lam.new_zeros(count, n), lam.new_zeros(count, tab.stages, n), lam.new_zeros(count, 2)
        t_bar, h_bar, end, function = state.t0, state.h, len(log), None
        for T, U, K, filled in reversed(log.blocks):
            outs = none if extra is None else self._outs(extra[end - filled:end], none)
            newest = filled - 1 if end == len(log) else -1
            args = (self._numbers(t_bar, h_bar, filled, newest, silent), lam, kappa, T, U, K, *outs,
                    *self.source.inputs)
            if function is None:
                from . import _traced

                function = self.source.loop(
                    ("reverse", run.method, run.inside, n, lam.dtype, time),
                    lambda: _traced.reverse(run, self.source.field, count, n, time, args))
            z, lam, kappa, W = function(*args)
            if time:
                t_bar, h_bar = z[:2].tolist()
            products.add(T[:filled], U[:filled], K[:filled], W[:filled], bool(silent) and end == len(log))
            end -= filled
        theta = state.theta if not products.params else self.add(state.theta, products.result())
        return state._replace(lam=lam, kappa=kappa if tab.fsal else None, theta=theta, t0=t_bar, h=h_bar)

    def _numbers(self, *xs):
        return torch.tensor(xs, dtype=torch.float64, device=self._device)

    @staticmethod
    def _outs(extra, none):
        """Contributions to the steps of a block as arrays."""
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
        if self.points >= POINTS:
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


def _rows(run, n):
    from . import _traced

    return _traced.rows_of(run.method.tableau(run.inside).stages, n)
