"""PyTorch: Python floats for times and step sizes, one buffer of stages per step, one number read per step."""

import math

import numpy as np
import torch
from array_api_compat import torch as xp

from sensitivity import lapack
from sensitivity.backend import Backend, Unbatched
from sensitivity.errors import UnsupportedCombination, undefined
from sensitivity.threefry import threefry_in_place

from . import _attach, _autodiff, _levels

POOLED = 4096


class TorchBackend(Backend):
    """Backend for one dtype and device (see `bound`); its loops run where autograd records nothing."""

    name = "torch"
    modes = frozenset({"reverse", "forward"})
    attaches = batches = sparse_lu = compiles = True
    namespace, array_call, copy_call = "torch", "torch.tensor", "clone"
    xp = xp

    def __init__(self, dtype=torch.float64, device=None):
        self.dtype, self._device = dtype, device
        self._bound, self._constants, self._pool, self._through = {}, {}, {}, None

    def bound(self, like):
        key = like.dtype, like.device
        if key not in self._bound:
            self._bound[key] = type(self)(*key)
        return self._bound[key]

    def differentiable(self):
        if self._through is None:
            from ._differentiable import Differentiable

            self._through = Differentiable(self.dtype, self._device)
        return self._through

    # -- arrays ---------------------------------------------------------------------------------------------------

    def is_array(self, x):
        return isinstance(x, torch.Tensor)

    def is_float(self, x):
        return x.dtype.is_floating_point or x.dtype.is_complex

    def is_complex(self, x):
        return x.dtype.is_complex

    def real_dtype(self, dtype):
        return dtype.to_real()

    def asarray(self, x, dtype=None, device=None):
        try:
            if isinstance(x, list | tuple) and any(isinstance(v, torch.Tensor) for v in x):
                return torch.stack([torch.as_tensor(v, dtype=dtype, device=device) for v in x])
            if not isinstance(x, torch.Tensor) and _levels.transformed():
                with _levels.outside():  # a number belongs to no transform, so nothing differentiates it
                    return torch.as_tensor(x, dtype=dtype, device=device)
            return torch.as_tensor(x, dtype=dtype, device=device)
        except RuntimeError as e:
            raise ValueError(str(e)) from e

    def copy(self, x):
        return x.detach().clone()

    def scalar(self, x):
        return _levels.value(x).item() if isinstance(x, torch.Tensor) else float(x)

    def scalars(self, ts):
        return _levels.value(ts).tolist() if isinstance(ts, torch.Tensor) else [self.scalar(t) for t in ts]

    def concrete(self, x):
        return None if _levels.batched(x) else self.scalar(x)

    def concrete_times(self, ts):
        return None if _levels.batched(ts) else self.scalars(ts)

    def time_vector(self, ts, like):
        return self.asarray(ts, dtype=torch.float64, device=like.device)

    def vector(self, xs, like):
        return self.asarray(xs, dtype=like.dtype, device=like.device)

    def time(self, t):
        return torch.as_tensor(t, dtype=self.dtype.to_real(), device=self._device)

    def times(self, t, h, c):
        if len(c) == 1:
            return (torch.tensor(t + c[0] * h, dtype=self.dtype.to_real(), device=self._device),)
        return torch.tensor([t + c_i * h for c_i in c], dtype=self.dtype.to_real(), device=self._device).unbind()

    def dot(self, a, b):
        return torch.vdot(a, b).real.item()

    def rms(self, x):
        return torch.linalg.vector_norm(x).item() / math.sqrt(x.shape[0]) if x.shape[0] else 0.0

    def scaled(self, e, u0, u1, rtol, atol):
        size = u0.abs() if u0 is u1 else torch.maximum(u0.abs(), u1.abs())
        if isinstance(atol, float) and isinstance(rtol, float):
            return e / torch.add(self._constant(atol), size, alpha=rtol)
        return e / size.mul_(rtol).add_(atol)

    def zeros(self, arrays):
        return tuple(torch.zeros_like(x, requires_grad=False) for x in arrays)

    def add(self, a, b):
        return tuple(x.add_(y) for x, y in zip(a, b, strict=True))

    def nan_where(self, bad, x):
        return x * torch.where(bad, math.nan, 1.0) if isinstance(bad, torch.Tensor) else super().nan_where(bad, x)

    def rows_in(self, memory, rows, like):
        n = like.shape[0]
        return torch.frombuffer(memory, dtype=like.dtype)[: rows * n].view(rows, n)

    def read(self, row, like):
        return row.to(like.device, copy=True)

    # -- small matrices -------------------------------------------------------------------------------------------

    def _constant(self, numbers):
        """Numbers as a tensor, made once."""
        found = self._constants.get(numbers)
        if found is None:
            with _levels.outside():  # what is made inside a transform does not outlive it
                found = self._constants[numbers] = torch.tensor(numbers, dtype=self.dtype, device=self._device)
        return found

    def _rows(self, a):
        """The rows of a tableau as tensors; None for a row of zeros."""
        key = "rows", a
        found = self._constants.get(key)
        if found is None:
            found = self._constants[key] = [self._constant(row) if any(row) else None for row in a]
        return found

    def _square(self, a):
        """A tableau as one matrix."""
        key = "square", a
        found = self._constants.get(key)
        if found is None:
            found = self._constants[key] = self._constant(tuple((*row, *[0.0] * (len(a) - len(row))) for row in a))
        return found

    def _work(self, s, n):
        """Buffer for `s` vectors with its rows, and for every i the matrix of the first i rows as columns."""
        pool = self._pool.setdefault((s, n), [])
        if pool:
            return pool, pool.pop()
        out = torch.empty((s, n), dtype=self.dtype, device=self._device)
        return pool, (out, out.unbind(), [out[:i].t() for i in range(s)])

    def recursion(self, a, base, scale, xs, row, carry, first=None):
        s, n = len(a), base.shape[-1]
        if s == 1 and first is None:
            carry, x = row(carry, [x[0] for x in xs], base.reshape(n))
            return carry, x.detach().to(base.dtype, copy=True).unsqueeze(0)
        pool, work = self._work(s, n)
        out, rows, columns = work
        bases = None if base.ndim == 1 else base.unbind()
        start = 0
        if first is not None:
            rows[0].copy_(first)
            start = 1
        weights = self._rows(a)
        for i in range(start, s):
            v = base if bases is None else bases[i]
            if i == 1 and a[1]:
                v = torch.add(v, rows[0], alpha=scale * a[1][0])
            elif weights[i] is not None:
                v = torch.addmv(v, columns[i], weights[i], alpha=scale)
            carry, x = row(carry, [x[i] for x in xs], v)
            rows[i].copy_(x)
        if n > POOLED:
            return carry, out
        pool.append(work)
        return carry, out.clone()

    def combine(self, base, scale, weights, rows):
        if len(weights) == 1 and base is not None:
            return torch.add(base, rows.squeeze(0), alpha=scale * weights[0])
        w = self._constant(weights)
        if base is None:
            return torch.addmv(rows[0], rows.t(), w, beta=0, alpha=scale)
        return torch.addmv(base, rows.t(), w, alpha=scale)

    def blended(self, base, scale, weights, rows):
        return torch.addmm(base, weights, rows, alpha=scale)

    def blended_vjp(self, scale, weights, ct):
        return ct.sum(0), torch.mm(weights.t(), ct).mul_(scale)

    def inputs(self, a, base, scale, rows):
        return torch.addmm(base, self._square(a), rows, alpha=scale).unbind()

    def seeds(self, b, h, lam, rows, last):
        out = torch.outer(self._constant(b), lam).mul_(h)
        if rows is not None:
            out += rows
        if last is not None:
            out[-1] += last
        return out

    def permuted_rows(self, rows, order):
        key = "order", order
        found = self._constants.get(key)
        if found is None:
            found = self._constants[key] = torch.tensor(order, device=self._device)
        return rows.index_select(0, found)

    def poly(self, coefficients, x, like):
        key = "powers", coefficients
        found = self._constants.get(key)
        if found is None:
            matrix = np.array(coefficients).T
            found = self._constants[key] = np.arange(len(matrix)), matrix
        exponents, matrix = found
        weights = np.array(x)[:, None] ** exponents @ matrix
        return torch.as_tensor(weights, dtype=like.dtype, device=like.device)

    # -- linear systems -------------------------------------------------------------------------------------------

    def factorize(self, A):
        lu, pivots, singular = torch.linalg.lu_factor_ex(A)

        def solve(b, transposed=False):
            rows = b if b.ndim == 2 else b[None]
            x = torch.linalg.lu_solve(lu, pivots, rows.mT, adjoint=transposed).mT.reshape(b.shape)
            return x * torch.where(singular > 0, math.nan, 1.0).to(x.dtype)

        return solve

    def factorize_sparse(self, values, pattern):
        return self._by_host(lapack.superlu(values, pattern))

    def factorize_banded(self, bands, lower, upper):
        if bands.device.type == "cpu":
            return self._by_host(lapack.band_lu(self.host(bands), lower, upper))
        try:
            return super().factorize_banded(bands, lower, upper)
        except torch.linalg.LinAlgError:
            return lambda b, transposed=False: b * math.nan

    def _by_host(self, solve):
        """A solver on NumPy arrays as one on tensors."""
        return lambda b, transposed=False: torch.as_tensor(
            solve(self.host(b), transposed), dtype=b.dtype, device=b.device)

    def threefry(self, k0, k1, x0, x1):
        given = k0, k1, x0, x1
        if x0.device.type != "cpu" or any(map(_levels.wrapped, given)):
            return super().threefry(*given)
        found = threefry_in_place(*(v.numpy() for v in given))
        return tuple(torch.from_numpy(v.astype(np.int64)) for v in found)

    def rows(self, f, arrays):
        try:
            return torch.func.vmap(f)(arrays)
        except RuntimeError as e:
            raise Unbatched(f"torch.func.vmap fails on f or g ({e})", "it cannot see all members at once",
                            "no branches on values and no .item() in f and g") from e

    def host(self, x):
        return x.detach().cpu().numpy()

    def setup(self):
        return torch.get_default_dtype()

    def restore(self, setup):
        torch.set_default_dtype(setup)

    # -- derivatives ----------------------------------------------------------------------------------------------

    def quiet(self):
        return torch.no_grad()

    def run(self, algorithm, name, run, args, wanted):
        _levels.refuse_transforms()
        with torch.no_grad():
            if name == "reverse":
                return _attach.reverse(algorithm, run, *args, wanted)
            return _attach.task(algorithm, name, run, *args, wanted)

    def uncompiled(self, algorithm, run):
        from . import _compiled

        return _compiled.unsuited(algorithm, run)

    def known(self, run, x):
        flat = (x.u0, *x.theta, x.t0, x.t1)
        if any(_levels.batched(v) for v in flat):
            return None
        live = {id(v) for v in getattr(run.field.f, "live", ())}
        u0, *theta, t0, t1 = (v if id(v) in live else _levels.value(v) for v in flat)
        return run, x._replace(u0=u0, theta=tuple(theta), t0=t0, t1=t1)

    def peak(self, call, like):
        from . import _memory

        said = "the allocator of CUDA" if like.device.type == "cuda" else "the storages of all tensors"
        return _memory.peak(call, like.device), said

    def look(self, at, run, x):
        known = self.known(run, x)
        if known is None:
            return None
        with torch.no_grad(), _levels.outside():
            return at(*known).tolist()

    def attach(self, algorithm, run, x):
        return _attach.attach(self, algorithm, run, x)

    def detached(self, x):
        return x._replace(t0=x.t0.detach(), t1=x.t1.detach())

    def hoist(self, f, t, u, p):
        return _autodiff.hoist(self, f, t, u, p)

    def vjp(self, f, theta, time, params):
        return _autodiff.vjp(f, theta, time, params)

    def value_and_vjp(self, f, theta, time, params):
        return _autodiff.value_and_vjp(f, theta, time, params)

    def jvp(self, f, theta, d_theta):
        return _autodiff.jvp(f, theta, d_theta)

    def second(self, f, theta, d_theta, params):
        return _autodiff.second(f, theta, d_theta, params)

    def loss_second(self, loss, args, d):
        return _autodiff.loss_second(loss, args, d)

    def pulls(self, rhs):
        return _autodiff.pulls(rhs)

    def jacobian(self, rhs):
        return _autodiff.jacobian(rhs)

    def along(self, f, u, du):
        return _autodiff.directional(f, u, du)

    def fixed(self, x, name):
        if isinstance(x, torch.Tensor) and _levels.moving(x):
            raise UnsupportedCombination(*undefined(name))
        return x

    def loss_vjp(self, loss, args):
        return _autodiff.loss_vjp(loss, args)

    def recording(self):
        return torch.is_grad_enabled()

    def evaluate(self, f, t, u, p):
        with torch.no_grad():
            return _autodiff.Field(self, f)(t, u, p)

    def connected(self, f, t, u, p):
        return None if _levels.active() else _autodiff.connected(self, f, t, u, p)
