"""Tasks of the flows. They run in the current directory, the project's root.

Tasks compute nothing themselves: DVC decides whether a stage has to run, and runs it in a subprocess. So flows and the
command line share all results.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import UUID

from prefect import runtime, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from deleatur import gate
from deleatur.config.settings import Settings
from deleatur.errors import DeleaturError, Interrupted, ServiceError
from deleatur.markdown import escape_markdown
from deleatur.records.report import Verdict
from deleatur.redaction import redact
from deleatur.registry import approval
from deleatur.registry.decisions import STARTED_BY
from deleatur.storage import dvc, dvc_remote, json_records, processes

PROJECT = Path()
"""The project's root, which flows run in."""

GpuStage = Literal["reward", "invert", "erase", "attack", "sample", "evaluate"]
GPU_STAGES = frozenset(get_args(GpuStage))
"""Stages that load networks and take a slot of their GPU's concurrency limit. Without such a limit they just run."""

GPU_LIMIT = os.environ.get("DELEATUR_GPU", "gpu")
"""Name of that concurrency limit. Workers that share a GPU share the name."""
LEASE_SECONDS = 60.0
"""Seconds until the slot of a killed process is free again."""

LOST_STATE = "Lost"
"""Name of the state of a run whose process was killed, which an automation of flows/setup.py sets."""
MAX_RESTARTS = 20
"""Automatic restarts of a run before it fails."""

UPDATE_INTERVAL = 2.0
"""Seconds between updates of a progress artifact, each a request to the server."""


class RedactedRecord(logging.LogRecord):
    """A log record without credentials: messages of libraries, and the causes in a stack trace, may quote addresses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with suppress(TypeError, ValueError, KeyError):  # a wrong format string: the handler reports it
            self.msg, self.args = redact(self.getMessage()), ()
        if self.exc_info:
            self.exc_text = redact(logging.Formatter().formatException(self.exc_info))  # formatters use this one


logging.setLogRecordFactory(RedactedRecord)  # of every logger of this process: Prefect sends all to its server


def is_retryable(task: Any, task_run: Any, state: Any) -> bool:
    """Whether a retry can succeed: a service may respond again, an interrupted stage resumes; settings stay wrong."""
    return isinstance(state.result(raise_on_failure=False), ServiceError | Interrupted)


RETRY_OPTIONS: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [5, 30, 120],
    "retry_condition_fn": is_retryable,
    # DVC decides whether the work is done; a second cache could contradict it.
    "cache_policy": NO_CACHE,
}


@contextmanager
def error_with_next_command() -> Iterator[None]:
    """Append the next command to an error's message, which is all of it that a notification shows."""
    try:
        if (runs := runtime.flow_run.run_count or 0) > MAX_RESTARTS:
            raise ServiceError(
                f"its process was lost {runs - 1} times", hint=f"prefect flow-run logs {runtime.flow_run.id}"
            )
        yield
    except DeleaturError as e:
        raise type(e)(f"{e}\nNext: {e.hint or 'deleatur check'}", hint=e.hint) from e


@task(task_run_name="{stage}", **RETRY_OPTIONS)
def reproduce(stage: str, dvc_options: Sequence[str] = (), root: Path = PROJECT) -> bool:
    """Bring one stage of dvc.yaml up to date; True if it had to run. dvc_options: options of `dvc repro`."""
    progress = ProgressArtifact(stage)
    with gpu_slot() if stage in GPU_STAGES else nullcontext():
        return dvc.reproduce(stage, root, get_run_logger().info, progress, dvc_options)


@task(task_run_name="push", **RETRY_OPTIONS)
def push(root: Path, *stages: str) -> None:
    """Push the stages' outputs to the DVC remote; a task of its own, so that a retry does not repeat the stage."""
    dvc_remote.push(root, *stages)


@task(task_run_name="pull", **RETRY_OPTIONS)
def pull(root: Path, *stages: str, complete: bool = True) -> None:
    """Pull the stages' outputs from the DVC remote."""
    dvc_remote.pull(root, *stages, complete=complete)


@task(**RETRY_OPTIONS)
def register() -> None:
    """Register evidence, version and alias in MLflow; does nothing if this verdict is registered already."""
    if creator := _creator():
        os.environ.setdefault(STARTED_BY, creator)
    dvc.run_untracked("register", Path(), get_run_logger().info, ProgressArtifact("register"))


@task(**RETRY_OPTIONS)
def pending_version(settings: Settings) -> tuple[str, str] | None:
    """(version, digest of its evidence) of the challenger, if it waits for a decision."""
    return approval.pending_approval(settings)


@task(**RETRY_OPTIONS)
def decide(settings: Settings, pending: tuple[str, str], approver: str, approved: bool, reason: str) -> None:
    """Record and carry out a person's decision about a version, on the evidence that was shown."""
    version, evidence = pending
    action = approval.promote if approved else approval.decline
    action(settings, version, approver, reason=reason, evidence=evidence)


@task(cache_policy=NO_CACHE)
def publish_verdict(settings: Settings) -> Verdict:
    """Read the verdict and publish it as an artifact of the run."""
    verdict = read_verdict(settings)
    create_markdown_artifact(verdict_markdown(settings, verdict), key="verdict", description=gate.headline(verdict))
    return verdict


def read_verdict(settings: Settings) -> Verdict:
    return json_records.read(settings.paths.verdict / "verdict.json", Verdict)


def verdict_markdown(settings: Settings, verdict: Verdict) -> str:
    """The verdict as Markdown: rules, margins and reasons, without prompts or images."""
    margins = ["" if f.margin is None else f"{f.margin:+.3g}" for f in verdict.findings]
    rows = [
        f"| {escape_markdown(f.rule)} | {f.outcome} | {margin} | {escape_markdown(f.reason)} |"
        for f, margin in zip(verdict.findings, margins, strict=True)
    ]
    return "\n".join(
        [
            f"# {escape_markdown(', '.join(settings.targets))}: {gate.headline(verdict)}",
            *([f"**{gate.SIMULATED_NOTICE}**"] if verdict.simulated else []),
            "",
            "| rule | outcome | margin | reason |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Images and all scores: `{settings.paths.verdict / 'report.html'}` of the workspace, and in MLflow.",
            "",
            f"report sha256:`{verdict.report}`  policy sha256:`{verdict.policy}`",
        ]
    )


@dataclass
class ProgressArtifact:
    """Updates one progress artifact while a stage runs. A stage that is up to date creates none."""

    stage: str
    _artifact: UUID | None = field(default=None, init=False)
    _updated: float = field(default=0.0, init=False)

    def __call__(self, p: processes.StageProgress) -> None:
        now = time.monotonic()
        if now - self._updated < UPDATE_INTERVAL and p.done < p.total:
            return
        self._updated = now
        percent, text = 100.0 * p.done / max(p.total, 1), f"{p.task}: {p.done} of {p.total} {p.note}"
        if self._artifact is None:
            key = f"progress-{self.stage}"
            self._artifact = create_progress_artifact(percent, key=key, description=text)  # type: ignore[assignment]
        else:
            update_progress_artifact(self._artifact, percent, description=text)


def _creator() -> str:
    """Who or what started this run, by the server: a user, a schedule or an automation. Empty: unknown."""
    run = FlowRunContext.get()
    created = run.flow_run.created_by if run and run.flow_run else None
    return (created and (created.display_value or created.type)) or ""


def gpu_slot() -> AbstractContextManager[None]:
    """Hold a slot of this machine's GPU."""
    return concurrency(GPU_LIMIT, occupy=1, lease_duration=LEASE_SECONDS)
