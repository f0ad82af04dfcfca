"""Clears away what nobody needs any more: `python flows/housekeeping.py` says what that is, `--for-real` removes it."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime, timedelta

import feedback
from here import run_here
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterEndTime, FlowRunFilterTags
from tasks import HERE, RETRIED, ending_in_a_command

from deleatur.config.settings import Settings
from deleatur.registry.decisions import registry_of
from deleatur.registry.mlflow_client import CHALLENGER, CHAMPION, LAST
from deleatur.storage import dvc_remote, remote

DAY = 24 * 3600.0


@flow(name="housekeeping")
def housekeeping(dry_run: bool = True, days: int = 90, remote: bool = False) -> list[str]:
    """Removes data that no commit, no file of the workspace and no version with an alias needs, states of stopped
    stages that nobody went on with, runs of MLflow that no version came from, and runs of Prefect.

    Data stay while a run of the chain is at work: workers leave products in the remote before any dvc.lock names them.

    Args:
        dry_run: Only say what would be removed.
        days: How old runs and states have to be.
        remote: Clear the DVC remote too. Leave it off where other projects use the same one.
    """
    with ending_in_a_command():
        settings = Settings.load()
        said = [
            *data(settings, dry_run, remote),
            *states(settings, dry_run, days),
            *tracked_runs(settings, dry_run, days),
            *flow_runs(dry_run, days),
        ]
        title = "What would be removed" if dry_run else "What was removed"
        lines = "\n".join(f"- {line}" for line in said)
        create_markdown_artifact(f"# {title}\n\n{lines or 'Nothing.'}", key="housekeeping", description=title)
        return said


@task(**RETRIED)
def data(settings: Settings, dry_run: bool, remote: bool) -> list[str]:
    if feedback.chain_is_at_work():
        return ["no data: a run of the chain is at work, and what it has made may not be named by any dvc.lock yet"]
    registry = registry_of(settings)
    kept = {version for name in (CHAMPION, CHALLENGER, LAST) if (version := registry.alias(name))}
    locks = [registry.file(version, "lock/dvc.lock") for version in sorted(kept)]
    return dvc_remote.collect(HERE, locks, dry=dry_run, remote=remote)


@task(**RETRIED)
def states(settings: Settings, dry_run: bool, days: int) -> list[str]:
    address = settings.workers.state
    old = remote.older(address, time.time() - days * DAY) if address else []
    for place in [] if dry_run else old:
        remote.remove(place)
    return [f"state of a stopped stage: {place}" for place in old]


@task(**RETRIED)
def tracked_runs(settings: Settings, dry_run: bool, days: int) -> list[str]:
    registry = registry_of(settings)
    old = registry.spent(time.time() - days * DAY)
    for run_id in [] if dry_run else old:
        registry.delete_run(run_id)
    return [f"run of MLflow: {name}" for name in old.values()]


@task(**RETRIED)
def flow_runs(dry_run: bool, days: int) -> list[str]:
    ended = FlowRunFilterEndTime(before_=datetime.now(UTC) - timedelta(days=days))
    ours = FlowRunFilter(end_time=ended, tags=FlowRunFilterTags(all_=["deleatur"]))
    with get_client(sync_client=True) as client:
        old = client.read_flow_runs(flow_run_filter=ours)
        for run in [] if dry_run else old:
            client.delete_flow_run(run.id)
    return [f"run of Prefect: {run.name}" for run in old]


if __name__ == "__main__":
    for line in run_here(housekeeping, dry_run="--for-real" not in sys.argv):
        print(line)
