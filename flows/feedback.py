"""Fetches new feedback and starts the chain when there is enough: `python flows/feedback.py`, or its deployment."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from erase import erase
from in_process import run_in_process
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
from tasks import PROJECT, RETRY_OPTIONS, error_with_next_command, reproduce

from deleatur.config.settings import Settings
from deleatur.records.feedback import FeedbackSummary
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHALLENGER
from deleatur.storage import dvc_remote, files, remote

CHAIN = "erase/chain"
ACTIVE_STATES = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED)
"""A run that waits for approval counts as active: its approver was shown the current feedback."""


@flow(name="feedback")
def feedback(min_new: int | None = None) -> int:
    """Fetch `feedback.inbox`, ingest it, and start the chain if enough events are newer than the last report.

    Returns the number of new events. Does nothing while a run of the chain is active or due.

    Args:
        min_new: New events about the targets that start the chain; by default `feedback.min_new` of params.yaml.
    """
    with error_with_next_command():
        settings, log = Settings.load(), get_run_logger()
        threshold = min_new or settings.feedback.min_new
        cancel_decided_runs(settings)
        if chain_is_active():
            log.info("A run of the chain is active or waits for approval; feedback is ingested when it has ended")
            return 0
        fetch(settings)
        reproduce("ingest")
        counts = event_counts(settings)
        new = sum(counts.values()) - sum(counts_at_last_report(settings).values())
        log.info("%d new events about %s; %d start the chain", new, ", ".join(settings.targets), threshold)
        if new >= threshold:
            start_chain(settings)
        return new


@task(**RETRY_OPTIONS)
def fetch(settings: Settings) -> None:
    if inbox := settings.feedback.inbox:
        remote.fetch(inbox, Path(settings.ingest.sources[0]).parent)


def event_counts(settings: Settings) -> dict[str, int]:
    """Number of events about each target."""
    return _target_counts(_summary(settings), settings)


def counts_at_last_report(settings: Settings) -> dict[str, int]:
    """Number of events about each target at the last report. Events are only ever added."""
    text = dvc_remote.file_at_last_run("evaluate", settings.paths.feedback, "summary.json", PROJECT)
    return _target_counts(files.parse_json(text, FeedbackSummary, "the summary"), settings) if text else {}


@task(cache_policy=NO_CACHE)
def start_chain(settings: Settings) -> None:
    """Start one run per state of the feedback: the same answers do not start a failed run again."""
    try:
        run_deployment(CHAIN, timeout=0, as_subflow=False, idempotency_key=f"feedback-{_summary(settings).feedback}")
    except ObjectNotFound:  # the server has no such deployment
        erase()


def chain_is_active() -> bool:
    """Whether a run of the chain is active or due; runs that its schedule has planned for later do not count."""
    now = datetime.now(UTC)
    return any(
        run.state_name != "Scheduled" or (run.expected_start_time or now) <= now for run in _chain_runs(*ACTIVE_STATES)
    )


def cancel_decided_runs(settings: Settings) -> None:
    """Cancel runs that are suspended for an approval which was given elsewhere, such as on the command line."""
    suspended = [run for run in _chain_runs(StateType.PAUSED) if run.state and run.state.name == "Suspended"]
    if suspended and open_registry(settings).alias(CHALLENGER) is None:
        with get_client(sync_client=True) as client:
            for run in suspended:
                client.set_flow_run_state(run.id, Cancelled(message="Decided elsewhere; no version waits for approval"))


def _chain_runs(*states: StateType) -> list[FlowRun]:
    """Runs of the chain in any of these states."""
    in_state = FlowRunFilter(state=FlowRunFilterState(type=OfType(any_=list(states))))
    chain = FlowFilter(name=FlowFilterName(any_=[CHAIN.partition("/")[0]]))
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_filter=chain, flow_run_filter=in_state)


def _summary(settings: Settings) -> FeedbackSummary:
    return files.read_json_as(settings.paths.feedback / "summary.json", FeedbackSummary)


def _target_counts(summary: FeedbackSummary, settings: Settings) -> dict[str, int]:
    return {name: counts.events if (counts := summary.concepts.get(name)) else 0 for name in settings.targets}


if __name__ == "__main__":
    run_in_process(feedback)
