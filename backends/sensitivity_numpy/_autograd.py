"""Products by autograd, for functions written with `autograd.numpy`; imported only when asked for."""

import numpy as np
from autograd import value_and_grad
from autograd.core import make_vjp


def vjp(f, theta, time, params):
    """`pull(t, u, ct)`; see `Backend.vjp`."""
    rhs = None if params else f(theta)

    def of(x):
        t, u, *th = x
        return (f(tuple(th)) if params else rhs)(t, u)

    def pull(t, u, ct):
        x = (t, u, *(theta if params else ()))
        backward, out = make_vjp(_packed(of, time, t), _pack(x, time))
        bars = _unpack(backward(_like(ct, out)), time)
        return bars[1], tuple(bars[2:]), float(bars[0]) if time else 0.0

    return pull


def _packed(of, time, t):
    from autograd.builtins import tuple as box_tuple  # noqa: F401  (registers tuples as differentiable containers)

    return of if time else lambda x: of((t, *x))


def _pack(x, time):
    return tuple(x) if time else tuple(x[1:])


def _unpack(bars, time):
    return bars if time else (0.0, *bars)


def _like(ct, out):
    return np.asarray(ct, dtype=np.asarray(out).dtype)


def jvp(f, theta, d_theta):
    """`push(t, u, du, dt)` by the transpose of the transpose: linear in the cotangent, so differentiated once more."""

    def push(t, u, du, dt):
        def pulled(v):
            backward, _ = make_vjp(lambda x: f(tuple(x[2:]))(x[0], x[1]), (float(t), u, *theta))
            return backward(v)

        out = f(theta)(t, u)
        twice, _ = make_vjp(pulled, np.zeros_like(out))
        rows = []
        for i in range(du.shape[0]):
            d = (0.0 if dt is None else float(dt[i]), du[i], *(v[i] for v in d_theta))
            rows.append(twice(d))
        return out, np.stack(rows)

    return push


def loss_vjp(loss, args):
    """Value and gradient, or None if the loss cannot be differentiated."""
    try:
        value, grads = value_and_grad(lambda x: loss(*x))(tuple(args))
    except Exception:  # whatever keeps autograd from a user's function, differences take over
        return None
    return value, tuple(grads)
