"""Pictures with matplotlib; imported only when one is asked for."""

from __future__ import annotations

from typing import Any

from .errors import BackendMissingError


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
    """Memory against time, or against estimated work, on logarithmic axes; a ring around the choice."""
    ax = _axes(ax)
    was = advice.reference is not None
    for r in advice.table:
        if r.verdict == "ruled out" or r.estimate is None:
            continue
        memory = r.estimate.memory if r.peak is None else r.peak
        work = r.seconds if was else r.estimate.nfe + r.estimate.njvp + r.estimate.nvjp
        colour = {"wrong": "tab:red", "chosen": "tab:green"}.get(r.verdict, "tab:blue")
        ax.plot([work], [memory], "x" if r.verdict == "wrong" else "o", color=colour)
        if r.verdict == "chosen":
            ax.plot([work], [memory], "o", color=colour, markersize=14, fillstyle="none")
        ax.annotate(r.name, (work, memory), xytext=(6, 4), textcoords="offset points", fontsize="small")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("time of one gradient, measured (s)" if was else "evaluations of f and products, estimated")
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
