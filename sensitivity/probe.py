"""The first-call check of `f`: mistakes that would end in a wrong answer are named before the solve.

A tracing backend gets one abstract trace. An eager one gets two evaluations of `f`; what the first tells decides where
the second is made:

| first evaluation | second evaluation | what the pair tells |
|---|---|---|
| no AD will run through `f` | same point | whether one input has one answer |
| AD sees that the output depends on `u` | same point | the same, and whether AD sees `p` |
| AD sees no dependence on `u` | `u` moved a little | equal: `f` is constant in `u`; else it hides from AD |

A third, at a moved `p`, is made only where AD sees no dependence on a `p` whose gradient is asked for.
Outputs are copied before `f` runs again, so an `f` that reuses its own buffer passes. A function that has passed is not
evaluated again for the same shapes and dtypes.
"""

from __future__ import annotations

import inspect
import math
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from .choose import auto
from .errors import (
    BrokenGradientError,
    ImpureFunctionError,
    ProbeWarning,
    SensitivityError,
    SignatureError,
    TracingError,
)
from .fieldoutput import adapter, check_output, copied, copies_of, leaves_of, swapped
from .system import Layout
from .userfunction import accepts, calling_depth, location, location_of_error, parameter_names, signed, unwrapped
from .uservjp import UserVJP
from .vjp import ComplexStepVJP, FiniteDifferenceVJP

TIME = frozenset({"t", "time", "t_", "_t", "tau", "s", "_"})
BLACK_BOX = "for a black box sensealg=sa.RecursiveCheckpointAdjoint(vjp=sa.FiniteDifferenceVJP())"
CAPACITY = 512
_passed: dict[Any, Callable[[], Any]] = {}


def check(be: Any, prob: Any, t0: Any, u: Any, p: Any, mode: str, wrt: tuple[str, ...] | None = None) -> None:
    """Evaluate `f` at the start and raise, or with `mode="warn"` warn, if the solve could not be trusted.

    `wrt` names what will be differentiated; None leaves that to the arrays (`requires_grad`), and () says that no AD
    will run through `f`.
    """
    f = prob.f
    anchor, same = identity(be, f)
    u_leaves, u_structure = be.flatten(u)
    p_leaves, p_structure = be.flatten(p)
    recorded = wrt != () and be.recording()
    asked = _asked(be, f, u_leaves, p_leaves, wrt) if recorded else ()
    key: Any = (id(anchor), same, be.name, mode, recorded, asked,
                u_structure, p_structure, _kinds(u_leaves), _kinds(p_leaves))
    try:
        known = _passed.get(key)
    except TypeError:  # a structure that cannot be hashed
        key, known = None, None
    if known is not None and known() is anchor:
        return
    try:
        _check_order(f)
        t = be.time(be.scalar(t0))
        if be.traced:
            _trace(be, f, t, u, p)
        else:
            _evaluate(be, f, t, u, p, recorded, asked)
    except SensitivityError as e:
        if mode != "warn":
            raise
        warnings.warn(str(e), ProbeWarning, stacklevel=calling_depth())
    if key is not None:
        for old in list(_passed)[: len(_passed) - CAPACITY + 1]:
            _passed.pop(old, None)
        _passed[key] = _held(anchor)


def through_ad(prob: Any, sensealg: Any, wrt: tuple[str, ...] | None = None) -> tuple[str, ...] | None:
    """`wrt` as `check` takes it: () where `sensealg` and `prob` say that derivatives of `f` are made without AD."""
    vjp = getattr(sensealg, "vjp", None)
    own = all(getattr(prob, k, None) for k in ("jac", "paramjac")) or getattr(prob, "vjp", None)
    without = isinstance(vjp, FiniteDifferenceVJP | ComplexStepVJP | UserVJP) or (own and (vjp is None or vjp is auto))
    return () if without and getattr(sensealg, "boundary", True) else wrt


# -- which functions have passed --------------------------------------------------------------------------------------


def identity(be: Any, f: Any) -> tuple[Any, Any]:
    """An object whose life and identity stand for `f`, and what else must be equal.

    A function that closes over nothing is its code, so that a `lambda` in a loop is checked once. A callable pytree
    on a tracing backend is its type and structure, because each update of its arrays makes a new one.
    """
    if isinstance(f, types.FunctionType):
        plain = f.__closure__ is None and f.__defaults__ is None and f.__kwdefaults__ is None
        return (f.__code__ if plain else f), None
    if isinstance(f, types.MethodType):
        return f.__self__, f.__func__
    if be.traced:
        leaves, structure = be.flatten(f)
        if not (len(leaves) == 1 and leaves[0] is f):
            return type(f), (structure, _kinds(leaves))
    return f, getattr(f, "training", None)


def _held(anchor: Any) -> Callable[[], Any]:
    """A weak reference where the type allows one; else the object is kept until newer entries push it out."""
    try:
        return weakref.ref(anchor)
    except TypeError:
        return lambda: anchor


def _kinds(leaves: list[Any]) -> tuple[Any, ...]:
    return tuple([(x.shape, x.dtype) if hasattr(x, "dtype") else type(x) for x in leaves])


# -- the evaluations --------------------------------------------------------------------------------------------------


def _asked(be: Any, f: Any, u: list[Any], p: list[Any], wrt: tuple[str, ...] | None) -> tuple[str, ...]:
    """Through which arguments of `f` AD will run: "u" whenever anything is differentiated, "p" if it is itself."""
    def on(xs: Any) -> bool:
        return any(getattr(x, "requires_grad", False) for x in xs)

    if "p" in wrt if wrt is not None else on(p):
        return "u", "p"
    parameters = f.parameters() if hasattr(f, "parameters") and hasattr(f, "forward") else ()
    return ("u",) if wrt is not None or on(u) or on(parameters) else ()


def _trace(be: Any, f: Any, t: Any, u: Any, p: Any) -> None:
    """One abstract evaluation; what is no array in `p` stays as it is, time has the precision of the state."""
    call = _Call(be, f)
    leaves, structure = be.flatten(p)
    arrays = [be.is_array(x) for x in leaves]

    def traced(t: Any, u: Any, values: list[Any]) -> Any:
        given = iter(values)
        full = [next(given) if a else x for x, a in zip(leaves, arrays, strict=True)]
        return be.flatten(call(t, u, be.unflatten(structure, full)))[0]

    t = be.asarray(t, dtype=be.real_dtype(be.flatten(u)[0][0].dtype))
    be.evaluate(traced, t, u, [x for x, a in zip(leaves, arrays, strict=True) if a])


def _evaluate(be: Any, f: Any, t: Any, u: Any, p: Any, recorded: bool, asked: tuple[str, ...]) -> None:
    call = _Call(be, f)
    linked = None
    if recorded:
        try:
            linked = _linked(be, call, t, u, p, over_p=False)
        except Exception as e:
            if asked or (isinstance(e, SensitivityError) and not isinstance(e, BrokenGradientError)):
                raise  # else it may be the recording that f does not bear
    if not call.outputs:
        be.evaluate(call, t, copied(be, u), p)
    if linked is False:
        # Recorded although neither u nor p is: f closes over something whose gradient can be asked for.
        if _evaluated(call, t, _moved(be, u), p) and call.differs() and (asked or call.recorded):
            raise _hidden(be, f, "u")
        return
    linked = _linked(be, call, t, u, p, over_p=True) if linked and "p" in asked else None
    if call.count < 2:
        be.evaluate(call, t, copied(be, u), p)
    if call.differs():
        raise ImpureFunctionError(
            f"f gave two answers for one input, at {location(f)}",
            "random numbers or state kept inside f mislead the error control and every gradient",
            "draw random numbers before the solve and hand them over in p"
            + ("; dropout: f.eval()" if getattr(f, "training", False) else ""))
    if linked is False and _evaluated(call, t, u, _moved(be, p)) and call.differs():
        raise _hidden(be, f, "p")


def _linked(be: Any, call: _Call, t: Any, u: Any, p: Any, over_p: bool) -> bool | None:
    """Whether AD sees that the output depends on `u` (or on `p`): one evaluation, as a function of one vector."""
    leaves, structure = be.flatten(p if over_p else u)
    moving = [i for i, x in enumerate(leaves) if be.is_array(x) and be.is_float(x)]
    if not moving:
        return None
    vectors = [leaves[i] for i in moving]
    layout = Layout(None, tuple(tuple(x.shape) for x in vectors))

    def flat(t: Any, x: Any, rest: Any) -> Any:
        full = list(leaves)
        for i, v, like in zip(moving, layout.unravel(be, x), vectors, strict=True):
            full[i] = be.xp.astype(v, like.dtype, copy=False)
        tree = be.unflatten(structure, full)
        out, _ = be.flatten(call(t, rest, tree) if over_p else call(t, tree, rest))
        return Layout(None, ()).ravel(be, out)

    try:
        return be.connected(flat, t, layout.ravel(be, vectors), copied(be, u) if over_p else p)
    except Exception:
        if call.failed:
            raise
        return None  # the backend cannot tell here


def _evaluated(call: _Call, t: Any, u: Any, p: Any) -> bool:
    try:
        call(t, u, p)
    except Exception:  # the moved point may lie outside the domain of f
        return False
    return True


def _moved(be: Any, tree: Any) -> Any:
    """Every floating-point entry about 0.1 % away, no two by the same factor; zeros become about 0.001."""
    leaves, structure = be.flatten(tree)
    out = []
    with be.quiet():
        for x in leaves:
            if be.is_array(x) and be.is_float(x):
                n = max(math.prod(x.shape), 1)
                step = be.xp.reshape(be.vector([1e-3 * (1.0 + i / n) for i in range(n)], x), tuple(x.shape))
                x = x + step * be.xp.where(x == 0, be.xp.ones_like(x), x)
            out.append(x)
    return be.unflatten(structure, out)


class _Call:
    """`f` under observation: failures are explained, outputs checked and copied, arguments compared."""

    def __init__(self, be: Any, f: Any) -> None:
        self.be, self.f = be, f
        self.outputs: list[list[Any]] = []
        self.count = 0
        self.failed = self.recorded = False

    def __call__(self, t: Any, u: Any, p: Any) -> Any:
        be, f = self.be, self.f
        self.count += 1
        self.failed = True
        first = not self.outputs
        like, p_leaves = leaves_of(be, u), leaves_of(be, p) if first else []
        u_copies, p_copies = (copies_of(be, like), copies_of(be, p_leaves)) if first else ([], [])
        try:
            out = f(t, u, p)
        except Exception as e:
            found = _explained(be, f, e)
            if found is None:
                if isinstance(e, TypeError) and isinstance(u, list | tuple):
                    e.add_note(f"u is a {type(u).__name__}, because u0 is one: for arithmetic make u0 an array")
                raise
            raise found from e
        if first:
            _check_unchanged(be, f, "u", u, like, u_copies)
            _check_unchanged(be, f, "p", p, p_leaves, p_copies)
        leaves = check_output(be, f, (t, u, p), like, out, first)
        self.recorded = any([getattr(x, "requires_grad", False) for x in leaves])
        self.outputs.append(copies_of(be, leaves))
        self.failed = False
        return out

    def differs(self) -> bool:
        """Whether the last output differs from the first by more than round-off, as far as values can be read."""
        return any(_equal(self.be, x, y, loose=True) is False
                   for x, y in zip(self.outputs[0], self.outputs[-1], strict=True))


def _check_unchanged(be: Any, f: Any, name: str, tree: Any, leaves: list[Any], copies: list[Any]) -> None:
    now = leaves_of(be, tree)
    if len(now) != len(leaves) or any(
        a is not b or (a is not c and be.is_array(a) and _equal(be, a, c) is False)
        for a, b, c in zip(now, leaves, copies, strict=True)
    ):
        raise _in_place(be, name, location(f))


def _equal(be: Any, a: Any, b: Any, loose: bool = False) -> bool | None:
    """Equal values, NaN being equal to NaN; None if the values cannot be read."""
    try:
        same = a == b
        if isinstance(same, bool) or same.all():
            return bool(same) if isinstance(same, bool) else True
        with be.quiet():
            same = same | ((a != a) & (b != b))
            if not loose or same.all():
                return bool(same.all())
            xp, zero = be.xp, be.xp.zeros_like(a)
            a, b = xp.where(same, zero, a), xp.where(same, zero, b)
            size = float(xp.max(xp.abs(a))) + float(xp.max(xp.abs(b)))
            return float(xp.max(xp.abs(a - b))) <= be.eps(a.dtype) ** 0.75 * size
    except Exception:  # tensors inside a transform have no values
        return None


# -- what may be wrong ------------------------------------------------------------------------------------------------


def _check_order(f: Any) -> None:
    """Names of the parameters that put time elsewhere than first."""
    names = parameter_names(f)
    if names is not None and len(names) >= 3 and names[0] not in TIME and {"t", "time"} & set(names[1:3]):
        raise swapped(f, f"f takes ({', '.join(names[:3])}), at {location(f)}", "by these names time is not first")


def _in_place(be: Any, name: str, place: str) -> ImpureFunctionError:
    fix = f"u * a instead of u *= a; u.{be.copy_call}() before u[i] = x"
    if be.traced:
        fix = "u.at[i].set(x) instead of u[i] = x"
    why = "the solver goes on with it after the call, and the answer would be wrong"
    return ImpureFunctionError(f"f changes {name} in place, at {place}", why, f"make a new array: {fix}")


def _hidden(be: Any, f: Any, name: str) -> BrokenGradientError:
    return BrokenGradientError(
        f"the output of f changes with {name}, but {be.name} sees no dependence on {name}, at {location(f)}",
        f"f leaves the AD (.detach(), .item(), .data, no_grad, NumPy), so gradients would silently lack df/d{name}",
        f"compute with {be.name} operations from {name} to the result; {BLACK_BOX}; "
        "if f only jumps there, probe='off'")


# -- exceptions raised by f -------------------------------------------------------------------------------------------

# By name, so that no framework is imported; the first that fits wins.
_TRACED = (
    ("TracerBoolConversionError", "decides on a value with Python control flow (if, while, and, or, min, max)",
     "jnp.where(condition, a, b), jax.lax.cond or jax.lax.while_loop"),
    ("NonConcreteBooleanIndexError", "selects entries by a condition", "jnp.where(condition, a, b)"),
    ("TracerArrayConversionError", "hands a traced array to NumPy", "the jax.numpy function of the same name"),
    ("TracerIntegerConversionError", "uses a traced number as an index or a count",
     "jnp.take, or pass the number as a Python int in p"),
    ("ConcretizationTypeError", "asks for the value of a traced array (float, int, .item(), math)",
     "keep it an array; jax.numpy functions take scalars too"),
)


def _explained(be: Any, f: Any, e: Exception) -> SensitivityError | None:
    """What an exception that came out of `f` says about `f`; None if it is the user's own affair."""
    text = str(e)
    kinds = {c.__name__ for c in type(e).__mro__ if c.__module__.startswith("jax")}
    for kind, what, fix in _TRACED:
        if kind in kinds:
            return TracingError(f"f {what}, at {location_of_error(e, f)}",
                                "values are unknown while f is traced and compiled", fix)
    if text.startswith("vmap:"):
        return TracingError(f"f asks for a value inside vmap, at {location_of_error(e, f)}",
                            "there it stands for many values",
                            "torch.where(condition, a, b), and tensors instead of Python numbers")
    if "Can't call numpy() on Tensor that requires grad" in text:
        return BrokenGradientError(f"f hands a tensor that is differentiated to NumPy, at {location_of_error(e, f)}",
                                   "NumPy records nothing, so gradients would silently lack this part of f",
                                   f"the torch function of the same name; {BLACK_BOX}")
    if "leaf Variable that requires grad" in text or "JAX arrays are immutable" in text:
        return _in_place(be, "an array", location_of_error(e, f))
    if isinstance(e, TypeError) and "argument" in text and not accepts(f, e):
        return _wrong_signature(f)
    return None


def _wrong_signature(f: Any) -> SignatureError:
    names = parameter_names(f) or []
    name = getattr(unwrapped(f), "__name__", "f")
    hint = adapter("from_sciml") if len(names) == 4 else ""
    if len(names) == 2:
        hint = adapter("from_scipy" if names[0] in TIME else "from_odeint")
    try:
        given = str(inspect.signature(signed(f)))
    except (TypeError, ValueError):
        given = ""
    return SignatureError(f"f{given} cannot be called as f(t, u, p), at {location(f)}",
                          "a vector field takes time, state and parameters; p is None where the problem has none",
                          ("lambda t, u, p: ..." if name == "<lambda>" else f"def {name}(t, u, p): ...") + hint)
