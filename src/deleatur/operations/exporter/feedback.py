"""Series about feedback: answers received, and how long reports wait for a release.

A report is an answer that labels an image as showing the concept. A version is trained on every answer up to its tag
`feedback_until`, the time of the newest one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import get_args, get_type_hints

from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.feedback.events import event_time
from deleatur.operations.exporter.series import gauge, unix_time
from deleatur.records.feedback import FeedbackEvent, FeedbackSummary
from deleatur.registry import ledger
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHAMPION, Registry
from deleatur.stages import ingest
from deleatur.storage import files

ANSWERS = get_args(get_type_hints(FeedbackEvent)["answer"])
REPORT_ANSWERS = ("yes", "ranked")
HOUR, DAY = 3600, 86400
BUCKETS = (HOUR, 6 * HOUR, DAY, 2 * DAY, 7 * DAY, 30 * DAY)
"""Seconds. The US TAKE IT DOWN Act gives platforms two days to remove an image."""


@dataclass(frozen=True)
class RecordedAnswer:
    concept: str
    answer: str
    time: float
    """Unix time, as all times in this module."""
    event_id: str
    replaces: str
    """Id of the answer that this one corrects or withdraws, if any."""


@dataclass(frozen=True)
class Champion:
    """A version that has been champion, and what it was trained on."""

    version: str
    time: float
    concepts: frozenset[str]
    feedback_until: float

    def covers(self, report: RecordedAnswer) -> bool:
        return report.concept in self.concepts and report.time <= self.feedback_until


def source_metrics(settings: Settings) -> Iterator[Metric]:
    """Answers in the sources."""
    counts = Counter((a.concept, a.answer) for a in _answers(settings))
    yield gauge("feedback_answers", "Answers in the sources.", counts, "concept", "answer")


def ingest_metrics(settings: Settings) -> Iterator[Metric]:
    """Summary of the last ingest, if there was one."""
    path = settings.paths.feedback / "summary.json"
    if not path.is_file():
        return
    summary = files.read_json_as(path, FeedbackSummary)
    rows = {("used",): summary.events, ("quarantined",): summary.quarantined.rows}
    yield gauge("feedback_rows", "Rows that the last ingest used, and that it quarantined.", rows, "status")
    agreement = {(name,): c.agreement.value for name, c in summary.concepts.items()}
    defined = {name: value for name, value in agreement.items() if value is not None}
    yield gauge("feedback_agreement", "Agreement of raters; 1: always.", defined, "concept")


def waiting_metrics(settings: Settings) -> Iterator[Metric]:
    """Reports that the champion was not trained on, and how long the others waited for a release."""
    current = ledger.read(settings.register_.ledger).aliases.get(CHAMPION)
    champions = list(_champions(settings))
    answers = _answers(settings)
    replaced = {a.replaces for a in answers if a.replaces}  # a report that was withdrawn no longer waits
    reports = [a for a in answers if a.answer in REPORT_ANSWERS and a.event_id not in replaced]
    waiting = [a for a in reports if not any(c.covers(a) for c in champions if c.version == current)]
    counts = {(name,): sum(a.concept == name for a in waiting) for name in settings.concepts}
    yield gauge("reports_waiting", "Reports that the champion was not trained on.", counts, "concept")
    oldest = {(name,): min(a.time for a in waiting if a.concept == name) for (name,), n in counts.items() if n}
    yield gauge("reports_oldest_timestamp_seconds", "Time of the oldest of these.", oldest, "concept")
    histogram = HistogramMetricFamily(
        "deleatur_report_to_release_seconds",
        "From a report to the first release that was trained on it.",
        labels=["concept"],
    )
    for name in settings.concepts:
        released = ((a, next((c for c in champions if c.covers(a)), None)) for a in reports if a.concept == name)
        waits = [max(0.0, champion.time - a.time) for a, champion in released if champion]
        buckets = [(str(float(top)), float(sum(w <= top for w in waits))) for top in BUCKETS]
        histogram.add_metric([name], [*buckets, ("+Inf", float(len(waits)))], sum(waits))
    yield histogram


def _answers(settings: Settings) -> list[RecordedAnswer]:
    """Answers about the concepts of params.yaml, from all sources."""
    sources = ((path, path.stat()) for path in ingest.find_sources(settings))
    by_source = (_read_source(path, stat.st_size, stat.st_mtime_ns) for path, stat in sources)
    return [a for answers in by_source for a in answers if a.concept in settings.concepts]


@lru_cache(maxsize=256)
def _read_source(path: Path, size: int, mtime_ns: int) -> Sequence[RecordedAnswer]:
    """Answers of the valid lines of a source. Size and time of change are part of the cache key only."""
    answers, now = [], datetime.now(UTC)
    for line in files.read_lines(path):
        try:
            event = json.loads(line)
            created_at = event_time(event["created_at"], now)
            if created_at and event["answer"] in ANSWERS:  # a label's values are fixed words, whatever a source holds
                ids = str(event.get("event_id")), str(event.get("replaces") or "")
                answers.append(RecordedAnswer(event["concept"], event["answer"], created_at.timestamp(), *ids))
        except (ValueError, KeyError, TypeError):
            continue  # ingest reports and quarantines it
    return answers


def _champions(settings: Settings) -> Iterator[Champion]:
    """Every version that has been champion, in the order in which they first were."""
    registry, seen = open_registry(settings), set[str]()
    for entry in ledger.read(settings.register_.ledger).entries:
        version = entry.aliases.get(CHAMPION)
        if version and version not in seen:
            seen.add(version)
            concepts, feedback_until = _version_sources(registry, version)
            yield Champion(version, unix_time(entry.time), concepts, unix_time(feedback_until or entry.time))


@cache
def _version_sources(registry: Registry, version: str) -> tuple[frozenset[str], str]:
    """Concepts and `feedback_until` of a version, which never change; versions of an older deleatur lack the second."""
    try:
        tags = registry.tags(version)
    except DataError:  # the version was deleted
        return frozenset(), ""
    return frozenset(tags.get("concepts", "").split("+")), tags.get("feedback_until", "")
