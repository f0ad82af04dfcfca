"""What people said, and how long it takes until something comes of it. A report is an answer that marks the concept.

A release has learned from every answer that is no newer than the newest it was made from, which its version names
(`feedback_until`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import get_args, get_type_hints

from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.feedback.events import utc
from deleatur.operations.exporter.series import gauge, seconds
from deleatur.records.feedback import Feedback
from deleatur.registry import ledger
from deleatur.registry.decisions import registry_of
from deleatur.registry.mlflow_client import CHAMPION, Registry
from deleatur.stages import ingest
from deleatur.storage import files

ANSWERS = get_args(get_type_hints(Feedback)["answer"])
REPORTING = ("yes", "ranked")
HOUR, DAY = 3600, 86400
BUCKETS = (HOUR, 6 * HOUR, DAY, 2 * DAY, 7 * DAY, 30 * DAY)
"""Two days are what a law of the United States gives platforms to take a picture down."""


@dataclass(frozen=True)
class Answer:
    concept: str
    answer: str
    time: float
    """Unix seconds, as all times here."""


@dataclass(frozen=True)
class Fix:
    """A version that went live."""

    version: str
    time: float
    concepts: frozenset[str]
    until: float

    def learned(self, report: Answer) -> bool:
        return report.concept in self.concepts and report.time <= self.until


def said(settings: Settings) -> Iterator[Metric]:
    """What has arrived."""
    counts = Counter((a.concept, a.answer) for a in _answers(settings))
    yield gauge("feedback_answers", "Answers in the sources.", counts, "concept", "answer")


def ingested(settings: Settings) -> Iterator[Metric]:
    """What the last ingest made of it, if there was one."""
    path = settings.paths.feedback / "summary.json"
    if not path.is_file():
        return
    summary = files.read_json(path)
    rows = {("used",): summary["events"], ("quarantined",): summary["quarantined"]["rows"]}
    yield gauge("feedback_rows", "Rows that the last ingest used, and put aside because it could not.", rows, "as")
    agreed = {(name,): c["agreement"]["value"] for name, c in summary["concepts"].items()}
    known = {name: value for name, value in agreed.items() if value is not None}
    yield gauge("feedback_agreement", "How far raters agree; 1: always.", known, "concept")


def answered(settings: Settings) -> Iterator[Metric]:
    """Reports that what is live has not learned from, and how long the others waited for a release."""
    fixes, live = list(_fixes(settings)), ledger.read(settings.register_.ledger).aliases.get(CHAMPION)
    reports = [a for a in _answers(settings) if a.answer in REPORTING]
    waiting = [a for a in reports if not any(fix.learned(a) for fix in fixes if fix.version == live)]
    rows = {(name,): sum(a.concept == name for a in waiting) for name in settings.concepts}
    yield gauge("reports_waiting", "Reports that what is live has not learned from.", rows, "concept")
    oldest = {(name,): min(a.time for a in waiting if a.concept == name) for (name,), n in rows.items() if n}
    yield gauge("reports_oldest_timestamp_seconds", "When the oldest of these was made.", oldest, "concept")
    histogram = HistogramMetricFamily(
        "deleatur_report_to_release_seconds",
        "From a report to the first release that learned from it.",
        labels=["concept"],
    )
    for name in settings.concepts:
        first = ((a, next((f for f in fixes if f.learned(a)), None)) for a in reports if a.concept == name)
        waits = [max(0.0, fix.time - a.time) for a, fix in first if fix]
        counted = [(str(float(top)), float(sum(w <= top for w in waits))) for top in BUCKETS]
        histogram.add_metric([name], [*counted, ("+Inf", float(len(waits)))], sum(waits))
    yield histogram


def _answers(settings: Settings) -> list[Answer]:
    """Of the concepts that there are."""
    files = ((path, path.stat()) for path in ingest.find(settings.ingest.sources))
    read = (_read(path, facts.st_size, facts.st_mtime_ns) for path, facts in files)
    return [a for answers in read for a in answers if a.concept in settings.concepts]


@lru_cache(maxsize=256)
def _read(path: Path, size: int, changed: int) -> Sequence[Answer]:
    """The lines of a source that can be read; size and time say which state of the file this is."""
    found = []
    for line in files.read_lines(path):
        try:
            event = json.loads(line)
            moment = utc(event["created_at"])
            if moment and event["answer"] in ANSWERS:  # the word is a label: nobody may put a sentence there
                found.append(Answer(event["concept"], event["answer"], moment.timestamp()))
        except (ValueError, KeyError, TypeError):
            continue  # ingest says what is wrong with it
    return found


def _fixes(settings: Settings) -> Iterator[Fix]:
    """Every version that was ever live, in the order of their first times."""
    registry, seen = registry_of(settings), set[str]()
    for entry in ledger.read(settings.register_.ledger).entries:
        version = entry.aliases.get(CHAMPION)
        if version and version not in seen:
            seen.add(version)
            concepts, until = _made_from(registry, version)
            yield Fix(version, seconds(entry.time), concepts, seconds(until) if until else seconds(entry.time))


@cache
def _made_from(registry: Registry, version: str) -> tuple[frozenset[str], str]:
    """Concepts and `feedback_until` of a version, which never change; versions of an older deleatur lack the second."""
    try:
        tags = registry.tags(version)
    except DataError:  # somebody has deleted it
        return frozenset(), ""
    return frozenset(tags.get("concepts", "").split("+")), tags.get("feedback_until", "")
