"""Is the automatic choice right, and is it fast? On every problem of `acceptance_problems.py`, in one framework.

    python tests/benchmarks/acceptance.py numpy|jax|torch [--problem NAME ...] [--json FILE] [--minutes M]
    python tests/benchmarks/acceptance.py --references

For each problem: the gradient of the automatic choice (of the method too, where the problem names none) against the
known one, then the time of every algorithm that gives the right gradient with the same method. `ratio` is the time of
the automatic choice over that of the fastest right one. The last lines count: right on all, and within 1.5 of the
fastest on how many.

Times are of processor time (of all threads, so keep to one: OMP_NUM_THREADS=1); on JAX those of a compiled `jax.grad`
where the loss is a function of the solution and u0 and p are asked for, else of `sa.gradient`. What compiles does so
beforehand. An algorithm whose first gradient costs more than 2.5 times the automatic choice is stopped there; what may
be faster is measured in turn with the automatic choice, and medians are compared. The run keeps to `--minutes` (of
processor time too, which is what a clock says on an idle machine): each problem has an equal part of what is left, and
an algorithm that is not reached within it is named. On JAX compiling takes most of the time; the algorithms that
promise most come first, and a second run with JAX_COMPILATION_CACHE_DIR set reaches more of them. Problems of one kind
do not follow each other, so that a run that is stopped is about all kinds; `--json` is written after each problem.
`--references` remakes the gradients of `fixtures/acceptance.json`.
"""

from __future__ import annotations

import argparse
import json
import math
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
from sensitivity import recommend, tree  # noqa: E402
from sensitivity.choose import choose  # noqa: E402
from sensitivity.costs import Cost  # noqa: E402
from sensitivity.registry import algorithms  # noqa: E402
from sensitivity.solve import prepare_options  # noqa: E402

TOLERANCE = 1e-4
WITHIN = 1.5
SLOW = 2.5
ONCE = 0.2  # seconds that a first gradient may take more than later ones
ROUNDS, AT_LEAST = 15, 3
MINUTES = 7.0
APART = 6  # how far apart problems of the same kind stand in the run
# What promises most comes first; tangents last where columns are many.
ORDER = ("ForwardSensitivity", "ForwardADSensitivity", "InterpolatingAdjoint", "DirectAdjoint", "GaussAdjoint",
         "ReversibleAdjoint", "ReversibleHeunAdjoint", "BacksolveAdjoint", "QuadratureAdjoint")
COLUMNS = 100
MANY = 10_000  # steps, where the 2048 that a compiled solve keeps by default are too few
KINDS = {sa.ODEProblem: "ode", sa.DDEProblem: "dde", sa.SDEProblem: "sde", sa.SteadyStateProblem: "steady"}


def compiled(lab, task, sensealg, alg):
    """`run()`, compiled as a whole where that is what a user of JAX would do, and the algorithm that it takes."""
    import jax

    names = wanted(task)
    if isinstance(task.loss, Cost) or set(names) - {"u0", "p"} or not hasattr(task.prob, "tspan"):
        return None
    taken = []

    def loss(given):
        sol = sa.solve(task.prob.remake(**given), alg, sensealg=sensealg, **task.options)
        taken.append(sol.sensealg)
        return task.loss(sol)

    given = {name: getattr(task.prob, name) for name in names}
    made = jax.jit(jax.grad(loss)).lower(given).compile()
    return (lambda: jax.block_until_ready(made(given))), taken[0]


def wanted(task):
    return ("u0", "p") if task.wrt is None else (task.wrt,) if isinstance(task.wrt, str) else task.wrt


class Parts:
    """A gradient of `compiled`, as `numbers` reads one."""

    def __init__(self, given):
        self.u0, self.p, self.t0, self.t1 = (given.get(name) for name in ("u0", "p", "t0", "t1"))


def call(lab, task, sensealg, alg):
    """`run()`, compiled; `values()` of what it returns; the algorithm, where that is known."""
    if lab.name == "jax":
        whole = compiled(lab, task, sensealg, alg)
        if whole is not None:
            return whole[0], (lambda made: numbers(lab, task, Parts(made))), whole[1]
    plain = task._replace(alg=alg)

    def run():
        return gradient(lab, plain, sensealg)

    taken = run().sensealg if lab.name == "jax" else None
    return run, (lambda made: numbers(lab, plain, made)), taken


def seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


class Stopped(BaseException):
    """Time is over. No `Exception`, so that nothing on the way takes it for an error of its own."""


@contextmanager
def at_most(limit, why, timer=signal.ITIMER_VIRTUAL, sign=signal.SIGVTALRM):
    """Raise `Stopped(why)` after so many seconds of processor time: backwards through a contraction a solve may take
    forever."""
    def stop(_, frame):
        if frame is not None and "gc_callback" in frame.f_code.co_name:
            return  # nothing that is raised there goes on; the timer comes again
        signal.setitimer(timer, 0.0)
        raise Stopped(why)

    before = signal.signal(sign, stop)
    signal.setitimer(timer, max(limit, 1e-3), 0.1)
    try:
        yield
    finally:
        signal.setitimer(timer, 0.0)
        signal.signal(sign, before)


def promising(task):
    """All algorithms for problems of this kind, those that promise most first."""
    parts = [getattr(task.prob, name) for name in set(wanted(task)) & {"u0", "p"}]
    columns = sum(math.prod(np.shape(v)) for part in parts for v in tree.flatten(part)[0])
    order = [*ORDER[2:], *ORDER[:2]] if columns > COLUMNS else list(ORDER)
    name = next(name for kind, name in KINDS.items() if isinstance(task.prob, kind))
    found = [made for made in (kind() for kind in algorithms().values()) if name in made.kinds | made.elsewhere]
    return sorted(found, key=lambda a: order.index(a.name) if a.name in order else len(order))


def tried(lab, name, task, algorithm, alg, usual, deadline):
    """The first gradient by an algorithm, and the call that makes it; refusals take no time."""
    choose(*prepare_options(task.prob, alg, task.options, ()), algorithm, verify=False)
    with at_most(deadline - time.process_time(), "out of time"):
        run, values, _ = call(lab, task, algorithm, alg)
        start = time.process_time()
        with at_most(ONCE + SLOW * usual, f"slower than {SLOW:g}x, stopped", signal.ITIMER_PROF, signal.SIGPROF):
            made = run()
        first = time.process_time() - start
        return {"error": error(name, task, values(made)), "seconds": first}, run


def measured(lab, name, limit):
    """One line of the report; algorithms that are not reached within `limit` seconds are named."""
    deadline = time.process_time() + limit
    task = CASES[name](lab)
    alg = recommend.method_of(task.prob, task.alg, task.options)
    auto, values, chosen = call(lab, task, sa.auto, alg)
    made = auto()
    if lab.name == "jax" and not np.all(np.isfinite(values(made))):  # more steps than a compiled solve keeps by itself
        task = task._replace(options=task.options | {"max_steps": MANY})
        auto, values, chosen = call(lab, task, sa.auto, alg)
        made = auto()
    chosen = made.sensealg if chosen is None else chosen
    wrong = error(name, task, values(made))
    found = {"problem": name, "alg": "-" if alg is None else alg.name, "auto": chosen.name,
             "because": [*getattr(alg, "because", ()), *chosen.because], "error": wrong,
             "right": bool(wrong <= TOLERANCE), "others": {}, "stopped": {}, "refused": {}}
    usual, contenders = seconds(auto), {}
    for algorithm in promising(task):
        if algorithm.name in (chosen.name, "ForwardOverAdjoint"):  # of which a gradient is that of its inner adjoint
            continue
        try:
            result, run = tried(lab, name, task, algorithm, alg, usual, deadline)
            if result["seconds"] < SLOW * usual:
                result["seconds"] = seconds(run)
                if result["error"] <= TOLERANCE and result["seconds"] < WITHIN * usual:
                    contenders[algorithm.name] = run
            found["others"][algorithm.name] = result
        except sa.SensitivityError as e:
            found["refused"][algorithm.name] = str(e.args[0])
        except Stopped as e:
            found["stopped"][algorithm.name] = str(e.args[0])
    times = {"auto": [usual], **{key: [found["others"][key]["seconds"]] for key in contenders}}
    for i in range(ROUNDS):
        if i >= AT_LEAST and time.process_time() > deadline:
            break
        for key, run in {"auto": auto, **contenders}.items() if contenders else ():
            times[key].append(seconds(run))
    medians = {key: statistics.median(t) for key, t in times.items()}
    for key in contenders:
        found["others"][key]["seconds"] = medians[key]
    fastest = min(medians, key=medians.get)
    return found | {"seconds": medians["auto"], "fastest": fastest, "ratio": medians["auto"] / medians[fastest]}


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


def line(r):
    """One problem, and below it what was stopped."""
    text = (f"{r['problem']:<24}{r['alg']:<16}{r['auto']:<30}{r['error']:>8.0e}{1e3 * r['seconds']:>10.2f}"
            f"{r['ratio']:>7.2f}  {r['fastest']}{'' if r['right'] else '   WRONG'}")
    for why in sorted(set(r["stopped"].values())):
        text += f"\n    {why}: {', '.join(k for k, v in r['stopped'].items() if v == why)}"
    off = [k for k, v in r["others"].items() if not v["error"] <= TOLERANCE]
    return text + (f"\n    wrong: {', '.join(off)}" if off else "")


def summary(rows, asked):
    far = [f"{r['problem']} {r['ratio']:.2f} ({r['fastest']})" for r in rows if r["ratio"] > WITHIN]
    wrong = [r["problem"] for r in rows if not r["right"]]
    missed = sum(why == "out of time" for r in rows for why in r["stopped"].values())
    timed = sum(len(r["others"]) + 1 for r in rows)
    near = len(rows) - len(far)
    return "\n".join([
        f"problems: {len(rows)} of {asked}; gradients compared: {timed}; algorithms not reached in time: {missed}",
        f"right: {len(rows) - len(wrong)} of {len(rows)}" + (f"; WRONG: {', '.join(wrong)}" if wrong else ""),
        f"within {WITHIN} of the fastest right one: {near} of {len(rows)} ({100 * near / max(1, len(rows)):.0f} %)"
        + (f"; beyond: {', '.join(far)}" if far else "")])


def run(lab, names, minutes, path):
    """All problems within so many minutes of processor time; a run that is interrupted has its summary too."""
    end, rows = time.process_time() + 60.0 * minutes, []
    print(f"{'problem':<24}{'method':<16}{'auto':<30}{'error':>8}{'ms':>10}{'ratio':>7}  fastest", flush=True)
    try:
        for i, name in enumerate(names):
            try:
                rows.append(measured(lab, name, (end - time.process_time()) / (len(names) - i)))
            except Exception as e:  # the others are to be seen all the same; what is missing counts as not right
                print(f"{name:<24}FAILED: {type(e).__name__}: {str(e).splitlines()[0]}", flush=True)
                continue
            print(line(rows[-1]), flush=True)
            if path:
                Path(path).write_text(json.dumps(rows, indent=1))
    except KeyboardInterrupt:
        print("interrupted")
    print(summary(rows, len(names)), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", nargs="?", choices=("numpy", "jax", "torch"))
    parser.add_argument("--references", action="store_true", help="remake the gradients of the fixture")
    apart = [name for start in range(APART) for name in list(CASES)[start::APART]]
    parser.add_argument("--problem", nargs="+", choices=apart, default=apart)
    parser.add_argument("--json", help="write all that was measured to this file")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of processor time, for the whole run")
    options = parser.parse_args()
    warnings.simplefilter("ignore", sa.SensitivityWarning)
    if options.references:
        references(options.problem)
        return 0
    if options.backend is None:
        parser.error("which framework: numpy, jax or torch?")
    rows = run(Lab(options.backend), options.problem, options.minutes, options.json)
    return 0 if len(rows) == len(options.problem) and all(r["right"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
