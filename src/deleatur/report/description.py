"""A verdict in a few lines of Markdown, for MLflow's pages: outcome, concept rates before and after, method, rules.

The first line is plain text, because lists of versions show it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from deleatur import gate
from deleatur.markdown import code, escape_markdown
from deleatur.records.report import Report, Score, Verdict
from deleatur.report.model_card import SOURCES

RATE = "concept_rate"


def describe(report: Report, verdict: Verdict, emergency: str = "") -> str:
    """The summary of a verdict. emergency: the reason for a release outside the pipeline; empty for all others."""
    rates, provenance = list(_concept_rates(report)), report.provenance
    first = ", ".join(f"{name} {base.value:.2f} → {candidate.value:.2f}" for name, base, candidate in rates)
    details = [
        f"{code(provenance.method)} erased {', '.join(map(code, provenance.concepts))}, specified by "
        f"{SOURCES[provenance.concept_source]}",
        *(
            f"{code(name)}: rate of the untouched model {_interval(base)}, of this model {_interval(candidate)}, in "
            f"{candidate.n} images of {candidate.prompts} prompts, by the detector {code(_detector(candidate))}"
            for name, base, candidate in rates
        ),
        gate.headline(verdict),
        *([f"EMERGENCY RELEASE: {emergency}"] if emergency else []),
        *([gate.SIMULATED_NOTICE] if verdict.simulated else []),
    ]
    summary = verdict.outcome.upper() + (f": {first}" if first else "")
    return "\n".join([summary, "", *(f"* {escape_markdown(line)}" for line in details)])


def _concept_rates(report: Report) -> Iterator[tuple[str, Score, Score]]:
    """(concept, score of the base model, score of the candidate) of each concept and detector."""
    concepts = report.provenance.concepts
    for name in concepts:
        part = f"concept/{name}" if len(concepts) > 1 else "concept"
        scores = [s for s in report.scores if (s.metric, s.slice, s.versus) == (RATE, part, None)]
        for candidate in (s for s in scores if s.variant == "candidate"):
            for base in (s for s in scores if s.variant == "base" and s.detector == candidate.detector):
                yield name, base, candidate


def _interval(score: Score) -> str:
    return f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"


def _detector(score: Score) -> str:
    return score.detector.name if score.detector else "none"
