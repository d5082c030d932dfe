"""Our times against the peers', measured side by side.

    python tests/benchmarks/run.py [jax|torch|numpy|import] [--problem NAME] [--json FILE]
                                   [--seconds S] [--no-compile]

Without a framework each one runs in a fresh process of its own. A row names our algorithm and the peer's; both compute
the same gradient (or solve) in turn, and `ratio` is the peer's median time over ours, so more than one is faster than
the peer. `difference` is the relative distance between the two results, the errors are their distances from a peer's
exact gradient at a tight tolerance (ours for the stiff problems of NumPy, where CVODES gets a tolerance of its own,
with which its error is about as large). `compile` is the first call in a fresh process, imports excluded, with what JAX
and PyTorch keep on disk; `memory` is what the resident memory of a fresh process grows by at its peak, in MiB instead
of milliseconds (Linux). Only ratios travel between machines, and a busy machine makes even those uncertain. PyTorch
runs on one thread on both sides.

`--seconds` is the time each variant is measured for (default 2, never fewer than three rounds).
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import groupby
from pathlib import Path

import measure
from problems import OPS, PROBLEMS, REFERENCE, ROWS, Row

PACKAGES = {
    "jax": ("sensealg", "jax", "jaxlib", "diffrax", "equinox", "jitcdde"),
    "torch": ("sensealg", "torch", "torchdiffeq", "torchode", "torchsde"),
    "numpy": ("sensealg", "numpy", "scipy", "casadi"),
    "import": ("sensealg", "numpy", "scipy", "jax", "diffrax", "torch", "torchdiffeq"),
}
WRONG = 1e-3
FRESH = {"compile": "--first-call", "memory": "--peak"}
COLUMNS = {
    "problem": "<",
    "quantity": "<",
    "ours": "<",
    "peer": "<",
    "ours ms": ">",
    "peer ms": ">",
    "ratio": ">",
    "target": ">",
    "difference": ">",
    "our error": ">",
    "peer error": ">",
    "note": "<",
}


def builder(framework: str, problem: str, name: str, reference: bool = False):
    """The call to time, or the one that gives the reference. Peers' names carry their package,
    `diffrax.BacksolveAdjoint`; ours do not."""
    side = importlib.import_module("peers" if "." in name else "ours")
    given = PROBLEMS[problem](OPS.get(name.partition(".")[0], OPS[framework])())
    return side.build(framework, name, given._replace(tol=given.tight, peer_tol=None) if reference else given)


def first_call(framework: str, problem: str, name: str) -> float:
    call = builder(framework, problem, name)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak(framework: str, problem: str, name: str) -> float:
    """By how many kilo-MiB resident memory grows at its peak, after a call with few steps."""
    side = importlib.import_module("peers" if "." in name else "ours")
    given = PROBLEMS[problem](OPS[framework]())
    start, _ = given.tspan
    side.build(framework, name, given._replace(tspan=(start, start + 10 * given.dt)))()
    call, before = side.build(framework, name, given), measure.resident("VmRSS")
    call()
    return (measure.resident("VmHWM") - before) / 1e3


def clock_for(framework: str, quantity: str, problem: str, name: str):
    """A clock, warmed up, and the result of the call where there is one."""
    if quantity == "import":
        clock, result = partial(measure.import_seconds, name), None
    elif quantity in FRESH:
        clock = partial(measure.in_fresh_process, __file__, framework, "--problem", problem, FRESH[quantity], name)
        result = None
    else:
        call = builder(framework, problem, name)
        clock, result = measure.burst(call), measure.flat(call())
    clock()
    return clock, result


def measure_rows(framework: str, rows: list[Row], seconds: float) -> list[dict]:
    """Rows of one problem and one quantity: all their variants take turns."""
    problem, quantity = rows[0].problem, rows[0].quantity
    clocks, results, failures = {}, {}, {}
    for name in dict.fromkeys(name for row in rows for name in (row.peer, row.ours)):
        try:
            clocks[name], results[name] = clock_for(framework, quantity, problem, name)
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            failures[name] = f"{name}: {type(error).__name__}: {first_line}"
    times = measure.interleave(clocks, seconds)
    keys = ((problem, quantity), problem, (framework, quantity))
    reference = next((REFERENCE[key] for key in keys if key in REFERENCE), None)
    exact = measure.flat(builder(framework, problem, reference, True)()) if reference in clocks else None
    return [report(row, times, results, failures, exact) for row in rows]


def report(row: Row, times: dict, results: dict, failures: dict, exact) -> dict:
    entry = row._asdict() | dict.fromkeys(("ratio", "difference", "our_error", "peer_error"))
    for side, name in (("ours", row.ours), ("peer", row.peer)):
        entry[f"{side}_seconds"] = times[name]._asdict() if name in times else None
    notes = [failures[name] for name in (row.ours, row.peer) if name in failures]
    if not notes:
        entry["ratio"] = times[row.peer].median / times[row.ours].median
        notes += ["below target"] if row.target and entry["ratio"] < row.target else []
        if results[row.ours] is not None:
            entry["difference"] = measure.difference(results[row.ours], results[row.peer])
        if exact is not None:
            entry["our_error"] = measure.difference(results[row.ours], exact)
            entry["peer_error"] = measure.difference(results[row.peer], exact)
            notes += [] if entry["our_error"] < WRONG else ["WRONG"]
    return entry | {"note": "; ".join(notes)}


def cells(entry: dict) -> list[str]:
    def show(value, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    medians = [(entry[f"{side}_seconds"] or {}).get("median") for side in ("ours", "peer")]
    return [
        *(entry[key] for key in ("problem", "quantity", "ours", "peer")),
        *(show(median, ".3g" if median and median < 1 else ".0f", 1e3) for median in medians),
        show(entry["ratio"], ".2f"),
        show(entry["target"], "g"),
        *(show(entry[key], ".0e") for key in ("difference", "our_error", "peer_error")),
        entry["note"],
    ]


def table(entries: list[dict]) -> str:
    lines = [list(COLUMNS), *(cells(entry) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = (zip(line, COLUMNS.values(), widths, strict=True) for line in lines)
    return "\n".join("  ".join(f"{cell:{side}{width}}" for cell, side, width in row).rstrip() for row in rows)


def run(framework: str, problem: str | None, seconds: float, with_compile: bool) -> dict:
    rows = [row for row in ROWS[framework] if problem in (None, row.problem)]
    rows = [row for row in rows if with_compile or row.quantity != "compile"]
    heading = {"framework": framework, "versions": measure.versions(PACKAGES[framework]), "machine": measure.machine()}
    entries = []
    for _, group in groupby(rows, key=lambda row: (row.problem, row.quantity)):
        entries += measure_rows(framework, list(group), seconds)
    if entries:
        print(f"\n{framework}: {heading['versions']}\n{heading['machine']}\n\n{table(entries)}", flush=True)
    return heading | {"rows": entries}


def run_each(arguments: list[str]) -> list[dict]:
    """Every framework in a process of its own."""
    reports = []
    for framework in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "report.json"
            subprocess.run([sys.executable, __file__, framework, *arguments, "--json", str(file)], check=True)
            reports += json.loads(file.read_text())
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", nargs="?", choices=list(ROWS))
    parser.add_argument("--problem", choices=sorted({row.problem for rows in ROWS.values() for row in rows}))
    parser.add_argument("--json", type=Path, help="also write the report here, with minima and sample counts")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--no-compile", action="store_true", help="leave out first calls in fresh processes")
    parser.add_argument("--first-call", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--peak", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_call:
        print(first_call(options.framework, options.problem, options.first_call))
        return
    if options.peak:
        print(peak(options.framework, options.problem, options.peak))
        return
    if options.framework:
        reports = [run(options.framework, options.problem, options.seconds, not options.no_compile)]
    else:
        chosen = ["--problem", options.problem] if options.problem else []
        chosen += ["--no-compile"] if options.no_compile else []
        reports = run_each([*chosen, "--seconds", str(options.seconds)])
    if options.json:
        options.json.write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
