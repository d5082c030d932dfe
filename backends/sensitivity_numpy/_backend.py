"""NumPy: one BLAS product per stage in a preallocated buffer, Python floats for times and step sizes."""

import math
import tracemalloc
import weakref
from importlib.util import find_spec

import numpy as np
from array_api_compat import numpy as xp

from sensitivity import lapack
from sensitivity.backend import Backend
from sensitivity.threefry import threefry_in_place

KEPT_BYTES = 2**29
EPS = {char: float(np.finfo(char).eps) for char in "efdgFDG"}


class NumpyBackend(Backend):
    name = "numpy"
    holds_numpy = True
    namespace, array_call = "np", "np.array"
    opaque = True
    sparse_lu = True
    how_to_get_ad = " (pip install autograd, and write f with autograd.numpy)"
    xp = xp

    def __init__(self):
        self.modes = frozenset({"reverse", "forward"}) if find_spec("autograd") else frozenset()
        self._matrices = {}
        self._kept, self._kept_bytes = {}, 0

    def is_array(self, x):
        return isinstance(x, np.ndarray | np.generic)

    def is_float(self, x):
        return x.dtype.kind in "fc"

    def is_complex(self, x):
        return x.dtype.kind == "c"

    def asarray(self, x, dtype=None, device=None):
        if device is not None and device != "cpu":
            raise ValueError("NumPy's arrays are on the processor, 'cpu'")
        return np.asarray(x, dtype=dtype)

    def device(self, x):
        return None

    def time(self, t):
        return t

    def times(self, t, h, c):
        return [t + c_i * h for c_i in c]

    def vector(self, xs, like):
        return np.asarray(xs, dtype=like.dtype)

    def unit_rows(self, m, n, start, like):
        return np.zeros((m, n), like.dtype) if start >= m else np.eye(m, n, k=-start, dtype=like.dtype)

    def dot(self, a, b):
        return float(np.dot(a, b))

    def eps(self, dtype):
        return EPS[np.dtype(dtype).char]

    def rms(self, x):
        n = x.shape[0]
        if not n:
            return 0.0
        return math.sqrt(float(np.vdot(x, x).real) / n)

    def scaled(self, e, u0, u1, rtol, atol):
        scale = np.maximum(np.abs(u0), np.abs(u1))
        scale *= rtol
        scale += atol
        return e / scale

    def zeros(self, arrays):
        return tuple(np.zeros_like(x) for x in arrays)

    def add(self, a, b):
        out = []
        for x, y in zip(a, b, strict=True):
            if x.ndim:
                x += y
            else:
                x = x + y
            out.append(x)
        return tuple(out)

    def copy(self, x):
        return np.array(x)

    def rows_in(self, memory, rows, like):
        return np.ndarray((rows, like.shape[0]), like.dtype, memory)

    def word(self):
        return np.uint32

    def counters(self, n, like):
        return np.arange(n, dtype=np.uint32)

    # -- matrix recursions --------------------------------------------------------------------------------------

    def _rows(self, a, like):
        """Dense rows of a tableau in the precision of `like`, made once; None marks a row of zeros."""
        found = self._matrices.get((id(a), like.dtype.char))
        if found is None:
            rows = [np.array(r, dtype=like.real.dtype) if any(r) else None for r in a]
            found = self._matrices[id(a), like.dtype.char] = (a, rows)
        return found[1]

    def _weights(self, w, like):
        found = self._matrices.get((id(w), like.dtype.char))
        if found is None:
            found = self._matrices[id(w), like.dtype.char] = (w, np.array(w, dtype=like.real.dtype))
        return found[1]

    def recursion(self, a, base, scale, xs, row, carry, first=None):
        one = base.ndim == 1
        out = np.empty((len(a), base.shape[-1]), dtype=base.dtype)
        start = 0
        if first is not None:
            out[0] = first
            start = 1
        rows = self._rows(a, base)
        items = zip(*xs, strict=True)
        for _ in range(start):
            next(items)
        for i in range(start, len(a)):
            v = base if one else base[i]
            if rows[i] is not None:
                dv = rows[i].dot(out[:i])
                dv *= scale
                dv += v
                v = dv
            carry, out[i] = row(carry, next(items), v)
        return carry, out

    def combine(self, base, scale, weights, rows):
        out = self._weights(weights, rows).dot(rows)
        out *= scale
        if base is not None:
            out += base
        return out

    def inputs(self, a, base, scale, rows):
        key = (id(a), rows.dtype.char, "square")
        found = self._matrices.get(key)
        if found is None:
            square = np.zeros((len(a), len(a)), dtype=rows.real.dtype)
            for i, r in enumerate(a):
                square[i, : len(r)] = r
            found = self._matrices[key] = (a, square)
        out = found[1].dot(rows)
        out *= scale
        out += base
        return out

    def seeds(self, b, h, lam, rows, last):
        out = np.multiply.outer(self._weights(b, lam) * h, lam)
        if rows is not None:
            out += rows
        if last is not None:
            out[-1] += last
        return out

    def permuted_rows(self, rows, order):
        return rows[::-1] if order == tuple(range(len(rows) - 1, -1, -1)) else rows[list(order)]

    def detached(self, x):
        return self.differentiable().detached(x)

    def known(self, run, x):
        return run, x

    def look(self, at, run, x):
        with np.errstate(all="ignore"):
            return at(run, x).tolist()

    def peak(self, call, like):
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1], "tracemalloc"
        finally:
            tracemalloc.stop()

    def differentiable(self):
        if not self.modes:
            return self
        from ._boxes import BoxBackend

        return BoxBackend()

    def threefry(self, k0, k1, x0, x1):
        return threefry_in_place(k0, k1, x0, x1)

    # -- linear systems -----------------------------------------------------------------------------------------

    def factorize_sparse(self, values, pattern):
        return lapack.superlu(values, pattern)

    def weigh(self, mass, z, transposed=False):
        if mass.sparse is None or not isinstance(z, np.ndarray):
            return super().weigh(mass, z, transposed)
        A = mass.sparse[0]
        return ((A.T if transposed else A) @ z.T).T.astype(z.dtype, copy=False)

    def unweigh(self, mass, z, transposed=False):
        if mass.sparse is None or not isinstance(z, np.ndarray) or z.dtype.kind == "c":
            return super().unweigh(mass, z, transposed)
        return mass.sparse[1](z, transposed=transposed).astype(z.dtype, copy=False)

    def factorize_banded(self, bands, lower, upper):
        return lapack.band_lu(bands, lower, upper)

    def host(self, x):
        return np.asarray(x)

    # -- derivatives --------------------------------------------------------------------------------------------

    def vjp(self, f, theta, time, params):
        from . import _autograd

        return _autograd.vjp(f, theta, time, params)

    def value_and_vjp(self, f, theta, time, params):
        from . import _autograd

        return _autograd.value_and_vjp(f, theta, time, params)

    def jvp(self, f, theta, d_theta):
        from . import _autograd

        return _autograd.jvp(f, theta, d_theta)

    def second(self, f, theta, d_theta, params):
        from . import _autograd

        return _autograd.second(f, theta, d_theta, params)

    def loss_second(self, loss, args, d):
        if "reverse" not in self.modes:
            return None
        from . import _autograd

        return _autograd.loss_second(loss, args, d)

    def bent(self, pull, t, u, rows, state, add):
        d, K, W = rows
        size, least = self.spans(u, K)
        ratios = (np.sqrt(np.einsum("ij,ij->i", K, K.conj()).real / u.shape[0]) + least) / size
        e = (EPS["d"] ** (1 / 3) / np.where(ratios > 0.0, ratios, 1.0)).astype(u.real.dtype)
        moves = e[:, None] * K
        lam, theta, moved = state
        lam, total = np.array(lam), None
        steps = zip((e * d).tolist(), u + moves, u - moves, W / (2.0 * e[:, None]), strict=True)
        for t_i, ahead, behind, w in steps:
            up, ups, up_t = pull(t + t_i, ahead, w)
            down, downs, down_t = pull(t - t_i, behind, w)
            lam += up - down
            moved += up_t - down_t
            change = tuple(map(np.subtract, ups, downs))
            total = change if total is None else self.add(total, change)
        return lam, add(theta, total, t, u), moved

    def shifted(self, J, c, M=None):
        A = J * -c
        if M is None:
            A.flat[::J.shape[0] + 1] += 1.0
        else:
            A += M
        return A

    def keep(self, x, value):
        size = getattr(value, "nbytes", 0)
        if size and self._kept_bytes + size <= KEPT_BYTES:
            weakref.finalize(x, self._forget, id(x)).atexit = False
            self._kept[id(x)] = value
            self._kept_bytes += size

    def kept(self, x):
        return self._kept.get(id(x))

    def _forget(self, key):
        self._kept_bytes -= self._kept.pop(key).nbytes

    def factorize(self, A):
        return lapack.lu(A)

    def along(self, f, u, du):
        from . import _autograd

        return _autograd.directional(f, u, du)

    def loss_vjp(self, loss, args):
        if "reverse" not in self.modes:
            return None
        from . import _autograd

        return _autograd.loss_vjp(loss, args)
