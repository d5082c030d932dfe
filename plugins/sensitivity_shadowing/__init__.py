"""Derivatives of long-time averages of chaotic solutions, as a plugin: least squares shadowing."""

from sensitivity.plugins import hookimpl

from ._lss import AdjointLSS, ForwardLSS
from ._nilsas import NILSAS
from ._nilss import NILSS

__all__ = ["NILSAS", "NILSS", "AdjointLSS", "ForwardLSS"]


@hookimpl
def sensitivity_algorithms():
    return {kind.__name__: kind for kind in (ForwardLSS, AdjointLSS, NILSS, NILSAS)}
