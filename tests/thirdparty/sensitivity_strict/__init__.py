"""A backend written by a stranger: array-api-strict, which has the array API, no AD and no mercy."""

from sensitivity.plugins import BackendInfo, hookimpl


def _load():
    from ._backend import StrictBackend

    return StrictBackend()


@hookimpl
def sensitivity_backends():
    return [BackendInfo("strict", ("array_api_strict",), _load, "array-api-strict")]
