"""The PyTorch backend, as a plugin."""

from sensitivity.plugins import BackendInfo, hookimpl


def _load():
    from ._backend import TorchBackend

    return TorchBackend()


@hookimpl
def sensitivity_backends():
    return [BackendInfo("torch", ("torch",), _load, "torch")]
