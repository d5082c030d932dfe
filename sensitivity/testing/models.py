"""Models that the field compares solvers and sensitivities with, in any array namespace.

Each function takes the namespace that `f` is to compute with (`numpy`, `autograd.numpy`, `jax.numpy` or `torch`) and
returns an `ODEProblem` in float64:

    from sensitivity.testing import models
    prob = models.pollu(jax.numpy)

The stiff ones (`robertson`, `robertson_dae`, `pollu`, `pendulum_dae`) need a stiff method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..problems import ODEProblem

Matrix = list[list[float]]


def _array(xp: Any, values: Any) -> Any:
    return xp.asarray(values, dtype=xp.float64)


def lotka_volterra(xp: Any) -> ODEProblem:
    """Prey and predators (Lotka 1925): 2 states, 4 parameters."""

    def f(t: Any, u: Any, p: Any) -> Any:
        prey, predators = u[0], u[1]
        return xp.stack([p[0] * prey - p[1] * prey * predators, p[3] * prey * predators - p[2] * predators])

    return ODEProblem(f, _array(xp, [1.0, 1.0]), (0.0, 10.0), _array(xp, [1.5, 1.0, 3.0, 1.0]))


def robertson(xp: Any) -> ODEProblem:
    """Autocatalytic reaction (Robertson 1966): 3 states, 3 parameters, very stiff."""

    def f(t: Any, u: Any, p: Any) -> Any:
        slow, fast, back = _robertson_rates(u, p)
        return xp.stack([back - slow, slow - back - fast, fast])

    return ODEProblem(f, _array(xp, [1.0, 0.0, 0.0]), (0.0, 1e5), _array(xp, [0.04, 3e7, 1e4]))


def robertson_dae(xp: Any) -> ODEProblem:
    """`robertson` with the conserved total in place of the last equation: an index-1 DAE by a singular mass matrix."""

    def f(t: Any, u: Any, p: Any) -> Any:
        slow, fast, back = _robertson_rates(u, p)
        return xp.stack([back - slow, slow - back - fast, u[0] + u[1] + u[2] - 1.0])

    mass = _array(xp, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    return ODEProblem(f, _array(xp, [1.0, 0.0, 0.0]), (0.0, 1e5), _array(xp, [0.04, 3e7, 1e4]), mass_matrix=mass)


def _robertson_rates(u: Any, p: Any) -> tuple[Any, Any, Any]:
    return p[0] * u[0], p[1] * u[1] * u[1], p[2] * u[1] * u[2]


# One reaction per line: rate constant, species that react, species that come of it.
POLLU: tuple[tuple[float, tuple[int, ...], tuple[int, ...]], ...] = (
    (0.35, (1,), (2, 3)),
    (26.6, (2, 4), (1,)),
    (1.23e4, (5, 2), (6, 1)),
    (8.6e-4, (7,), (8, 5, 5)),
    (8.2e-4, (7,), (8,)),
    (1.5e4, (7, 6), (8, 5)),
    (1.3e-4, (9,), (5, 8, 10)),
    (2.4e4, (9, 6), (11,)),
    (1.65e4, (11, 2), (10, 12, 1)),
    (9.0e3, (11, 1), (13,)),
    (2.2e-2, (13,), (11, 1)),
    (1.2e4, (10, 2), (14, 1)),
    (1.88, (14,), (7, 5)),
    (1.63e4, (1, 6), (15,)),
    (4.8e6, (3,), (4,)),
    (3.5e-4, (4,), (16,)),
    (1.75e-2, (4,), (3,)),
    (1.0e8, (16,), (6, 6)),
    (4.44e11, (16,), (3,)),
    (1.24e3, (17, 6), (18, 5)),
    (2.1, (19,), (2,)),
    (5.78, (19,), (1, 3)),
    (4.74e-2, (1, 4), (19,)),
    (1.78e3, (19, 1), (20,)),
    (3.12, (20,), (19, 1)),
)
POLLU_START = {2: 0.2, 4: 0.04, 7: 0.1, 8: 0.3, 9: 0.01, 17: 0.007}


def pollu(xp: Any) -> ODEProblem:
    """Air pollution (Verwer 1994, SIAM J. Sci. Comput. 15, 1243): 20 species, 25 reactions, stiff."""
    n = 20
    balance: Matrix = [[0.0] * len(POLLU) for _ in range(n)]
    for k, (_, before, after) in enumerate(POLLU):
        _count(balance, k, before, -1.0)
        _count(balance, k, after, 1.0)
    stoichiometry = _array(xp, balance)

    def f(t: Any, u: Any, p: Any) -> Any:
        rates = [_product(p[k], [u[i - 1] for i in before]) for k, (_, before, _) in enumerate(POLLU)]
        return stoichiometry @ xp.stack(rates)

    u0 = _array(xp, [POLLU_START.get(i + 1, 0.0) for i in range(n)])
    return ODEProblem(f, u0, (0.0, 60.0), _array(xp, [rate for rate, _, _ in POLLU]))


def _count(balance: Matrix, k: int, species: Sequence[int], sign: float) -> None:
    for i in species:
        balance[i - 1][k] += sign


def _product(rate: Any, factors: list[Any]) -> Any:
    for x in factors:
        rate = rate * x
    return rate


class Dosed(NamedTuple):
    """A problem, the times of its doses, and what a dose does: `affect(t, u, p) -> u`."""

    prob: ODEProblem
    times: tuple[float, ...]
    affect: Callable[[Any, Any, Any], Any]


def pkpd(xp: Any) -> Dosed:
    """A drug in gut, blood and two tissues, and the response to it: 5 states, 14 parameters, doses at 24 and 48 h."""
    trace = math.ldexp(1.0, -52)

    def f(t: Any, u: Any, p: Any) -> Any:
        ka, cl, vc, q1, v1, kin, kout, ic50, imax, gamma, vmax, km, q2, v2 = (p[i] for i in range(14))
        gut, blood, near, far, response = (u[i] for i in range(5))
        level = blood / vc
        to_near, to_far = q1 * level - q1 * near / v1, q2 * level - q2 * far / v2
        inhibition = imax * level**gamma / (ic50**gamma + level**gamma)
        return xp.stack([-ka * gut, ka * gut - (cl + vmax / (km + level)) * level - to_near - to_far, to_near, to_far,
                         kin * (1.0 - inhibition) - kout * response])

    def affect(t: Any, u: Any, p: Any) -> Any:
        return u + _array(xp, [100.0, 0.0, 0.0, 0.0, 0.0])

    p = [1.0, 1.0, 20.0, 2.0, 10.0, 10.0, 2.0, 2.0, 1.0, 1.0, 0.0, 2.0, 0.5, 100.0]
    prob = ODEProblem(f, _array(xp, [100.0, trace, trace, trace, 5.0]), (0.0, 50.0), _array(xp, p))
    return Dosed(prob, (24.0, 48.0), affect)


def brusselator_1d(xp: Any, n: int = 128) -> ODEProblem:
    """Two diffusing species on n cells between fixed ends (Hairer, Wanner II, IV.10): `2 n` states, 3 parameters A, B
    and the diffusion coefficient, stiff.

    State `(n, 2)`, so that `jac_sparsity` has two diagonals on either side of the main one.
    """
    from scipy.sparse import block_diag, diags_array

    scale = float(n + 1) ** 2
    x = [(i + 1) / (n + 1) for i in range(n)]

    def f(t: Any, u: Any, p: Any) -> Any:
        A, B, d = p[0], p[1], p[2]
        ends = xp.reshape(xp.stack([A, B / A]), (1, 2))
        wide = xp.concatenate([ends, u, ends])
        v, w = u[:, 0], u[:, 1]
        gain = v * v * w
        return (xp.stack([A + gain - (B + 1.0) * v, B * v - gain], 1)
                + scale * d * (wide[:-2] - 2.0 * u + wide[2:]))

    u0 = [[1.0 + math.sin(2.0 * math.pi * a), 3.0] for a in x]
    cells = block_diag([[[1.0, 1.0], [1.0, 1.0]]] * n)
    pattern = cells + diags_array([1.0, 1.0], offsets=[-2, 2], shape=(2 * n, 2 * n))
    return ODEProblem(f, _array(xp, u0), (0.0, 10.0), _array(xp, [1.0, 3.0, 0.02]), jac_sparsity=pattern)


def brusselator_2d(xp: Any, n: int = 5) -> ODEProblem:
    """Two diffusing species on an `n x n` periodic grid: `2 n^2` states, `4 n^2` parameters, stiff for large n.

    State `(2, n, n)`, parameters `(4, n, n)`: A, B and two diffusion coefficients per cell. From t = 1.1 on the first
    species is fed within 0.1 of (0.3, 0.6).
    """
    x = [i / (n - 1) for i in range(n)]
    scale = float(n - 1) ** 2
    ring = [[scale * (((i - j) % n == 1) + ((j - i) % n == 1) - 2.0 * (i == j)) for j in range(n)] for i in range(n)]
    fed = [[5.0 * ((a - 0.3) ** 2 + (b - 0.6) ** 2 <= 0.01) for b in x] for a in x]
    second, feed = _array(xp, ring), _array(xp, fed)

    def laplacian(w: Any) -> Any:
        return second @ w + w @ second

    def f(t: Any, u: Any, p: Any) -> Any:
        v, w = u[0, ...], u[1, ...]
        A, B, dv, dw = p[0, ...], p[1, ...], p[2, ...], p[3, ...]
        reaction = v * v * w
        return xp.stack([dv * laplacian(v) + B + reaction - (A + 1.0) * v + (t >= 1.1) * feed,
                         dw * laplacian(w) + A * v - reaction])

    profile = [(a * (1.0 - a)) ** 1.5 for a in x]
    u0 = [[[22.0 * b for b in profile] for _ in x], [[27.0 * a for _ in x] for a in profile]]
    p = [[[value] * n for _ in x] for value in (3.4, 1.0, 10.0, 10.0)]
    return ODEProblem(f, _array(xp, u0), (0.0, 1.0), _array(xp, p))


def pendulum_dae(xp: Any, length: float = 1.2, angle: float = 0.9, speed: float = 0.4, g: float = 9.81) -> ODEProblem:
    """Pendulum in Cartesian coordinates with the tension as fifth state, reduced to index 1 by a singular mass matrix.

    `p = [g]`; starts at `angle` from the vertical with `speed` along the circle, tension and constraint consistent.
    """

    def f(t: Any, u: Any, p: Any) -> Any:
        x, y, vx, vy, tension = (u[i] for i in range(5))
        return xp.stack([vx, vy, -tension * x, -tension * y - p[0],
                         vx * vx + vy * vy - tension * (x * x + y * y) - p[0] * y])

    s, c = math.sin(angle), math.cos(angle)
    u0 = [length * s, -length * c, speed * c, speed * s, (speed**2 + g * length * c) / length**2]
    mass = [[float(i == j and i < 4) for j in range(5)] for i in range(5)]
    return ODEProblem(f, _array(xp, u0), (0.0, 1.5), _array(xp, [g]), mass_matrix=_array(xp, mass))
