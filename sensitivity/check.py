"""`check_gradient`: gradients held against the values of the loss, and against each other.

For inputs x and a direction d (every entry of x moved by about its own size) with `g . d` the slope that a gradient
claims, the remainder `|G(x + h d) - G(x) - h g . d|` falls like h^2 if the gradient is right and like h if it is not
(Taylor test). The slope itself is measured by central differences, extrapolated to h = 0 from two sizes
(Richardson), which shows errors too small to bend the remainders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .algorithms.base import size_of
from .algorithms.discrete import RecursiveCheckpointAdjoint
from .algorithms.forward import ForwardSensitivity
from .algorithms.interpolating import InterpolatingAdjoint
from .assembled import assemble
from .costs import Cost
from .errors import InputError, UnsupportedCombination
from .gradient import checked_names, gradient
from .probe import through_ad
from .solve import checked, prepare_options, solve
from .stochastic import SDEProblem

STEPS = tuple(0.01 / 2.0**k for k in range(5))


@dataclass(frozen=True)
class CheckedGradient:
    """One algorithm's line in a `GradientCheck`.

    Attributes
    ----------
    sensealg : the algorithm, with its VJP choice.
    slope : the directional derivative `g . d` that its gradient claims.
    error : how far that is from the measured slope, relative to it.
    order : the order of the Taylor remainder, 2 for a right gradient; None where the remainders are round-off.
    remainders : one for each of the check's `steps`.
    difference : the largest difference to the first algorithm's gradient, relative to its largest entry.
    ok : whether order and error are those of a right gradient.
    refused : why the algorithm was not tried, or None.
    """

    sensealg: Any
    slope: float = math.nan
    error: float = math.nan
    order: float | None = None
    remainders: tuple[float, ...] = ()
    difference: float = math.nan
    ok: bool = False
    refused: str | None = None

    @property
    def name(self) -> str:
        """Algorithm and VJP choice in one line."""
        vjp = getattr(self.sensealg, "vjp", None)
        return self.sensealg.name + (f"({vjp.name})" if vjp is not None else "")


@dataclass(frozen=True)
class GradientCheck:
    """What `check_gradient` found; `print` it.

    Attributes
    ----------
    value : the loss.
    slope : its directional derivative, measured.
    tolerance : the largest `error` that counts as right: what differences at the solve's tolerance can show.
    steps : the sizes h of the Taylor test.
    rows : one `CheckedGradient` per algorithm.
    """

    value: float
    slope: float
    tolerance: float
    steps: tuple[float, ...]
    rows: tuple[CheckedGradient, ...]

    @property
    def ok(self) -> bool:
        """Whether every algorithm that was tried is right, and at least one was."""
        tried = [r for r in self.rows if r.refused is None]
        return bool(tried) and all(r.ok for r in tried)

    def _cells(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = []
        for r in self.rows:
            if r.refused is not None:
                lines.append((r.name, "", "", "", "", "refused"))
                continue
            order = "round-off" if r.order is None else f"{r.order:.2f}"
            lines.append((r.name, f"{r.slope:.10g}", f"{r.error:.1e}", order, f"{r.difference:.1e}",
                          "ok" if r.ok else "WRONG"))
        return lines

    def __str__(self) -> str:
        table = [COLUMNS, *self._cells()]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        lines += [f"{r.name}: {r.refused}" for r in self.rows if r.refused is not None]
        return "\n".join([f"loss {self.value:.10g}, measured slope {self.slope:.10g} "
                          f"(errors up to {self.tolerance:.0e} count as right)", *lines])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(*COLUMNS, title=f"loss {self.value:.10g}, measured slope {self.slope:.10g}")
        for row in self._cells():
            table.add_row(*row, style="bold red" if row[-1] == "WRONG" else None)
        return table


COLUMNS = ("algorithm", "slope", "error", "Taylor order", "difference", "verdict")


def check_gradient(prob: Any, alg: Any = None, loss: Any = None, sensealgs: Sequence[Any] | None = None, *,
                   wrt: Any = None, dloss: Any = None, **options: Any) -> GradientCheck:
    """Check gradients against values of the loss along one direction, and against each other.

    Eleven solves measure, and each algorithm makes its gradient once.

    Parameters
    ----------
    prob, alg, loss, wrt, dloss
        As for `gradient`; `wrt` may hold "u0", "p", "t0", "t1", and `p` is what the problem carries, not what `f`
        closes over. A cost needs its values: `DiscreteCost(..., g=...)`.
    sensealgs : sequence of sensitivity algorithms, optional
        `RecursiveCheckpointAdjoint()`, `InterpolatingAdjoint()` and `ForwardSensitivity()` if not given; of an
        `SDEProblem` only the first and the last, which differentiate the computed solution.
    options
        The keywords of `solve`. Unless they are given, `rtol` and `atol` are tight (1e-10 and 1e-12 in float64): a loss
        that jumps by the tolerance when a step is added has differences no better than that.

    Returns
    -------
    GradientCheck
        `.ok`, `.rows`, and a table when printed (with `rich.print` in colour).

    Raises
    ------
    InputError
        The loss has no value, or `wrt` holds something that cannot be moved.
    """
    usual: list[Any] = [RecursiveCheckpointAdjoint(), ForwardSensitivity()]
    if not isinstance(prob, SDEProblem):
        usual.insert(1, InterpolatingAdjoint())
    algorithms = usual if sensealgs is None else [checked(s) for s in sensealgs]
    names = checked_names(wrt)
    if "saveat" in names:
        raise InputError("wrt holds 'saveat'", "a check moves the state, the parameters and the span",
                         "choose from u0, p, t0, t1")
    if not callable(loss) and not isinstance(loss, Cost):
        raise InputError("loss is not callable", "a gradient is that of a number",
                         "loss=lambda sol: (sol.u ** 2).sum()")
    by_ad = through_ad(prob, algorithms[0], names) if algorithms else names
    run, x = prepare_options(prob, alg, options, by_ad)
    alg = run.method
    be, k = run.be, run.field.p.count
    if wrt is None and not k:
        names = ("u0",)
    if "p" in names and not k:
        raise InputError("wrt holds 'p', but the problem has no floating-point parameters",
                         "nothing can be moved", "ODEProblem(f, u0, tspan, p), or wrt='u0'")
    double = be.eps(x.u0.dtype) < 1e-10
    for name, tight in (("rtol", 1e-10 if double else 2e-5), ("atol", 1e-12 if double else 1e-7)):
        options.setdefault(name, tight)
    arrays = _inputs(x, names, k)
    d = [_direction(be, v, 7 * i) for i, v in enumerate(arrays)]
    with be.quiet():
        values = {h: _value(prob, alg, loss, options, run, x, names, arrays, d, h)
                  for h in (0.0, *STEPS, *(-h for h in STEPS))}
    steep = [(values[h] - values[-h]) / (2.0 * h) for h in STEPS[-2:]]
    slope = (4.0 * steep[1] - steep[0]) / 3.0
    # What the values themselves are uncertain by: rounding, and with error control a step more or less.
    noise = 20.0 * be.eps(x.u0.dtype) * abs(values[0.0])
    control = run.controller.adaptive and isinstance(options["rtol"], float)
    noise += 10.0 * options["rtol"] * abs(values[0.0]) if control else 0.0
    size = max(abs(slope), noise / STEPS[0])
    tolerance = max(1e-6 if double else 1e-3, 1e3 * options["rtol"] if control else 0.0, noise / (STEPS[-1] * size))
    rows: list[CheckedGradient] = []
    first: list[Any] | None = None
    for algorithm in algorithms:
        try:
            r = gradient(prob, alg, loss, wrt=names, sensealg=algorithm, dloss=dloss, **options)
        except UnsupportedCombination as e:
            rows.append(CheckedGradient(algorithm, refused=str(e.args[0])))
            continue
        found = _gradient_arrays(be, run, r, names)
        first = found if first is None else first
        claimed = sum(_number(be, be.xp.sum(a * b)) for a, b in zip(found, d, strict=True))
        rests = tuple(abs(values[h] - values[0.0] - h * claimed) for h in STEPS)
        order, error = _order(rests, noise), abs(claimed - slope) / size
        ok = error <= tolerance and (order is None or order > 1.7)
        rows.append(CheckedGradient(r.sensealg, claimed, error, order, rests, _difference(be, found, first), ok))
    return GradientCheck(values[0.0], slope, tolerance, STEPS, tuple(rows))


def _inputs(x: Any, names: tuple[str, ...], k: int) -> list[Any]:
    out: list[Any] = []
    for name in names:
        out += list(x.theta[:k]) if name == "p" else [getattr(x, name)]
    return out


def _direction(be: Any, v: Any, start: int) -> Any:
    """Each entry moved by 0.5 to 1.5 times its own size (1 for a zero), up or down; the same at every call."""
    n = size_of(v)
    with be.quiet():
        flat = be.xp.reshape(v, (-1,))
        factors = be.vector([math.copysign(1.0 + 0.5 * math.sin(2.4 * (start + i)), math.cos(1.7 * (start + i) + 0.3))
                             for i in range(n)], flat)
        size = be.xp.abs(flat)
        return be.xp.reshape(factors * be.xp.where(size > 0.0, size, be.xp.ones_like(size)), tuple(v.shape))


def _value(prob: Any, alg: Any, loss: Any, options: dict[str, Any], run: Any, x: Any, names: tuple[str, ...],
           arrays: list[Any], d: list[Any], h: float) -> float:
    """The loss at `x + h d`."""
    be, field, k = run.be, run.field, run.field.p.count
    moved = iter([v + h * w for v, w in zip(arrays, d, strict=True)])
    changes: dict[str, Any] = {}
    tspan = [x.t0, x.t1]
    for name in names:
        if name == "u0":
            changes["u0"] = field.state(be, next(moved))
        elif name == "p":
            changes["p"] = field.p.join(be, [next(moved) for _ in range(k)], x.constants)
        else:
            tspan[name == "t1"] = next(moved)
    if {"t0", "t1"} & set(names):
        changes["tspan"] = tuple(tspan)
    prob = prob.remake(**changes)
    plain = RecursiveCheckpointAdjoint()
    if not isinstance(loss, Cost):
        return _number(be, loss(solve(prob, alg, sensealg=plain, **options)))
    run, x = prepare_options(prob, alg, options, ())
    plan = assemble(prob, loss, options, run, x, ())
    if any(cost.g is None for cost, _, _ in plan.discrete):
        raise InputError("a DiscreteCost without g has no value", "values are what gradients are checked against",
                         "DiscreteCost(at, dgdu, dgdp, g)")
    return _number(be, plan.whole(be, solve(plan.prob, alg, sensealg=plain, **plan.options)))


def _number(be: Any, value: Any) -> float:
    return float(be.concrete(value))


def _gradient_arrays(be: Any, run: Any, r: Any, names: tuple[str, ...]) -> list[Any]:
    out: list[Any] = []
    for name in names:
        leaves = be.flatten(getattr(r, name))[0]
        if name == "u0":
            out.append(run.field.u.ravel(be, leaves))
        elif name == "p":
            out += [v for v, role in zip(leaves, run.field.p.roles, strict=True) if role == "theta"]
        else:
            out += leaves
    return out


def _order(rests: tuple[float, ...], noise: float) -> float | None:
    """Slope of the line through `(log h, log rest)` for the last three above the noise; None if there are fewer."""
    points = [(math.log(h), math.log(r)) for h, r in zip(STEPS, rests, strict=True) if r > noise][-3:]
    if len(points) < 3:
        return None
    a, b = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return sum((p - a) * (q - b) for p, q in points) / sum((p - a) ** 2 for p, _ in points)


def _difference(be: Any, found: list[Any], first: list[Any]) -> float:
    """Largest difference of two gradients, relative to the largest entry."""
    def largest(arrays: list[Any]) -> float:
        return max(_number(be, be.xp.max(be.xp.abs(v))) for v in arrays if size_of(v))

    return largest([a - b for a, b in zip(found, first, strict=True)]) / (largest(first) or 1.0)
