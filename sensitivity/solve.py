"""`solve`: check, choose, run, report."""

from __future__ import annotations

import warnings
from typing import Any

from . import ensemble, steady
from .algorithms.base import Aux, Outputs, SensitivityAlgorithm
from .algorithms.carried import carrying
from .choose import auto, choose
from .dense import DenseOutput, LaterOutput
from .ensemble import EnsembleProblem
from .errors import InputError, NumericalDerivativeWarning, UnsupportedCombination
from .integrate import Run
from .prepare import prepare
from .probe import through_ad
from .problems import ODEProblem
from .retcode import RetCode
from .solution import Events, Solution, Stats
from .steadymethods import SteadyStateMethod
from .system import Inputs
from .vjp import FiniteDifferenceVJP


def solve(prob: Any, alg: Any = None, *, sensealg: Any = auto, on_failure: str = "raise", **options: Any) -> Solution:
    """Solve a problem; the result is differentiable in the framework of its arrays.

    Parameters
    ----------
    prob : ODEProblem, DDEProblem, SDEProblem, SteadyStateProblem or EnsembleProblem
    alg : method, optional
        `Euler() Heun() Midpoint() RK4() BS3() Dopri5() Tsit5() Dopri8()`, for stiff problems `ImplicitEuler()
        ImplicitMidpoint() Trapezoid() Kvaerno3() Kvaerno5() Rodas5P()`. If not given, one that the start of the
        solution asks for, see `sol.alg.because`; Tsit5 inside `jit` and `vmap`. For an SDEProblem
        `EulerMaruyama() Milstein() StochasticHeun() ReversibleHeun() ShARK()`; one that suits the noise if not given.
        Steady states: `Newton() PseudoTransient()`; the first, then the second, if not given.
    sensealg : sensitivity algorithm or auto
        How derivatives are made when they are asked for.
    saveat : None, array, int or "steps"
        None: the end only. An array: those times, in the order given. An int N: N equally spaced times, both ends
        included. "steps": the end of every accepted step (inside `jax.jit` padded with NaN, `sol.n_steps` rows valid).
    rtol, atol : float or pytree like `u0`
        Defaults 1e-6 and 1e-9 in float64, 1e-4 and 1e-6 in float32.
    dt : float
        The step with `FixedStep`, else the first step to try.
    events : Event, PresetTimes or a list of them
        What happens on the way; see `sol.events`. Rows of `sol.u` at times after a terminal event are NaN.
    max_events : int
        Limit on events, 1000; on JAX also the size of the record, 100.
    max_steps : int
        Limit on attempted steps, 100000; where steps are recorded on JAX also the size of the record, 2048.
    dtmin, dtmax, tstops, controller, norm
        Step control: bounds, times to step on exactly, `PIController()` or `FixedStep()`, error norm of a vector.
    dense : bool
        Keep dense output for `sol(t)`; without it the first `sol(t)` solves once more.
    backend, device, dtype
        Where to compute; by default what the arrays say. A device is the framework's own object, or a name: "cuda:0".
    progress : bool or callable `(fraction, t)`
    on_failure : "raise", "nan" or "return"
        What a failed solve does; inside `jit` and `vmap`, where nothing can be raised, outputs are NaN.
    probe : "raise", "warn" or "off"
        The first-call check of `f`.
    executor : concurrent.futures.Executor, optional
        For an `EnsembleProblem`: spread its members, `chunk` at a time, over other threads or processes.

    Returns
    -------
    Solution
        Of an ensemble: everything in it has an axis for the members in front.

    Raises
    ------
    SolveError
        The end was not reached; `retcode`, `t` and `solution` say where it stood.
    InputError, TimesError, ToleranceError, UnsupportedCombination
        An argument is wrong; nothing was computed.
    """
    if isinstance(prob, EnsembleProblem):
        return ensemble.run(solve, prob, (alg,), {**options, "sensealg": sensealg, "on_failure": on_failure})
    if on_failure not in ("raise", "nan", "return"):
        raise InputError(f"on_failure={on_failure!r} is none of the possible values",
                         "they are 'raise', 'nan', 'return'", "on_failure='raise'")
    asked(sensealg, None, None)
    run, x = prepare_options(prob, alg, options, through_ad(prob, sensealg))
    differentiated = run.be.attaches or isinstance(run.method, SteadyStateMethod)
    algorithm, run = choose(run, x, checked(sensealg), verify=differentiated)
    if not hasattr(prob, "tspan") and run.products.jac is None:
        warn_numerical(algorithm)
    out, aux = run.be.attach(carrying(algorithm, run), run, x)
    sol, _ = finished(prob, run, x, algorithm, out, aux, on_failure)
    if sol.dense is None and hasattr(prob, "tspan"):
        later = sensealg if algorithm.interpolates else auto
        sol.dense = LaterOutput(solve, prob, run.method, {**options, "sensealg": later, "on_failure": on_failure})
    return sol


KNOWN = ("saveat", "rtol", "atol", "dt", "events", "max_steps", "max_events", "dtmin", "dtmax", "dense", "backend",
         "device", "dtype", "progress", "controller", "norm", "tstops", "probe")
FOREIGN = {"t_eval": "saveat", "ts": "saveat", "method": "alg", "args": "p (in the problem)", "adjoint": "sensealg",
           "dt0": "dt", "max_step": "dtmax", "stepsize_controller": "controller", "first_step": "dt",
           "abstol": "atol", "reltol": "rtol", "callback": "events", "dense_output": "dense"}


def prepare_options(prob: Any, alg: Any, options: dict[str, Any],
                    wrt: tuple[str, ...] | None = None) -> tuple[Run, Inputs]:
    """`prepare` with unknown keywords refused by name."""
    for name in options:
        if name not in KNOWN:
            fix = f"here it is called {FOREIGN[name]}" if name in FOREIGN else f"the keywords are {', '.join(KNOWN)}"
            raise TypeError(f"solve() got an unexpected keyword {name!r}; {fix}")
    if isinstance(prob, steady.SteadyStateProblem):
        return steady.prepare(prob, alg, wrt=wrt, **options)
    if isinstance(alg, SteadyStateMethod):
        raise UnsupportedCombination(f"{alg.name} cannot solve {type(prob).__name__}", "it finds steady states",
                                     "alg=Tsit5(), or SteadyStateProblem(f, u0, p)")
    if alg is None and isinstance(prob, ODEProblem):
        from .recommend import recommended  # what is not always needed is imported late

        return recommended(prob, options, wrt)
    return prepare(prob, alg, wrt=wrt, **options)


def checked(sensealg: Any) -> Any:
    if sensealg is auto or isinstance(sensealg, SensitivityAlgorithm):
        return sensealg
    if isinstance(sensealg, type):
        name = sensealg.__name__
        raise InputError(f"sensealg={name} is a class, not an algorithm", "algorithms have options",
                         f"sensealg={name}()")
    raise InputError(f"sensealg={sensealg!r} is not a sensitivity algorithm", "algorithms are objects, not names",
                     "sensealg=sa.auto")


def asked(sensealg: Any, loss: Any, wrt: Any) -> Any:
    """`wrt` as the algorithm has it, see `SensitivityAlgorithm.asked`."""
    return wrt if sensealg is auto else checked(sensealg).asked(loss, wrt)


def build(prob: Any, run: Run, x: Inputs, algorithm: Any, out: Outputs, aux: Aux) -> Solution:
    """A `Solution` from flat results."""
    be, layout = run.be, run.field.u
    u, times = be.trimmed(out.u, aux.ts, aux.accepted) if run.saves == "steps" else (out.u, aux.ts)
    tree = be.unflatten(layout.structure, layout.unravel(be, u))
    accepted, rejected, nfe = (count(be, v) for v in (aux.accepted, aux.rejected, aux.nfe))
    njac, nlu, nsolve = (count(be, v) for v in aux.algebra)
    stats = Stats(nfe=nfe, njac=njac, nlu=nlu, nsolve=nsolve, naccept=accepted, nreject=rejected)
    code = be.concrete(aux.status)
    retcode = aux.status if code is None else RetCode(int(code))
    events = None
    if run.events:
        index, number, ended = aux.events
        number = count(be, number)
        columns: list[Any] = [out.event_t, out.event_u, be.indices(index)]
        t, seen, index = (v[:number] if isinstance(number, int) else v for v in columns)
        events = Events(t, be.unflatten(layout.structure, layout.unravel(be, seen)), index, number)
        if code is None:
            retcode = be.choose(ended & (aux.status == 0), int(RetCode.Terminated), aux.status)
        elif ended and code == RetCode.Success:
            retcode = RetCode.Terminated
    dense = DenseOutput(run, x, out, aux) if run.dense else None
    return Solution(be.time_vector(times, x.u0), tree, stats, retcode, accepted, prob, run.method, algorithm, events,
                    dense)


def count(be: Any, number: Any) -> Any:
    """A count as a Python integer where it is known."""
    value = be.concrete(number)
    return number if value is None else int(value)


def finished(prob: Any, run: Run, x: Inputs, algorithm: Any, out: Outputs, aux: Aux,
             on_failure: str) -> tuple[Solution, Outputs]:
    """The solution and its outputs; a failed solve raises, or its outputs become NaN, unless "return" is asked for."""
    code = run.be.concrete(aux.status)
    if code is not None and code != RetCode.Success and on_failure == "raise":
        from .failure import failure

        raise failure(build(prob, run, x, algorithm, out, aux), run, x, aux, RetCode(int(code)))
    if code != RetCode.Success and on_failure != "return":
        out = out._replace(u=run.be.nan_where(aux.status != int(RetCode.Success), out.u))
    return build(prob, run, x, algorithm, out, aux), out


def warn_numerical(algorithm: Any) -> None:
    """Say once per call site that `auto` fell back on differences."""
    if algorithm.because and isinstance(algorithm.vjp, FiniteDifferenceVJP):
        warnings.warn(f"derivatives of f are {algorithm.because[-1]}", NumericalDerivativeWarning, stacklevel=3)
