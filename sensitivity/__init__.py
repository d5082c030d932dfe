"""Gradients through differential equations: one API for NumPy/SciPy, JAX and PyTorch."""

import importlib
import typing

from .algorithms.backsolve import BacksolveAdjoint
from .algorithms.base import SensitivityAlgorithm
from .algorithms.direct import DirectAdjoint
from .algorithms.discrete import RecursiveCheckpointAdjoint
from .algorithms.forward import ForwardSensitivity
from .algorithms.forward_ad import ForwardADSensitivity
from .algorithms.gauss import GaussAdjoint
from .algorithms.implicit import ImplicitAdjoint
from .algorithms.interpolating import InterpolatingAdjoint
from .algorithms.quadrature import QuadratureAdjoint
from .algorithms.reversible import ReversibleAdjoint
from .algorithms.reversibleheun import ReversibleHeunAdjoint
from .algorithms.second_order import ForwardOverAdjoint
from .blackbox import BlackBox, ScipySolver
from .choose import auto
from .citation import citation
from .control import FixedStep, PIController
from .costs import ContinuousCost, DiscreteCost
from .ensemble import EnsembleProblem
from .errors import (
    BackendMissingError,
    BrokenGradientError,
    CapturedValueError,
    ImpureFunctionError,
    IndexTooHigh,
    InputError,
    MixedFrameworksError,
    NumericalDerivativeWarning,
    OutputError,
    ProbeWarning,
    ReconstructionWarning,
    SensitivityError,
    SensitivityWarning,
    SignatureError,
    SolveError,
    TimesError,
    ToleranceError,
    TracingError,
    UnstableSensealgError,
    UnstableSensealgWarning,
    UnsupportedCombination,
)
from .events import Event, PresetTimes
from .gradient import adjoint_sensitivities, gradient
from .linearsolver import Krylov
from .methods import (
    BS3,
    EES25,
    EES27,
    RK4,
    Dopri5,
    Dopri8,
    Euler,
    Heun,
    ImplicitEuler,
    ImplicitMidpoint,
    Kvaerno3,
    Kvaerno5,
    Method,
    Midpoint,
    Rodas5P,
    RungeKutta,
    Trapezoid,
    Tsit5,
)
from .noise import TabulatedPath, VirtualBrownianTree
from .objective import objective
from .problems import DDEProblem, ODEProblem
from .retcode import RetCode
from .solution import Gradient, Solution, Stats
from .solve import solve
from .steady import SteadyStateProblem
from .steadymethods import Newton, PseudoTransient
from .stochastic import SDEProblem
from .stochasticmethods import EulerMaruyama, Milstein, ReversibleHeun, ShARK, StochasticHeun, StochasticMethod
from .uservjp import UserVJP
from .vjp import VJP, ComplexStepVJP, FiniteDifferenceVJP, ForwardVJP, ReverseVJP

if typing.TYPE_CHECKING:
    from .adapters import from_odeint, from_sciml, from_scipy, from_torchdiffeq
    from .advice import Advice, Candidate
    from .advise import advise
    from .check import CheckedGradient, GradientCheck, check_gradient
    from .hessians import hessian, hessian_vector_product
    from .rules import Rule
    from .sensitivities import forward_sensitivities

__version__ = "0.1.0"

# Tools around a solve wait for their first use.
_LATER = {
    "Advice": "advice",
    "Candidate": "advice",
    "advise": "advise",
    "from_odeint": "adapters",
    "from_sciml": "adapters",
    "from_scipy": "adapters",
    "from_torchdiffeq": "adapters",
    "CheckedGradient": "check",
    "GradientCheck": "check",
    "check_gradient": "check",
    "hessian": "hessians",
    "hessian_vector_product": "hessians",
    "Rule": "rules",
    "forward_sensitivities": "sensitivities",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _LATER:
        from .registry import provided

        found = provided(name)
        if found is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return found
    value = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value


__all__ = [
    "BS3",
    "EES25",
    "EES27",
    "RK4",
    "VJP",
    "Advice",
    "BackendMissingError",
    "BacksolveAdjoint",
    "BlackBox",
    "BrokenGradientError",
    "Candidate",
    "CapturedValueError",
    "CheckedGradient",
    "ComplexStepVJP",
    "ContinuousCost",
    "DDEProblem",
    "DirectAdjoint",
    "DiscreteCost",
    "Dopri5",
    "Dopri8",
    "EnsembleProblem",
    "Euler",
    "EulerMaruyama",
    "Event",
    "FiniteDifferenceVJP",
    "FixedStep",
    "ForwardADSensitivity",
    "ForwardOverAdjoint",
    "ForwardSensitivity",
    "ForwardVJP",
    "GaussAdjoint",
    "Gradient",
    "GradientCheck",
    "Heun",
    "ImplicitAdjoint",
    "ImplicitEuler",
    "ImplicitMidpoint",
    "ImpureFunctionError",
    "IndexTooHigh",
    "InputError",
    "InterpolatingAdjoint",
    "Krylov",
    "Kvaerno3",
    "Kvaerno5",
    "Method",
    "Midpoint",
    "Milstein",
    "MixedFrameworksError",
    "Newton",
    "NumericalDerivativeWarning",
    "ODEProblem",
    "OutputError",
    "PIController",
    "PresetTimes",
    "ProbeWarning",
    "PseudoTransient",
    "QuadratureAdjoint",
    "ReconstructionWarning",
    "RecursiveCheckpointAdjoint",
    "RetCode",
    "ReverseVJP",
    "ReversibleAdjoint",
    "ReversibleHeun",
    "ReversibleHeunAdjoint",
    "Rodas5P",
    "Rule",
    "RungeKutta",
    "SDEProblem",
    "ScipySolver",
    "SensitivityAlgorithm",
    "SensitivityError",
    "SensitivityWarning",
    "ShARK",
    "SignatureError",
    "Solution",
    "SolveError",
    "Stats",
    "SteadyStateProblem",
    "StochasticHeun",
    "StochasticMethod",
    "TabulatedPath",
    "TimesError",
    "ToleranceError",
    "TracingError",
    "Trapezoid",
    "Tsit5",
    "UnstableSensealgError",
    "UnstableSensealgWarning",
    "UnsupportedCombination",
    "UserVJP",
    "VirtualBrownianTree",
    "__version__",
    "adjoint_sensitivities",
    "advise",
    "auto",
    "check_gradient",
    "citation",
    "forward_sensitivities",
    "from_odeint",
    "from_sciml",
    "from_scipy",
    "from_torchdiffeq",
    "gradient",
    "hessian",
    "hessian_vector_product",
    "objective",
    "solve",
]
