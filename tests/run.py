"""Install what the checks need into the current environment, then run them all.

    python tests/run.py                 lint, types, documentation, tests
    python tests/run.py --slow          the same, with the slow tests
    python tests/run.py --no-install    use the environment as it is
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "jax,autograd,plot,rich,test,docs"


def python(*args: str) -> int:
    print(">>> python", *args, flush=True)
    return subprocess.run([sys.executable, *args], cwd=ROOT).returncode


def install() -> int:
    # Pinned: the one release every check is known to pass with. An installed PyTorch is left alone.
    if importlib.util.find_spec("torch") is None and (status := python("-m", "pip", "install", "-q", "torch==2.13.0")):
        return status
    return python("-m", "pip", "install", "-q", "-e", f".[{EXTRAS}]")


def check(slow: bool) -> list[str]:
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test processes already fill the cores
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    select = [] if slow else ["-m", "not slow"]
    with tempfile.TemporaryDirectory() as site:
        failed = {
            "ruff": python("-m", "ruff", "check", "--output-format", "concise"),
            "mypy": python("-m", "mypy"),
            "mkdocs": python("-m", "mkdocs", "build", "-f", ".mkdocs.yml", "--quiet", "--strict", "--site-dir", site),
            "pytest": python("-m", "pytest", "-n", "2", *select),
        }
    return [name for name, status in failed.items() if status]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="run the slow tests too")
    parser.add_argument("--no-install", action="store_true", help="install nothing")
    options = parser.parse_args()
    if not options.no_install and (status := install()):
        return status
    failed = check(options.slow)
    print("failed: " + ", ".join(failed) if failed else "all checks passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
