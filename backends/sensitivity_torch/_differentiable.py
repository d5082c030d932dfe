"""Loops that autograd sees through."""

import torch

from . import _levels
from ._backend import TorchBackend


class Differentiable(TorchBackend):
    """The same loops without writing into buffers, so that autograd, `torch.func` and dual numbers see through."""

    def times(self, t, h, c):
        if not isinstance(h, torch.Tensor):
            return super().times(t, h, c)
        return (t + h * torch.tensor(c, dtype=h.dtype, device=h.device)).to(self.dtype.to_real()).unbind()

    def rms(self, x):
        return super().rms(x.detach())

    def scaled(self, e, u0, u1, rtol, atol):
        return super().scaled(e.detach(), u0.detach(), u1.detach(), rtol, atol)

    def poly(self, coefficients, x, like):
        x = self.vector(x, like)[:, None]
        *columns, out = self._constant(coefficients).t().unbind()
        for c in reversed(columns):
            out = torch.addcmul(c, out, x)
        return out.expand(x.shape[0], -1)

    def recursion(self, a, base, scale, xs, row, carry, first=None):
        rows = [] if first is None else [first]
        for i in range(len(rows), len(a)):
            v = base if base.ndim == 1 else base[i]
            if any(a[i]):
                v = self.combine(v, scale, a[i], torch.stack(rows))
            carry, x = row(carry, [x[i] for x in xs], v)
            rows.append(x.to(base.dtype))
        return carry, torch.stack(rows)

    def blended(self, base, scale, weights, rows):
        if isinstance(scale, torch.Tensor):
            return base + scale * torch.mm(weights, rows)
        return super().blended(base, scale, weights, rows)

    def combine(self, base, scale, weights, rows):
        if not isinstance(scale, torch.Tensor):
            return super().combine(base, scale, weights, rows)
        # The value to the last bit as in the plain loop, so that both take the same steps.
        out = super().combine(base, self.scalar(scale), weights, rows)
        if not _levels.moving(scale):
            return out
        return out + (scale - scale.detach()) * torch.mv(rows.t(), self._constant(weights))
