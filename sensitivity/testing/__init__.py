"""The conformance suite: does a backend do what the library needs?

Without pytest:

    python -m sensitivity.testing NAME

With pytest:

    from sensitivity.testing import BackendConformance

    class TestToy(BackendConformance):
        backend = "toy"

The checks use arithmetic operators, indexing and `@` on arrays, and the backend's own methods; nothing else is
imported. They need float64 (for JAX: set `JAX_ENABLE_X64=1`).
"""

from .harness import Harness
from .suite import BackendConformance, Check, checks, run

__all__ = ["BackendConformance", "Check", "Harness", "checks", "run"]
