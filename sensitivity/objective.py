"""`objective`: a problem and a loss, for optimisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .arguments import choice
from .choose import auto
from .errors import InputError

if TYPE_CHECKING:
    from .packed import Objective


def objective(prob: Any, alg: Any = None, loss: Callable[[Any], Any] | None = None, *, wrt: Any = "p",
              residuals: Callable[[Any], Any] | None = None, sensealg: Any = auto, **options: Any) -> Objective:
    """Loss, gradient and residuals as functions of one NumPy vector, for `scipy.optimize`.

    Parameters
    ----------
    prob, alg, sensealg
        As for `gradient`.
    loss : callable, optional
        A real scalar function of the `Solution`, for `fun`, `jac` and `fun_and_jac`.
    wrt : "p", "u0" or both
        What is varied. Its pytree is packed into `obj.x0`, and `obj.unpack(x)` is a pytree again.
    residuals : callable, optional
        A function of the `Solution` that returns an array (or a pytree of arrays), for `residuals` and `residuals_jac`.
    options
        The keywords of `solve` and `gradient`.

    Returns
    -------
    Objective

    Raises
    ------
    InputError
        Neither `loss` nor `residuals` is given, or `wrt` names something that holds no numbers.
    """
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in names:
        choice("wrt", name, ("p", "u0"))
    if loss is None and residuals is None:
        raise InputError("neither loss nor residuals was given", "there is nothing to minimise",
                         "sa.objective(prob, alg, loss=lambda sol: (sol.u ** 2).sum())")
    from .packed import Objective  # NumPy, which importing this package does not need

    return Objective(prob, alg, loss, residuals, names, sensealg, options)
