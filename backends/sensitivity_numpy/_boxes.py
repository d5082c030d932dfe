"""NumPy under autograd: arrays may be boxes, so loops build new arrays instead of writing into buffers."""

import autograd.numpy as anp
import numpy as np
from array_api_compat import numpy as plain
from autograd.extend import Box
from autograd.tracer import getval

from sensitivity.backend import Backend
from sensitivity.errors import UnsupportedCombination, undefined


class Namespace:
    """The array API's names on `autograd.numpy`."""

    permute_dims = staticmethod(anp.transpose)

    @staticmethod
    def concat(arrays, axis=0):
        return anp.concatenate(arrays, axis)

    @staticmethod
    def astype(x, dtype):
        return x if x.dtype == dtype else x.astype(dtype)

    def __getattr__(self, name):
        return getattr(anp if hasattr(anp, name) else plain, name)


def value(x):
    """The number behind a box, or behind boxes of boxes."""
    while isinstance(x, Box):
        x = getval(x)
    return x


def _like(x, like):
    """A step size in the dtype of `like`: unlike a Python float, a box of float64 would turn float32 into float64."""
    return x.astype(like.dtype) if getattr(x, "dtype", like.dtype) != like.dtype else x


class BoxBackend(Backend):
    """Loops that autograd can run through."""

    name = "numpy"
    holds_numpy = True
    namespace, array_call = "np", "np.array"
    modes = frozenset({"reverse", "forward"})
    xp = Namespace()

    def is_array(self, x):
        return isinstance(value(x), np.ndarray | np.generic)

    def is_float(self, x):
        return x.dtype.kind in "fc"

    def is_complex(self, x):
        return x.dtype.kind == "c"

    def asarray(self, x, dtype=None, device=None):
        if isinstance(x, Box):
            x = anp.reshape(x, ()) if isinstance(value(x), float) else x
            return x if dtype is None or x.dtype == dtype else x.astype(dtype)
        return np.asarray(x, dtype=dtype)

    def device(self, x):
        return None

    def eps(self, dtype):
        return float(np.finfo(dtype).eps)

    def scalar(self, x):
        return float(value(x))

    def scalars(self, ts):
        return [float(t) for t in value(ts)]

    def concrete(self, x):
        return float(value(x))

    def concrete_times(self, ts):
        return [float(t) for t in value(ts)]

    def time(self, t):
        return t

    def times(self, t, h, c):
        return [t + c_i * h for c_i in c]

    def vector(self, xs, like):
        if any(isinstance(x, Box) for x in xs):
            return _like(anp.array(list(xs)), like)
        return np.asarray(xs, dtype=like.dtype)

    def combine(self, base, scale, weights, rows):
        return super().combine(base, _like(scale, rows), weights, rows)

    def recursion(self, a, base, scale, xs, row, carry, first=None):
        return super().recursion(a, base, _like(scale, base), xs, row, carry, first)

    def rms(self, x):
        x = value(x)
        return float(np.sqrt(np.vdot(x, x).real / x.shape[0])) if x.shape[0] else 0.0

    def time_vector(self, ts, like):
        if isinstance(ts, list) and any(isinstance(t, Box) for t in ts):
            return anp.stack([anp.reshape(t, ()) for t in ts])
        return ts if isinstance(ts, Box) else np.asarray(ts, dtype=float)

    def word(self):
        return np.uint32

    def counters(self, n, like):
        return np.arange(n, dtype=np.uint32)

    def along(self, f, u, du):
        from . import _autograd

        return _autograd.directional(f, u, du)

    def fixed(self, x, name):
        if isinstance(x, Box):
            raise UnsupportedCombination(*undefined(name))
        return x

    def detached(self, x):
        return x._replace(t0=value(x.t0), t1=value(x.t1))

    def nan_where(self, bad, x):
        return x * np.nan if bad else x
