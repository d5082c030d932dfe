"""`sensitivity doctor`: what is installed, and whether each backend makes a right gradient."""

from __future__ import annotations

import math
import platform
import warnings
from importlib import metadata
from typing import Any

from . import __version__
from .algorithms.discrete import RecursiveCheckpointAdjoint
from .errors import SensitivityWarning
from .gradient import gradient
from .methods import Tsit5
from .problems import ODEProblem
from .registry import registry
from .vjp import ReverseVJP


def examined() -> dict[str, Any]:
    """Versions, plugins, and one entry for each backend; nothing is raised."""
    found = registry()
    return {
        "sensealg": __version__, "python": platform.python_version(), "platform": platform.platform(),
        "backends": [_backend(info) for _, info in sorted(found.backends.items())],
        "plugins": sorted(name for name, _ in found.manager.list_name_plugin()), "failures": dict(found.failures),
    }


def _backend(info: Any) -> dict[str, Any]:
    """Version, device, precision and the error of one gradient of a backend."""
    out: dict[str, Any] = {"name": info.name, "version": None, "device": None, "x64": None, "ad": None, "error": None,
                           "ok": False, "problem": None}
    try:
        out["version"] = metadata.version(info.modules[0])
        be = registry().backend(info.name)
        u0 = be.asarray([2.0], dtype=be.default_float())
        out["device"] = str(be.device(u0) or "cpu")
        out["x64"] = be.xp.finfo(be.default_float()).bits == 64
        out["ad"] = sorted(be.modes)
        out["error"] = _error(be, u0, out["x64"])
        out["ok"] = out["error"] < (1e-7 if out["x64"] else 1e-3)
    except Exception as e:  # what is wrong with a backend is what was asked for
        out["problem"] = f"{type(e).__name__}: {e}"
    return out


def _error(be: Any, u0: Any, double: bool) -> float:
    """How far the gradient of `u(1)` of `u' = -p u` is from `-u0 exp(-p)`, relative to it."""
    prob = ODEProblem(lambda t, u, p: -p * u, u0, (0.0, 1.0), be.asarray([0.5], dtype=u0.dtype))
    # NumPy has AD only for what is written with autograd; this f is plain arithmetic, which it follows.
    vjp = ReverseVJP() if "reverse" in be.modes else None
    tight: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12} if double else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SensitivityWarning)
        r = gradient(prob, Tsit5(), lambda sol: sol.u[-1, 0], wrt="p", sensealg=RecursiveCheckpointAdjoint(vjp=vjp),
                     **tight)
    want = -2.0 * math.exp(-0.5)
    got = be.concrete(r.p[0])
    assert got is not None
    return abs(float(got) - want) / abs(want)


def report(found: dict[str, Any]) -> str:
    """`examined` as text."""
    lines = [f"sensealg {found['sensealg']}, Python {found['python']}, {found['platform']}", ""]
    for b in found["backends"]:
        if b["problem"]:
            lines.append(f"  {b['name']:<9} {b['version'] or 'not installed'}: {b['problem']}")
            continue
        verdict = "ok" if b["ok"] else "WRONG"
        kind = "float64" if b["x64"] else "float32"
        lines.append(f"  {b['name']:<9} {b['version']}, {b['device']}, {kind} by default, "
                     f"AD: {', '.join(b['ad']) or 'none'}; gradient off by {b['error']:.0e}: {verdict}")
        if not b["x64"]:
            lines.append("          JAX_ENABLE_X64=1 in the environment gives float64 where JAX makes the arrays")
    lines += ["", f"  plugins: {', '.join(found['plugins'])}"]
    lines += [f"  plugin {name} could not be loaded: {why}" for name, why in found["failures"].items()]
    return "\n".join(lines)
