"""What a framework must provide, and what it gets for free.

A backend owns arrays, loops and derivatives of callables; algorithms own steps and formulas.
Vectors are one-dimensional arrays; a *scalar* (time, step size, error ratio) is a Python float on
backends that run eagerly and a 0-d array on backends that trace.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import tree as _tree

Array = Any
Scalar = Any
Tree = Any


class Record(NamedTuple):
    """One accepted step: start time, step size, state at the start, stage derivatives `(s, n)`."""

    t: Scalar
    h: Scalar
    u: Array
    k: Array


class Contribution(NamedTuple):
    """Cotangents that outputs inside one step hand to that step: of its start state, of its stages, of its size."""

    u: Array | None
    k: Array | None
    h: Scalar


class Loops:
    """Loops, selection and small matrix recursions for frameworks that run eagerly.

    A tracing backend overrides every method with the compiled twin; results must be equal.
    """

    traced = False

    def choose(self, pred: Any, a: Any, b: Any) -> Any:
        """`a` where the scalar `pred` holds, else `b`; `a` and `b` have one structure."""
        return a if pred else b

    def least(self, a: Scalar, b: Scalar) -> Scalar:
        return min(a, b)

    def greatest(self, a: Scalar, b: Scalar) -> Scalar:
        return max(a, b)

    def isfinite(self, x: Scalar) -> Any:
        return math.isfinite(x)

    def iterate(self, step: Callable, state: Any, running: Callable, limit: int, sink: Any = None) -> tuple[Any, Any]:
        """Run `state, record, keep = step(state)` while `running(state)`, at most `limit` times.

        Records with `keep` go to `sink` (from `store` or `sampler`), or nowhere. Returns `(state, sink result)`.
        """
        add = None if sink is None else sink.add
        for _ in range(limit):
            if not running(state):
                break
            state, record, keep = step(state)
            if keep and add is not None:
                add(record)
        return state, None if sink is None else sink.result()

    def replay(self, body: Callable, state: Any, log: Any, extra: Any = None) -> Any:
        """Fold `state = body(state, record, extra_n, last)` over a log, newest record first.

        `extra` is a sequence aligned with the log (see `sample_vjp`), or None; `last` marks the newest record.
        """
        for n in reversed(range(len(log))):
            state = body(state, log[n], None if extra is None else extra[n], n == len(log) - 1)
        return state

    def follow(self, body: Callable, state: Any, log: Any) -> tuple[Any, Any]:
        """Fold `state, new = body(state, record, last)` over a log, oldest record first; the `new` form a log too."""
        out = _Store()
        for n in range(len(log)):
            state, new = body(state, log[n], n == len(log) - 1)
            out.append(new)
        return state, out

    def nodes(self, log: Any, end: Array, t_end: Scalar) -> tuple[Array, Any]:
        """States and times at the ends of all steps: `(N, n)` and N times."""
        states = [r.u for r in log[1:]] + [end] * bool(log)
        u = self.xp.stack(states) if states else self.xp.reshape(end, (1, -1))[:0, :]
        return u, [r.t for r in log[1:]] + [t_end] * bool(log)

    def nodes_vjp(self, log: Any, ct: Array) -> tuple[Any, Array]:
        """Pull cotangents of `nodes` back: contributions aligned with the log, and the cotangent of the end state."""
        return [None] + [Contribution(ct[n, :], None, 0.0) for n in range(len(log) - 1)], ct[len(log) - 1, :]

    def stacked(self, log: Any) -> tuple[Any, Any, Array, Array]:
        """A log as arrays: times, sizes, start states `(N, n)`, stages `(N, s, n)`."""
        xp = self.xp
        return [r.t for r in log], [r.h for r in log], xp.stack([r.u for r in log]), xp.stack([r.k for r in log])

    def unstacked(self, times: Any, sizes: Any, u: Array, k: Array, count: Any) -> Any:
        """A log from the arrays of `stacked`."""
        return [Record(times[n], sizes[n], u[n, :], k[n, :, :]) for n in range(int(count))]

    def trimmed(self, rows: Array, ts: Any, count: Any) -> tuple[Array, Any]:
        """The first `count` rows and times; where `count` is only traced, the rest becomes NaN."""
        return rows, ts

    def stacked_vjp(self, log: Any, u: Array, k: Array, extra: Any) -> Any:
        """Contributions from cotangents of the arrays of `stacked`, added to `extra`."""
        out = []
        for n in range(len(log)):
            old = None if extra is None else extra[n]
            u_n, k_n, h_n = u[n, :], k[n, :, :], 0.0
            if old is not None:
                u_n, h_n = u_n + old.u, old.h
                k_n = k_n if old.k is None else k_n + old.k
            out.append(Contribution(u_n, k_n, h_n))
        return out

    def silent_end(self, extra: Any) -> int:
        """1 if the newest step's last stage got no cotangent from outputs, so that its product was left out."""
        return int(extra is None or extra[-1] is None or extra[-1].k is None)

    def last_size(self, log: Any) -> Scalar:
        """Size of the newest step; 1.0 if there is none."""
        return log[-1].h if log else 1.0

    def spread(self, t0: Any, t1: Any, fractions: Sequence[float]) -> Any:
        """Times `t0 + w (t1 - t0)`, exact at both ends."""
        return [t0 if w == 0.0 else t1 if w == 1.0 else t0 + w * (t1 - t0) for w in fractions]

    def total(self, values: Any, weights: Sequence[float] | None = None) -> Scalar:
        """Weighted sum of scalars."""
        return sum(values) if weights is None else sum(w * v for w, v in zip(weights, values, strict=True))

    def sort_down(self, ts: Any, rows: Array, direction: Scalar) -> tuple[Any, Any]:
        """Times from the last to the first along `direction`, with their rows."""
        order = sorted(range(len(ts)), key=lambda i: -direction * ts[i])
        return [ts[i] for i in order], [rows[i, :] for i in order]

    def gathered(self, rows: Any) -> Array:
        """The result list of `scan` as one array."""
        return self.xp.stack(rows)

    def reached(self, rows: Array, ts: Any, t_end: Scalar, direction: Scalar) -> Array:
        """Rows of times that the solve did not reach become NaN."""
        if all(direction * (t - t_end) <= 0.0 for t in ts):
            return rows
        bad = self.vector([math.nan if direction * (t - t_end) > 0.0 else 0.0 for t in ts], rows)
        return rows + bad[:, None]

    def padded(self, v: Array, size: int) -> Array:
        """`v` followed by zeros up to `size` entries."""
        more = size - v.shape[0]
        return self.xp.concat([v, self.xp.zeros((more,), dtype=v.dtype, device=self.device(v))]) if more else v

    def split(self, flat: Array, like: tuple[Array, ...]) -> tuple[Array, ...]:
        """Pieces of a vector in the shapes and dtypes of `like`."""
        out, start = [], 0
        for v in like:
            stop = start + math.prod(v.shape)
            out.append(self.xp.astype(self.xp.reshape(flat[start:stop], v.shape), v.dtype))
            start = stop
        return tuple(out)

    def detached(self, x: Any) -> Any:
        """Inputs whose `t0` and `t1` carry no derivative."""
        return x

    def differentiable(self) -> Any:
        """The same backend with loops that the framework's own AD can run through."""
        return self

    def nothing(self, like: Array) -> Array | None:
        """A zero cotangent; None on eager backends, which leave it out."""
        del like
        return None

    def scan(self, body: Callable, state: Any, xs: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        """Fold `state, y = body(state, x)` over sequences of one known length; returns the list or array of `y`."""
        ys = []
        for n in range(len(xs[0])):
            state, y = body(state, tuple(x[n, ...] if self.is_array(x) else x[n] for x in xs))
            ys.append(y)
        return state, ys

    def store(self, capacity: int) -> Any:
        """A sink that keeps every record; its result is a log for `replay`, `sample`, `lookup`."""
        del capacity
        return _Store()

    def reopen(self, log: Any, stages: Callable[[Record], Array]) -> Any:
        """A stored log ready for use; `stages(record)` remakes the stages where they were too big to keep."""
        del stages
        return log

    def sampler(self, interpolate: Callable, ts: Any, u0: Array, direction: Scalar, capacity: int,
                stages: Callable[[Record], Array]) -> Any:
        """A sink that keeps only the states at times `ts`; its result has shape `(len(ts), n)`.

        `interpolate(record, ts)` evaluates the dense output of one step at several times; `stages` as in `reopen`.
        """
        del capacity, stages
        return _Sampler(self, interpolate, ts, u0, direction)

    def recursion(self, a: Sequence, base: Array, scale: Scalar, xs: tuple[Sequence, ...], row: Callable,
                  carry: Any, first: Array | None = None) -> tuple[Any, Array]:
        """Rows `X_i` of a triangular recursion: `carry, X_i = row(carry, x_i, base_i + scale sum_{j<i} a_ij X_j)`.

        `base` is one vector for all rows or one row each; with `first`, row 0 is given. Returns `(carry, X)`.
        """
        rows = [] if first is None else [first]
        for i in range(len(rows), len(a)):
            v = base if base.ndim == 1 else base[i, :]
            for a_ij, x in zip(a[i], rows, strict=True):
                if a_ij:
                    v = v + (scale * a_ij) * x
            carry, out = row(carry, tuple(x[i] for x in xs), v)
            rows.append(out)
        return carry, self.xp.stack(rows)

    def combine(self, base: Array | None, scale: Scalar, weights: Sequence, rows: Array) -> Array:
        """`base + scale * weights @ rows`."""
        out = base
        for i, w in enumerate(weights):
            if w:
                term = (scale * w) * rows[i, :]
                out = term if out is None else out + term
        return rows[0, :] * 0.0 if out is None else out

    def inputs(self, a: Sequence, base: Array, scale: Scalar, rows: Array) -> Sequence[Array]:
        """Vectors `base + scale sum_j a_ij rows_j`, one per row of the lower triangular `a`."""
        return [self.combine(base, scale, a_i, rows) if any(a_i) else base for a_i in a]

    def seeds(self, b: Sequence, h: Scalar, lam: Array, rows: Array | None, last: Array | None) -> Array:
        """Matrix with rows `h b_i lam + rows_i`, and `last` added to the last row."""
        out = [(h * b_i) * lam for b_i in b]
        if rows is not None:
            out = [x + rows[i, :] for i, x in enumerate(out)]
        if last is not None:
            out[-1] = out[-1] + last
        return self.xp.stack(out)

    def permuted(self, xs: Sequence, order: Sequence[int]) -> Sequence:
        return [xs[i] for i in order]

    def permuted_rows(self, rows: Array, order: Sequence[int]) -> Array:
        return self.xp.stack([rows[i, :] for i in order])

    def poly(self, coefficients: Sequence, x: Sequence[Scalar], like: Array) -> Array:
        """Matrix with entries `p_j(x_i)`, `p_j(x) = sum_k coefficients[j][k] x^k`."""
        x = self.vector(x, like)[:, None]
        columns = [self.vector(c, like)[None, :] for c in zip(*coefficients, strict=True)]
        out = columns[-1]
        for c in columns[-2::-1]:
            out = out * x + c
        return out + 0.0 * x

    def lookup(self, interpolate: Callable, log: Any) -> Callable[[Scalar], Array]:
        """Dense output over a whole log: `t -> u(t)`."""
        starts = [r.t for r in log]
        sign = 1.0 if not log or log[0].h >= 0 else -1.0
        keys = [sign * t for t in starts]

        def dense(t: Scalar) -> Array:
            n = max(bisect.bisect_right(keys, sign * t) - 1, 0)
            return interpolate(log[n], [t])[0, :]

        return dense

    def sample(self, interpolate: Callable, log: Any, ts: Any, u0: Array, direction: Scalar) -> Array:
        """States at times `ts` (any order, repeats allowed) from a log; shape `(len(ts), n)`."""
        sink = _Sampler(self, interpolate, ts, u0, direction)
        for record in log:
            sink.add(record)
        return sink.result()

    def sample_vjp(self, transpose: Callable, log: Any, ts: Any, ct: Array, direction: Scalar) -> tuple[Any, Any]:
        """Pull cotangents `ct` of `sample` back: contributions aligned with the log, and cotangents of `ts`.

        `transpose(record, ts, ct_rows) -> (Contribution, [ct of each t])` is one step's pullback.
        """
        groups = self._groups(log, ts, direction)
        extra: list[Contribution | None] = [None] * len(log)
        ts_bar = [0.0] * len(ts)
        for n, members in groups.items():
            rows = self.xp.stack([ct[i, :] for i in members])
            extra[n], bars = transpose(log[n], [ts[i] for i in members], rows)
            for i, bar in zip(members, bars, strict=True):
                ts_bar[i] = bar
        return extra, ts_bar

    @staticmethod
    def _groups(log: Any, ts: Any, direction: float) -> dict[int, list[int]]:
        """Indices of the save times inside each step; a time on a node belongs to the step that ends there."""
        starts = [direction * r.t for r in log]
        groups: dict[int, list[int]] = {}
        for i, t in enumerate(ts):
            if starts:
                groups.setdefault(max(bisect.bisect_left(starts, direction * t) - 1, 0), []).append(i)
        return groups


class _Store(list):
    add = list.append

    def result(self) -> _Store:
        return self


class _Sampler:
    def __init__(self, be: Loops, interpolate: Callable, ts: Any, u0: Array, direction: float) -> None:
        self.be, self.interpolate, self.direction, self.u0 = be, interpolate, direction, u0
        self.order = sorted(range(len(ts)), key=lambda i: direction * ts[i])
        self.ts = [ts[i] for i in self.order]
        self.keys = [direction * t for t in self.ts]
        self.done = 0
        self.parts: list[Array] = []

    def add(self, record: Record) -> None:
        if self.done == len(self.keys):
            return
        end = bisect.bisect_right(self.keys, self.direction * (record.t + record.h), self.done)
        if end > self.done:
            self.parts.append(self.interpolate(record, self.ts[self.done:end]))
            self.done = end

    def result(self) -> Array:
        xp = self.be.xp
        k = len(self.ts)
        if self.done < k:
            # Round-off may leave a time at t1 behind the last node; a failed solve leaves the rest unknown.
            fill = self.parts[-1][-1:, :] if self.parts else xp.reshape(self.u0, (1, -1))
            self.parts.append(xp.concat([fill] * (k - self.done), axis=0))
        rows = xp.concat(self.parts, axis=0) if len(self.parts) > 1 else self.parts[0]
        if self.order == list(range(k)):
            return rows
        place = [0] * k
        for position, i in enumerate(self.order):
            place[i] = position
        return xp.stack([rows[j, :] for j in place])


class Backend(Loops):
    """One array framework.

    Required: `name`, `modes`, `xp`, `is_array`; `custom_ad` when the framework has its own AD;
    `vjp` if `"reverse" in modes`, `jvp` if `"forward" in modes`. Everything else has a default that uses the
    array API only.

    Attributes
    ----------
    name : how users name it, `solve(..., backend=name)`.
    modes : subset of `{"reverse", "forward"}`: derivatives of a callable that the framework offers.
    complex : whether complex numbers flow through (needed by `ComplexStepVJP`).
    opaque : whether a user function may leave the AD without an error, so that products are checked by value.
    how_to_get_ad : what to say when AD is missing but could be installed.
    """

    name: str
    modes: frozenset[str] = frozenset()
    opaque = False
    complex = True
    how_to_get_ad = ""
    xp: Any = None

    # -- arrays -----------------------------------------------------------------------------------------------

    def bound(self, like: Array) -> Backend:
        """The backend for states with the dtype and device of `like`; times that `f` receives have them too."""
        del like
        return self

    def flatten(self, tree: Tree) -> tuple[list[Any], Any]:
        return _tree.flatten(tree)

    def unflatten(self, structure: Any, leaves: Sequence[Any]) -> Tree:
        return _tree.unflatten(structure, leaves)

    def asarray(self, x: Any, dtype: Any = None, device: Any = None) -> Array:
        return self.xp.asarray(x, dtype=dtype, device=device)

    def default_float(self) -> Any:
        return self.xp.float64

    def time_dtype(self, dtype: Any) -> Any:
        """Dtype in which times are kept beside states of `dtype`."""
        del dtype
        return self.default_float()

    def is_array(self, x: Any) -> bool:
        """Whether `x` is an array of this framework."""
        raise NotImplementedError

    def is_float(self, x: Any) -> bool:
        """Whether an array holds real or complex floating-point numbers."""
        return bool(self.xp.isdtype(x.dtype, ("real floating", "complex floating")))

    def is_complex(self, x: Any) -> bool:
        return bool(self.xp.isdtype(x.dtype, "complex floating"))

    def eps(self, dtype: Any) -> float:
        return float(self.xp.finfo(dtype).eps)

    def device(self, x: Array) -> Any:
        return getattr(x, "device", None)

    def scalar(self, x: Any) -> Scalar:
        """A time as the loops use it: a Python float here, a 0-d array on tracing backends."""
        return float(x)

    def scalars(self, ts: Any) -> Any:
        """Many times: a list of floats here, a vector on tracing backends."""
        return [float(t) for t in ts]

    def concrete(self, x: Any) -> float | None:
        """The value of a scalar if it is known now, else None."""
        return float(x)

    def concrete_times(self, ts: Any) -> list[float] | None:
        """The values of many times if they are known now, else None."""
        return [float(t) for t in ts]

    def time_vector(self, ts: Any, like: Array) -> Array:
        """Times as an array for the user."""
        return self.xp.asarray(ts, dtype=self.time_dtype(like.dtype), device=self.device(like))

    def real_dtype(self, dtype: Any) -> Any:
        """The real dtype of the same precision."""
        return self.xp.finfo(dtype).dtype

    def times(self, t: Scalar, h: Scalar, c: Sequence[float]) -> Sequence[Any]:
        """Times `t + c h` as the user's `f` receives them."""
        return [self.time(t + c_i * h) for c_i in c]

    def time(self, t: Scalar) -> Any:
        """One time as the user's `f` receives it."""
        return self.xp.asarray(t)

    def vector(self, xs: Sequence[Scalar], like: Array) -> Array:
        """A vector of scalars with the dtype and device of `like`."""
        return self.xp.asarray(xs, dtype=like.dtype, device=self.device(like))

    def unit_rows(self, m: int, n: int, start: int, like: Array) -> Array:
        """Matrix `(m, n)` with a one at `(start + j, j)` where that row exists, else zeros."""
        return self.xp.asarray(self.xp.eye(m, n, k=-start, dtype=like.dtype), device=self.device(like))

    def dot(self, a: Array, b: Array) -> Scalar:
        return self.scalar(self.xp.sum(a * b))

    def rms(self, x: Array) -> Scalar:
        """Root mean square as a scalar."""
        magnitude = self.xp.abs(x)
        return self.scalar(self.xp.sqrt(self.xp.mean(magnitude * magnitude))) if x.shape[0] else 0.0

    def scaled(self, e: Array, u0: Array, u1: Array, rtol: Any, atol: Any) -> Array:
        """`e / (atol + rtol max(|u0|, |u1|))`, the error measured in tolerances."""
        xp = self.xp
        return e / (atol + rtol * xp.maximum(xp.abs(u0), xp.abs(u1)))

    def zeros(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(self.xp.zeros_like(x) for x in arrays)

    def add(self, a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        """Sum of two tuples of arrays; `a` is not used afterwards, so it may be overwritten."""
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def nan_where(self, bad: Any, x: Array) -> Array:
        """`x`, or NaN everywhere (its derivatives too) if the scalar `bad` holds."""
        return x * math.nan if bad else x

    # -- running ----------------------------------------------------------------------------------------------

    def run(self, algorithm: Any, name: str, run: Any, args: tuple[Any, ...], wanted: frozenset[str]) -> Any:
        """`algorithm.<name>(run, *args, wanted)` on plain arrays; a backend may compile it once per hashable `run`."""
        with self.quiet():
            return getattr(algorithm, name)(run, *args, wanted)

    def quiet(self) -> Any:
        """Context in which the framework records nothing for differentiation."""
        import contextlib

        return contextlib.nullcontext()

    def report(self, progress: Callable, fraction: Scalar, t: Scalar) -> None:
        progress(fraction, t)

    # -- derivatives ------------------------------------------------------------------------------------------

    def attach(self, algorithm: Any, run: Any, x: Any) -> tuple[Any, Any]:
        """`algorithm.plain(run, x)` with the algorithm's derivatives attached to the framework's own AD."""
        return algorithm.plain(run, x)

    def hoist(self, f: Callable, t: Any, u: Tree, p: Tree) -> tuple[Callable, tuple[Array, ...]]:
        """`f` with what it closes over made explicit: `(g, captured)`, `g(t, u, p, *captured)`."""
        del t, u, p
        return f, ()

    def vjp(self, f: Callable, theta: tuple[Array, ...], time: bool, params: bool) -> Callable:
        """`pull(t, u, ct) -> (ct_u, ct_theta, ct_t)` for `f(theta)(t, u)`.

        `ct_t` is 0.0 unless `time`; `ct_theta` is () unless `params`.
        """
        raise NotImplementedError

    def jvp(self, f: Callable, theta: tuple[Array, ...], d_theta: tuple[Array, ...]) -> Callable:
        """`push(t, u, du, dt) -> (f, df)` along many directions at once.

        `du` has shape `(m, n)`, every `d_theta` leaf `(m, *leaf shape)`, `dt` shape `(m,)` or None.
        """
        raise NotImplementedError

    def loss_vjp(self, loss: Callable, args: tuple[Array, ...]) -> tuple[Any, tuple[Array, ...]] | None:
        """Value and gradient of a scalar user function of arrays, or None where the framework cannot."""
        del loss, args
        return None

    # -- the first-call check ----------------------------------------------------------------------------------

    def evaluate(self, f: Callable, t: Any, u: Tree, p: Tree) -> Any:
        """Call `f` for inspection; a tracing backend returns shapes and dtypes only."""
        return f(t, u, p)

    def copy(self, x: Array) -> Array:
        return self.xp.asarray(x, copy=True)

    def connected(self, f: Callable, t: Any, u: Array, p: Tree) -> bool | None:
        """Whether the framework's AD sees that `f` depends on `u`; None if it cannot tell."""
        del f, t, u, p
        return None
