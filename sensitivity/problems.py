"""Problems: what is to be solved. Immutable; `remake` gives a changed copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from .errors import InputError, SignatureError


class Problem:
    """What all problems have in common."""

    def remake(self, **changes: Any) -> Self:
        """A copy with some fields changed: `prob.remake(p=p)`.

        Raises
        ------
        InputError
            A name is not a field of the problem.
        """
        known = [f.name for f in dataclasses.fields(cast(Any, self))]
        for name in changes:
            if name not in known:
                raise InputError(f"remake got {name!r}, which is no field of {type(self).__name__}",
                                 "only fields can change", f"the fields are {', '.join(known)}")
        return dataclasses.replace(cast(Any, self), **changes)

    def _repr_html_(self) -> str:
        from .report import problem_html

        return problem_html(self)


@dataclass(frozen=True, eq=False)
class ODEProblem(Problem):
    """Initial value problem `u' = f(t, u, p)`, `u(t0) = u0`.

    Parameters
    ----------
    f : callable
        `f(t, u, p)` returns du/dt with the structure and shapes of `u`. An `nn.Module` or `eqx.Module` will do.
    u0 : pytree of arrays
        Initial state; float32 or float64 arrays of any shape.
    tspan : (t0, t1)
        Start and end; `t1 < t0` integrates backwards.
    p : pytree, optional
        Parameters handed to `f`; leaves that are not floating point pass through undifferentiated.
    mass_matrix : array, optional
        Constant `M` in `M u' = f`, `(n, n)` for a raveled state, dense or SciPy sparse. A singular one makes rows of
        `f` constraints, which must determine the algebraic variables (index 1); `u0` is made consistent, keeping
        `M u0`. Only stiffly accurate implicit methods solve those.
    jac : callable, optional
        `jac(t, u, p)` = df/du, shape `(n, n)` for a raveled state; implicit methods use it. On NumPy and PyTorch it
        may be a SciPy sparse matrix.
    jac_sparsity : array, optional
        Pattern of df/du, dense or SciPy sparse: implicit methods then make the Jacobian from few products and factorise
        it as a band, in the given order or a better one, or as a sparse matrix. Explicit methods do not use it.
    vjp : callable, optional
        `vjp(t, u, p, lam)` -> `(lam @ f_u, lam @ f_p)`, the second with the structure of `p`.
    jvp : callable, optional
        `jvp(t, u, p, du, dp)` -> df.
    paramjac : callable, optional
        `paramjac(t, u, p)` = df/dp, shape `(n, m)` for raveled state and parameters.

    Raises
    ------
    SignatureError
        `f` is not callable.
    InputError
        `tspan` is not a pair.
    """

    f: Callable[..., Any]
    u0: Any
    tspan: tuple[Any, Any]
    p: Any = None
    _: dataclasses.KW_ONLY
    mass_matrix: Any = None
    jac: Callable[..., Any] | None = None
    jac_sparsity: Any = None
    vjp: Callable[..., Any] | None = None
    jvp: Callable[..., Any] | None = None
    paramjac: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not callable(self.f):
            raise SignatureError(f"f is {type(self.f).__name__}, which cannot be called",
                                 "the vector field is a function of time, state and parameters",
                                 "ODEProblem(f, u0, tspan, p) with def f(t, u, p): ...")
        object.__setattr__(self, "tspan", pair(self.tspan))


@dataclass(frozen=True, eq=False)
class DDEProblem(Problem):
    """Initial value problem with delays, `u'(t) = f(t, u(t), h, p)`, where `h(s)` is the state at an earlier time `s`.

    Parameters
    ----------
    f : callable
        `f(t, u, h, p)` returns du/dt with the structure and shapes of `u`. It may call `h(t - lag)` for the lags that
        are declared in `lags`; any other time is refused.
    u0 : pytree of arrays
        State at `t0`; it need not be `history(t0, p)`.
    history : callable
        `history(t, p)` is the state before `t0`, in the structure of `u0`.
    tspan : (t0, t1)
        Start and end, `t0 < t1`.
    p : pytree, optional
        Parameters handed to `f`, `history` and `lags`.
    lags : sequence of numbers, or callable
        The lags: positive numbers, or `lags(p)` that returns them, or `lags(t, u, p)` if they depend on the state.
        Derivatives with respect to a lag need one of the callables: the points where the solution has kinks move with
        the lags declared there.

    Raises
    ------
    SignatureError
        `f`, `history` or `lags` cannot be called as above.
    InputError
        `tspan` is not a pair, or `lags` is empty.
    """

    f: Callable[..., Any]
    u0: Any
    history: Callable[..., Any]
    tspan: tuple[Any, Any]
    p: Any = None
    _: dataclasses.KW_ONLY
    lags: Any

    mass_matrix: ClassVar[None] = None
    jac: ClassVar[None] = None
    jac_sparsity: ClassVar[None] = None
    vjp: ClassVar[None] = None
    jvp: ClassVar[None] = None
    paramjac: ClassVar[None] = None

    def __post_init__(self) -> None:
        for name, signature in (("f", "f(t, u, h, p)"), ("history", "history(t, p)")):
            value = getattr(self, name)
            if not callable(value):
                raise SignatureError(f"{name} is {type(value).__name__}, which cannot be called",
                                     "a delay equation has a vector field and a past",
                                     f"DDEProblem(f, u0, history, tspan, p, lags=[1.0]) with {signature}")
        object.__setattr__(self, "tspan", pair(self.tspan))


def pair(tspan: Any) -> tuple[Any, Any]:
    """Start and end of a solve."""
    try:
        t0, t1 = tspan
    except (TypeError, ValueError):
        raise InputError(f"tspan={tspan!r} is not a pair (t0, t1)", "a solve has a start and an end",
                         "tspan=(0.0, 10.0)") from None
    return t0, t1
