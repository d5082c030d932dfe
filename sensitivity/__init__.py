"""Gradients through differential equations: one API for NumPy/SciPy, JAX and PyTorch."""

from .algorithms.backsolve import BacksolveAdjoint
from .algorithms.base import SensitivityAlgorithm
from .algorithms.direct import DirectAdjoint
from .algorithms.discrete import RecursiveCheckpointAdjoint
from .algorithms.forward import ForwardSensitivity
from .algorithms.forward_ad import ForwardADSensitivity
from .algorithms.gauss import GaussAdjoint
from .algorithms.interpolating import InterpolatingAdjoint
from .algorithms.quadrature import QuadratureAdjoint
from .algorithms.reversibleheun import ReversibleHeunAdjoint
from .algorithms.second_order import ForwardOverAdjoint
from .blackbox import BlackBox, ScipySolver
from .check import CheckedGradient, GradientCheck, check_gradient
from .choose import auto
from .control import FixedStep, PIController
from .costs import ContinuousCost, DiscreteCost
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
from .hessians import hessian, hessian_vector_product
from .methods import (
    BS3,
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
from .problems import DDEProblem, ODEProblem
from .retcode import RetCode
from .sensitivities import forward_sensitivities
from .solution import Gradient, Solution, Stats
from .solve import solve
from .stochastic import SDEProblem
from .stochasticmethods import EulerMaruyama, Milstein, ReversibleHeun, ShARK, StochasticHeun, StochasticMethod
from .vjp import VJP, ComplexStepVJP, FiniteDifferenceVJP, ForwardVJP, ReverseVJP, UserVJP

__version__ = "0.1.0"

__all__ = [
    "BS3",
    "RK4",
    "VJP",
    "BackendMissingError",
    "BacksolveAdjoint",
    "BlackBox",
    "BrokenGradientError",
    "CapturedValueError",
    "CheckedGradient",
    "ComplexStepVJP",
    "ContinuousCost",
    "DDEProblem",
    "DirectAdjoint",
    "DiscreteCost",
    "Dopri5",
    "Dopri8",
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
    "ImplicitEuler",
    "ImplicitMidpoint",
    "ImpureFunctionError",
    "IndexTooHigh",
    "InputError",
    "InterpolatingAdjoint",
    "Kvaerno3",
    "Kvaerno5",
    "Method",
    "Midpoint",
    "Milstein",
    "MixedFrameworksError",
    "NumericalDerivativeWarning",
    "ODEProblem",
    "OutputError",
    "PIController",
    "PresetTimes",
    "ProbeWarning",
    "QuadratureAdjoint",
    "RecursiveCheckpointAdjoint",
    "RetCode",
    "ReverseVJP",
    "ReversibleHeun",
    "ReversibleHeunAdjoint",
    "Rodas5P",
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
    "auto",
    "check_gradient",
    "forward_sensitivities",
    "gradient",
    "hessian",
    "hessian_vector_product",
    "solve",
]
