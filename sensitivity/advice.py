"""What `advise` found: as text, HTML, JSON, a table and a picture."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from html import escape
from typing import Any

from .estimates import Estimate
from .fieldfacts import FieldFacts
from .rules import Facts, amount
from .stiffness import Probes

REPEATS = 3  # times of each candidate where they are measured
VERDICTS = {"chosen": "*", "possible": " ", "ruled out": "x", "wrong": "!"}


@dataclass(frozen=True)
class Candidate:
    """One line of the advice.

    Attributes
    ----------
    sensealg : the algorithm.
    verdict : "chosen", "possible" or "ruled out"; "wrong" where a measured gradient disagrees with the others.
    why : the reason; the text of the refusal where the algorithm refuses.
    rule : the rule or remark that says so, or None.
    estimate : counts of work and bytes kept, expected.
    seconds, peak, error : measured: time of one gradient, bytes of memory at its peak (None where that cannot be seen),
        largest difference to the reference relative to its largest entry.
    spread : by how much the longest of the times that were measured exceeds the shortest, which is `seconds`, relative.
    """

    sensealg: Any
    verdict: str
    why: str
    rule: str | None = None
    estimate: Estimate | None = None
    seconds: float | None = None
    peak: int | None = None
    error: float | None = None
    spread: float | None = None

    @property
    def name(self) -> str:
        return spelled(dataclasses.replace(self.sensealg, vjp=None, **_jvp(self.sensealg))).removeprefix("sa.")

    @property
    def brief(self) -> str:
        """The reason in a line: of a refusal, what does not go, without what to do instead."""
        lines = self.why.splitlines() or [""]
        if not lines[0].startswith("[SN"):
            return " ".join(self.why.split())
        return lines[0].split("] ", 1)[-1].removeprefix(f"{self.sensealg.name} ")


@dataclass(frozen=True)
class Advice:
    """What `advise` found; `print` it.

    Attributes
    ----------
    sensealg, vjp, alg : what to use; `sensealg` is what `auto` takes.
    why_method : why `alg`, if none was given.
    facts : what the rules know of the problem.
    probes : stiffness and what going backwards costs, or None where that is not known.
    field : what is known of `f`: whether it is a function, what it depends on, where it branches, what it closes over.
    path : the questions of the decision tree with this problem's answers, `(question, answer, what follows)`.
    table : one `Candidate` for each algorithm.
    steps : accepted and rejected steps of the forward solve.
    reference : what measured errors refer to, or None if nothing was measured.
    peaks : what measured the memory, or None.
    """

    prob: Any = dataclasses.field(repr=False)
    sensealg: Any
    vjp: Any
    alg: Any
    why_method: str
    facts: Facts
    probes: Probes | None
    field: FieldFacts
    path: tuple[tuple[str, str, str], ...]
    table: tuple[Candidate, ...]
    options: dict[str, Any]
    wrt: Any
    steps: tuple[Any, Any]
    reference: str | None = None
    peaks: str | None = None

    @property
    def code(self) -> str:
        """The line to paste; it expects `prob` and `loss`."""
        words = [f"wrt={self.wrt!r}"] if self.wrt is not None else []
        words += [f"{k}={v!r}" if isinstance(v, int | float | str) else f"{k}={k}" for k, v in self.options.items()]
        call = "gradient" if self.facts.order == 1 else "hessian"
        return ", ".join([f"sa.{call}(prob, {spelled(self.alg)}, loss", f"sensealg={spelled(self.sensealg)}",
                          *words]) + ")"

    @property
    def agree(self) -> bool | None:
        """Whether all measured gradients agree; None if nothing was measured."""
        tried = [r for r in self.table if r.error is not None or r.verdict == "wrong"]
        return all(r.verdict != "wrong" for r in tried) if tried else None

    def _problem(self) -> list[tuple[str, str]]:
        f, accepted, rejected = self.facts, *self.steps
        size = f"{_some(f.n, 'state')}, {_some(f.params, 'parameter')}"
        steps = f"{_some(accepted, 'step')} (+{rejected} rejected)"
        rows = [("problem", f"{KINDS[f.kind]}, {size}, {steps}, {f.backend}, {f.device}, float{f.bits}")]
        if self.probes is not None:
            rows.append(("probes", _said(self.probes)))
        rows.append(("f", str(self.field)))
        rows.append(("products", self.sensealg.because[-1]))
        if self.why_method:
            rows.append(("method", f"{spelled(self.alg)}: {self.why_method}"))
        return rows

    def _columns(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Head and cells; what is estimated says so in the head, and gives way to what is measured."""
        was = self.reference is not None
        extra: tuple[str, ...] = ("time", "peak", "error") if was else ()
        known = not was and any(r.estimate is not None for r in self.table)
        work = ("est. f", "est. JVP", "est. VJP", "est. memory") if known else ()
        head = ("", "sensealg", *extra, *work, "why")
        rows = []
        for r in self.table:
            e = r.estimate
            counts = ("-",) * 4 if e is None else (f"{e.nfe:,}", f"{e.njvp:,}", f"{e.nvjp:,}", _bytes(e.memory))
            seen = (_time(r.seconds), "-" if r.peak is None else _bytes(r.peak),
                    "-" if r.error is None else f"{r.error:.0e}") if was else ()
            rows.append((VERDICTS[r.verdict], r.name, *seen, *counts[:len(work)], r.brief))
        return head, rows

    def __str__(self) -> str:
        was = self.reference is not None
        mode = f"measured; errors against {self.reference}" if was else "estimated, nothing measured"
        mode += f"; peak by {self.peaks}" if self.peaks else ""
        spread = max((r.spread for r in self.table if r.spread is not None), default=None)
        if spread is not None:
            mode += f"; the least of {REPEATS} times, which differ by {100 * spread:.0f} % at most"
        head, rows = self._columns()
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
        left = (0, 1)
        lines = _hanging(f"advise(prob, {spelled(self.alg)})   ", mode)
        for name, text in self._problem():
            lines += _hanging(f"  {name:<9}", text)
        lines.append("")
        for row in (head, *rows):
            cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
            lines += _hanging("  " + "  ".join([*cells, ""]), row[-1])
        lines.append("")
        for i, (question, answer, then) in enumerate(self.path):
            lines += _hanging(f"  {'' if i else 'path':<9}", f"{question} {answer}{'; ' + then if then else ''}")
        lines.append(f"  {'choice':<9}{self.code}")
        if self.agree is not None:
            wrong = [r.name for r in self.table if r.verdict == "wrong"]
            lines.append(f"  {'agree':<9}" + (f"{', '.join(wrong)}: WRONG" if wrong else
                                              f"{sum(r.error is not None for r in self.table)} gradients agree to "
                                              f"{max(r.error for r in self.table if r.error is not None):.0e}"))
        again = "" if was or self.facts.order > 1 else "advise(..., measure=True) runs them   "
        draw = "advice.plot()   " if any(r.estimate is not None for r in self.table) else ""
        lines.append(f"  {'more':<9}{again}{draw}advice.to_frame()   advice.to_json()")
        return "\n".join(lines)

    def __rich__(self) -> Any:
        """The same with `rich.print`: the choice bold, what is ruled out dim, what is wrong red."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        head, rows = self._columns()
        table = Table(*head, title=f"advise(prob, {spelled(self.alg)})")
        for row in rows:
            table.add_row(*map(Text, row), style={"*": "bold", "x": "dim", "!": "bold red"}.get(row[0]))
        lines = [Text(f"{name:<9}{text}") for name, text in self._problem()]
        return Group(*lines, table, Text(f"{'choice':<9}{self.code}"))

    def _repr_html_(self) -> str:
        head, rows = self._columns()
        style = {"*": "font-weight:bold", "x": "opacity:0.5", "!": "color:#b00"}
        left = "style='text-align:left'"
        cells = "".join(f"<th {left}>{escape(h)}</th>" for h in head)
        body = "".join(f"<tr style='{style.get(row[0], '')}'>" + "".join(f"<td {left}>{escape(c)}</td>" for c in row)
                       + "</tr>" for row in rows)
        top = "".join(f"<div><b>{escape(k)}</b> {escape(v)}</div>" for k, v in self._problem())
        return (f"{top}<table><tr>{cells}</tr>{body}</table><pre>{escape(self.code)}</pre>"
                f"<details><summary>as text</summary><pre>{escape(str(self))}</pre></details>")

    def records(self) -> list[dict[str, Any]]:
        """The table as plain values, one dict per candidate."""
        out = []
        for r in self.table:
            e = r.estimate
            counts = dict.fromkeys(Estimate._fields) if e is None else e._asdict()
            out.append({"sensealg": r.name, "verdict": r.verdict, "why": r.why, "rule": r.rule,
                        **{f"estimated_{k}": v for k, v in counts.items()},
                        "measured_seconds": r.seconds, "measured_spread": r.spread, "measured_peak": r.peak,
                        "measured_error": r.error})
        return out

    def to_json(self) -> str:
        """Everything as JSON."""
        known = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in dataclasses.asdict(self.facts).items()}
        return json.dumps({
            "sensealg": spelled(self.sensealg), "vjp": spelled(self.vjp), "alg": spelled(self.alg), "code": self.code,
            "because": list(self.sensealg.because), "why_method": self.why_method, "facts": known,
            "probes": None if self.probes is None else self.probes._asdict(), "field": self.field._asdict(),
            "path": [list(step) for step in self.path], "reference": self.reference, "peaks": self.peaks,
            "agree": self.agree, "table": self.records()}, indent=2, default=str)

    def to_frame(self) -> Any:
        """The table as a `pandas.DataFrame`.

        Raises
        ------
        BackendMissingError
            pandas is not installed.
        """
        from .report import _package

        return _package("pandas", "to_frame").DataFrame(self.records())

    def plot(self, ax: Any = None) -> Any:
        """Memory against work (estimated) or time (measured) of the candidates that are offered; returns the axes.

        Raises
        ------
        BackendMissingError
            matplotlib is not installed.
        UnsupportedCombination
            The advice is about second derivatives, whose work is not estimated.
        """
        from .plotting import plot_advice

        return plot_advice(self, ax)


WIDTH = 120
NARROW = 40  # what a column of reasons has at least


def _hanging(start: str, text: str) -> list[str]:
    """Lines of text after `start`, those that follow below where it began."""
    room = max(NARROW, WIDTH - len(start))
    first, *rest = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    return [(start + first).rstrip(), *(" " * len(start) + line for line in rest)]


def _some(count: Any, name: str) -> str:
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"


KINDS = {"ode": "ODE", "dde": "delay equation", "sde": "stochastic equation", "steady": "steady state"}


def _said(p: Probes) -> str:
    """Probes as text."""
    about, most = ("about ", "at most ") if p.bound else ("", "")
    words = [f"Lipschitz {about}{p.lipschitz:.2g}"]
    if p.density is not None and p.density < 1.0:
        words.append(f"{100.0 * p.density:.0f} % of f_u is not zero")
    if p.digits is None:
        rest = "" if p.growth is None else ", stable" if p.growth < 0.0 else f", unstable (grows at {p.growth:.2g})"
        return "; ".join([f"at rest{rest}; fastest rate {about}{p.rate:.2g}", *words])
    words.append(f"integrating backwards: {most}{amount(p.digits)} digits at risk")
    return "; ".join([f"{'stiff' if p.stiff else 'not stiff'} (decay x span = {about}{max(0.0, p.decay * p.span):.2g}, "
                      f"rate x span = {about}{p.rate * p.span:.2g})", *words])


def spelled(x: Any) -> str:
    """The call that makes an object of this library, with what is not a default."""
    words = []
    for f in dataclasses.fields(x) if dataclasses.is_dataclass(x) else ():
        value = getattr(x, f.name)
        if f.init and f.name != "because" and not (f.name == "vjp" and hasattr(x, "jvp")) and value != f.default:
            own = type(value).__module__.startswith("sensitivity")
            words.append(f"{f.name}={spelled(value) if own else repr(value)}")
    return f"sa.{type(x).__name__}({', '.join(words)})"


def _jvp(x: Any) -> dict[str, None]:
    return {"jvp": None} if hasattr(x, "jvp") else {}


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f} ms"
