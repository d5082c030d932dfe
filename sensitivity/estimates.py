"""What a gradient costs, before it is made: counts of work, from the steps of one forward solve.

With N accepted of A attempted steps of s stages, n unknowns, m columns (see `Facts.columns`) and P parameters: each
entry of `WORK` is (evaluations of f beyond the forward solve's, JVPs, VJPs, numbers kept). Counts for exact algorithms
are those of the theory; a continuous adjoint chooses its steps, and is taken to need as many as the forward solve.
Source of the counts: Hairer, Norsett, Wanner I, II.6; Griewank, Walther (2008); the papers of each algorithm.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Work(NamedTuple):
    """The forward solve: evaluations of `f`, accepted and attempted steps, stages; `stored` numbers in all steps.

    `extra` evaluations of `f` stand beside a product whose value is needed too.
    """

    nfe: int
    N: int
    A: int
    s: int
    n: int
    m: int
    P: int
    implicit: bool = False
    extra: int = 0

    @property
    def stored(self) -> int:
        return self.N * (self.s + 1) * self.n


class Estimate(NamedTuple):
    """Evaluations of `f` (those inside products apart), products, bytes kept."""

    nfe: int
    njvp: int
    nvjp: int
    memory: int


WORK: dict[str, Any] = {
    "RecursiveCheckpointAdjoint": lambda w: (0, 0, w.N * w.s, w.stored),
    "ReversibleAdjoint": lambda w: (w.A * w.s + 2 * w.extra * w.N * w.s, 0, 2 * w.N * w.s, 4 * w.n + 2 * w.N),
    "GaussAdjoint": lambda w: (0, 0, w.A * w.s + 3 * w.N, w.stored),
    "QuadratureAdjoint": lambda w: (0, 0, w.A * w.s + 7 * w.N, 2 * w.stored),
    "InterpolatingAdjoint": lambda w: (0, 0, w.A * w.s, w.stored + (w.n + w.P) * (w.s + 3)),
    "BacksolveAdjoint": lambda w: (w.A * w.s, 0, w.A * w.s, (2 * w.n + w.P) * (w.s + 3)),
    "ForwardSensitivity": lambda w: (0, w.A * w.s * w.m, 0, w.n * (w.m + 1) * (w.s + 3)),
    "ForwardADSensitivity": lambda w: (0, w.N * w.s * w.m, 0, w.stored + w.n * w.m * (w.s + 2)),
    "ForwardOverAdjoint": lambda w: (0, 0, w.N * w.s, w.stored),
    "DirectAdjoint": lambda w: (0, 0, w.A * w.s, 2 * w.A * (w.s + 1) * w.n),
    "ReversibleHeunAdjoint": lambda w: (2 * w.N, 0, 2 * w.N, 6 * w.n),
    "ImplicitAdjoint": lambda w: (0, 0, 3, w.n * w.n),
}


def estimate(algorithm: Any, work: Work, itemsize: int, limit: int | None = None) -> Estimate | None:
    """The estimate for an algorithm of this table, or None; `limit` is the most that it may keep, in bytes."""
    known = WORK.get(algorithm.name)
    if known is None:
        return None
    nfe, njvp, nvjp, kept = known(work)
    kept = (kept + (work.n * work.n if work.implicit else 0)) * itemsize
    budget = getattr(algorithm, "memory", None) or getattr(algorithm, "checkpoints", None)
    if limit is not None and budget is not None:
        nfe, kept = nfe + (work.nfe if kept > limit else 0), min(kept, limit)
    return Estimate(work.nfe + nfe, njvp, nvjp, kept)
