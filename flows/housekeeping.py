"""Removes what is no longer needed: `python flows/housekeeping.py` lists it, `--for-real` removes it."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime, timedelta

import feedback
from in_process import run_in_process
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterEndTime, FlowRunFilterTags
from tasks import PROJECT, RETRY_OPTIONS, error_with_next_command

from deleatur.config.settings import Settings
from deleatur.markdown import escape_markdown
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION, LAST_KNOWN_GOOD
from deleatur.storage import dvc_remote, remote

DAY_SECONDS = 24 * 3600.0


@flow(name="housekeeping")
def housekeeping(dry_run: bool = True, days: int = 90, remote: bool = False) -> list[str]:
    """Remove data that no commit, no workspace file and no version with an alias refers to, checkpoints of abandoned
    jobs, MLflow runs without a version, and old Prefect runs.

    Data stay while a run of the chain is active: workers push outputs before any dvc.lock refers to them.

    Args:
        dry_run: Only list what would be removed.
        days: Minimum age of runs and checkpoints.
        remote: Clean the DVC remote too. Leave it off if other projects share it.
    """
    with error_with_next_command():
        settings = Settings.load()
        items = [
            *unneeded_data(settings, dry_run, remote),
            *abandoned_checkpoints(settings, dry_run, days),
            *disposable_mlflow_runs(settings, dry_run, days),
            *old_flow_runs(dry_run, days),
        ]
        title = "What would be removed" if dry_run else "What was removed"
        lines = "\n".join(f"- {escape_markdown(line)}" for line in items)
        create_markdown_artifact(f"# {title}\n\n{lines or 'Nothing.'}", key="housekeeping", description=title)
        return items


@task(**RETRY_OPTIONS)
def unneeded_data(settings: Settings, dry_run: bool, remote: bool) -> list[str]:
    if feedback.chain_is_active():
        return ["no data: a run of the chain is active, and no dvc.lock may refer to its outputs yet"]
    registry = open_registry(settings)
    versions = {version for name in (CHAMPION, CHALLENGER, LAST_KNOWN_GOOD) if (version := registry.alias(name))}
    locks = [registry.artifact_text(version, "lock/dvc.lock") for version in sorted(versions)]
    return dvc_remote.collect_garbage(PROJECT, locks, dry_run=dry_run, remote=remote)


@task(**RETRY_OPTIONS)
def abandoned_checkpoints(settings: Settings, dry_run: bool, days: int) -> list[str]:
    base = settings.workers.checkpoint_uri
    old = remote.list_older(base, time.time() - days * DAY_SECONDS) if base else []
    for uri in [] if dry_run else old:
        remote.remove(uri)
    return [f"checkpoints of an abandoned job: {uri}" for uri in old]


@task(**RETRY_OPTIONS)
def disposable_mlflow_runs(settings: Settings, dry_run: bool, days: int) -> list[str]:
    registry = open_registry(settings)
    old = registry.disposable_runs(time.time() - days * DAY_SECONDS)
    for run_id in [] if dry_run else old:
        registry.runs.delete(run_id)
    return [f"MLflow run: {name}" for name in old.values()]


@task(**RETRY_OPTIONS)
def old_flow_runs(dry_run: bool, days: int) -> list[str]:
    ended = FlowRunFilterEndTime(before_=datetime.now(UTC) - timedelta(days=days))
    ours = FlowRunFilter(end_time=ended, tags=FlowRunFilterTags(all_=["deleatur"]))
    with get_client(sync_client=True) as client:
        old = client.read_flow_runs(flow_run_filter=ours)
        for run in [] if dry_run else old:
            client.delete_flow_run(run.id)
    return [f"Prefect run: {run.name}" for run in old]


if __name__ == "__main__":
    for line in run_in_process(housekeeping, dry_run="--for-real" not in sys.argv):
        print(line)
