"""The demonstration: fit a predator-prey model to the Hudson Bay lynx and hare record.

    x' = a x - b x y,   y' = -c y + d x y

for hares x and lynx y in thousands of pelts, 1900-1920. The six numbers a, b, c, d, x(1900), y(1900) are found by
descending the gradient of the squared error of the logarithms; every gradient goes through `solve`.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, NamedTuple

from .gradient import gradient
from .methods import Tsit5
from .problems import ODEProblem
from .registry import registry
from .solve import solve

NAMES = ("a", "b", "c", "d", "x(1900)", "y(1900)")
START = (0.5, 0.025, 0.8, 0.025, 30.0, 4.0)


class Fit(NamedTuple):
    """What the demonstration found."""

    values: tuple[float, ...]
    loss: float
    solves: int
    sensealg: Any


def record() -> tuple[list[float], list[list[float]]]:
    """Years, and (hare, lynx) pelts in thousands (Hudson's Bay Company, after Howard)."""
    years, counts = [], []
    for line in resources.files("sensitivity").joinpath("data/lynx_hare.csv").read_text().splitlines():
        if line and not line.startswith(("#", "year")):
            year, hare, lynx = map(float, line.split(","))
            years.append(year)
            counts.append([hare, lynx])
    return years, counts


def problem(be: Any, values: Any) -> ODEProblem:
    """The model at these parameters, in one framework; where AD may fail to see `f`, with derivatives by hand."""
    xp = be.xp

    def array(v: Any) -> Any:
        return xp.asarray(v, dtype=xp.float64)

    def f(t: Any, u: Any, p: Any) -> Any:
        x, y = u[0], u[1]
        return xp.stack([p[0] * x - p[1] * x * y, -p[2] * y + p[3] * x * y])

    def jac(t: Any, u: Any, p: Any) -> Any:
        x, y = u
        return array([[p[0] - p[1] * y, -p[1] * x], [p[3] * y, -p[2] + p[3] * x]])

    def paramjac(t: Any, u: Any, p: Any) -> Any:
        x, y = u
        return array([[x, -x * y, 0.0, 0.0], [0.0, 0.0, -y, x * y]])

    hand = {"jac": jac, "paramjac": paramjac} if be.opaque else {}
    return ODEProblem(f, array(values[4:]), (0.0, 20.0), array(values[:4]), **hand)


def fit(backend: str = "numpy") -> Fit:
    """Fit the model with one backend; SciPy's BFGS makes the steps."""
    import numpy as np
    from scipy.optimize import minimize

    be = registry().backend(backend)
    be.allow_float64()
    xp = be.xp
    years, counts = record()
    times = [year - years[0] for year in years]
    target = xp.log(xp.asarray(counts, dtype=xp.float64))
    used: list[Any] = []

    def loss(sol: Any) -> Any:
        return ((xp.log(sol.u) - target) ** 2).sum()

    def dloss(sol: Any) -> Any:
        return 2.0 * (xp.log(sol.u) - target) / sol.u

    base = problem(be, np.array(START))

    def objective(z: Any) -> tuple[float, Any]:
        """Loss and gradient in the logarithms of the six numbers."""
        now = problem(be, np.exp(z))
        r = gradient(base.remake(u0=now.u0, p=now.p), Tsit5(), loss, wrt=("u0", "p"), saveat=times, rtol=1e-9,
                     atol=1e-9, dloss=dloss if be.opaque else None, on_failure="nan")
        used.append(r.sensealg)
        slope = np.concatenate([np.asarray(r.p), np.asarray(r.u0)])
        value = float(r.value)
        return (value, slope * np.exp(z)) if np.isfinite(value) else (1e6, np.zeros_like(z))

    best = minimize(objective, np.log(np.array(START)), jac=True, method="BFGS", options={"gtol": 1e-7})
    return Fit(tuple(float(v) for v in np.exp(best.x)), float(best.fun), len(used), used[-1])


def run(backend: str, output: str) -> None:
    """Fit, say what was found and how, and save a picture where matplotlib is there."""
    import numpy as np

    found = fit(backend)
    years, counts = record()
    print(f"Lynx and hare pelts of the Hudson's Bay Company, {years[0]:.0f}-{years[-1]:.0f}, {len(years)} years.")
    print("Model  x' = a x - b x y,  y' = -c y + d x y   (x hares, y lynx, thousands of pelts)\n")
    for name, value in zip(NAMES, found.values, strict=True):
        print(f"  {name:8s} {value:12.7f}")
    print(f"\n  squared error of the logarithms {found.loss:.9f}, {found.solves} gradients through solve")
    print(f"\nbackend {backend}; sensitivity algorithm {found.sensealg.name}, chosen automatically:")
    for sentence in found.sensealg.because:
        print(f"  - {sentence}")
    try:
        from .plotting import save_fit

        prob = problem(registry().backend("numpy"), np.array(found.values))
        sol = solve(prob, Tsit5(), saveat=400, rtol=1e-8, atol=1e-8)
        save_fit(output, years, np.array(counts), sol.t + years[0], sol.u, ("hares", "lynx"))
    except ImportError as e:
        print(f"\nno picture: {e}")
    else:
        print(f"\npicture of data and fit: {output}")
