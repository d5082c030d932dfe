"""Every Python block of the README and of the documentation runs, in order, page by page."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FRAMEWORKS = ("autograd", "jax", "torch")
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.M | re.S)


def script(page: str) -> str:
    """The page with everything but its Python blocks blanked, so that a traceback shows the page's own lines."""
    lines = [""] * (page.count("\n") + 1)
    for m in BLOCK.finditer(page):
        wanted = [name for name in FRAMEWORKS if re.search(rf"^ *(import|from) {name}\b", m[2], re.M)]
        if all(find_spec(name) for name in wanted):
            start = page.count("\n", 0, m.start(2))
            for n, line in enumerate(m[2].splitlines(), start):
                lines[n] = line.removeprefix(m[1])
    return "\n".join(lines)


def marked(page):
    """A page for `test_blocks_run`; the one that needs a C++ compiler takes a minute of it."""
    missing = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")
    marks = [pytest.mark.slow, missing] if page.name == "compiled.md" else []
    return pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks)


@pytest.mark.parametrize("page", [marked(p) for p in PAGES if BLOCK.search(p.read_text(encoding="utf-8"))])
def test_blocks_run(page, tmp_path):
    path = tmp_path / f"{page.stem}.py"
    path.write_text(script(page.read_text(encoding="utf-8")), encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "error", str(path)], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "MPLBACKEND": "agg"})
    assert done.returncode == 0, f"{page.relative_to(ROOT)}\n{done.stderr}"


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_first_look_in_three_frameworks(page):
    blocks = [m[2] for m in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8"))]
    first_look = [b for b in blocks if "predator_prey" in b]
    assert [next(f for f in FRAMEWORKS if f"import {f}" in b) for b in first_look] == list(FRAMEWORKS)
