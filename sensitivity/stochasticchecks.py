"""What an `SDEProblem` is held against before a solve: method, steps, path, and what `g` returns."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from .backend import Array
from .errors import ImpureFunctionError, InputError, OutputError, UnsupportedCombination
from .stochasticmethods import EulerMaruyama, ShARK, StochasticHeun, StochasticMethod
from .system import Field


def method_for(prob: Any, method: Any) -> StochasticMethod:
    """The method in use: the one asked for, if it suits the problem, or one that does.

    Raises
    ------
    UnsupportedCombination
        The method is none for SDEs, finds the solution of the other interpretation, or is not made for this noise.
    """
    additive = prob.noise == "additive"
    suited = ShARK() if additive else EulerMaruyama() if prob.interpretation == "ito" else StochasticHeun()
    if method is None:
        return suited
    if not isinstance(method, StochasticMethod):
        raise UnsupportedCombination(f"{method.name} is no method for an SDEProblem", "its steps see no noise",
                                     f"{suited.name}()")
    if prob.noise not in method.noises:
        raise UnsupportedCombination(f"{method.name} cannot be used with {prob.noise} noise",
                                     f"it is made for {' and '.join(method.noises)} noise", f"{suited.name}()")
    if not additive and method.interpretation != prob.interpretation:
        names = {"ito": "Ito", "stratonovich": "Stratonovich"}
        raise UnsupportedCombination(
            f"{method.name} finds the {names[method.interpretation]} solution, interpretation={prob.interpretation!r}",
            "the two differ by the drift g_u g / 2", f"{suited.name}(), or convert the drift and change interpretation")
    return method


def check_steps(method: StochasticMethod, options: dict[str, Any]) -> None:
    """Raise what `controller`, `dt`, `dtmin`, `dtmax`, `tstops` and `events` cannot be for an SDE."""
    if options["events"] is not None:
        raise UnsupportedCombination("events cannot be used with an SDEProblem",
                                     "a path crosses a condition many times near its first crossing",
                                     "remake(u0=..., tspan=...) at known times")
    controller = options["controller"]
    if controller is not None and controller.adaptive:
        if not method.adaptive:
            raise UnsupportedCombination(f"{method.name} has no error estimate to control steps with",
                                         "only StochasticHeun compares its steps with halves of them",
                                         "dt=0.01, or StochasticHeun() for a Stratonovich problem")
        return
    if options["dt"] is None:
        raise InputError("an SDEProblem takes fixed steps and dt was not given", "nothing else says how long they are",
                         "dt=0.01, or StochasticHeun() with controller=PIController()")
    for name in ("dtmin", "dtmax", "tstops"):
        if options[name] is not None:
            raise UnsupportedCombination(f"{name} cannot be used with an SDEProblem and fixed steps",
                                         "all steps but the last are equal", "dt= alone; remake(tspan=...) for a stop")


def check_path(be: Any, path: Any, m: int, dt: float | None, t0: float | None, t1: float | None) -> None:
    if path.width is not None and path.width != m:
        raise InputError(f"brownian has {path.width} columns, the problem has {m} noises",
                         "each noise has its own path", f"W of shape (len(ts), {m})")
    known = path.span(be)
    if known is not None and t0 is not None and t1 is not None:
        slack = 1e-9 * (t1 - t0)
        if t0 < known[0] - slack or t1 > known[1] + slack:
            raise InputError(f"brownian covers ({known[0]:g}, {known[1]:g}), tspan is ({t0:g}, {t1:g})",
                             "a path is not continued outside", "a path over all of tspan")
    tol = getattr(path, "tol", None)
    if tol is not None and dt is not None and tol > dt * (1.0 + 1e-9):
        raise InputError(f"tol={tol:g} of VirtualBrownianTree is larger than dt={dt:g}",
                         "increments of smaller intervals would not be independent", f"tol={dt / 4:g}")


def action(be: Any, prob: Any, base: Field, g: Any) -> tuple[str, int]:
    """How `g` meets the noise, and how many noises there are, from what `g` returned."""
    leaves, shapes = be.flatten(g)[0], base.u.shapes
    found = tuple(tuple(getattr(x, "shape", ())) for x in leaves)
    if len(found) == len(shapes) and prob.noise != "general" and found == shapes:
        return ("one", 1) if prob.noise == "scalar" else ("each", base.u.size)
    if prob.noise in ("general", "additive") and len(found) == len(shapes):
        widths = {x[-1] for x, v in zip(found, shapes, strict=True) if x[:-1] == v and len(x) == len(v) + 1}
        if len(widths) == 1 and all(len(x) == len(v) + 1 for x, v in zip(found, shapes, strict=True)):
            return "all", widths.pop()
    expected = {"general": "(*shape of u, m)", "additive": "that of u, or (*shape of u, m)"}
    wanted = expected.get(prob.noise, "that of u")
    raise OutputError(f"g returned shapes {list(found)}, u has {list(shapes)}; noise={prob.noise!r}",
                      f"the shape of g is {wanted}", "return g in that shape, or choose another noise=")


def check_diffusion(be: Any, prob: Any, method: StochasticMethod, t: Any, u: Any,
                    p: Any) -> None:
    """Looks at `g` that need values: whether it is a function, and of what.

    Raises
    ------
    ImpureFunctionError, InputError, UnsupportedCombination
    """
    if be.traced:
        return
    with be.quiet():
        first, again = _vector(be, prob.g(t, u, p)), _vector(be, prob.g(t, u, p))
        if first is None or again is None:
            return
        if be.scalar(be.xp.max(be.xp.abs(first - again))) > 0.0:
            raise ImpureFunctionError("g gives two answers for one input", "it holds random numbers or a hidden state, "
                                      "and the noise is drawn by the solver", "a function of t, u and p alone")
        leaves, structure = be.flatten(u)
        if prob.noise == "additive":
            moved = be.unflatten(structure, [x + 0.1 * (1.0 + be.xp.abs(x)) for x in leaves])
            other = _vector(be, prob.g(t, moved, p))
            if other is not None and be.scalar(be.xp.max(be.xp.abs(first - other))) > 0.0:
                raise InputError("g changes with u, and noise='additive'", "the order of the methods would be lost",
                                 "noise='diagonal', 'scalar' or 'general'")
    if method.scheme.squares and prob.noise != "additive":
        _check_squares(be, prob, t, u, p)


def _vector(be: Any, tree: Any) -> Array | None:
    """All entries of a tree of arrays, or None if it holds something else."""
    leaves = be.flatten(tree)[0]
    if not leaves or not all(be.is_array(x) for x in leaves):
        return None
    return be.xp.concat([be.xp.reshape(x, (-1,)) for x in leaves])


def _check_squares(be: Any, prob: Any, t: Any, u: Any, p: Any) -> None:
    """`check_derivative` for the term of Milstein's method."""
    through = be.differentiable()
    leaves, structure = be.flatten(u)
    shapes = [tuple(x.shape) for x in leaves]
    sizes = [math.prod(s) for s in shapes]

    def flat(v: Array) -> Any:
        parts, at = [], 0
        for shape, size in zip(shapes, sizes, strict=True):
            parts.append(through.xp.reshape(v[at:at + size], shape))
            at += size
        return _vector(through, prob.g(t, through.unflatten(structure, parts), p))

    v = be.xp.concat([be.xp.reshape(x, (-1,)) for x in leaves])
    if prob.noise != "general":
        return check_derivative(be, flat, v, "Milstein", prob.noise == "diagonal", "EulerMaruyama()")
    m = be.flatten(prob.g(t, u, p))[0][0].shape[-1]

    def column(k: int) -> Any:
        return lambda v: through.xp.reshape(flat(v), (-1, m))[:, k]

    with be.quiet():
        g = [column(k)(v) for k in range(m)]
    for k in range(m):
        check_derivative(be, column(k), v, "Milstein", False, "EulerMaruyama()")
    for j, k in combinations(range(m), 2):
        one, other = be.along(column(j), v, g[k]), be.along(column(k), v, g[j])
        with be.quiet():
            if not be.rms(one - other) <= 1e-6 * (be.rms(one) + be.rms(other)):
                raise UnsupportedCombination("Milstein with noise='general' needs noise that commutes",
                                             f"columns {j} and {k} of g do not: (g_{j})_u g_{k} is not (g_{k})_u g_{j}",
                                             "EulerMaruyama()")


def check_entries(run: Any, x: Any, name: str) -> None:
    """`check_derivative` for the correction of the drift of an Ito equation, where the numbers are known."""
    if run.kind.interpretation != "ito" or run.kind.additive or (known := run.be.known(run, x)) is None:
        return
    run, x = known
    be, field = run.be, run.field
    through = be.differentiable()
    rhs = field.bind(be, x.theta, x.constants)
    t = field.argument(be, be.scalar(x.t0))[0]

    def g(v: Array) -> Array:
        out = rhs.parts(through, t, v)[1]
        return through.xp.sum(out, axis=1) if field.acts == "all" else out

    check_derivative(be, g, x.u0, name, field.acts == "each", "RecursiveCheckpointAdjoint()")


def check_derivative(be: Any, g: Any, u: Array, needed: str, diagonal: bool, instead: str) -> None:
    """Hold the derivative of `g`, from vectors to vectors, against differences, and for diagonal noise its entries.

    Raises
    ------
    UnsupportedCombination
        AD fails on `g`, or disagrees with differences; or the noise is diagonal and the derivative is not.
    """
    weights = be.vector([1.0 + 0.37 * math.sin(7.0 * i) for i in range(u.shape[0])], u)
    ones = be.xp.ones_like(u)
    if "forward" not in be.modes:
        raise UnsupportedCombination(f"{needed} needs the derivative of g, and there is no AD",
                                     be.how_to_get_ad.strip(), instead)
    try:
        along, weighted = be.along(g, u, ones), be.along(g, u, weights)
    except Exception as e:  # any failure of AD on a user's function means the same: it cannot serve
        raise UnsupportedCombination(f"{needed} needs the derivative of g, on which {be.name} AD fails "
                                     f"({type(e).__name__})", f"g has to be written for it{be.how_to_get_ad}",
                                     instead) from e
    with be.quiet():
        step = be.eps(u.dtype) ** (1 / 3)
        numeric = (g(u + step * ones) - g(u - step * ones)) / (2.0 * step)
        size = 1e-12 + be.rms(numeric) + be.rms(along)
        if not be.rms(along - numeric) <= 1e-2 * size:
            raise UnsupportedCombination(f"{be.name} AD of g disagrees with differences",
                                         f"{needed} needs its derivative",
                                         f"write g in the AD's namespace, or {instead}")
        if diagonal and not be.rms(weighted - weights * along) <= 1e-6 * size:
            raise UnsupportedCombination(
                f"{needed} with noise='diagonal' needs entry i of g to depend on entry i of u only",
                "g mixes entries, and the missing terms are of the order of those kept", instead)
