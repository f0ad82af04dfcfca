"""Work on other machines: one run each of a deployment of the pool `gpu`, in a checkout of its own.

A worker gets the commit and params.yaml; for a stage dvc.lock too, and it takes all else from the DVC remote, which it
also leaves its products in. What dvc.lock then says of the stage, and the journal, come back as artifacts of the run.
Whoever asked waits meanwhile, and holds no slot of a GPU.
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
from tasks import HERE, OnGpu, pull, push

from deleatur.config.settings import Settings
from deleatur.errors import ContinueMe, DataError, DeleaturError, ServiceError, SettingsError
from deleatur.registry import mlflow_client
from deleatur.runtime import event_log
from deleatur.stages import STAGES
from deleatur.storage import dvc, dvc_remote
from deleatur.storage.remote import without_password

STAGE = "stage/gpu"

Where = Literal["auto", "here", "workers"]
Back = Literal["lock", "journal", "canary"]
FENCE = "```yaml\n"
"""So that its page shows an artifact as it is."""

LOST = 10
"""Workers that a stage may lose one after the other, before somebody has to look."""
POLL = 5.0
"""Seconds between two looks at the run of a worker."""

CODE = ("src", "flows", "prompts", "dvc.yaml", ".dvcignore", ".dvc/config")
"""What a worker takes from the commit, beside the networks."""

REPOSITORY = "DELEATUR_REPOSITORY"
"""Environment variable with where workers clone from, where that is not the origin of the repository here."""

LIVE = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED)


@dataclass(frozen=True)
class Job:
    """All that a worker has to be told to do one thing."""

    deployment: str
    what: str
    """The stage, for one."""
    commit: str
    parameters: Mapping[str, Any]
    """Of the deployment's flow, but for places that things are left at."""

    @cached_property
    def digest(self) -> str:
        """What it is known by: a run of the same job is waited for, and gone on with where it was stopped."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    @property
    def state(self) -> str | None:
        """A place of its own that other machines reach, below `workers.state`."""
        if (place := Settings.load().workers.state) is None:
            return None
        place = place if "://" in place else str(Path(place).resolve())
        return f"{place.rstrip('/')}/{self.what}-{self.digest}"


def there(where: Where, deployment: str = STAGE) -> bool:
    """Whether work goes to workers. `auto`: where a server knows the deployment that they do it by."""
    if where == "auto":
        return bool(PREFECT_API_URL.value()) and _deployed(deployment)
    if where == "workers" and not _deployed(deployment):
        raise SettingsError(
            f"expected the deployment {deployment}, by which workers get their work; this server has none",
            hint="prefect --no-prompt deploy --all",
        )
    return where == "workers"


def _lost(task: Any, task_run: Any, state: Any) -> bool:
    """Another worker goes on where a lost one was. All else the worker has tried again itself."""
    return isinstance(state.result(raise_on_failure=False), ContinueMe)


REPLACED: dict[str, Any] = {
    "retries": LOST,
    "retry_delay_seconds": [2, 10, 60],
    "retry_condition_fn": _lost,
    "cache_policy": NO_CACHE,
}
"""A task that waits for a worker."""


@task(task_run_name="{stage} on a worker", **REPLACED)
def send(stage: OnGpu, how: Sequence[str] = (), root: Path = HERE) -> bool:
    """Brings one stage of dvc.yaml up to date on a worker, and its products here; whether there was anything to do.

    how: options of `dvc repro`.
    """
    if not dvc.status(root, stage):
        return False
    store = dvc_remote.store(root)
    push(root, *STAGES[: STAGES.index(stage) + 1])  # its own too: what it has drawn is not drawn again
    lock = (root / "dvc.lock").read_text("utf-8")
    params = (root / "params.yaml").read_text("utf-8")
    job = Job(STAGE, stage, commit_of(root), {"name": stage, "params": params, "lock": lock, "how": list(how)})
    if job.state is None:
        get_run_logger().info("workers.state is not set: where a worker is lost, %s starts anew", stage)
    run = carry_out(job, store=store)
    if lines := handed_back("journal", stage, run):
        event_log.adopt(root / Settings.load(root / "params.yaml").paths.state, lines)
    demand_done(stage, run)
    dvc_remote.enter(stage, demanded_back("lock", stage, run), root)
    pull(root, stage)
    return True


def demand_published() -> None:
    """Raises SettingsError where workers would not get what lies here."""
    commit, models = commit_of(HERE), Settings.load().paths.models
    if changed := dvc_remote.uncommitted(HERE, *CODE, str(models)):
        raise SettingsError(
            f"workers check out the commit, and {', '.join(changed[:3])} is not as it is there", hint="git commit"
        )
    if not dvc_remote.published(HERE):
        raise SettingsError(
            f"workers clone {without_password(dvc_remote.origin(HERE))}, which lacks the commit {commit}",
            hint="git push",
        )


def commit_of(root: Path) -> str:
    if found := dvc.commit(root).hash:
        return found
    raise SettingsError("expected a git repository with a commit, which workers check out", hint="git commit")


def call_back(flow: Any, flow_run: FlowRun, state: Any) -> None:
    """Who cancels a flow wants no stage of it computed on: a hook for `on_cancellation`."""
    sent = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run.id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(LIVE))),
    )
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=sent):
            client.set_flow_run_state(run.id, Cancelling(message=f"Cancelled with {flow_run.name}"))


def hand_back(what: Back, of: str, text: str) -> None:
    """On the worker: what dvc.lock says of the stage that has just run; what the journal says, however it ended."""
    create_markdown_artifact(f"{FENCE}{text}```", key=f"{what}-{of}", description=f"The {what} of {of}")


def handed_back(what: Back, of: str, run: FlowRun) -> str:
    """Nothing where the worker did not come that far."""
    of_run = ArtifactFilter(
        key=ArtifactFilterKey(any_=[f"{what}-{of}"]), flow_run_id=ArtifactFilterFlowRunId(any_=[run.id])
    )
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=of_run, sort=ArtifactSort.CREATED_DESC, limit=1)
    return str(found[0].data).removeprefix(FENCE).removesuffix("```") if found else ""


def demanded_back(what: Back, of: str, run: FlowRun) -> str:
    if text := handed_back(what, of, run):
        return text
    raise DataError(f"{of}: its worker handed nothing back", hint=f"prefect flow-run inspect {run.id}")


def carry_out(job: Job, **places: str) -> FlowRun:
    """Has a worker do it, or waits for the one that does it already; its run, when that has ended somehow."""
    run = _under_way(job) or submit(job, **places)
    with get_client(sync_client=True) as client:
        while not (run.state and run.state.is_final()):
            time.sleep(POLL)
            with suppress(httpx.HTTPError):  # a server that is started anew is asked again
                run = client.read_flow_run(run.id)
    return run


def _deployed(name: str) -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(name)
        except ObjectNotFound:
            return False
    return True


def _under_way(job: Job) -> FlowRun | None:
    """A run of this job that another life of this flow has begun, and that has not failed."""
    since = runtime.flow_run.scheduled_start_time
    done = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED]))
    live = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(LIVE)))
    mine = FlowRunFilterTags(all_=[job.digest])
    with get_client(sync_client=True) as client:
        for filtered in (
            FlowRunFilter(tags=mine, state=live),
            FlowRunFilter(tags=mine, state=done, start_time=FlowRunFilterStartTime(after_=since)),
        ):
            if found := client.read_flow_runs(flow_run_filter=filtered, sort=FlowRunSort.START_TIME_DESC, limit=1):
                return found[0]
    return None


def submit(job: Job, **places: str) -> FlowRun:
    env, repository = {"DELEATUR_COMMIT": job.commit}, os.environ.get(REPOSITORY) or dvc_remote.origin(HERE)
    if not repository.startswith("http") or without_password(repository) == repository:
        env[REPOSITORY] = repository  # what holds a password is in the workers' own environment
    return run_deployment(  # type: ignore[return-value]
        job.deployment,
        parameters={**job.parameters, **places, "state": job.state},
        job_variables={"env": env | _tracking(Settings.load())},
        flow_run_name=f"{job.what} {job.digest[:6]}",
        tags=[job.digest],
        timeout=0,
    )


def _tracking(settings: Settings) -> dict[str, str]:
    """Where the registry is, as it is known here. A database that lies here is at its place on this machine's workers
    only. What holds a password goes nowhere: workers have an environment of their own.
    """
    folder, name = "sqlite:///", mlflow_client.GIVEN or settings.register_.tracking_uri
    if name.startswith(folder):
        return {"MLFLOW_TRACKING_URI": folder + str(Path(name.removeprefix(folder)).resolve())}
    return {} if "@" in name else {"MLFLOW_TRACKING_URI": name}


def demand_done(what: str, run: FlowRun) -> None:
    """Raises what the worker's flow raised, ContinueMe where its worker was lost."""
    state, look = run.state, f"prefect flow-run logs {run.id}"
    assert state is not None
    if state.is_completed():
        return
    if state.is_crashed() and run.start_time:
        raise ContinueMe(f"{what}: its worker was lost: {state.message}", hint="run the flow again, to go on")
    if state.is_crashed():
        raise ServiceError(f"{what}: its worker could not check out what it was to run: {state.message}", hint=look)
    if state.is_failed():
        raise _raised(state.message or "", look)
    raise DeleaturError(f"{what}: its run on a worker was cancelled", hint="run the flow again")


def _raised(message: str, look: str) -> DeleaturError:
    """A flow's message, `tasks.ending_in_a_command` at its end, as the error that it was."""
    words, _, hint = message.partition("\nNext: ")
    words = words.removeprefix("Flow run encountered an exception: ")
    kind = next((k for k in dvc.KINDS if words.startswith(f"{k.__name__}: ")), ServiceError)
    return kind(words.removeprefix(f"{kind.__name__}: "), hint=hint or look)
