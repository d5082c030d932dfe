"""The NumPy and SciPy backend, as a plugin."""

from sensitivity.plugins import BackendInfo, hookimpl


def _load():
    from ._backend import NumpyBackend

    return NumpyBackend()


@hookimpl
def sensitivity_backends():
    return [BackendInfo("numpy", ("numpy",), _load, "numpy")]
