"""Products with derivatives of callables, and the tensors that a callable closes over."""

import torch
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from sensitivity.errors import CapturedValueError

from . import _levels

# `torch.autograd.grad` without its checks, which take as long as a small product itself.
run_backward = torch.autograd.Variable._execution_engine.run_backward
# Whether the running backward pass has `retain_graph=True`; early versions do not say.
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

# -- the user's function ------------------------------------------------------------------------------------------


class Field:
    """`f` as the loops call it.

    `names` are parameters of the module `f` that are handed in, `live` the tensors that `f` finds by itself.
    """

    def __init__(self, be, f, names=(), live=()):
        self.be, self.f, self.names, self.live = be, f, names, live
        self.recording = False

    def __call__(self, t, u, p, *captured):
        if self.recording and not torch.is_grad_enabled():
            return self._recorded(t, u, p, captured)
        try:
            return self._call(t, u, p, captured) if self.names else self.f(t, u, p)
        except RuntimeError as e:
            if "does not require grad" not in str(e):
                raise
        # f differentiates inside itself, which needs a state that requires grad.
        self.recording = True
        return self._recorded(t, u, p, captured)

    def _call(self, t, u, p, captured):
        if not self.names:
            return self.f(t, u, p)
        return functional_call(self.f, dict(zip(self.names, captured, strict=False)), (t, u, p))

    def _recorded(self, t, u, p, captured):
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            u = _mapped(self.be, lambda x: x if x.requires_grad else x.detach().requires_grad_(), u)
            out = self._call(t, u, p, captured)
        return out if keep else _mapped(self.be, torch.Tensor.detach, out)


def _mapped(be, fun, tree):
    leaves, structure = be.flatten(tree)
    return be.unflatten(structure, [fun(x) if isinstance(x, torch.Tensor) else x for x in leaves])


def _leaves(be, tree):
    """A copy of a tree whose floating-point tensors are leaves that require grad: `(these, tree)`."""
    leaves, structure = be.flatten(tree)
    moving = {i: x.detach().requires_grad_() for i, x in enumerate(leaves) if be.is_array(x) and be.is_float(x)}
    return list(moving.values()), be.unflatten(structure, [moving.get(i, x) for i, x in enumerate(leaves)])


def _recorded_outputs(be, f, t, u, p, captured=()):
    """Leaves made of `u`, leaves made of `p`, and what `f` makes of them, as far as autograd sees it."""
    with torch.enable_grad():
        (inputs, u), (others, p) = _leaves(be, u), _leaves(be, p)
        outputs = [x for x in be.flatten(f(t, u, p, *captured))[0] if isinstance(x, torch.Tensor) and x.requires_grad]
        return inputs, others, [x.view_as(x) for x in outputs]


def connected(be, f, t, u, p):
    """Whether autograd sees that `f` depends on `u`."""
    inputs, _, outputs = _recorded_outputs(be, f, t, u, p)
    if not outputs:
        return False
    grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs], allow_unused=True)
    return any(g is not None for g in grads)


class _Watch(TorchFunctionMode):
    """Refuses tensors of the running transforms: `f` was called with plain ones, so it closes over these.

    Transforms inside `f` are noticed; what happens in them can be judged under `_levels.idle(levels)` only.
    """

    def __init__(self, levels, idle):
        super().__init__()
        self.levels, self.idle, self.inside = levels, idle, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if _levels.depth() > (self.levels if self.idle else 0):
            self.inside = True
        if self.idle or not self.inside:
            for x in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(x, torch.Tensor) and _levels.outer(x, self.levels):
                    raise CapturedValueError(
                        "f closes over a tensor that a torch.func transform or a dual level differentiates or batches",
                        "the solve cannot see it from outside f",
                        "pass it through p; or make f the nn.Module whose parameters are transformed")
        return func(*args, **(kwargs or {}))


def found(be, field, t, u, p, captured):
    """The leaf tensors that require grad and that `field` reaches by itself at `(t, u, p)`."""
    inputs, others, outputs = _recorded_outputs(be, field, t, u, p, captured)
    known = {id(x) for x in (*inputs, *others)}
    queue = [x.grad_fn for x in outputs]
    seen, leaves = set(queue), []
    while queue:
        node = queue.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            leaves.append(leaf)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
    return tuple(leaves)


def hoist(be, f, t, u, p):
    """`(field, captured)`: tensors of a transformed module are handed in, leaves behind `f` stay where they are."""
    active = _levels.active()
    if not active and not torch.is_grad_enabled():
        return Field(be, f), ()
    names, given = (), ()
    if active and isinstance(f, torch.nn.Module):
        own = [*f.named_parameters(), *f.named_buffers()]
        moved = [(k, v) for k, v in own if _levels.wrapped(v) or _levels.dual(v)]
        names, given = tuple(k for k, _ in moved), tuple(v for _, v in moved)
    field = Field(be, f, names)
    if active:
        t, u, p, given_now = (_mapped(be, _levels.value, x) for x in (t, u, p, given))
        levels = _levels.depth()
        watch, failure = _Watch(levels, False), None
        try:
            with _levels.outside(), watch:
                field.live = found(be, field, t, u, p, given_now)
        except RuntimeError as e:
            failure = e
        if watch.inside:
            with _levels.idle(levels), _Watch(levels, True):
                field(t, u, p, *given_now)
        if failure is not None:
            raise failure
    else:
        field.live = found(be, field, t, u, p, ())
    return field, (*given, *field.live)


# -- products -----------------------------------------------------------------------------------------------------


class silent:
    """Hooks of parameters wait until their gradient is complete."""

    def __init__(self, tensors):
        self.hooks = [x._backward_hooks for x in tensors if x._backward_hooks]

    def __enter__(self):
        self.kept = [dict(h) for h in self.hooks]
        for h in self.hooks:
            h.clear()

    def __exit__(self, *_):
        for h, kept in zip(self.hooks, self.kept, strict=True):
            h.update(kept)


def parameters(theta, params):
    """Parameters to differentiate with respect to; one that requires grad is what `f` closes over, and stays."""
    return tuple(x if x.requires_grad or not params else x.detach().requires_grad_() for x in theta)


def vjp(f, theta, time, params):
    """`pull(t, u, ct)`; see `Backend.vjp`."""
    at = value_and_vjp(f, theta, time, params)
    return lambda t, u, ct: at(t, u)[1](ct)


def value_and_vjp(f, theta, time, params):
    """`at(t, u) -> (f, pull)`; see `Backend.value_and_vjp`."""
    captured = any(x.requires_grad for x in theta)
    leaves = parameters(theta, params)
    rhs = f(leaves)
    wanted = leaves if params else ()
    zeros = [torch.zeros_like(x, requires_grad=False) for x in wanted]

    def at(t, u):
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            t = t.detach().requires_grad_() if time else t
            out = rhs(t, u)

        def pull(ct):
            if not out.requires_grad:
                return torch.zeros_like(u, requires_grad=False), tuple(zeros), 0.0
            inputs = (u, *wanted, t) if time else (u, *wanted)
            u_bar, *bars = run_backward((out,), (ct.to(out.dtype),), captured, False, inputs, True, False)
            t_bar = bars.pop() if time else None
            bars = tuple(z if x is None else x for x, z in zip(bars, zeros, strict=True))
            u_bar = torch.zeros_like(u, requires_grad=False) if u_bar is None else u_bar
            return u_bar, bars, 0.0 if t_bar is None else t_bar.item()

        return out.detach(), pull

    return at


def pulls(rhs):
    """`pull(t, u, rows)`, row by row on one graph; see `Backend.pulls`."""

    def pull(t, u, rows):
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            out = rhs(t, u)
        if not out.requires_grad:
            return u.new_zeros(rows.shape[0], u.shape[0])
        bars = [torch.autograd.grad(out, u, e, retain_graph=True, allow_unused=True)[0] for e in rows.to(out.dtype)]
        return torch.stack([torch.zeros_like(u, requires_grad=False) if r is None else r for r in bars])

    return pull


def jacobian(rhs):
    """`jac(t, u)`; see `Backend.jacobian`."""
    pull = pulls(rhs)
    return lambda t, u: pull(t, u, torch.eye(u.shape[0], dtype=u.dtype, device=u.device))


def jvp(f, theta, d_theta):
    """`push(t, u, du, dt)`: the product with the transposed derivative is linear, and its transpose is wanted.

    Of a state with no more entries than there are directions, the rows of the Jacobian are cheaper.
    """
    captured = any(x.requires_grad for x in theta)
    leaves = parameters(theta, True)
    rhs = f(leaves)

    def push(t, u, du, dt):
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            t = t if dt is None else t.detach().requires_grad_()
            out = rhs(t, u)
        if not out.requires_grad:
            return out.detach(), du.new_zeros(du.shape[0], out.shape[0])
        inputs = (u, *leaves) if dt is None else (u, *leaves, t)
        directions = (du, *d_theta) if dt is None else (du, *d_theta, dt.to(t.dtype))
        if u.shape[0] <= du.shape[0] and not out.is_complex():
            return out.detach(), _by_rows(out, inputs, directions, du, captured)
        with torch.enable_grad():
            ct = torch.zeros_like(out, requires_grad=True)
            bars = torch.autograd.grad(out, inputs, ct, create_graph=True, allow_unused=True)
        pairs = [(g, d) for g, d in zip(bars, directions, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return out.detach(), du.new_zeros(du.shape[0], out.shape[0])
        g, d = zip(*pairs, strict=True)
        return out.detach(), _rows(g, ct, d, du)

    return push


def _by_rows(out, inputs, directions, du, captured):
    """Tangents `(m, n)` of `out` `(n,)` along directions of the inputs, with the rows of the derivative."""
    n = out.shape[0]
    rows = [run_backward((out,), (e,), captured or i + 1 < n, False, inputs, True, False)
            for i, e in enumerate(torch.eye(n, dtype=out.dtype, device=out.device).unbind())]
    total = du.new_zeros(du.shape[0], n)
    for column, d in zip(zip(*rows, strict=True), directions, strict=True):
        if any(g is not None for g in column):
            like = next(g for g in column if g is not None)
            matrix = torch.stack([torch.zeros_like(like) if g is None else g for g in column])
            total += d.reshape(-1, like.numel()).to(like.dtype) @ matrix.reshape(n, like.numel()).t()
    return total


def directional(f, u, du):
    """The derivative of `f` at `u` along `du`, as the transpose of the product with the transposed Jacobian."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        u = u if u.requires_grad else u.detach().requires_grad_()
        out = f(u)
        ct = torch.zeros_like(out, requires_grad=True)
        (g,) = torch.autograd.grad(out, u, ct, create_graph=True, allow_unused=True) if out.requires_grad else (None,)
        if g is None or not g.requires_grad:
            return torch.zeros_like(du)
        (along,) = torch.autograd.grad(g, ct, du, create_graph=keep)
    return along


def _rows(g, ct, d, du):
    if du.shape[0] > 3:
        try:
            return torch.autograd.grad(g, ct, d, retain_graph=True, is_grads_batched=True)[0]
        except RuntimeError:  # an operation in f that cannot be batched
            pass
    rows = [torch.autograd.grad(g, ct, [x[i] for x in d], retain_graph=True)[0] for i in range(du.shape[0])]
    return torch.stack(rows)


def second(f, theta, d_theta, params):
    """`turn(t, u, w, nu, lam)`; see `Backend.second`: reverse over reverse."""
    captured = any(x.requires_grad for x in theta)
    leaves = parameters(theta, True)
    rhs = f(leaves)
    wanted = leaves if params else ()
    zeros = tuple(torch.zeros_like(x, requires_grad=False) for x in wanted)

    def turn(t, u, w, nu, lam):
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            out = rhs(t, u)
            if not out.requires_grad:
                return torch.zeros_like(lam), zeros, torch.zeros_like(lam)
            bars = torch.autograd.grad(out, (u, *leaves), lam, create_graph=True, allow_unused=True)
            pairs = [(g, d) for g, d in zip(bars, (w, *d_theta), strict=True) if g is not None and g.requires_grad]
            outputs, cts = zip((out, nu), *pairs, strict=True)
        u_bar, *theta_bar = torch.autograd.grad(outputs, (u, *wanted), cts, retain_graph=captured, allow_unused=True)
        theta_bar = tuple(z if g is None else g for g, z in zip(theta_bar, zeros, strict=True))
        w_bar = torch.zeros_like(lam) if bars[0] is None else bars[0].detach()
        return torch.zeros_like(lam) if u_bar is None else u_bar, theta_bar, w_bar

    return turn


def loss_second(loss, args, d):
    """Value, gradient and Hessian times `d`; a leaf that requires grad stays what it is."""
    _levels.refuse_transforms()
    with torch.enable_grad():
        args = [x if x.is_leaf and x.requires_grad else x.detach().requires_grad_() for x in args]
        value = loss(*args)
        zeros = tuple(torch.zeros_like(x, requires_grad=False) for x in args)
        if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
            return value, zeros, zeros
        grads = torch.autograd.grad(value, args, create_graph=True, allow_unused=True)
    pairs = [(g, v) for g, v in zip(grads, d, strict=True) if g is not None and g.requires_grad]
    rows = [None] * len(args)
    if pairs:
        outputs, cts = zip(*pairs, strict=True)
        rows = torch.autograd.grad(outputs, args, cts, allow_unused=True)
    filled = [tuple(z if g is None else g.detach() for g, z in zip(x, zeros, strict=True)) for x in (grads, rows)]
    return value.detach(), *filled


def loss_vjp(loss, args):
    """Value and gradient of a scalar function; a leaf that requires grad stays what it is."""
    _levels.refuse_transforms()
    with torch.enable_grad():
        args = [x if x.is_leaf and x.requires_grad else x.detach().requires_grad_() for x in args]
        value = loss(*args)
    zeros = tuple(torch.zeros_like(x, requires_grad=False) for x in args)
    if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
        return value, zeros
    grads = torch.autograd.grad(value, args, allow_unused=True)
    return value.detach(), tuple(z if g is None else g for g, z in zip(grads, zeros, strict=True))
