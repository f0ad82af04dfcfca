"""What a flow can ask for, each a task in the current directory, the project's root.

Nothing is computed here. DVC decides whether a stage has to run and runs it in a process of its own; what has been
done by hand is recognised, and what is done here is recognised there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from deleatur.errors import ContinueMe, DeleaturError, ServiceError
from deleatur.records.report import Verdict
from deleatur.registry import approval
from deleatur.registry.decisions import STARTED_BY
from deleatur.storage import dvc, dvc_remote, json_records

HERE = Path()
"""The project's root: where a flow runs."""

OnGpu = Literal["reward", "invert", "erase", "attack", "sample", "evaluate"]
ON_GPU = frozenset(get_args(OnGpu))
"""Stages that load networks: they want a slot of their GPU's concurrency limit. Where there is none, they just run."""

SLOT = os.environ.get("DELEATUR_GPU", "gpu")
"""Name of that limit. Workers that share a GPU share its name."""
LEASE = 60.0
"""Seconds after which the slot of a process that vanished is free again."""

LOST_STATE = "Lost"
"""Name of the state of a run whose process has vanished: see flows/setup.py."""
LIVES = 20
"""Times that a run is started again by itself, before somebody has to look."""

UPDATE = 2.0
"""Seconds between two updates of a progress artifact: each is a request to the server."""


def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """A service may answer next time, a stage that was stopped goes on where it was; a wrong setting stays wrong."""
    return isinstance(state.result(raise_on_failure=False), ServiceError | ContinueMe)


RETRIED: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [5, 30, 120],
    "retry_condition_fn": worth_retrying,
    # DVC knows whether the work is done; a second memory could only disagree with it.
    "cache_policy": NO_CACHE,
}


@contextmanager
def ending_in_a_command() -> Iterator[None]:
    """What a flow fails with ends with the command to run next: its message is all that a notification shows."""
    try:
        if (lives := runtime.flow_run.run_count or 0) > LIVES:
            raise ServiceError(
                f"its process was lost {lives - 1} times", hint=f"prefect flow-run logs {runtime.flow_run.id}"
            )
        yield
    except DeleaturError as e:
        raise type(e)(f"{e}\nNext: {e.hint or 'deleatur check'}", hint=e.hint) from e


@task(task_run_name="{stage}", **RETRIED)
def reproduce(stage: str, how: Sequence[str] = (), root: Path = HERE) -> bool:
    """Brings one stage of dvc.yaml up to date; whether anything had to run. how: options of `dvc repro`."""
    told = Told(stage)
    with slot() if stage in ON_GPU else nullcontext():
        return dvc.reproduce(stage, root, get_run_logger().info, told, how)


@task(task_run_name="push", **RETRIED)
def push(root: Path, *stages: str) -> None:
    """What they have made, to the DVC remote: a network that is away for a minute costs no hours of work."""
    dvc_remote.push(root, *stages)


@task(task_run_name="pull", **RETRIED)
def pull(root: Path, *stages: str, all_of_it: bool = True) -> None:
    """What they have made, from the DVC remote."""
    dvc_remote.pull(root, *stages, all_of_it=all_of_it)


@task(**RETRIED)
def register() -> None:
    """Evidence, version and alias into MLflow; nothing where this verdict is registered already."""
    if creator := _creator():
        os.environ.setdefault(STARTED_BY, creator)
    dvc.perform("register", Path(), get_run_logger().info, Told("register"))


@task(**RETRIED)
def waiting(settings: Settings) -> tuple[str, str] | None:
    """(version, digest of its evidence) of the model that was just registered, if it waits for a decision."""
    return approval.waiting(settings)


@task(**RETRIED)
def decide(settings: Settings, found: tuple[str, str], approver: str, approved: bool, reason: str) -> None:
    """Carries out what a person decided about a version, on the evidence that was shown."""
    version, evidence = found
    carry_out = approval.promote if approved else approval.decline
    carry_out(settings, version, approver, reason=reason, evidence=evidence)


@task(cache_policy=NO_CACHE)
def publish(settings: Settings) -> Verdict:
    """The verdict, shown as an artifact of the run."""
    verdict = read(settings)
    create_markdown_artifact(page(settings, verdict), key="verdict", description=gate.headline(verdict))
    return verdict


def read(settings: Settings) -> Verdict:
    return json_records.read(settings.paths.verdict / "verdict.json", Verdict)


def page(settings: Settings, verdict: Verdict) -> str:
    """The verdict as Markdown: rules, margins and reasons, which hold no prompt and no picture."""
    margins = ["" if f.margin is None else f"{f.margin:+.3g}" for f in verdict.findings]
    rows = [f"| {f.rule} | {f.outcome} | {m} | {f.reason} |" for f, m in zip(verdict.findings, margins, strict=True)]
    return "\n".join(
        [
            f"# {', '.join(settings.targets)}: {gate.headline(verdict)}",
            *([f"**{gate.SIMULATED}**"] if verdict.simulated else []),
            "",
            "| rule | outcome | margin | reason |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Pictures and all numbers: `{settings.paths.verdict / 'report.html'}` of the workspace, and in MLflow.",
            "",
            f"report sha256:`{verdict.report}`  policy sha256:`{verdict.policy}`",
        ]
    )


@dataclass
class Told:
    """Keeps one progress artifact up to date while a stage runs; a stage that need not run gets none."""

    stage: str
    _artifact: UUID | None = field(default=None, init=False)
    _last: float = field(default=0.0, init=False)

    def __call__(self, p: dvc.Progress) -> None:
        now, whole = time.monotonic(), p.done >= p.total
        if now - self._last < UPDATE and not whole:
            return
        self._last, share, text = now, 100.0 * p.done / max(p.total, 1), f"{p.what}: {p.done} of {p.total} {p.note}"
        if self._artifact is None:
            key = f"progress-{self.stage}"
            self._artifact = create_progress_artifact(share, key=key, description=text)  # type: ignore[assignment]
        else:
            update_progress_artifact(self._artifact, share, description=text)


def _creator() -> str:
    """Who started this run, where the server knows: a user or, where nobody did, the schedule or the automation."""
    run = FlowRunContext.get()
    created = run.flow_run.created_by if run and run.flow_run else None
    return (created and (created.display_value or created.type)) or ""


def slot() -> AbstractContextManager[None]:
    """Of the GPU of this machine."""
    return concurrency(SLOT, occupy=1, lease_duration=LEASE)
