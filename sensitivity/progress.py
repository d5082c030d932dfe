"""A plain progress line on standard error."""

from __future__ import annotations

import sys


def line(fraction: float, t: float) -> None:
    """Show how far a solve has come; overwrites itself."""
    end = "\n" if fraction >= 1.0 else ""
    sys.stderr.write(f"\rsolving: {100.0 * float(fraction):5.1f} %  t = {float(t):.6g} {end}")
    sys.stderr.flush()
