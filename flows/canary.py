"""The canary every night: `python flows/canary.py`, or its deployment.

If the server has the deployment `canary-check/gpu`, a worker of the pool `gpu` samples and detects, and returns the
result. The decision is always taken on this machine, which has the ledger.
"""

from __future__ import annotations

from in_process import run_in_process
from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger
from tasks import PROJECT, RETRY_OPTIONS, error_with_next_command, gpu_slot
from workers import (
    WORKER_RETRY_OPTIONS,
    Placement,
    WorkerJob,
    cancel_worker_runs,
    require_commit,
    require_completed,
    require_published,
    require_returned_text,
    return_text,
    run_job,
    use_workers,
)

from deleatur.config.settings import Settings
from deleatur.errors import DeleaturError
from deleatur.operations import canary as stage
from deleatur.records.report import CanaryResult, Outcome
from deleatur.redaction import redact
from deleatur.registry.decisions import without_ledger
from deleatur.registry.rollback import RollbackResult
from deleatur.storage import json_records, remote

CHECK_DEPLOYMENT = "canary-check/gpu"
JOB_NAME = "canary-check"


@flow(name="canary", on_cancellation=[cancel_worker_runs])
def canary(placement: Placement = "auto") -> Outcome | None:
    """Check the champion for every concept that was ever erased. If one is back, quarantine the version and fail, with
    the new champion in the message. None: no champion has erased anything.

    Args:
        placement: Which machine samples: a worker of the pool `gpu`, or this one. `auto` uses workers if the server has
            the deployment `canary-check/gpu`.
    """
    with error_with_next_command():
        settings, log = Settings.load(), get_run_logger()
        if (pending := stage.pending_check(settings)) is None:
            log.info("No champion has erased anything")
            return None
        if on_workers := use_workers(placement, CHECK_DEPLOYMENT):
            require_published()
        result = (check_on_worker if on_workers else check_here)(settings, *pending)
        json_records.write(settings.canary.result_file, result)
        rows = [{"concept": c.concept, "outcome": c.outcome, "reason": c.reason} for c in result.checks]
        create_table_artifact(rows, key="canary", description=f"Check of version {result.version}")
        rollback = decide(settings, result)
        if rollback:
            raise breach_error(result, rollback)
        if result.outcome != "pass":
            log.warning("Version %s: %s. %s", result.version, result.outcome, "; ".join(r["reason"] for r in rows))
        return result.outcome


@flow(name="canary-check")
def canary_check(params: str, version: str, concepts: list[str], storage_uri: str | None = None) -> None:
    """Check a version on a worker and return the result; decides nothing.

    Args:
        params: Content of params.yaml, which may differ from the commit's.
        version: Number of the version in the registry.
        concepts: Names of the concepts that were ever erased.
        storage_uri: Folder or s3://… for the contact sheets; without one, they stay on the worker.
    """
    with error_with_next_command():
        (PROJECT / "params.yaml").write_text(params, "utf-8")
        settings = Settings.load()
        with without_ledger():
            result = check_here(settings, version, concepts)
        for sheet in settings.canary.folder.glob("*.png") if storage_uri else ():
            remote.upload(sheet, f"{storage_uri}/{sheet.name}")
        return_text("canary", JOB_NAME, json_records.encode(result).decode())


@task(task_run_name=JOB_NAME, **RETRY_OPTIONS)
def check_here(settings: Settings, version: str, concepts: list[str]) -> CanaryResult:
    with gpu_slot():
        return stage.check(settings, version, concepts)


@task(task_run_name=f"{JOB_NAME} on a worker", **WORKER_RETRY_OPTIONS)
def check_on_worker(settings: Settings, version: str, concepts: list[str]) -> CanaryResult:
    params = redact((PROJECT / "params.yaml").read_text("utf-8"))
    parameters = {"params": params, "version": version, "concepts": concepts}
    job = WorkerJob(CHECK_DEPLOYMENT, JOB_NAME, require_commit(PROJECT), parameters)
    run = run_job(job)
    require_completed(JOB_NAME, run)
    returned = require_returned_text("canary", JOB_NAME, run).encode()
    result = json_records.decode(returned, CanaryResult, "the worker's result")
    if job.storage_uri:
        remote.fetch(job.storage_uri, settings.canary.folder)
        remote.remove(job.storage_uri)
    return result


@task(**RETRY_OPTIONS)
def decide(settings: Settings, result: CanaryResult) -> RollbackResult | None:
    """Quarantine the version if a concept is back and it is still the champion."""
    return stage.decide(settings, result)


def breach_error(result: CanaryResult, rollback: RollbackResult) -> DeleaturError:
    """The error that the flow fails with after a quarantine."""
    instead = f"version {rollback.champion} is champion now" if rollback.champion else "there is no champion now"
    concepts = ",".join(check.concept for check in result.checks if check.outcome == "fail")
    return DeleaturError(
        f"{result.breach}. Version {rollback.quarantined} is quarantined; {instead}",
        hint="deleatur canary" if rollback.champion else f"deleatur emergency {concepts} --as NAME --reason WHY",
    )


if __name__ == "__main__":
    print(run_in_process(canary) or "No champion has erased anything")
