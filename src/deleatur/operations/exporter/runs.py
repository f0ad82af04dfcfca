"""Series about stage runs, from the event log of this workspace, and about its disk."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from prometheus_client import Metric

from deleatur.config.settings import Settings
from deleatur.operations.exporter.series import counter, gauge
from deleatur.runtime import event_log
from deleatur.runtime.event_log import Event

END_EVENTS = ("done", "interrupted", "failed")


def stage_metrics(settings: Settings) -> Iterator[Metric]:
    lines = event_log.read(settings.paths.checkpoints)
    stages = dict.fromkeys(line.stage for line in lines)
    lines_by_stage = {stage: [line for line in lines if line.stage == stage] for stage in stages}
    runs = Counter((stage, outcome) for stage, log in lines_by_stage.items() for outcome in _run_outcomes(log))
    yield counter("stage_runs", "Runs of a stage, by outcome.", runs, "stage", "outcome")
    seconds = {(stage,): sum(line.seconds for line in log) for stage, log in lines_by_stage.items()}
    yield counter("stage_seconds", "Duration of a stage's runs, killed ones aside.", seconds, "stage")
    last_seconds = {
        (stage,): line.seconds for stage, log in lines_by_stage.items() for line in log if line.kind == "done"
    }
    yield gauge("stage_last_seconds", "Time that the last complete run of a stage took.", last_seconds, "stage")
    lost_steps = {(stage,): sum(line.lost for line in log) for stage, log in lines_by_stage.items()}
    yield counter("steps_lost", "Steps that were computed again after a kill.", lost_steps, "stage")
    start_times = {(stage,): _start_time(log) for stage, log in lines_by_stage.items() if not _has_ended(log)}
    yield gauge("stage_began_timestamp_seconds", "Start of a run that has not ended.", start_times, "stage")


def disk_metrics(settings: Settings) -> Iterator[Metric]:
    usage = shutil.disk_usage(Path())
    yield gauge("disk_free_bytes", "Free on the disk of the workspace.", usage.free)
    yield gauge("disk_bytes", "Size of the disk of the workspace.", usage.total)


def _run_outcomes(lines: Sequence[Event]) -> Iterator[str]:
    """Outcome of each run that has ended; a run without an end that another one follows was killed."""
    runs = [line.kind for line in lines if line.kind != "resumed"]
    for kind, after in zip(runs, [*runs[1:], ""], strict=True):
        if kind in END_EVENTS:
            yield kind
        elif after == "started":
            yield "killed"


def _has_ended(lines: Sequence[Event]) -> bool:
    return next(line.kind for line in reversed(lines) if line.kind != "resumed") in END_EVENTS


def _start_time(lines: Sequence[Event]) -> float:
    return next(line.time for line in reversed(lines) if line.kind == "started")
