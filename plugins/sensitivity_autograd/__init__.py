"""`autograd.grad` through a solve, as a plugin: arrays in autograd's boxes belong to this backend."""

from sensitivity.plugins import BackendInfo, hookimpl


def _load():
    from ._backend import AutogradBackend

    return AutogradBackend()


@hookimpl
def sensitivity_backends():
    return [BackendInfo("autograd", ("autograd",), _load, "autograd")]
