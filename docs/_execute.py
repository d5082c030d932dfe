"""MkDocs hook: run the `# %%` scripts of docs/tutorials and show what they really print and plot.

A cell starts at a line `# %%`; `# %% [markdown]` starts a cell of prose, written as comments.
A script that fails, fails the build.
"""

import contextlib
import io
import os
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

os.environ["MPLBACKEND"] = "agg"


def cells(text: str) -> list[tuple[bool, int, str]]:
    """(is prose, number of lines before it, source) for each cell of a script."""
    found: list[tuple[bool, int, list[str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("# %%"):
            found.append((line.endswith("[markdown]"), number, []))
        elif found:
            prose, _, lines = found[-1]
            lines.append(line.removeprefix("#").removeprefix(" ") if prose else line)
    return [(prose, before, "\n".join(lines).rstrip()) for prose, before, lines in found]


def execute(path: Path) -> tuple[str, dict[str, bytes]]:
    """The page a script makes, and its pictures by file name."""
    import matplotlib.pyplot as plt

    page: list[str] = []
    pictures: dict[str, bytes] = {}
    namespace = {"__name__": "__main__"}
    for prose, before, source in cells(path.read_text(encoding="utf-8")):
        if prose:
            page.append(source)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * before + source, str(path), "exec"), namespace)
        page.append(f"```python\n{source.strip()}\n```")
        if printed.getvalue():
            page.append(f"```text title=\"Output\"\n{printed.getvalue().rstrip()}\n```")
        for number in plt.get_fignums():
            name = f"{path.stem}_{len(pictures) + 1}.png"
            buffer = io.BytesIO()
            plt.figure(number).savefig(buffer, dpi=120, bbox_inches="tight")
            pictures[name] = buffer.getvalue()
            page.append(f"![Figure {len(pictures)}]({name})")
        plt.close("all")
    page.append(f"This page was made by running [{path.name}]({path.name}).")
    return "\n\n".join(page) + "\n", pictures


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for script in sorted(Path(config.docs_dir, "tutorials").glob("*.py")):
        page, pictures = execute(script)
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=page))
        for name, content in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files
