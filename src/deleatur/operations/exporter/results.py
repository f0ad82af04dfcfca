"""Series about results: the newest report, verdict and canary check.

A missing file is not an error: its stage has not run yet, or is running again.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric

from deleatur.config.settings import Settings
from deleatur.operations.exporter.series import gauge, unix_time
from deleatur.records.report import CanaryResult, Outcome, Report, Score, Verdict
from deleatur.registry import ledger
from deleatur.registry.mlflow_registry import CHAMPION
from deleatur.storage import json_records

OUTCOME_VALUES: dict[Outcome, float] = {"pass": 1.0, "not enough evidence": 0.0, "fail": -1.0}
SCORE_LABELS = ("metric", "slice", "concept", "variant", "versus", "detector")


def report_metrics(settings: Settings) -> Iterator[Metric]:
    path = settings.paths.report / "report.json"
    if not path.is_file():
        return
    report = json_records.read(path, Report)
    scores = {_score_labels(score, report.provenance.concepts): score for score in report.scores}
    description = "Score of the newest report"
    yield gauge("score", f"{description}.", {k: s.value for k, s in scores.items()}, *SCORE_LABELS)
    yield gauge(
        "score_low", f"{description}: lower end of its interval.", {k: s.low for k, s in scores.items()}, *SCORE_LABELS
    )
    yield gauge(
        "score_high",
        f"{description}: upper end of its interval.",
        {k: s.high for k, s in scores.items()},
        *SCORE_LABELS,
    )
    yield gauge("score_images", f"{description}: number of images.", {k: s.n for k, s in scores.items()}, *SCORE_LABELS)


def verdict_metrics(settings: Settings) -> Iterator[Metric]:
    path = settings.paths.verdict / "verdict.json"
    if not path.is_file():
        return
    verdict = json_records.read(path, Verdict)
    yield gauge("verdict", "Newest verdict: 1 pass, 0 not enough evidence, -1 fail.", OUTCOME_VALUES[verdict.outcome])
    yield gauge("verdict_simulated", "1: the newest verdict rests on simulated raters.", verdict.simulated)
    findings = {(f.rule,): f for f in verdict.findings}
    outcomes = {rule: OUTCOME_VALUES[f.outcome] for rule, f in findings.items()}
    yield gauge("rule", "Outcome of a rule: 1 pass, 0 not enough evidence, -1 fail.", outcomes, "rule")
    margins = {rule: f.margin for rule, f in findings.items() if f.margin is not None}
    yield gauge(
        "rule_margin", "Distance of the interval's deciding end from the limit, positive inside.", margins, "rule"
    )
    yield gauge("verdict_live", "1: the newest verdict is about the champion.", _is_of_champion(settings, verdict))


def canary_metrics(settings: Settings) -> Iterator[Metric]:
    """The last canary check."""
    if not settings.canary.result_file.is_file():
        return
    result = json_records.read(settings.canary.result_file, CanaryResult)
    outcomes = {(check.concept,): OUTCOME_VALUES[check.outcome] for check in result.checks}
    yield gauge("canary", "Last check of the champion: 1 the concept is gone, 0 unclear, -1 back.", outcomes, "concept")
    scores = {(check.concept, score.variant): score for check in result.checks for score in check.scores}
    description, labels = "Share of its images that show the concept", ("concept", "variant")
    values = {key: score.value for key, score in scores.items()}
    yield gauge("canary_rate", f"{description}.", values, *labels)
    lows = {key: score.low for key, score in scores.items()}
    yield gauge("canary_rate_low", f"{description}: lower end of its interval.", lows, *labels)
    highs = {key: score.high for key, score in scores.items()}
    yield gauge("canary_rate_high", f"{description}: upper end of its interval.", highs, *labels)
    yield gauge("canary_timestamp_seconds", "Time of the last check.", unix_time(result.time))


def _score_labels(score: Score, concepts: tuple[str, ...]) -> tuple[str, ...]:
    """Label values of a score. Its slice is role/concept, or a role alone: all concepts, or the only one."""
    role, _, concept = score.slice.partition("/")
    concept = concept or (concepts[0] if len(concepts) == 1 else "all")
    detector = score.detector.name if score.detector else ""
    return score.metric, role, concept, score.variant, score.versus or "", detector


def _is_of_champion(settings: Settings, verdict: Verdict) -> bool:
    decisions = ledger.read(settings.register_.ledger)
    champion, evidence = decisions.aliases.get(CHAMPION), json_records.digest(verdict)
    return any(entry.version == champion and entry.evidence == evidence for entry in decisions.entries if entry.version)
