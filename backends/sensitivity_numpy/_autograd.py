"""Products by autograd, for functions written with `autograd.numpy`; imported only when asked for."""

import warnings

import autograd.numpy as anp
import numpy as np
from autograd import core, value_and_grad
from autograd.tracer import getval

from sensitivity.errors import SensitivityError


def make_vjp(function, x):
    """`autograd`'s, without its warning: a result that does not depend on `x` has zero derivatives."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Output seems independent of input")
        return core.make_vjp(function, x)


def vjp(f, theta, time, params):
    """`pull(t, u, ct)`; see `Backend.vjp`."""
    at = value_and_vjp(f, theta, time, params)
    return lambda t, u, ct: at(t, u)[1](ct)


def value_and_vjp(f, theta, time, params):
    """`at(t, u) -> (f, pull)`; see `Backend.value_and_vjp`."""
    moved = theta if params else ()
    fixed = None if params else f(theta)
    k = len(moved)

    def at(t, u):
        def rhs(x):
            return (f(tuple(x[1 : k + 1])) if params else fixed)(x[k + 1] if time else t, x[0])

        backward, out = make_vjp(rhs, (u, *moved, t) if time else (u, *moved))

        def pull(ct):
            u_bar, *bars = backward(np.asarray(ct, dtype=np.asarray(out).dtype))
            return u_bar, tuple(bars[:k]), float(bars[k]) if time else 0.0

        return out, pull

    return at


def jvp(f, theta, d_theta):
    """`push(t, u, du, dt)`: by rows of the Jacobians, or, for few directions, by the transpose of the transpose."""

    def push(t, u, du, dt):
        m = du.shape[0]
        x = (t if np.ndim(t) else float(t), u, *theta)
        directions = (np.zeros((m, *np.shape(t))) if dt is None else dt, du, *d_theta)
        backward, out = make_vjp(lambda x: f(tuple(x[2:]))(x[0], x[1]), x)
        n = np.shape(out)[0]
        if n <= m:
            rows = (backward(e) for e in np.eye(n, dtype=np.asarray(out).dtype))
            columns = [sum(_dots(d, bar) for d, bar in zip(directions, row, strict=True)) for row in rows]
            return out, np.stack(columns, axis=1)

        def pulled(v):
            return make_vjp(lambda x: f(tuple(x[2:]))(x[0], x[1]), x)[0](v)

        twice, _ = make_vjp(pulled, np.zeros_like(out))
        return out, np.stack([twice(tuple(d[i] for d in directions)) for i in range(m)])

    return push


def directional(f, u, du):
    """The derivative of `f` at `u` along `du`, as the transpose of the product with the transposed Jacobian."""
    def pulled(v):
        return make_vjp(f, u)[0](v)

    return make_vjp(pulled, np.zeros(u.shape, u.dtype))[0](du)


def _dots(directions, bar):
    """The inner product of each direction with a cotangent."""
    return np.reshape(directions, (len(directions), -1)) @ np.reshape(bar, (-1,))


def second(f, theta, d_theta, params):
    """`turn(t, u, w, nu, lam)`; see `Backend.second`: reverse over reverse."""
    k = len(theta)

    def turn(t, u, w, nu, lam):
        pulled = []

        def phi(x):
            backward, out = make_vjp(lambda x: f(tuple(x[1 : k + 1]))(t, x[0]), x)
            bars = backward(lam)
            pulled.append(np.asarray(getval(bars[0])))
            total = anp.sum(nu * out)
            for i, d in enumerate((w, *d_theta)):
                total = total + anp.sum(d * bars[i])
            return total

        backward, _ = make_vjp(phi, (u, *theta))
        u_bar, *theta_bar = backward(1.0)
        return u_bar, tuple(theta_bar) if params else (), pulled[0]

    return turn


def loss_second(loss, args, d):
    """Value, gradient and Hessian times `d`, or None if the loss cannot be differentiated."""
    found = []

    def along(x):
        value, grads = value_and_grad(lambda x: loss(*x))(x)
        found.append((getval(value), tuple(np.asarray(getval(grads[i])) for i in range(len(args)))))
        return sum(anp.sum(v * grads[i]) for i, v in enumerate(d))

    try:
        backward, _ = make_vjp(along, tuple(args))
        rows = tuple(backward(1.0))
    except SensitivityError:
        raise
    except Exception:  # whatever keeps autograd from a user's function, the caller knows what to do
        return None
    return *found[0], rows


def loss_vjp(loss, args):
    """Value and gradient, or None if the loss cannot be differentiated."""
    try:
        value, grads = value_and_grad(lambda x: loss(*x))(tuple(args))
    except SensitivityError:
        raise
    except Exception:  # whatever keeps autograd from a user's function, differences take over
        return None
    return value, tuple(grads)
