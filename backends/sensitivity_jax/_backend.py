"""JAX: a solve is one compiled loop, differentiable through `custom_jvp` and a transposable tangent."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.random import threefry2x32_p

from sensitivity.backend import Backend
from sensitivity.errors import UnsupportedCombination, undefined
from sensitivity.solution import Gradient, Solution, Stats

from . import _bands
from ._attach import attached, looked, plain, task
from ._bounded import BoundedLoops
from ._fields import hoisted
from ._lanes import in_lanes
from ._lookback import JaxLookback
from ._loops import JaxLoops
from ._matrices import Rowwise, Summed, WrittenOut, light
from ._native import native, possible
from ._onebyone import OneByOne
from ._products import by_rows


def _register_results():
    """Let `jax.jit` return solutions and gradients; problem and dense output stay inside."""
    for cls in (Stats, Gradient):
        jax.tree_util.register_dataclass(cls, [f.name for f in dataclasses.fields(cls) if f.name != "sensealg"],
                                         ["sensealg"] if cls is Gradient else [])
    jax.tree_util.register_pytree_node(
        Solution, lambda s: ((s.t, s.u, s.stats, s.retcode, s.n_steps), (s.alg, s.sensealg)),
        lambda aux, kept: Solution(*kept, None, *aux))


class JaxBackend(JaxLookback, JaxLoops, Backend):
    name = "jax"
    modes = frozenset({"reverse", "forward"})
    attaches = True
    namespace, array_call = "jnp", "jnp.array"
    xp = jnp
    _peaks = None

    def __init__(self):
        self._through = None

    def flatten(self, tree):
        leaves, structure = jax.tree.flatten(tree)
        fresh = {type(x) for x in leaves if dataclasses.is_dataclass(x) and not isinstance(x, type)}
        if not fresh:
            return leaves, structure
        for cls in fresh:
            jax.tree_util.register_dataclass(cls, [f.name for f in dataclasses.fields(cls)], [])
        return self.flatten(tree)

    def unflatten(self, structure, leaves):
        return jax.tree.unflatten(structure, leaves)

    def asarray(self, x, dtype=None, device=None):
        if isinstance(device, str):
            kind, _, index = device.partition(":")
            device = jax.devices(kind)[int(index or 0)]
        return jnp.asarray(x, dtype=dtype, device=device)

    def default_float(self):
        return jnp.result_type(float)

    def is_array(self, x):
        return isinstance(x, jax.Array | np.ndarray | np.generic)

    def is_float(self, x):
        return jnp.issubdtype(x.dtype, jnp.inexact)

    def is_complex(self, x):
        return jnp.issubdtype(x.dtype, jnp.complexfloating)

    def eps(self, dtype):
        return float(jnp.finfo(dtype).eps)

    def real_dtype(self, dtype):
        return jnp.finfo(dtype).dtype

    def device(self, x):
        return None

    def scalar(self, x):
        return jnp.asarray(x)

    def scalars(self, ts):
        return jnp.stack(ts) if isinstance(ts, list) else jnp.asarray(ts)

    def concrete(self, x):
        try:
            return float(x)
        except (jax.errors.ConcretizationTypeError, TypeError):
            return None

    def concrete_times(self, ts):
        try:
            return np.asarray(ts).tolist()
        except jax.errors.TracerArrayConversionError:
            return None

    def time_vector(self, ts, like):
        return jnp.stack(ts) if isinstance(ts, list) else jnp.asarray(ts)

    def time(self, t):
        return jnp.asarray(t)

    def times(self, t, h, c):
        return t + h * jnp.asarray(np.array(c), jnp.result_type(t))

    def vector(self, xs, like):
        xs = jnp.stack([jnp.asarray(x) for x in xs]) if isinstance(xs, list | tuple) else jnp.asarray(xs)
        return xs.astype(like.dtype)

    def unit_rows(self, m, n, start, like):
        return jnp.eye(m, n, k=-start, dtype=like.dtype)

    def dot(self, a, b):
        return jnp.vdot(a, b, precision="highest")

    def rms(self, x):
        if not x.shape[0]:
            return jnp.zeros(())
        return lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.real(x * jnp.conj(x)))))

    def nan_where(self, bad, x):
        return x * jnp.where(bad, jnp.nan, 1.0).astype(jnp.finfo(x.dtype).dtype)

    def padded(self, v, size):
        return jnp.pad(v, (0, size - v.shape[0]))

    def split(self, flat, like):
        ends = np.cumsum([math.prod(v.shape) for v in like])[:-1]
        return tuple(p.reshape(v.shape).astype(v.dtype) for p, v in zip(jnp.split(flat, ends), like, strict=True))

    def copy(self, x):
        return x

    # -- linear systems ---------------------------------------------------------------------------------------------

    def factorize(self, A):
        factors = jax.scipy.linalg.lu_factor(A)
        return lambda b, transposed=False: jax.scipy.linalg.lu_solve(factors, b.T, trans=int(transposed)).T

    def factorize_banded(self, bands, lower, upper):
        if _bands.suited(bands.shape[1], lower, upper):
            return _bands.factorize(bands, lower, upper)
        return super().factorize_banded(bands, lower, upper)

    def members(self, one, rows):
        return jax.vmap(lambda rows: one(None, rows))(rows)

    def host(self, x):
        return np.asarray(x)

    def setup(self):
        return bool(jax.config.jax_enable_x64)

    def restore(self, setup):
        if bool(jax.config.jax_enable_x64) != setup:
            jax.config.update("jax_enable_x64", setup)

    def allow_float64(self):
        self.restore(True)

    def linear_solve(self, apply, transposed, b, solver, back):
        return lax.custom_linear_solve(apply, b, solver, lambda _, b: back(transposed, b))

    # -- random numbers ---------------------------------------------------------------------------------------------

    def word(self):
        return jnp.uint32

    def threefry(self, k0, k1, x0, x1):
        return threefry2x32_p.bind(*jnp.broadcast_arrays(k0, k1, x0, x1))

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, algorithm, name, run, args, wanted):
        if self._peaks is not None:
            self._peaks.append(_bytes(task.lower(algorithm, name, run, wanted, args).compile()))
        return task(algorithm, name, run, wanted, args)

    def peak(self, call, like):
        """By what the compiler reserves for the forward and the reverse pass; their residuals belong to both."""
        JaxBackend._peaks = peaks = []  # of the class: a solve may run on a variant of this backend
        try:
            call()
        finally:
            JaxBackend._peaks = None
        known = bool(peaks) and None not in peaks
        return (max(peaks), "the compiler, for the forward or the reverse pass") if known else (None, None)

    def known(self, run, x):
        u0, theta, t0, t1 = lax.stop_gradient((x.u0, x.theta, x.t0, x.t1))
        plain = x._replace(u0=u0, theta=theta, t0=t0, t1=t1)
        return None if any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(plain)) else (run, plain)

    def look(self, at, run, x):
        known = self.known(run, x)
        return None if known is None else self.concrete_times(looked(at, *known))  # None inside jit, whatever x is

    def attach(self, algorithm, run, x):
        return (attached if algorithm.boundary else plain)(algorithm, run, x)

    def report(self, progress, fraction, t):
        jax.debug.callback(progress, fraction, t)

    def detached(self, x):
        return x._replace(t0=lax.stop_gradient(x.t0), t1=lax.stop_gradient(x.t1))

    def suited(self, rhs, t, u):
        closed = jax.make_jaxpr(rhs)(t, u)
        lanes = any(map(in_lanes, (t, u, *closed.consts)))
        if light(closed.jaxpr):
            return _in_lanes if lanes else _alone
        return _network if not lanes and possible(closed.jaxpr, u.size) else self

    def differentiable(self):
        if self._through is None:
            self._through = _Through()
        return self._through

    # -- derivatives ------------------------------------------------------------------------------------------------

    def vjp(self, f, theta, time, params):
        at = self.value_and_vjp(f, theta, time, params)
        return lambda t, u, ct: at(t, u)[1](ct)

    def value_and_vjp(self, f, theta, time, params):
        def at(t, u):
            out, back = jax.vjp(lambda t, u, *th: f(*th or (theta,))(t, u), t, u, *((theta,) if params else ()))
            back = by_rows(back)

            def pull(ct):
                t_bar, u_bar, *theta_bar = back(ct)
                return u_bar, theta_bar[0] if params else (), t_bar if time else 0.0

            return out, pull

        return at

    def jvp(self, f, theta, d_theta):
        def push(t, u, du, dt):
            t = jnp.asarray(t)
            out, along = jax.linearize(lambda t, u, th: f(th)(t, u), t, u, theta)
            dt = jnp.zeros((du.shape[0], *t.shape), t.dtype) if dt is None else dt.astype(t.dtype)
            return out, jax.vmap(along)(dt, du, d_theta)

        return push

    def second(self, f, theta, d_theta, params):
        def turn(t, u, w, nu, lam):
            def pulled(u, theta, lam):
                return jax.vjp(lambda u, th: f(th)(t, u), u, theta)[1](lam)

            (w_bar, _), (u_bar, theta_bar) = jax.jvp(pulled, (u, theta, lam), (w, d_theta, nu))
            return u_bar, theta_bar if params else (), w_bar

        return turn

    def loss_second(self, loss, args, d):
        gradient = jax.value_and_grad(lambda xs: loss(*xs))
        (value, grads), (_, rows) = jax.jvp(gradient, (tuple(args),), (tuple(d),))
        return value, grads, rows

    def pulls(self, rhs):
        return lambda t, u, rows: jax.vmap(jax.vjp(lambda u: rhs(t, u), u)[1])(rows)[0]

    def jacobian(self, rhs):
        return lambda t, u: jax.jacfwd(lambda u: rhs(t, u))(u)

    def directional(self, g, size):
        return jax.jvp(lambda e: jax.tree.map(jnp.asarray, tuple(g(e))), (0.0,), (1.0,))[1]

    def shifted(self, J, c, M=None):
        return super().shifted(J, jnp.asarray(c, J.dtype), M)

    def along(self, f, u, du):
        return jax.jvp(f, (u,), (du,))[1]

    def fixed(self, x, name):
        return _fixed(name, x) if isinstance(x, jax.core.Tracer) else x

    def loss_vjp(self, loss, args):
        value, grads = jax.value_and_grad(lambda xs: loss(*xs))(tuple(args))
        return value, grads

    def hoist(self, f, t, u, p):
        return hoisted(self, f, t, u, p)

    def evaluate(self, f, t, u, p):
        return jax.eval_shape(f, t, u, p)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fixed(name, x):
    return x


@partial(_fixed.defjvp, symbolic_zeros=True)
def _refuse(name, primals, tangents):
    if not isinstance(tangents[0], SymbolicZero):
        raise UnsupportedCombination(*undefined(name))
    return primals[0], tangents[0]


def _bytes(compiled):
    """What a compiled function takes: arguments, results, and what it needs between."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes


class _Through(BoundedLoops, JaxBackend):
    """The backend with loops of known length."""


class _Native(OneByOne, JaxBackend):
    """The backend for one solve whose loops may be one function."""

    def factorize(self, A):
        return _bands.pivoted(A) if A.shape[0] <= _bands.SMALL else super().factorize(A)

    def _while(self, cond, body, start):
        return native(lambda: lax.while_loop(cond, body, start()))


class _Alone(Summed, _Native):
    """The same for a light vector field."""


class _Network(Rowwise, _Native):
    """The same for products of matrices with vectors."""


class _InLanes(WrittenOut, JaxBackend):
    """The backend for many solves of a light vector field; their stages are evaluated again rather than kept."""

    keeps_stages = False


_alone, _network, _in_lanes = _Alone(), _Network(), _InLanes()
_register_results()
