"""Clocks: interleaved medians, fresh processes, and the agreement of two results."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROUNDS = 3  # at least
BURST = 0.01  # seconds a variant keeps the processor before the next one gets its turn


class Times(NamedTuple):
    """Seconds of one call."""

    median: float
    best: float
    samples: int


def burst(call: Callable[[], object]) -> Callable[[], float]:
    """A clock for calls that may be too short to time one by one."""
    repeats = 1

    def clock() -> float:
        nonlocal repeats
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        seconds = (time.perf_counter() - start) / repeats
        repeats = max(1, round(BURST / seconds))
        return seconds

    return clock


def interleave(clocks: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, Times]:
    """Call every clock in turn, for about `seconds` each, so that a disturbance meets them all."""
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    start, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - start < seconds * len(clocks):
        for name, clock in clocks.items():
            samples[name].append(clock())
        rounds += 1
    return {name: Times(statistics.median(s), min(s), len(s)) for name, s in samples.items()}


def in_fresh_process(*arguments: str) -> float:
    """Run Python with these arguments; it prints seconds."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout.split()[-1])


def resident(which: str) -> float:
    """Resident memory of this process in MiB: "VmRSS" now, "VmHWM" at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(which))


def import_seconds(modules: str) -> float:
    code = f"import time; start = time.perf_counter(); import {modules}; print(time.perf_counter() - start)"
    return in_fresh_process("-c", code)


def flat(result) -> np.ndarray:
    """Every number of a nest of arrays as one vector."""
    if isinstance(result, (list, tuple)):
        return np.concatenate([flat(part) for part in result])
    return np.asarray(result, dtype=float).ravel()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Relative to the second."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def machine() -> str:
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    model = models[0].split(":")[1].strip() if models else platform.processor()
    load = os.getloadavg()[0]
    return f"{model}, {os.cpu_count()} cores, load {load:.1f}, {platform.system()}, Python {platform.python_version()}"


def versions(packages: tuple[str, ...]) -> str:
    def one(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} (not installed)"

    return ", ".join(one(package) for package in packages)
