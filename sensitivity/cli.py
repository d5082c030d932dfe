"""The command line: `sensitivity demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .errors import SensitivityError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="sensitivity", description="Gradients through differential equations.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="fit a predator-prey model to the lynx and hare record")
    demo.add_argument("--backend", default="numpy", choices=("numpy", "jax", "torch"), help="default: numpy")
    demo.add_argument("--output", default="lynx_hare.png", help="the picture; default: lynx_hare.png")
    options = parser.parse_args(arguments)
    try:
        from .demo import run

        run(options.backend, options.output)
    except SensitivityError as e:
        print(e, file=sys.stderr)
        return 1
    return 0
