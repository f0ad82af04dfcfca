"""The verdict, its rules and all scores as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deleatur.gate import SIMULATED_NOTICE, headline
from deleatur.records.report import WORST_FIRST, Finding, Outcome, Report, Score, Verdict
from deleatur.report.score_tables import reading_order

STYLES: Mapping[Outcome, str] = {"pass": "green", "fail": "red", "not enough evidence": "yellow"}


def summary(report: Report, verdict: Verdict) -> RenderableType:
    """The verdict, why rules did not pass, and all scores, for `rich.print`."""
    style = STYLES[verdict.outcome]
    parts: list[RenderableType] = [Panel(Text(headline(verdict), style=f"bold {style}"), border_style=style)]
    if verdict.simulated:
        parts.insert(0, Panel(Text(SIMULATED_NOTICE, style="bold black on yellow"), style="yellow"))
    reasons = [Text(f"{f.rule}: {f.reason}") for f in verdict.findings if f.outcome != "pass"]
    return Group(*parts, _rules_table(verdict.findings), "", *reasons, "", _scores_table(report.scores))


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="dim", padding=(0, 2, 0, 0))


def _rules_table(findings: Sequence[Finding]) -> Table:
    table = _table("rule", "outcome", "margin")
    for f in sorted(findings, key=lambda f: WORST_FIRST.index(f.outcome)):
        margin = "" if f.margin is None else f"{f.margin:+.3g}"
        table.add_row(Text(f.rule), Text(f.outcome, style=STYLES[f.outcome]), margin)
    return table


def _scores_table(scores: Sequence[Score]) -> Table:
    table = _table("metric", "slice", "variant", "value", "interval", "n")
    for s in sorted(scores, key=lambda s: (s.metric, s.versus is not None, reading_order(s))):
        variant = f"{s.variant} − {s.versus}" if s.versus else s.variant
        interval = f"[{_number(s.low)}, {_number(s.high)}]"
        table.add_row(*map(Text, (s.metric, s.slice, variant, _number(s.value), interval, str(s.n))))
    return table


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
