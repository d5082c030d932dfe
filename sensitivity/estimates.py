"""What a gradient costs, before it is made: counts of work, from the steps of one forward solve.

`SensitivityAlgorithm.work` says it for each algorithm, with N accepted of A attempted steps of s stages, n unknowns, m
columns (see `Facts.columns`) and P parameters. Counts for exact algorithms are those of the theory; a continuous
adjoint chooses its steps, and is taken to need as many as the forward solve, and one between any two save times, where
its costate jumps. Source of the counts: Hairer, Norsett, Wanner I, II.6; Griewank, Walther (2008); the papers of each
algorithm.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Work(NamedTuple):
    """The forward solve: evaluations of `f`, accepted and attempted steps, stages, unknowns, columns, parameters.

    `extra` evaluations of `f` stand beside a product whose value is needed too; `saves` rows of output; `room` is how
    many numbers may be kept, or None.
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
    saves: int = 1
    room: int | None = None

    @property
    def stored(self) -> int:
        """Numbers in all steps with their stages."""
        return self.N * (self.s + 1) * self.n

    @property
    def matrix(self) -> int:
        """Numbers in the matrix of an implicit step."""
        return self.n * self.n if self.implicit else 0

    @property
    def back(self) -> int:
        """Steps of an adjoint that starts again at each save time."""
        return max(self.A, self.saves)


class Effort(NamedTuple):
    """Evaluations of `f` beyond the forward solve's and outside products, JVPs, VJPs, numbers kept."""

    nfe: int
    njvp: int
    nvjp: int
    kept: int

    def within(self, w: Work) -> Effort:
        """With a budget: no more than there is room for, and the forward solve once more where that is less."""
        if w.room is None or self.kept + w.matrix <= w.room:
            return self
        return self._replace(nfe=self.nfe + w.nfe, kept=max(0, w.room - w.matrix))


class Estimate(NamedTuple):
    """Evaluations of `f` (those inside products apart), products, bytes kept."""

    nfe: int
    njvp: int
    nvjp: int
    memory: int

    def evaluations(self, known: Any) -> float:
        """All work in evaluations of `f`, to rank by: a product by AD costs at most 2.5 of them forwards and 4
        backwards (Griewank, Walther 2008, section 4.6), by differences or columns 2 for each direction."""
        backward = 4.0 if known.transposes else 2.0 * (known.n + known.params)
        return self.nfe + (2.5 if known.transposes else 2.0) * self.njvp + backward * self.nvjp


def estimate(algorithm: Any, work: Work, itemsize: int) -> Estimate | None:
    """What an algorithm says of its work, or None where it says nothing."""
    effort = algorithm.work(work)
    if effort is None:
        return None
    return Estimate(work.nfe + effort.nfe, effort.njvp, effort.nvjp, (effort.kept + work.matrix) * itemsize)
