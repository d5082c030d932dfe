"""`forward_sensitivities`: the derivative of every saved state, not of one number."""

from __future__ import annotations

from typing import Any

from .algorithms.base import columns, directions
from .algorithms.carried import carrying
from .algorithms.forward import ForwardSensitivity
from .choose import auto, choose
from .errors import InputError, UnsupportedCombination
from .gradient import checked_names
from .probe import through_ad
from .retcode import RetCode
from .solution import Solution
from .solve import asked, checked, finished, prepare_options, warn_numerical


def forward_sensitivities(prob: Any, alg: Any = None, *, wrt: Any = "p", seeds: Any = None, sensealg: Any = auto,
                          on_failure: str = "raise", **options: Any) -> tuple[Solution, Any]:
    """The solution and its derivatives `S = du/dx`.

    Parameters
    ----------
    prob, alg
        As for `solve`.
    wrt : str or tuple of str
        The inputs x: "u0", "p", "t0", "t1". A tuple puts their columns side by side, in its order.
    seeds : array `(m, r)`, optional
        Directions in the m inputs, one per column; then `S @ seeds` is computed, at the price of r columns.
    sensealg : sensitivity algorithm
        `ForwardSensitivity()` unless given. `ForwardADSensitivity()` gives the exact derivatives of the computed
        solution; adjoint algorithms that have a forward mode may be named too.
    options
        `saveat` and the other keywords of `solve`.

    Returns
    -------
    (Solution, array `(k, n, m)`)
        Axes of the array: save time, state, input. States and inputs that are no vectors are raveled, pytrees leaf
        after leaf in their order (dictionaries by key); after the leaves of `p` come the arrays that `f` closes over.

    Raises
    ------
    InputError
        `wrt` names something unknown or missing, or `seeds` has another shape.
    UnsupportedCombination
        The algorithm has no forward mode.
    SolveError
        The end was not reached.
    """
    names = checked_names(wrt)
    if "saveat" in names:
        raise InputError("wrt holds 'saveat'", "the derivative of u(t) in its own time is f(t, u, p)",
                         "choose from u0, p, t0, t1")
    asked(sensealg, None, wrt)
    algorithm = ForwardSensitivity() if sensealg is auto else checked(sensealg)
    if not algorithm.boundary or "forward" not in algorithm.modes:
        raise UnsupportedCombination(f"{algorithm.name} has no forward mode of its own", "S needs one",
                                     "sensealg=ForwardSensitivity() or ForwardADSensitivity()")
    run, x = prepare_options(prob, alg, options, through_ad(prob, algorithm, names))
    be, xp = run.be, run.be.xp
    flat_names = ["theta" if n == "p" else n for n in names]
    wanted, parts = frozenset(flat_names), columns(x, flat_names)
    if "theta" in wanted and not x.theta:
        raise InputError("wrt holds 'p', but the problem has no floating-point parameters",
                         "nothing can be differentiated", "ODEProblem(f, u0, tspan, p), or wrt='u0'")
    m = sum(size for _, size in parts)
    rows = be.unit_rows(m, m, 0, x.u0)
    if seeds is not None:
        matrix = be.asarray(seeds, dtype=x.u0.dtype, device=be.device(x.u0))
        if matrix.ndim != 2 or matrix.shape[0] != m:
            raise InputError(f"seeds has shape {tuple(matrix.shape)}, expected ({m}, r)",
                             f"each column is a direction in the {m} inputs", "seeds=direction[:, None] for one")
        rows = matrix.T
    algorithm, run = choose(run, x, algorithm)
    warn_numerical(algorithm)
    out, aux, S = be.run(carrying(algorithm, run), "along", run, (x, directions(be, x, parts, rows)), wanted)
    sol, out = finished(prob, run, x, algorithm, out, aux, on_failure)
    if on_failure != "return":
        S = be.nan_where(aux.status != int(RetCode.Success), S)
    S = xp.permute_dims(S, (1, 2, 0))
    if run.saves == "steps":
        shape = S.shape
        S = xp.reshape(be.trimmed(xp.reshape(S, (shape[0], -1)), aux.ts, aux.accepted)[0], (-1, *shape[1:]))
    return sol, S
