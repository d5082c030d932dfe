"""Is the automatic choice right, and is it fast? On every problem of `acceptance_problems.py`, in one framework.

    python tests/benchmarks/acceptance.py numpy|jax|torch [--problem NAME ...] [--json FILE] [--rounds N]
    python tests/benchmarks/acceptance.py --references

For each problem: the gradient of the automatic choice (of the method too, where the problem names none) against the
known one, then the time of every algorithm that gives the right gradient with the same method. `ratio` is the time of
the automatic choice over that of the fastest right one. The last lines count: right on all, and within 1.5 of the
fastest on how many.

Times are medians of process time (of all threads, so keep to one: OMP_NUM_THREADS=1), taken in turn; on JAX those of
a compiled `jax.grad` where the loss is a function of the solution and u0 and p are asked for, else of `sa.gradient`.
What takes more than five times the automatic choice is measured
once, what takes longer than twenty times that and ten seconds is given up. `--references` remakes the gradients of
`fixtures/acceptance.json`.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
from acceptance_problems import CASES, KEPT, STORED, error, gradient, numbers, reduced  # noqa: E402
from conftest import Lab  # noqa: E402

import sensitivity as sa  # noqa: E402
from sensitivity import recommend  # noqa: E402
from sensitivity.advise import candidates  # noqa: E402
from sensitivity.costs import Cost  # noqa: E402

TOLERANCE = 1e-4
WITHIN = 1.5
SLOW = 5.0
PATIENCE = 10.0


def compiled(lab, task, sensealg, alg):
    """A call that makes the gradient; on JAX compiled as a whole where that is what a user would do."""
    import jax

    names = ("u0", "p") if task.wrt is None else (task.wrt,) if isinstance(task.wrt, str) else task.wrt
    if lab.name != "jax" or isinstance(task.loss, Cost) or set(names) - {"u0", "p"}:
        return None
    if not hasattr(task.prob, "tspan"):
        return None

    def loss(given):
        return task.loss(sa.solve(task.prob.remake(**given), alg, sensealg=sensealg, **task.options))

    made = jax.jit(jax.grad(loss))
    given = {name: getattr(task.prob, name) for name in names}
    return lambda: jax.block_until_ready(made(given))


class Parts:
    """A gradient of `compiled`, as `numbers` reads one."""

    def __init__(self, given):
        self.u0, self.p, self.t0, self.t1 = (given.get(name) for name in ("u0", "p", "t0", "t1"))


def call(lab, task, sensealg, alg):
    """`run() -> numbers`, and the result of a first call."""
    whole = compiled(lab, task, sensealg, alg) if lab.name == "jax" else None
    if whole is not None:
        return whole, lambda: numbers(lab, task, Parts(whole()))
    plain = task._replace(alg=alg)
    return (lambda: gradient(lab, plain, sensealg)), (lambda: numbers(lab, plain, gradient(lab, plain, sensealg)))


def seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


@contextmanager
def at_most(limit):
    """Raise `TimeoutError` after so many seconds: backwards through a contraction a solve may take forever."""
    def stop(*_):
        raise TimeoutError(f"not ready after {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def measured(lab, name, rounds):
    """One line of the report."""
    task = CASES[name](lab)
    r = gradient(lab, task, sa.auto)
    wrong = error(name, task, numbers(lab, task, r))
    alg, chosen = r.solution.alg, r.sensealg
    found = {"problem": name, "alg": alg.name, "because": list(alg.because), "auto": chosen.name, "error": wrong,
             "right": bool(wrong <= TOLERANCE), "others": {}, "refused": {}}
    runs = {"auto": call(lab, task, sa.auto, alg)[0]}
    runs["auto"]()
    usual = seconds(runs["auto"])
    for kind in candidates():
        algorithm = kind()
        if algorithm.name == chosen.name:
            continue
        try:
            run, values = call(lab, task, algorithm, alg)
            with at_most(PATIENCE + 20.0 * usual):
                off = error(name, task, values())
        except (sa.SensitivityError, TimeoutError) as e:
            found["refused"][algorithm.name] = str(e.args[0])
            continue
        first = seconds(run)
        found["others"][algorithm.name] = {"error": off, "seconds": first}
        if off <= TOLERANCE and first < SLOW * usual:
            runs[algorithm.name] = run
    times = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(seconds(run))
    medians = {key: statistics.median(t) for key, t in times.items()}
    for key, value in medians.items():
        if key != "auto":
            found["others"][key]["seconds"] = value
    right = {k: v["seconds"] for k, v in found["others"].items() if v["error"] <= TOLERANCE}
    fastest = min(right, key=right.get, default=None)
    if fastest is None or right[fastest] >= medians["auto"]:
        fastest = "auto"
    found |= {"seconds": medians["auto"], "fastest": fastest,
              "ratio": medians["auto"] / min([medians["auto"], *right.values()])}
    return found


def references(names):
    """Gradients by tangents through tight solves (compiled, because those of stiff problems are long); differences of
    tight solves where there are very many parameters, where steps are part of the problem, or constraints."""
    stored = json.loads(STORED.read_text()) if STORED.is_file() else {}
    for name in names:
        lab = Lab("numpy")
        task = CASES[name](lab)
        if task.want is not None:
            continue
        columns = sum(np.size(v) for part in (task.prob.u0, task.prob.p) for v in lab.be.flatten(part)[0])
        stiff = recommend.method_of(task.prob, task.alg, {}) if isinstance(task.prob, sa.ODEProblem) else sa.Tsit5()
        if isinstance(task.prob, sa.ODEProblem) and task.prob.mass_matrix is None and columns <= 200:
            lab = Lab("jax")
            task = CASES[name](lab)
            tight = {"rtol": 1e-10, "atol": 1e-13} if stiff.implicit else {"rtol": 1e-12, "atol": 1e-13}
            made = gradient(lab, task, sa.ForwardSensitivity(), alg=stiff, max_steps=100_000, **tight)
            values = reduced(numbers(lab, task, made))
        else:
            tight = {"rtol": 1e-12, "atol": 1e-14} if "dt" not in task.options and hasattr(task.prob, "tspan") else {}
            values = differences(lab, task._replace(alg=task.alg, options=task.options | tight))
        stored[name] = [float(v) for v in values]
        print(f"{name}: {len(values)} of {columns}", flush=True)
        STORED.write_text(json.dumps(stored, indent=1) + "\n")


def differences(lab, task):
    """Central differences of the kept entries, of fourth order."""
    names = ("u0", "p") if task.wrt is None else (task.wrt,)
    start = np.concatenate([np.ravel(getattr(task.prob, name)) for name in names])
    cuts = np.cumsum([np.size(getattr(task.prob, name)) for name in names])[:-1]

    def value(x):
        parts = dict(zip(names, np.split(x, cuts), strict=True))
        return float(task.loss(sa.solve(task.prob.remake(**parts), task.alg, **task.options)))

    found = []
    for i in range(0, start.shape[0], -(-start.shape[0] // KEPT)):
        h = 2e-3 * (abs(start[i]) or 1.0)
        unit = h * (np.arange(start.shape[0]) == i)
        near, far = (value(start + k * unit) - value(start - k * unit) for k in (1.0, 2.0))
        found.append((8.0 * near - far) / (12.0 * h))
    return found


def report(rows):
    lines = [f"{'problem':<24}{'method':<16}{'auto':<30}{'error':>8}{'ms':>10}{'ratio':>7}  fastest"]
    for r in rows:
        lines.append(f"{r['problem']:<24}{r['alg']:<16}{r['auto']:<30}{r['error']:>8.0e}{1e3 * r['seconds']:>10.2f}"
                     f"{r['ratio']:>7.2f}  {r['fastest']}{'' if r['right'] else '   WRONG'}")
    near = sum(r["ratio"] <= WITHIN for r in rows)
    lines.append(f"right: {sum(r['right'] for r in rows)} of {len(rows)}")
    lines.append(f"within {WITHIN} of the fastest right one: {near} of {len(rows)} ({100 * near / len(rows):.0f} %)")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", nargs="?", choices=("numpy", "jax", "torch"))
    parser.add_argument("--references", action="store_true", help="remake the gradients of the fixture")
    parser.add_argument("--problem", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--json", help="write all that was measured to this file")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore", sa.SensitivityWarning)
    if options.references:
        references(options.problem)
        return 0
    if options.backend is None:
        parser.error("which framework: numpy, jax or torch?")
    lab, rows = Lab(options.backend), []
    for name in options.problem:
        rows.append(measured(lab, name, options.rounds))
        print(report(rows[-1:]).splitlines()[1], flush=True)
    print(report(rows))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    return 0 if all(r["right"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
