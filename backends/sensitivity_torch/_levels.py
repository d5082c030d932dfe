"""What PyTorch's composable transforms (`torch.func`, dual numbers) are doing at the moment."""

from contextlib import contextmanager

import torch
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as outside
from torch.autograd import forward_ad

from sensitivity.errors import UnsupportedCombination

wrapped = _functorch.is_functorch_wrapped_tensor


def transformed():
    """Whether a `torch.func` transform is running."""
    return _functorch.peek_interpreter_stack() is not None


def active():
    """Whether derivatives or batches may come in otherwise than by `requires_grad`."""
    return transformed() or forward_ad._current_level >= 0


def depth():
    """How many transforms are running."""
    top = _functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()


@contextmanager
def idle(count):
    """Without the running transforms, but with as many levels that do nothing, so that levels inside are new ones."""
    with outside():
        for _ in range(count):
            _functorch._vmap_increment_nesting(1, "same")
        try:
            yield
        finally:
            for _ in range(count):
                _functorch._vmap_decrement_nesting()


def outer(x, count):
    """Whether `x` belongs to one of the first `count` levels, or is a dual number."""
    return 0 < _functorch.maybe_get_level(x) <= count if wrapped(x) else dual(x)


def refuse_transforms():
    if transformed():
        raise UnsupportedCombination("sa.gradient was called inside a torch.func transform",
                                     "it computes with plain tensors", "torch.func.grad of a loss of sa.solve(...).u")


def dual(x):
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def batched(x):
    """Whether `vmap` hides several values behind `x`."""
    while isinstance(x, torch.Tensor) and wrapped(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def moving(x):
    """Whether a derivative with respect to `x` may be asked for."""
    while wrapped(x):
        if _functorch.is_gradtrackingtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return (x.requires_grad and torch.is_grad_enabled()) or dual(x)


def value(x):
    """A plain tensor: `x` without transforms, the first one of a batch."""
    while wrapped(x):
        inner = _functorch.get_unwrapped(x)
        x = inner.select(_functorch.maybe_get_bdim(x), 0) if _functorch.is_batchedtensor(x) else inner
    with outside():
        return x.detach()
