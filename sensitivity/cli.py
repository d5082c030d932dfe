"""The command line: `sensitivity demo`, `sensitivity advise`, `sensitivity doctor`."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from .errors import InputError, SensitivityError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="sensitivity", description="Gradients through differential equations.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="fit a predator-prey model to the lynx and hare record")
    demo.add_argument("--backend", default="numpy", choices=("numpy", "jax", "torch"), help="default: numpy")
    demo.add_argument("--output", default="lynx_hare.png", help="the picture; default: lynx_hare.png")
    demo.set_defaults(task=_demo)
    advise = commands.add_parser("advise", help="which sensitivity algorithm for a problem, and why")
    advise.add_argument("target", metavar="FILE.py[:NAME]",
                        help="a script, and the name of its problem if it has several")
    advise.add_argument("--measure", action="store_true", help="make the gradient with every candidate")
    advise.add_argument("--memory", help='what may be kept for a gradient, for example "200MB"')
    advise.add_argument("--wrt", help="differentiate with respect to these, separated by commas; default: u0,p")
    advise.add_argument("--order", type=int, choices=(1, 2), default=1, help="2 for second derivatives")
    advise.add_argument("--rtol", type=float)
    advise.add_argument("--atol", type=float)
    advise.add_argument("--json", action="store_true", help="print JSON")
    advise.set_defaults(task=_advise)
    doctor = commands.add_parser("doctor", help="what is installed, and whether each backend makes a right gradient")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(task=_doctor)
    options = parser.parse_args(arguments)
    try:
        return options.task(options)
    except SensitivityError as e:
        print(e, file=sys.stderr)
        return 1


def _demo(options: Any) -> int:
    from .demo import run

    run(options.backend, options.output)
    return 0


def _advise(options: Any) -> int:
    from .advise import advise

    prob = _problem(options.target)
    wrt = None if options.wrt is None else tuple(options.wrt.split(","))
    more = {k: getattr(options, k) for k in ("rtol", "atol") if getattr(options, k) is not None}
    advice = advise(prob, measure=options.measure, memory=options.memory, wrt=wrt, order=options.order, **more)
    _show(advice.to_json() if options.json else advice)
    return 0


def _show(answer: Any) -> None:
    """In colour where there is a terminal, and rich."""
    if isinstance(answer, str) or not sys.stdout.isatty() or not find_spec("rich"):
        print(answer)
        return
    import rich

    rich.print(answer)


def _doctor(options: Any) -> int:
    from .doctor import examined, report

    found = examined()
    print(json.dumps(found, indent=2) if options.json else report(found))
    return 0 if all(b["ok"] for b in found["backends"] if b["version"]) and not found["failures"] else 1


def _problem(target: str) -> Any:
    """The problem that `FILE.py` or `FILE.py:NAME` names."""
    from .prepare import PROBLEMS
    from .steady import SteadyStateProblem

    path, _, name = target.partition(".py:")
    try:
        found = runpy.run_path(path + ".py" if name else path)
    except OSError as e:
        raise InputError(f"{target!r} cannot be read ({e.strerror})", "the problem is taken from a script",
                         "sensitivity advise model.py:prob") from e
    problems = {k: v for k, v in found.items() if isinstance(v, (*PROBLEMS, SteadyStateProblem))}
    if not name and len(problems) == 1:
        return next(iter(problems.values()))
    if name not in problems:
        raise InputError(f"{target!r} names no problem", f"the problems there are: {', '.join(problems) or 'none'}",
                         f"sensitivity advise {path.removesuffix('.py')}.py:{next(iter(problems), 'prob')}")
    return problems[name]
