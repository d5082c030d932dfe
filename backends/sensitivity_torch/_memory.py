"""How much memory the tensors of a call hold at most."""

import weakref

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Tally(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it until it is freed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._add(t.untyped_storage(), before)
        return out

    def _add(self, storage, before):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or key in before:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self.seen.discard(key)
        self.now -= size


def peak(call, device):
    """The most bytes that tensors made in a call held at one time."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - start
    tally = Tally()
    with tally:
        call()
    return tally.peak
