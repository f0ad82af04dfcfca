"""What was measured last, and what the gate said of it: the numbers of report and verdict, by name.

A file that is not there is no trouble: nothing has made it yet, or a stage that makes it anew is at work.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric

from deleatur.config.settings import Settings
from deleatur.operations.exporter.series import gauge, seconds
from deleatur.records.report import Canary, Outcome, Report, Score, Verdict
from deleatur.registry import ledger
from deleatur.registry.mlflow_client import CHAMPION
from deleatur.storage import json_records

OUTCOME: dict[Outcome, float] = {"pass": 1.0, "not enough evidence": 0.0, "fail": -1.0}
NAMES = ("metric", "slice", "concept", "side", "versus", "detector")


def measured(settings: Settings) -> Iterator[Metric]:
    path = settings.paths.report / "report.json"
    if not path.is_file():
        return
    report = json_records.read(path, Report)
    scores = {_labels(score, report.identity.concepts): score for score in report.scores}
    about = "A number of the newest report"
    yield gauge("score", f"{about}.", {k: s.value for k, s in scores.items()}, *NAMES)
    yield gauge("score_low", f"{about}: lower end of its interval.", {k: s.low for k, s in scores.items()}, *NAMES)
    yield gauge("score_high", f"{about}: upper end of its interval.", {k: s.high for k, s in scores.items()}, *NAMES)
    yield gauge("score_pictures", f"{about}: over so many pictures.", {k: s.n for k, s in scores.items()}, *NAMES)


def judged(settings: Settings) -> Iterator[Metric]:
    path = settings.paths.verdict / "verdict.json"
    if not path.is_file():
        return
    verdict = json_records.read(path, Verdict)
    yield gauge("verdict", "Newest verdict: 1 pass, 0 not enough evidence, -1 fail.", OUTCOME[verdict.outcome])
    yield gauge("verdict_simulated", "1: the newest verdict rests on raters that are no people.", verdict.simulated)
    findings = {(f.rule,): f for f in verdict.findings}
    outcomes = {rule: OUTCOME[f.outcome] for rule, f in findings.items()}
    yield gauge("rule", "What a rule says: 1 pass, 0 not enough evidence, -1 fail.", outcomes, "rule")
    margins = {rule: f.margin for rule, f in findings.items() if f.margin is not None}
    yield gauge("rule_margin", "How far inside the limit the deciding end of the interval is.", margins, "rule")
    yield gauge("verdict_live", "1: the newest verdict is about what is live.", _is_live(settings, verdict))


def watched(settings: Settings) -> Iterator[Metric]:
    """What the last canary saw."""
    if not settings.canary.result.is_file():
        return
    found = json_records.read(settings.canary.result, Canary)
    outcomes = {(look.concept,): OUTCOME[look.outcome] for look in found.looks}
    yield gauge("canary", "What is live, drawn again: 1 the concept is gone, 0 unclear, -1 back.", outcomes, "concept")
    scores = {(look.concept, score.side): score for look in found.looks for score in look.scores}
    about, of = "Share of its pictures with the concept", ("concept", "side")
    yield gauge("canary_rate", f"{about}.", {k: s.value for k, s in scores.items()}, *of)
    yield gauge("canary_rate_low", f"{about}: lower end of its interval.", {k: s.low for k, s in scores.items()}, *of)
    yield gauge("canary_rate_high", f"{about}: upper end of its interval.", {k: s.high for k, s in scores.items()}, *of)
    yield gauge("canary_timestamp_seconds", "When that was.", seconds(found.time))


def _labels(score: Score, concepts: tuple[str, ...]) -> tuple[str, ...]:
    """A slice of one concept is role/concept; a role alone is about all of them, or the only one."""
    role, _, concept = score.slice.partition("/")
    about = concept or (concepts[0] if len(concepts) == 1 else "all")
    return score.metric, role, about, score.side, score.versus or "", score.detector.name if score.detector else ""


def _is_live(settings: Settings, verdict: Verdict) -> bool:
    known = ledger.read(settings.register_.ledger)
    live, evidence = known.aliases.get(CHAMPION), json_records.digest(verdict)
    return any(entry.version == live and entry.evidence == evidence for entry in known.entries if entry.version)
