"""The JAX backend, as a plugin."""

from sensitivity.plugins import BackendInfo, hookimpl


def _load():
    from ._backend import JaxBackend

    return JaxBackend()


@hookimpl
def sensitivity_backends():
    return [BackendInfo("jax", ("jax", "jaxlib"), _load, '"sensealg[jax]"')]
