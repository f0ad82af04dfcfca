"""What runs cost: the journal of this workspace, and the disk it lies on."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from prometheus_client import Metric

from deleatur.config.settings import Settings
from deleatur.operations.exporter.series import counter, gauge
from deleatur.runtime import event_log
from deleatur.runtime.event_log import Line

ENDS = ("done", "stopped", "failed")


def ran(settings: Settings) -> Iterator[Metric]:
    lines = event_log.read(settings.paths.state)
    stages = dict.fromkeys(line.stage for line in lines)
    own = {stage: [line for line in lines if line.stage == stage] for stage in stages}
    runs = Counter((stage, how) for stage, mine in own.items() for how in _ended(mine))
    yield counter("stage_runs", "Runs of a stage that ended, and how.", runs, "stage", "how")
    took = {(stage,): sum(line.seconds for line in mine) for stage, mine in own.items()}
    yield counter("stage_seconds", "Time that runs of a stage took, those aside that were killed.", took, "stage")
    last = {(stage,): line.seconds for stage, mine in own.items() for line in mine if line.what == "done"}
    yield gauge("stage_last_seconds", "Time that the last whole run of a stage took.", last, "stage")
    lost = {(stage,): sum(line.lost for line in mine) for stage, mine in own.items()}
    yield counter("steps_lost", "Steps that were done, and done again because nobody had saved them.", lost, "stage")
    begun = {(stage,): _began(mine) for stage, mine in own.items() if not _has_ended(mine)}
    yield gauge("stage_began_timestamp_seconds", "When a run began that has not ended.", begun, "stage")


def disk(settings: Settings) -> Iterator[Metric]:
    found = shutil.disk_usage(Path())
    yield gauge("disk_free_bytes", "Free on the disk of the workspace.", found.free)
    yield gauge("disk_bytes", "Size of that disk.", found.total)


def _ended(lines: Sequence[Line]) -> Iterator[str]:
    """How each run ended; one that another followed without an end was killed."""
    runs = [line.what for line in lines if line.what != "resumed"]
    for what, after in zip(runs, [*runs[1:], ""], strict=True):
        if what in ENDS:
            yield what
        elif after == "began":
            yield "killed"


def _has_ended(lines: Sequence[Line]) -> bool:
    return next(line.what for line in reversed(lines) if line.what != "resumed") in ENDS


def _began(lines: Sequence[Line]) -> float:
    return next(line.time for line in reversed(lines) if line.what == "began")
