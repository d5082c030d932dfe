"""Gradients through differential equations: one API for NumPy/SciPy, JAX and PyTorch."""

from .algorithms.base import SensitivityAlgorithm
from .algorithms.direct import DirectAdjoint
from .algorithms.discrete import RecursiveCheckpointAdjoint
from .algorithms.forward import ForwardSensitivity
from .algorithms.interpolating import InterpolatingAdjoint
from .choose import auto
from .control import FixedStep, PIController
from .errors import (
    BackendMissingError,
    BrokenGradientError,
    CapturedValueError,
    ImpureFunctionError,
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
    UnsupportedCombination,
)
from .gradient import gradient
from .integrate import RetCode
from .methods import BS3, RK4, Dopri5, Dopri8, Euler, Heun, Midpoint, RungeKutta, Tsit5
from .problems import ODEProblem
from .solution import Gradient, Solution, Stats
from .solve import solve
from .vjp import VJP, ComplexStepVJP, FiniteDifferenceVJP, ForwardVJP, ReverseVJP, UserVJP

__version__ = "0.1.0"
