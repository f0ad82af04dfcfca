"""The HTML report: one file with verdict, images, scores, training curves and provenance, and no external resources.

Images of prompts that ask for an erased concept are covered until the reader uncovers them, and their prompts are
named by id. The file contains no time and no machine name: the same evidence gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deleatur.gate import SIMULATED_NOTICE, Rule, deciding_evaluation, headline
from deleatur.records.report import WORST_FIRST, DetectorInfo, Report, Score, Verdict
from deleatur.report import plots
from deleatur.report.contact_sheet import ContactSheet
from deleatur.report.plots import Curve
from deleatur.report.score_tables import rule_plot, score_tables
from deleatur.report.templates import load_template
from deleatur.storage.files import atomic_write

TEMPLATE = Path(__file__).with_name("report.html")


def write_html(
    report: Report,
    verdict: Verdict,
    sheets: Sequence[ContactSheet],
    curves: Sequence[Curve],
    path: Path,
    *,
    base_model: str,
    rules: Mapping[str, Rule] | None = None,
) -> None:
    """Writes the report. base_model: its address. rules: the gate's, to draw their limits beside the intervals."""
    evaluations = {name: deciding_evaluation(rule, report) for name, rule in (rules or {}).items()}
    decided = {name: evaluation for name, evaluation in evaluations.items() if evaluation}
    with plots.style():
        html = load_template(TEMPLATE).render(
            report=report,
            verdict=verdict,
            headline=headline(verdict),
            base_model=base_model,
            simulated_notice=SIMULATED_NOTICE,
            findings=sorted(verdict.findings, key=lambda f: WORST_FIRST.index(f.outcome)),
            rule_plots={name: rule_plot(evaluation) for name, evaluation in decided.items()},
            sheets=sheets,
            tables=list(score_tables(report.scores, list(decided.values()))),
            charts=[(curve.title, chart) for curve in curves if (chart := plots.line_chart(curve))],
            detectors=_detectors(report.scores),
        )
    with atomic_write(path) as partial:
        partial.write_text(html, "utf-8")


def _detectors(scores: Sequence[Score]) -> list[DetectorInfo]:
    return sorted({s.detector for s in scores if s.detector}, key=lambda d: (d.name, d.weights, d.labels, d.cutoff))
