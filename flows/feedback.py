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
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from tasks import HERE, RETRIED, ending_in_a_command, reproduce

from deleatur.io import exchange, objects, tables
from deleatur.settings import Settings

CHAIN = "erase/chain"
AT_WORK = [StateType.PENDING, StateType.RUNNING, StateType.PAUSED]
"""A run that waits for a person is to find the feedback that the person was shown."""


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
        if chain_is_at_work():
            log.info("A run of the chain is at work; feedback is looked at when it has ended")
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
        objects.fetch(inbox, Path(settings.ingest.sources[0]).parent)


def counted(settings: Settings) -> dict[str, int]:
    """Target → events about it."""
    return _events(tables.read_json(settings.paths.feedback / "summary.json"), settings)


def known(settings: Settings) -> dict[str, int]:
    """As above, when the last report was made. Events are only ever added."""
    text = exchange.last_read("evaluate", settings.paths.feedback, "summary.json", HERE)
    return _events(json.loads(text), settings) if text else {}


@task(cache_policy=NO_CACHE)
def start(settings: Settings) -> None:
    """One run for one state of the feedback: a run that failed is not begun again by the same answers."""
    digest = tables.read_json(settings.paths.feedback / "summary.json")["feedback"]
    try:
        run_deployment(CHAIN, timeout=0, as_subflow=False, idempotency_key=f"feedback-{digest}")
    except ObjectNotFound:  # nothing is deployed here
        erase()


def chain_is_at_work() -> bool:
    """Or due: a schedule has runs of later days, too."""
    at_work = FlowRunFilterState(type=FlowRunFilterStateType(any_=AT_WORK))
    waiting = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
    due = FlowRunFilterExpectedStartTime(before_=datetime.now(UTC))
    chain = FlowFilter(name=FlowFilterName(any_=[erase.name]))
    with get_client(sync_client=True) as client:
        return any(
            client.read_flow_runs(flow_filter=chain, flow_run_filter=which, limit=1)
            for which in (FlowRunFilter(state=at_work), FlowRunFilter(state=waiting, expected_start_time=due))
        )


def _events(summary: dict[str, dict[str, dict[str, int]]], settings: Settings) -> dict[str, int]:
    return {name: summary["concepts"].get(name, {}).get("events", 0) for name in settings.targets}


if __name__ == "__main__":
    run_here(feedback)
