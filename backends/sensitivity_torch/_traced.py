"""Loops over steps as functions of tensors, traced and compiled by TorchInductor.

A block of steps is one `while_loop` in C++: times, step sizes and the decisions of step control are 0-d tensors, and
the steps themselves are those of `sensitivity.integrate` and `sensitivity.explicit`, traced once. Forward a block
ends when its rows are full; the reverse one passes the recorded steps from the last to the first.
"""

import math
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch._higher_order_ops.while_loop import while_loop_op
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from sensitivity.errors import UnsupportedCombination
from sensitivity.explicit import step_vjp
from sensitivity.integrate import Span, State, Steps
from sensitivity.records import Contribution, Record
from sensitivity.recursions import Recursions
from sensitivity.stepper import Adjoint

from ._backend import TorchBackend

ENTRIES = 4096  # of the rows that a block is allowed: every attempt writes all of them
LONGEST = 64


@dataclass(frozen=True)
class Shape:
    """What loops are compiled for, beside the graph of `f`: the method, step control and the state."""

    method: Any
    inside: bool
    controller: Any
    limits: tuple
    norm: Any
    n: int
    dtype: torch.dtype

    @classmethod
    def of(cls, run, u):
        return cls(run.method, run.inside, run.controller, (run.dtmin, run.dtmax, run.tstops), run.norm, u.shape[0],
                   u.dtype)

    @property
    def tableau(self):
        return self.method.tableau(self.inside)

    @property
    def rows(self):
        """How many steps one block records."""
        return max(1, min(LONGEST, ENTRIES // ((self.tableau.stages + 1) * self.n)))


class Traced(TorchBackend):
    """Numbers are 0-d tensors, and sums over stages are written out, for the compiler to fuse."""

    traced = True
    recursion, combine = Recursions.recursion, Recursions.combine
    inputs, seeds, permuted_rows = Recursions.inputs, Recursions.seeds, Recursions.permuted_rows

    def scalar(self, x):
        return x

    def choose(self, pred, a, b):
        return pytree.tree_map(lambda x, y: None if x is None else torch.where(pred, x, y), a, b)

    def least(self, a, b):
        return torch.minimum(*self._numbers(a, b))

    def greatest(self, a, b):
        return torch.maximum(*self._numbers(a, b))

    def isfinite(self, x):
        return torch.isfinite(x)

    def time(self, t):
        return t.to(self.dtype.to_real())

    def times(self, t, h, c):
        return [self.time(t + c_i * h) for c_i in c]

    def dot(self, a, b):
        return torch.sum(a * b).to(torch.float64)

    def rms(self, x):
        return torch.sqrt(torch.sum(x * x).to(torch.float64)) / math.sqrt(x.shape[0])

    def scaled(self, e, u0, u1, rtol, atol):
        return e / (atol + rtol * torch.maximum(u0.abs(), u1.abs()))

    @staticmethod
    def _numbers(*xs):
        return [x if isinstance(x, torch.Tensor) else torch.full((), float(x), dtype=torch.float64) for x in xs]


def forward(shape, rtol, atol, field, args):
    """The compiled `(z, u, k, span, rtol, atol, *inputs) -> (z, u, k, T, U, K, filled)`, for arguments like `args`.

    `z` are the numbers in a `State`, `span` is `(t0, t1, direction, all attempts)`, `T` has the times and sizes of
    the accepted steps, `U` and `K` their states and stages. `field(inputs)` is the right-hand side. Without
    first-same-as-last stages `k` is empty.
    """
    del rtol, atol  # their shapes
    be = Traced(shape.dtype, args[1].device)
    tab, rows, n = shape.tableau, shape.rows, shape.n
    dtmin, dtmax, tstops = shape.limits
    run = SimpleNamespace(be=be, controller=shape.controller, dtmin=dtmin, dtmax=dtmax, tstops=tstops, progress=None)

    norm = be.rms if shape.norm is None else replace(shape.norm, be=be)

    def steps(span, rtol, atol, *inputs):
        t0, t1, direction, _ = span.unbind()
        stepper = shape.method.bind(be, field(inputs), shape.inside)
        return Steps(run, stepper, Span(t0, t1, direction), rtol, atol, norm, be.eps(torch.float64))

    def state(z, u, k):
        t, h, memory, ratio, *counts = z.unbind()
        return State(t, h, u, k if tab.fsal else None, memory, ratio, *counts)

    def more(z, u, k, T, U, K, filled, span, *given):
        return steps(span, *given).running(state(z, u, k)) & (filled < rows) & (z[4] + z[5] < span[3])

    def body(z, u, k, T, U, K, filled, span, *given):
        new, record, keep = steps(span, *given)(state(z, u, k))
        here = torch.arange(rows) == filled
        T = torch.where(here[:, None], torch.stack([record.t, record.h]), T)
        U = torch.where(here[:, None], record.u, U)
        K = torch.where(here[:, None, None], record.k, K)
        numbers = be._numbers(new.t, new.h, new.memory, new.ratio, new.accepted, new.rejected, new.status)
        k = new.k.clone() if tab.fsal else k.clone()
        return torch.stack(numbers), new.u, k, T, U, K, filled + (keep + torch.zeros_like(filled))

    def start(z, u, k, *given):
        return (z, u, k, u.new_zeros(rows, 2, dtype=torch.float64), u.new_zeros(rows, n),
                u.new_zeros(rows, tab.stages, n), torch.zeros((), dtype=torch.int64))

    return _compiled(more, body, start, 3, args)


def reverse(shape, time, field, args):
    """The compiled `(z, lam, kappa, T, U, K, outs, inputs) -> (z, lam, kappa, W)`.

    `z` is `(t0, h, i, newest, silent)`: cotangents of `t0` and of the size of the newest step, how many steps there
    are to pass, the number of the newest step if it is among them, and whether its last stage counts for nothing.
    `outs` are cotangents that outputs hand to the steps: of states, stages, and sizes and times. `W` are those of
    the stages.
    """
    be = Traced(shape.dtype, args[1].device)
    tab, rows, n = shape.tableau, shape.rows, shape.n
    order = range(tab.stages - 1, tab.fsal - 1, -1)

    def more(z, *_):
        return z[2] > 0.0

    def body(z, lam, kappa, W, T, U, K, out_u, out_k, out_z, *inputs):
        t_bar, h_bar, i, newest, silent = z.unbind()
        i = i - 1.0
        row = i.to(torch.int64)
        quiet, handed, stages = (silent > 0.0) & (i == newest), {}, iter(order)
        pull_one = pullback(field(inputs), time)

        def pull(t, u, ct):
            stage = next(stages)
            handed[stage] = ct
            u_bar, moved = pull_one(t, u, ct)
            if tab.fsal and stage == tab.stages - 1:
                u_bar, moved = torch.where(quiet, 0.0, u_bar), torch.where(quiet, 0.0, moved)
            return u_bar, (), moved

        def at(x):
            return torch.index_select(x, 0, row[None]).squeeze(0)

        (t, h), (h_out, t_out) = at(T).unbind(), at(out_z).unbind()
        out = Contribution(at(out_u), at(out_k), h_out, t_out)
        state = Adjoint(lam, kappa if tab.fsal else None, (), t_bar, h_bar)
        state = step_vjp(be, tab, pull, Record(t, h, at(U), at(K)), out, i == newest, time, state, add=_nothing)
        handed = torch.stack([handed.get(j, torch.zeros_like(lam)) for j in range(tab.stages)])
        W = torch.where((torch.arange(rows) == row)[:, None, None], handed, W)
        z = torch.stack(be._numbers(state.t0, state.h, i, newest, silent))
        return z, state.lam.clone(), (state.kappa if tab.fsal else kappa).clone(), W

    def start(z, lam, kappa, *given):
        return z, lam, kappa, lam.new_zeros(rows, tab.stages, n)

    return _compiled(more, body, start, 3, args)


def _nothing(total, theta_bar, t, u):
    return total


def pullback(rhs, time):
    """`pull(t, u, ct) -> (ct_u, ct_t)`, to be traced."""

    def pull(t, u, ct):
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            t = t.detach().requires_grad_() if time else t
            out = rhs(t, u)
        inputs = (u, t) if time else (u,)
        if not out.requires_grad:
            bars = [None] * len(inputs)
        else:
            bars = torch.autograd.grad(out, inputs, ct, allow_unused=True)
        bars = [torch.zeros_like(v) if g is None else g for g, v in zip(bars, inputs, strict=True)]
        return bars[0].detach(), bars[1].detach().to(torch.float64) if time else torch.zeros((), dtype=torch.float64)

    return pull


# -- tracing and compiling ----------------------------------------------------------------------------------------


def _compiled(more, body, start, carried, args):
    """`while more(*state, *given): state = body(*state, *given)` with `state = start(*args)` and `given` the arguments
    after the first `carried`."""
    args = [v.clone() for v in args]  # what shares memory in one solve may not do so in the next
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # importing TorchInductor warns of deprecations in PyTorch itself
        try:
            from torch._inductor.compile_fx import compile_fx

            graph, constants = _looped(more, body, start, carried, args)
            made = compile_fx(graph, [*args, *constants], config_patches={"cpp_wrapper": True})
        except Exception as e:
            why = " ".join(str(e).split())[:300]
            raise UnsupportedCombination("ReverseVJP(compile=True) cannot compile the steps",
                                         f"{type(e).__name__} in PyTorch {torch.__version__}: {why}",
                                         "vjp=ReverseVJP()") from e
    return lambda *flat: made(*flat, *constants)


def _looped(more, body, start, carried, args):
    """The graph of a loop, and what it takes beside its arguments."""
    given, state = args[carried:], start(*args)
    more, first = _closed(more, (*state, *given))
    body, second = _closed(body, (*state, *given))
    common, k, count = len(state) + len(given), len(first), len(args)

    def whole(*flat):
        return while_loop_op(lambda *a: more(*a[:common + k]),
                             lambda *a: tuple(body(*a[:common], *a[common + k:])),
                             start(*flat[:count]), flat[carried:])

    constants = (*first, *second)
    return make_fx(whole, tracing_mode="fake")(*args, *constants), constants


def _closed(f, args):
    """`f` as a graph whose constants are arguments: `(graph, constants)`."""
    graph = make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    constants, places = [], [n for n in graph.graph.nodes if n.op == "placeholder"]
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        value = getattr(graph, node.target)
        if isinstance(value, torch.Tensor):
            with graph.graph.inserting_after(places[-1]):
                place = graph.graph.placeholder(f"constant_{len(constants)}")
            places.append(place)
            constants.append(value)
            node.replace_all_uses_with(place)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph, constants
