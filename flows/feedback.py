"""Looks for new feedback and starts the chain when there is enough: `python flows/feedback.py`, or its deployment."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from erase import erase
from here import run_here
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterState
from prefect.client.schemas.filters import FlowRunFilterStateType as OfType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Cancelled
from tasks import HERE, RETRIED, ending_in_a_command, reproduce

from deleatur.config.settings import Settings
from deleatur.registry.decisions import registry_of
from deleatur.registry.mlflow_client import CHALLENGER
from deleatur.storage import dvc_remote, files, remote

CHAIN = "erase/chain"
AT_WORK = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED)
"""A run that waits for an answer goes on with the feedback that was shown to whoever answers."""


@flow(name="feedback")
def feedback(min_new: int | None = None) -> int:
    """Fetches what has arrived in `feedback.inbox`, ingests it, and starts the chain when there is enough that the last
    report does not know. How many events that are. Does nothing while a run of the chain is at work or due.

    Args:
        min_new: Events about the targets that are enough; left out, it is `feedback.min_new` of params.yaml.
    """
    with ending_in_a_command():
        settings, log = Settings.load(), get_run_logger()
        enough = min_new or settings.feedback.min_new
        withdraw(settings)
        if chain_is_at_work():
            log.info("A run of the chain is at work, or waits for an answer; feedback is looked at when it has ended")
            return 0
        fetch(settings)
        reproduce("ingest")
        now = counted(settings)
        new = sum(now.values()) - sum(known(settings).values())
        log.info("%d new events about %s; %d start the chain", new, ", ".join(settings.targets), enough)
        if new >= enough:
            start(settings)
        return new


@task(**RETRIED)
def fetch(settings: Settings) -> None:
    if inbox := settings.feedback.inbox:
        remote.fetch(inbox, Path(settings.ingest.sources[0]).parent)


def counted(settings: Settings) -> dict[str, int]:
    """Target → events about it."""
    return _events(files.read_json(settings.paths.feedback / "summary.json"), settings)


def known(settings: Settings) -> dict[str, int]:
    """As above, when the last report was made. Events are only ever added."""
    text = dvc_remote.last_read("evaluate", settings.paths.feedback, "summary.json", HERE)
    return _events(json.loads(text), settings) if text else {}


@task(cache_policy=NO_CACHE)
def start(settings: Settings) -> None:
    """One run for one state of the feedback: a run that failed is not begun again by the same answers."""
    digest = files.read_json(settings.paths.feedback / "summary.json")["feedback"]
    try:
        run_deployment(CHAIN, timeout=0, as_subflow=False, idempotency_key=f"feedback-{digest}")
    except ObjectNotFound:  # nothing is deployed here
        erase()


def chain_is_at_work() -> bool:
    """Or due: what its schedule has planned for later is neither."""
    now = datetime.now(UTC)
    return any(run.state_name != "Scheduled" or (run.expected_start_time or now) <= now for run in _chains(*AT_WORK))


def withdraw(settings: Settings) -> None:
    """Cancels runs that are suspended for an answer which has been given elsewhere, on the command line for one."""
    waits = [run for run in _chains(StateType.PAUSED) if run.state and run.state.name == "Suspended"]
    if waits and registry_of(settings).alias(CHALLENGER) is None:
        with get_client(sync_client=True) as client:
            for run in waits:
                client.set_flow_run_state(run.id, Cancelled(message="It has been decided; nothing waits for an answer"))


def _chains(*states: StateType) -> list[FlowRun]:
    """Runs of the chain in one of these states."""
    asked = FlowRunFilter(state=FlowRunFilterState(type=OfType(any_=list(states))))
    chain = FlowFilter(name=FlowFilterName(any_=[CHAIN.partition("/")[0]]))
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_filter=chain, flow_run_filter=asked)


def _events(summary: dict[str, dict[str, dict[str, int]]], settings: Settings) -> dict[str, int]:
    return {name: summary["concepts"].get(name, {}).get("events", 0) for name in settings.targets}


if __name__ == "__main__":
    run_here(feedback)
