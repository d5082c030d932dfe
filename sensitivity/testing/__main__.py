"""`python -m sensitivity.testing NAME`: run the conformance suite against a registered backend."""

import argparse
import sys

from ..registry import registry
from .suite import run


def main() -> int:
    known = sorted(registry().backends)
    parser = argparse.ArgumentParser(prog="python -m sensitivity.testing", description="Check a backend.")
    parser.add_argument("backend", choices=known, metavar="NAME", help=f"one of {', '.join(known)}")
    return 1 if run(parser.parse_args().backend) else 0


if __name__ == "__main__":
    sys.exit(main())
