"""Pictures with matplotlib; imported only when one is asked for."""

from __future__ import annotations

from typing import Any

from .errors import BackendMissingError, UnsupportedCombination


def _axes(ax: Any) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise BackendMissingError(f"plots need matplotlib, which is not installed ({e})", "",
                                  'pip install "sensealg[plot]"') from e
    return ax if ax is not None else plt.subplots()[1]


def _numpy(x: Any) -> Any:
    import numpy as np

    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


def plot_solution(sol: Any, ax: Any = None) -> Any:
    """Every component of `sol.u` over `sol.t`; returns the axes."""
    from . import tree

    ax = _axes(ax)
    t = _numpy(sol.t)
    leaves, _ = tree.flatten(sol.u)
    for name, leaf in zip(tree.names(sol.u), leaves, strict=True):
        values = _numpy(leaf).reshape(len(t), -1)
        for j in range(values.shape[1]):
            label = f"{name or 'u'}[{j}]" if values.shape[1] > 1 else name or "u"
            ax.plot(t, values[:, j], label=label)
    ax.set_xlabel("t")
    ax.legend()
    return ax


def plot_advice(advice: Any, ax: Any = None) -> Any:
    """Memory against time, or against estimated work, on logarithmic axes: a ring around the choice, the Pareto front
    dashed, errors as colours where they were measured."""
    was = advice.reference is not None
    rows = [r for r in advice.table if r.verdict != "ruled out" and r.estimate is not None and r.rule != "second-order"]
    if not rows:
        raise UnsupportedCombination("there is nothing to draw", "work and memory are estimated for gradients only",
                                     "print(advice)")
    ax = _axes(ax)
    at = {r.name: (1e3 * r.seconds if was else r.estimate.evaluations(advice.facts),
                   r.estimate.memory if r.peak is None else r.peak) for r in rows}
    right = [r for r in rows if r.verdict != "wrong"]
    places = [at[r.name] for r in right]
    if was and right:
        from matplotlib.colors import LogNorm

        errors = [max(r.error, 1e-16) for r in right]
        dots = ax.scatter(*zip(*places, strict=True), c=errors, cmap="viridis_r", s=60, edgecolors="black", zorder=3,
                          norm=LogNorm(min(errors) / 2.0, max(errors) * 2.0))
        ax.figure.colorbar(dots, ax=ax, label="error relative to the largest entry")
    elif right:
        ax.scatter(*zip(*places, strict=True), s=60, edgecolors="black", zorder=3)
    for i, r in enumerate(sorted(rows, key=lambda r: at[r.name])):
        if r.verdict == "wrong":
            ax.plot(*at[r.name], "x", color="tab:red", markersize=10)
        if r.verdict == "chosen":
            ax.plot(*at[r.name], "o", color="tab:orange", markersize=16, fillstyle="none", markeredgewidth=2.5)
        ax.annotate(r.name.removesuffix("()"), at[r.name], xytext=(8, -14 if i % 2 else 6), textcoords="offset points",
                    fontsize="small", color="tab:red" if r.verdict == "wrong" else "black")
    front = [p for p in sorted(places) if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in places)]
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.margins(0.15)
    if front:
        edge = (front[-1], (ax.get_xlim()[1], front[-1][1]))
        ax.step(*zip(*front, edge[1], strict=True), where="post", color="gray", linestyle="--", zorder=1)
    ax.grid(alpha=0.3, which="both")
    size = f"{advice.facts.n:,} states, {advice.facts.params:,} parameters"
    ax.set_title(f"{size}: ring, the choice; dashed, Pareto front", fontsize="medium")
    ax.set_xlabel("time of one gradient, measured (ms)" if was else "work of one gradient, estimated (evaluations)")
    seen = any(r.peak is not None for r in advice.table)
    ax.set_ylabel("memory at its peak, measured (bytes)" if seen else "memory kept, estimated (bytes)")
    return ax


def save_fit(path: str, years: Any, data: Any, times: Any, fit: Any, labels: tuple[str, ...]) -> None:
    """Data as points, a fitted curve as lines, written to `path`."""
    ax = _axes(None)
    for j, label in enumerate(labels):
        (line,) = ax.plot(times, fit[:, j], label=f"{label}, fitted")
        ax.plot(years, data[:, j], "o", color=line.get_color(), label=f"{label}, recorded")
    ax.set_xlabel("year")
    ax.set_ylabel("pelts (thousands)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    ax.figure.savefig(path, dpi=150, bbox_inches="tight")
    import matplotlib.pyplot as plt

    plt.close(ax.figure)
