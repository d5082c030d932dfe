"""Tableaus of diagonally implicit Runge-Kutta methods whose diagonal is one number, but for an explicit first stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .tableaus import Tableau


@dataclass(frozen=True)
class Diagonal(Tableau):
    """Coefficients of a diagonally implicit method; `a` is the part below the diagonal.

    Attributes
    ----------
    gamma : the diagonal.
    error_order : p if the error estimate is O(h^p).
    """

    gamma: float = 0.0
    error_order: int = 0

    @property
    def fsal(self) -> bool:
        """Whether the first stage is explicit; the last one then is `f` at the new point, which the next step uses."""
        return self.c[0] == 0.0

    @cached_property
    def inner(self) -> tuple[tuple[float, ...], ...]:
        return tuple((*row, 0.0 if self.fsal and i == 0 else self.gamma) for i, row in enumerate(self.a))

    @cached_property
    def predictor(self) -> tuple[tuple[float, ...], ...]:
        """Weights of the earlier slopes in the first guess of each slope.

        The last stage at the same time if there is one, else the parabola through the first three.
        """
        rows = []
        for i, c in enumerate(self.c):
            nodes = self.c[:min(i, 3)]
            same = [j for j in range(i) if self.c[j] == c]
            row = [_lagrange(nodes, j, c) for j in range(len(nodes))]
            if same:
                row = [float(j == same[-1]) for j in range(i)]
            rows.append((*row, *[0.0] * (self.stages - len(row))))
        return tuple(rows)


def _lagrange(nodes: tuple[float, ...], j: int, x: float) -> float:
    out = 1.0
    for k, node in enumerate(nodes):
        if k != j:
            out *= (x - node) / (nodes[j] - node)
    return out


def _hermite(b: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """Cubic Hermite dense output of a method whose first and last stages are `f` at both ends of the step."""
    rows = [[0.0, 3.0 * w, -2.0 * w] for w in b]
    rows[0] = [x + y for x, y in zip(rows[0], (1.0, -2.0, 1.0), strict=True)]
    rows[-1] = [x + y for x, y in zip(rows[-1], (0.0, -1.0, 1.0), strict=True)]
    return tuple(map(tuple, rows))


# Implicit Euler; the step before ends with the slope that makes the trapezoidal rule the other formula of the pair.
IMPLICIT_EULER = Diagonal(a=((), (0.0,)), b=(0.0, 1.0), c=(0.0, 1.0), order=1, error=(-0.5, 0.5), error_order=2,
                          dense=((0.0,), (1.0,)), dense_order=1, gamma=1.0)

IMPLICIT_MIDPOINT = Diagonal(a=((),), b=(1.0,), c=(0.5,), order=2, dense=((1.0,),), dense_order=1, gamma=0.5)

# Trapezoidal rule, implicit Euler embedded.
TRAPEZOID = Diagonal(a=((), (0.5,)), b=(0.5, 0.5), c=(0.0, 1.0), order=2, error=(0.5, -0.5), error_order=2,
                     dense=_hermite((0.5, 0.5)), dense_order=2, gamma=0.5)


def _kvaerno3() -> Diagonal:
    g = 0.43586652150845967  # root of x^3 - 3 x^2 + 3 x / 2 - 1 / 6, for L-stability
    embedded = ((-4 * g**2 + 6 * g - 1) / (4 * g), (1 - 2 * g) / (4 * g))
    b = ((6 * g - 1) / (12 * g), -1 / ((24 * g - 12) * g), (-6 * g**2 + 6 * g - 1) / (6 * g - 3), g)
    return Diagonal(a=((), (g,), embedded, b[:3]), b=b, c=(0.0, 2 * g, 1.0, 1.0), order=3,
                    error=tuple(x - y for x, y in zip(b, (*embedded, g, 0.0), strict=True)), error_order=3,
                    dense=_hermite(b), dense_order=3, gamma=g)


# Kvaerno 2004, methods 3(2) and 5(4), stiffly accurate, the embedded formula too.
KVAERNO3 = _kvaerno3()

_A5 = (
    (),
    (0.26,),
    (0.13, 0.84033320996790809),
    (0.22371961478320505, 0.47675532319799699, -0.06470895363112615),
    (0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998),
    (0.13855640231268224, 0.0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676),
    (0.13659751177640291, 0.0, -0.05496908796538376, -0.04118626728321046, 0.62993304899016403, 0.06962479448202728),
)

# Dense output: the smallest weights of degree 4 that satisfy the order conditions up to 4 for every theta, and
# continue the solution and its derivative.
KVAERNO5 = Diagonal(
    a=_A5,
    b=(*_A5[6], 0.26),
    c=(0.0, 0.52, 1.230333209967908, 0.8957659843500759, 0.43639360985864756, 1.0, 1.0),
    order=5,
    error=tuple(x - y for x, y in zip((*_A5[6], 0.26), (*_A5[5], 0.26, 0.0), strict=True)),
    error_order=5,
    dense=(
        (1.0, -2.0720375887956806, 1.6904652246969716, -0.4818301241248887),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 0.8427243190616546, -1.9053249899848428, 1.0076315829578042),
        (0.0, -0.6665857136422189, 1.1684263581515957, -0.5430269117925864),
        (0.0, 3.2569288143993473, -3.9941254328380347, 1.367129667428851),
        (0.0, -0.6050255205696937, 1.488550219067494, -0.813899904015774),
        (0.0, -0.7560043104534062, 1.5520086209068154, -0.5360043104534081),
    ),
    dense_order=4,
    gamma=0.26,
)
