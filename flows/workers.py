"""Runs jobs on workers: each is a run of a deployment of the pool `gpu`, in a checkout of its own.

A worker receives the commit and params.yaml; for a stage also dvc.lock, and it pulls inputs from and pushes outputs to
the DVC remote. The stage's entry in dvc.lock and its event log come back as artifacts of the run. The calling flow
waits meanwhile, without a GPU slot.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import httpx
from prefect import runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling
from tasks import PROJECT, GpuStage, pull, push

from deleatur.config.settings import Settings
from deleatur.errors import DataError, DeleaturError, Interrupted, ServiceError, SettingsError
from deleatur.redaction import redact
from deleatur.registry import mlflow_client
from deleatur.runtime import event_log
from deleatur.stages import STAGES
from deleatur.storage import dvc, dvc_remote, git

STAGE_DEPLOYMENT = "stage/gpu"

Placement = Literal["auto", "local", "workers"]
ReturnKind = Literal["lock", "event-log", "canary"]
FENCE = "```yaml\n"
"""A code fence, so that Prefect's UI shows an artifact verbatim."""

MAX_LOST_WORKERS = 10
"""Workers that a stage may lose in a row before its flow fails."""
POLL_INTERVAL = 5.0
"""Seconds between requests for the state of a worker's run."""

COMMITTED_PATHS = ("src", "flows", "prompts", "dvc.yaml", ".dvcignore", ".dvc/config")
"""What a worker uses from its checkout, besides the networks."""

REPOSITORY_VARIABLE = "DELEATUR_REPOSITORY"
"""Environment variable with the repository that workers clone, if it is not this repository's origin."""

ACTIVE_STATES = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED)


@dataclass(frozen=True)
class WorkerJob:
    """A job for a worker, by all its inputs."""

    deployment: str
    name: str
    """For example the stage."""
    commit: str
    parameters: Mapping[str, Any]
    """Parameters of the deployment's flow, without storage locations."""

    @cached_property
    def digest(self) -> str:
        """Identity of the job: an active run of the same job is waited for, an interrupted one is resumed."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    @property
    def storage_uri(self) -> str | None:
        """The job's own folder below `workers.checkpoint_uri`, which all machines reach."""
        if (base := Settings.load().workers.checkpoint_uri) is None:
            return None
        base = base if "://" in base else str(Path(base).resolve())
        return f"{base.rstrip('/')}/{self.name}-{self.digest}"


def use_workers(placement: Placement, deployment: str = STAGE_DEPLOYMENT) -> bool:
    """Whether to use workers. `auto`: if the server has the deployment that they run."""
    if placement == "auto":
        return bool(PREFECT_API_URL.value()) and _is_deployed(deployment)
    if placement == "workers" and not _is_deployed(deployment):
        raise SettingsError(
            f"expected the deployment {deployment}, which workers run; this server does not have it",
            hint="prefect --no-prompt deploy --all",
        )
    return placement == "workers"


def _worker_was_lost(task: Any, task_run: Any, state: Any) -> bool:
    """Only a lost worker is retried, on another one: all other failures the worker has retried itself."""
    return isinstance(state.result(raise_on_failure=False), Interrupted)


WORKER_RETRY_OPTIONS: dict[str, Any] = {
    "retries": MAX_LOST_WORKERS,
    "retry_delay_seconds": [2, 10, 60],
    "retry_condition_fn": _worker_was_lost,
    "cache_policy": NO_CACHE,
}
"""Options of a task that waits for a worker."""


@task(task_run_name="{stage} on a worker", **WORKER_RETRY_OPTIONS)
def run_on_worker(stage: GpuStage, dvc_options: Sequence[str] = (), root: Path = PROJECT) -> bool:
    """Bring one stage of dvc.yaml up to date on a worker and pull its outputs; True if it had to run.

    dvc_options: options of `dvc repro`.
    """
    if not dvc.status(root, stage):
        return False
    store = dvc_remote.remote_url(root)
    push(root, *STAGES[: STAGES.index(stage) + 1])  # its own outputs too: the worker reuses images already sampled
    parameters = {
        "name": stage,
        "params": redact((root / "params.yaml").read_text("utf-8")),
        "lock": redact((root / "dvc.lock").read_text("utf-8")),
        "dvc_options": list(dvc_options),
    }
    job = WorkerJob(STAGE_DEPLOYMENT, stage, require_commit(root), parameters)
    if job.storage_uri is None:
        get_run_logger().info("workers.checkpoint_uri is not set: if a worker is lost, %s restarts", stage)
    run = run_job(job, store=redact(store))
    if lines := returned_text("event-log", stage, run):
        event_log.merge(root / Settings.load(root / "params.yaml").paths.checkpoints, lines)
    require_completed(stage, run)
    dvc_remote.set_lock_entry(stage, require_returned_text("lock", stage, run), root)
    pull(root, stage)
    return True


def require_published() -> None:
    """Raises SettingsError if workers would check out other files than those of this workspace."""
    commit, models = require_commit(PROJECT), Settings.load().paths.models
    if changed := git.uncommitted_files(PROJECT, *COMMITTED_PATHS, str(models)):
        raise SettingsError(
            f"workers check out the commit, and {', '.join(changed[:3])} has uncommitted changes", hint="git commit"
        )
    if not git.is_pushed(PROJECT):
        raise SettingsError(
            f"workers clone {git.origin_url(PROJECT)}, which lacks the commit {commit}",
            hint="git push",
        )


def require_commit(root: Path) -> str:
    if commit := git.current_commit(root).hash:
        return commit
    raise SettingsError("expected a git repository with a commit, which workers check out", hint="git commit")


def cancel_worker_runs(flow: Any, flow_run: FlowRun, state: Any) -> None:
    """Hook for `on_cancellation`: cancel the worker runs that a cancelled flow has started."""
    children = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run.id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(ACTIVE_STATES))),
    )
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=children):
            client.set_flow_run_state(run.id, Cancelling(message=f"Cancelled with {flow_run.name}"))


def return_text(kind: ReturnKind, name: str, text: str) -> None:
    """On the worker: return a text to the calling flow, as an artifact of the run."""
    create_markdown_artifact(f"{FENCE}{text}```", key=f"{kind}-{name}", description=f"The {kind} of {name}")


def returned_text(kind: ReturnKind, name: str, run: FlowRun) -> str:
    """A text that the worker's run has returned; empty if it did not come that far."""
    of_run = ArtifactFilter(
        key=ArtifactFilterKey(any_=[f"{kind}-{name}"]), flow_run_id=ArtifactFilterFlowRunId(any_=[run.id])
    )
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(artifact_filter=of_run, sort=ArtifactSort.CREATED_DESC, limit=1)
    return str(artifacts[0].data).removeprefix(FENCE).removesuffix("```") if artifacts else ""


def require_returned_text(kind: ReturnKind, name: str, run: FlowRun) -> str:
    if text := returned_text(kind, name, run):
        return text
    raise DataError(f"{name}: its worker returned no {kind}", hint=f"prefect flow-run inspect {run.id}")


def run_job(job: WorkerJob, **parameters: str) -> FlowRun:
    """Have a worker run the job, or wait for a worker that already does; its run, in a final state."""
    run = _existing_run(job) or submit(job, **parameters)
    with get_client(sync_client=True) as client:
        while not (run.state and run.state.is_final()):
            time.sleep(POLL_INTERVAL)
            with suppress(httpx.HTTPError):  # the server may be restarting
                run = client.read_flow_run(run.id)
    return run


def _is_deployed(name: str) -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(name)
        except ObjectNotFound:
            return False
    return True


def _existing_run(job: WorkerJob) -> FlowRun | None:
    """An active or completed run of this job that an earlier attempt of this flow run has started."""
    since = runtime.flow_run.scheduled_start_time
    done = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED]))
    live = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(ACTIVE_STATES)))
    tagged = FlowRunFilterTags(all_=[job.digest])
    with get_client(sync_client=True) as client:
        for run_filter in (
            FlowRunFilter(tags=tagged, state=live),
            FlowRunFilter(tags=tagged, state=done, start_time=FlowRunFilterStartTime(after_=since)),
        ):
            if runs := client.read_flow_runs(flow_run_filter=run_filter, sort=FlowRunSort.START_TIME_DESC, limit=1):
                return runs[0]
    return None


def submit(job: WorkerJob, **parameters: str) -> FlowRun:
    env, repository = {"DELEATUR_COMMIT": job.commit}, os.environ.get(REPOSITORY_VARIABLE) or git.origin_url(PROJECT)
    if not repository.startswith("http") or redact(repository) == repository:
        env[REPOSITORY_VARIABLE] = repository  # a URL with a password stays out of the run's parameters
    return run_deployment(  # type: ignore[return-value]
        job.deployment,
        parameters={**job.parameters, **parameters, "storage_uri": job.storage_uri},
        job_variables={"env": env | _tracking_environment(Settings.load())},
        flow_run_name=f"{job.name} {job.digest[:6]}",
        tags=[job.digest],
        timeout=0,
    )


def _tracking_environment(settings: Settings) -> dict[str, str]:
    """The registry's URI, for the worker's environment. A SQLite file is reached only by workers on this machine. A URI
    with a password is not passed on: workers have it in their own environment.
    """
    sqlite, uri = "sqlite:///", mlflow_client.ENVIRONMENT_URI or settings.register_.tracking_uri
    if uri.startswith(sqlite):
        return {"MLFLOW_TRACKING_URI": sqlite + str(Path(uri.removeprefix(sqlite)).resolve())}
    return {} if redact(uri) != uri else {"MLFLOW_TRACKING_URI": uri}


def require_completed(name: str, run: FlowRun) -> None:
    """Raises the error of the worker's flow, or Interrupted if the worker was lost."""
    state, log_command = run.state, f"prefect flow-run logs {run.id}"
    assert state is not None
    if state.is_completed():
        return
    if state.is_crashed() and run.start_time:
        raise Interrupted(f"{name}: its worker was lost: {state.message}", hint="run the flow again, which resumes")
    if state.is_crashed():
        raise ServiceError(f"{name}: its worker could not check out the commit: {state.message}", hint=log_command)
    if state.is_failed():
        raise _as_error(state.message or "", log_command)
    raise DeleaturError(f"{name}: its run on a worker was cancelled", hint="run the flow again")


def _as_error(message: str, log_command: str) -> DeleaturError:
    """The error that a failed run's message describes; its last line is the hint of `error_with_next_command`."""
    text, _, hint = message.partition("\nNext: ")
    text = text.removeprefix("Flow run encountered an exception: ")
    error_class = next((k for k in dvc.STAGE_ERRORS if text.startswith(f"{k.__name__}: ")), ServiceError)
    return error_class(text.removeprefix(f"{error_class.__name__}: "), hint=hint or log_command)
