"""The house rules: what may import what, how long it takes, and whether the README tells the truth."""

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

import sensitivity as sa

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

CORE = sorted((ROOT / "sensitivity").rglob("*.py"))
OUTSIDE = sorted(p for folder in ("backends", "plugins") for p in (ROOT / folder).rglob("*.py"))
FRAMEWORKS = {"numpy", "scipy", "jax", "torch", "autograd", "matplotlib", "pandas"}
PLUGINS = set(PYPROJECT["project"]["entry-points"]["sensitivity"].values())
# The modules that see everything; the layers below must not reach up to them.
TOP = {"__init__.py", "__main__.py", "gradient.py", "cli.py", "demo.py", "check.py", "citation.py", "hessians.py",
       "advise.py", "packed.py", "objective.py", "sensitivities.py"}
BELOW = [p for p in CORE if p.relative_to(ROOT / "sensitivity").parts[0] not in TOP | {"testing"}]
HEAVY = ["jax", "torch", "autograd", "scipy.integrate", "scipy.optimize", "matplotlib", "pandas"]


def run(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONSAFEPATH": "1", **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imported(path: Path, everywhere: bool) -> set[str]:
    """Absolute names that a file imports: at module level, or `everywhere` inside functions too."""
    package = path.relative_to(ROOT).with_suffix("").parts
    if package[0] in ("backends", "plugins"):
        package = package[1:]
    found = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        match node:
            case ast.Import(names=names):
                found |= {a.name for a in names}
            case ast.ImportFrom(module=module, level=level, names=names):
                base = ".".join([*(package[:-level] if level else ()), *([module] if module else [])])
                # `from . import x` names a module; `from .x import y` may, and adding it does no harm.
                found |= {base, *(f"{base}.{a.name}" for a in names)}
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if not everywhere:
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
        nodes += ast.iter_child_nodes(node)
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# -- imports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_core_imports_no_framework(path):
    if path.name == "packed.py":  # optimisers take NumPy vectors; imported when one is asked for
        return
    assert not roots(imported(path, everywhere=False)) & (FRAMEWORKS | PLUGINS)


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_core_knows_no_plugin(path):
    assert not roots(imported(path, everywhere=True)) & PLUGINS


@pytest.mark.parametrize("path", BELOW, ids=relative)
def test_only_the_top_layer_imports_solve(path):
    assert "sensitivity.solve" not in imported(path, everywhere=True)


@pytest.mark.parametrize("path", OUTSIDE, ids=relative)
def test_plugins_do_not_see_the_top_layer_or_each_other(path):
    names = imported(path, everywhere=True)
    own = path.relative_to(ROOT).parts[1]
    assert "sensitivity.solve" not in names
    assert "sensitivity.gradient" not in names
    assert not roots(names) & (PLUGINS - {own, "sensitivity_numpy"})


def test_import_is_light():
    loaded = run("import sys, sensitivity; print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


def test_listing_plugins_imports_no_framework():
    out = run(
        "import sys, sensitivity\n"
        "from sensitivity.registry import registry\n"
        "r = registry()\n"
        "assert {'numpy', 'jax', 'torch'} <= set(r.backends), r.backends\n"
        "assert not r.failures, r.failures\n"
        "print(*sys.modules)"
    )
    assert not set(HEAVY) & set(out.split())


@pytest.mark.timing
def test_import_budget(tmp_path):
    # Processor time of one thread, and the least of several: what else runs on the machine only adds to it.
    code = "import numpy, time; t = time.thread_time(); import sensitivity; print(1e3 * (time.thread_time() - t))"
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    run(code, **compiled)
    assert min(float(run(code, **compiled)) for _ in range(9)) < 100


# -- layout and package data ------------------------------------------------------------------------------------


def test_top_level_folders():
    ignored = set((ROOT / ".gitignore").read_text(encoding="utf-8").replace("/", "").split())
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    folders = {name for name in folders - ignored if not name.endswith(".egg-info")}
    assert folders == {"sensitivity", "backends", "plugins", "tests", "docs"}
    files = {p.name for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".")}
    assert files == {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}


def test_no_import_package_where_only_a_folder_is_meant():
    for name in ("backends", "plugins", "tests", "docs"):
        assert not (ROOT / name / "__init__.py").exists()


def test_every_package_is_shipped():
    listed = set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    there = {relative(p.parent) for folder in ("backends", "plugins") for p in (ROOT / folder).glob("*/__init__.py")}
    assert listed == there | {"sensitivity"}
    assert PLUGINS == {Path(name).name for name in there}


def test_package_data():
    package = resources.files("sensitivity")
    assert (package / "py.typed").is_file()
    lines = (package / "data" / "lynx_hare.csv").read_text(encoding="utf-8").splitlines()
    assert lines[1] == "year,hare,lynx"
    assert len(lines) == 2 + 21


# -- claims -----------------------------------------------------------------------------------------------------


def test_versions_agree():
    version = PYPROJECT["project"]["version"]
    assert metadata.version("sensealg") == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert sa.__version__ == version


def test_python_version_of_the_readme():
    claims = re.findall(r"Python (\d+\.\d+)", README)
    assert claims
    assert {f">={claim}" for claim in claims} == {PYPROJECT["project"]["requires-python"]}


def test_extras_of_the_readme():
    claims = {name for group in re.findall(r'"(?:\.|sensealg)\[([a-z,]+)\]"', README) for name in group.split(",")}
    assert claims <= set(PYPROJECT["project"]["optional-dependencies"])


def test_names_of_the_readme():
    names = set(re.findall(r"\bsa\.([A-Za-z_]\w*)", README))
    table = README.partition("## What is there")[2].partition("\n## ")[0]
    names |= {name for name in re.findall(r"`([A-Za-z]\w+)(?:\(\))?`", table) if name[0].isupper()}
    assert "Tsit5" in names
    assert not sorted(name for name in names if not hasattr(sa, name))


def test_paths_of_the_readme():
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_public_name_is_documented():
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: sensitivity\.(?:\w+\.)*(\w+)$", pages, re.M))
    assert set(sa.__all__) - {"__version__"} <= documented


def test_all_lists_the_public_names():
    public = {name for name, value in vars(sa).items() if name[0] != "_" and not inspect.ismodule(value)}
    public |= {name for name in sa._LATER if hasattr(sa, name)}
    assert set(sa.__all__) - {"__version__"} == public


def test_every_error_code_has_a_row():
    from sensitivity import errors

    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (SN\d+) \| `(\w+)`", page, re.M))
    codes = {c.code: c.__name__ for c in vars(errors).values() if isinstance(c, type) and "code" in vars(c)}
    assert rows == codes
