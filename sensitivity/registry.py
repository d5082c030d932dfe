"""Finds plugins and maps arrays to backends; nothing is imported or scanned before the first use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, NamedTuple

from .errors import BackendMissingError, InputError, MixedFrameworksError, SensitivityWarning

GROUP = "sensitivity"


class BackendInfo(NamedTuple):
    """A backend that can be listed without importing its framework.

    Attributes
    ----------
    name : how users name it.
    modules : top-level module names that its array types live in.
    load : imports the framework and returns the `Backend` instance.
    package : what to install when the framework is missing.
    """

    name: str
    modules: tuple[str, ...]
    load: Callable[[], Any]
    package: str


class Registry:
    """Backends and algorithms by name, from the `sensitivity` entry points."""

    loading = False  # whether plugins are being imported now

    def __init__(self, entry_points: bool = True) -> None:
        # Only when the first array arrives: these take longer to import than all of this package.
        from importlib import metadata

        import pluggy

        from . import hooks

        self.manager = pluggy.PluginManager("sensitivity")
        self.manager.add_hookspecs(hooks)
        self.failures: dict[str, str] = {}
        self._loaded: dict[str, Any] = {}
        self._by_type: dict[type, str | None] = {}
        if entry_points:
            Registry.loading = True
            for entry in sorted(metadata.entry_points(group=GROUP), key=lambda e: e.name):
                try:
                    self.manager.register(entry.load(), name=entry.name)
                except Exception as e:  # one broken plugin must not break the others
                    self.failures[entry.name] = f"{type(e).__name__}: {e}"
                    warnings.warn(f"Plugin {entry.name!r} could not be loaded: {self.failures[entry.name]}",
                                  SensitivityWarning, stacklevel=3)
            Registry.loading = False
        self.refresh()

    def register(self, plugin: Any, name: str | None = None) -> None:
        """Add a plugin object or module by hand."""
        self.manager.register(plugin, name=name)
        self.refresh()

    def refresh(self) -> None:
        self.backends = self._unique("backend", ((b.name, b) for bs in self.manager.hook.sensitivity_backends()
                                                 for b in bs))
        self.methods = self._mapping("method", self.manager.hook.sensitivity_methods())
        self.algorithms = self._mapping("sensitivity algorithm", self.manager.hook.sensitivity_algorithms())
        self.vjps = self._mapping("VJP choice", self.manager.hook.sensitivity_vjps())
        self.rules = tuple(rule for rules in self.manager.hook.sensitivity_rules() for rule in rules)
        self._by_type.clear()

    def _mapping(self, kind: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
        return self._unique(kind, (item for answer in answers for item in answer.items()))

    @staticmethod
    def _unique(kind: str, items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in items:
            if name in found:
                raise ValueError(f"Two plugins provide the {kind} {name!r}.")
            found[name] = value
        return found

    def backend(self, name: str) -> Any:
        """The backend instance called `name`; imports its framework."""
        if name not in self.backends:
            known = ", ".join(sorted(self.backends)) or "none: no plugin of the group 'sensitivity' is installed"
            raise InputError(f"backend={name!r} is unknown", f"the backends are {known}",
                             "use one of these, or install the plugin that provides it")
        if name not in self._loaded:
            info = self.backends[name]
            try:
                self._loaded[name] = info.load()
            except ImportError as e:
                raise BackendMissingError(f"the {name!r} backend could not be loaded: {e}", "it needs a package",
                                          f"pip install {info.package}") from e
        return self._loaded[name]

    def kind_of(self, x: Any) -> str | None:
        """Name of the backend whose array `x` is, from its type alone."""
        kind = type(x)
        if kind not in self._by_type:
            roots = {k.__module__.split(".")[0] for k in kind.__mro__}
            names = [b.name for b in self.backends.values() if roots & set(b.modules)]
            if not names and hasattr(x, "dtype") and hasattr(x, "shape"):
                broken = "".join(f"; plugin {name!r} failed: {why}" for name, why in self.failures.items())
                raise BackendMissingError(
                    f"no backend is installed for arrays of type {kind.__module__}.{kind.__qualname__}{broken}",
                    f"the backends are {', '.join(sorted(self.backends)) or 'none'}",
                    "install the plugin for this framework, or convert to numpy arrays")
            self._by_type[kind] = names[0] if names else None
        return self._by_type[kind]

    def backend_for(self, labelled: Iterable[tuple[str, Any]]) -> Any:
        """The one backend of these labelled leaves; NumPy constants may stand beside any other framework."""
        found: dict[str, str] = {}
        for label, x in labelled:
            name = self.kind_of(x)
            if name is not None:
                found.setdefault(name, label)
        others = {n: label for n, label in found.items() if n != "numpy"}
        if len(others) > 1:
            where = ", ".join(f"{label} is {n}" for n, label in others.items())
            raise MixedFrameworksError(f"the problem mixes frameworks: {where}",
                                       "one solve runs in one framework, so that one AD sees all of it",
                                       "convert everything to one framework, e.g. jnp.asarray(x) or torch.as_tensor(x)")
        return self.backend(next(iter(others), "numpy"))


def algorithms() -> dict[str, Any]:
    """Every sensitivity algorithm that can be made without arguments: the library's own and those of plugins."""
    import sensitivity

    from .algorithms.base import SensitivityAlgorithm

    own = {name: kind for name, kind in vars(sensitivity).items()
           if isinstance(kind, type) and issubclass(kind, SensitivityAlgorithm) and kind is not SensitivityAlgorithm}
    return {name: kind for name, kind in sorted((own | registry().algorithms).items())
            if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(kind) if f.init)}


@cache
def registry() -> Registry:
    """The process-wide registry, built from the entry points at the first call."""
    return Registry()


def provided(name: str) -> Any:
    """The sensitivity algorithm of a plugin with this name, or None; plugins are looked for if it can be a class."""
    return None if Registry.loading or not name[:1].isupper() else registry().algorithms.get(name)
