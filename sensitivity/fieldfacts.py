"""What can be told of a vector field without trusting anybody: is it a function, does it reach its arguments, does it
branch on values, what does it close over."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from .integrate import Run
from .jacobian import sizes
from .problems import DDEProblem, ODEProblem
from .system import Inputs
from .userfunction import parameter_names, signed


class FieldFacts(NamedTuple):
    """What is known of `f`; None where it cannot be told.

    Attributes
    ----------
    pure : whether two evaluations at one point agree.
    reaches : which of "u" and "p" the result changes with.
    branches : lines of its source that decide on a value with `if`, `while` or a conditional expression.
    captured : how many arrays it closes over that can be differentiated.
    """

    pure: bool | None
    reaches: tuple[str, ...] | None
    branches: tuple[int, ...] | None
    captured: int

    def __str__(self) -> str:
        words = [] if self.pure is None else ["pure" if self.pure else "NOT PURE: two answers for one input"]
        if self.reaches is not None:
            words.append(f"depends on {' and '.join(self.reaches)}" if self.reaches else "is constant")
        if self.branches is not None:
            words.append(f"branches on values at line {', '.join(map(str, self.branches))}" if self.branches
                         else "has no branch on values")
        if self.captured:
            words.append(f"closes over {self.captured} array{'s' * (self.captured > 1)} that can be differentiated")
        return "; ".join(words) or "nothing is known"


def field_facts(run: Run, x: Inputs, f: Callable, captured: int) -> FieldFacts:
    """Look at the user's `f`, as `run` has it, at the start."""
    pure, reaches = _evaluated(run, x)
    return FieldFacts(pure, reaches, branches(f), captured)


def _evaluated(run: Run, x: Inputs) -> tuple[bool | None, tuple[str, ...] | None]:
    be = run.be
    known = be.known(run, x)
    if known is None:
        return None, None
    run, x = known
    be = run.be

    def at(u: Any, theta: tuple[Any, ...]) -> Any:
        return run.field.bind(be, theta, x.constants)(be.time(be.scalar(x.t0)), u)

    def differs(a: Any, b: Any) -> bool:
        return not bool(be.xp.all((a == b) | ((a != a) & (b != b))))

    try:
        with be.quiet():
            first, again = at(x.u0, x.theta), at(x.u0, x.theta)
            moved = {"u": lambda: at(_moved(be, x.u0), x.theta),
                     "p": lambda: at(x.u0, tuple(_moved(be, v) for v in x.theta))}
            return not differs(first, again), tuple(
                name for name in moved if (name == "u" or x.theta) and differs(first, moved[name]()))
    except Exception:  # the moved point may lie outside the domain of f
        return None, None


def _moved(be: Any, v: Any) -> Any:
    flat = be.xp.reshape(v, (-1,))
    return be.xp.reshape(flat + 1e-3 * sizes(be, flat, 1e-3), v.shape) if flat.shape[0] else v


def branches(f: Callable) -> tuple[int, ...] | None:
    """Lines of the file on which the source of `f` decides on a value that comes from its arguments; None without
    a source. What `f` calls is not read."""
    names = parameter_names(f)
    try:
        lines, first = inspect.getsourcelines(signed(f))
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    if names is None:
        return None
    from_values, found = set(names), set()
    nodes = sorted((n for n in ast.walk(tree) if hasattr(n, "lineno")), key=lambda n: n.lineno)
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if _names(node.value) & from_values:
                from_values |= {name for target in targets for name in _names(target)}
        if isinstance(node, ast.For) and _names(node.iter) & from_values:
            from_values |= _names(node.target)
        if isinstance(node, ast.If | ast.While | ast.IfExp) and _names(node.test) & from_values:
            found.add(first + node.lineno - 1)
    return tuple(sorted(found))


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def plain(prob: Any) -> Any:
    """The problem whose `f` is looked at: the drift of a stochastic one, a delayed one with its past held fixed as one
    more parameter, a steady one over the unit of time."""
    if isinstance(prob, DDEProblem):
        f, history = prob.f, prob.history(prob.tspan[0], prob.p)
        return ODEProblem(lambda t, u, p: f(t, u, lambda s: p[1], p[0]), prob.u0, prob.tspan, (prob.p, history))
    if isinstance(prob, ODEProblem):
        return prob
    return ODEProblem(prob.f, prob.u0, getattr(prob, "tspan", (0.0, 1.0)), prob.p)
