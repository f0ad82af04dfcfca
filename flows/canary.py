"""What is live, drawn again every night: `python flows/canary.py`, or its deployment.

The ledger is here, the GPU may be elsewhere: where the deployment `look/live` is known, a worker of the pool `gpu`
draws and looks, and what it found comes back. What follows from it is decided here.
"""

from __future__ import annotations

from here import run_here
from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger
from tasks import HERE, RETRIED, ending_in_a_command, slot
from workers import (
    REPLACED,
    Job,
    Where,
    call_back,
    carry_out,
    commit_of,
    demand_done,
    demand_published,
    demanded_back,
    hand_back,
    there,
)

from deleatur.config.settings import Settings
from deleatur.errors import DeleaturError
from deleatur.operations import canary as stage
from deleatur.records.report import CanaryResult, Outcome
from deleatur.registry.rollback import RollbackResult
from deleatur.storage import json_records, remote

LOOK = "look/live"


@flow(name="canary", on_cancellation=[call_back])
def canary(where: Where = "auto") -> Outcome | None:
    """Draws what is live again, for every concept that was ever erased. Fails where one is back, with what is live
    instead. None where nothing is live that has anything erased.

    Args:
        where: Which machine draws: a worker of the pool `gpu`, or this one. `auto` asks workers where the deployment
            `look/live` is known.
    """
    with ending_in_a_command():
        settings, log = Settings.load(), get_run_logger()
        if (asked := stage.pending_check(settings)) is None:
            log.info("Nothing is live that has anything erased")
            return None
        if away := there(where, LOOK):
            demand_published()
        found = (send if away else drawn)(settings, *asked)
        json_records.write(settings.canary.result_file, found)
        rows = [{"concept": look.concept, "outcome": look.outcome, "reason": look.reason} for look in found.checks]
        create_table_artifact(rows, key="canary", description=f"Version {found.version}, drawn again")
        taken = decide(settings, found)
        if taken:
            raise back(found, taken)
        if found.outcome != "pass":
            log.warning("Version %s: %s. %s", found.version, found.outcome, "; ".join(r["reason"] for r in rows))
        return found.outcome


@flow(name="look")
def look(params: str, version: str, concepts: list[str], state: str | None = None) -> None:
    """Draws a version again on a worker, and says whether concepts are back; decides nothing.

    Args:
        params: The text of params.yaml, which may differ from the commit's.
        version: Number of the version in the registry.
        concepts: What was ever erased, by the names in params.yaml.
        state: Folder or s3://… that the pictures are left in; left out, they stay on the worker.
    """
    with ending_in_a_command():
        (HERE / "params.yaml").write_text(params, "utf-8")
        settings = Settings.load()
        found = drawn(settings, version, concepts)
        for sheet in settings.canary.folder.glob("*.png") if state else ():
            remote.upload(sheet, f"{state}/{sheet.name}")
        hand_back("canary", "look", json_records.encode(found).decode())


@task(task_run_name="look", **RETRIED)
def drawn(settings: Settings, version: str, concepts: list[str]) -> CanaryResult:
    with slot():
        return stage.check(settings, version, concepts)


@task(task_run_name="look on a worker", **REPLACED)
def send(settings: Settings, version: str, concepts: list[str]) -> CanaryResult:
    params = (HERE / "params.yaml").read_text("utf-8")
    job = Job(LOOK, "look", commit_of(HERE), {"params": params, "version": version, "concepts": concepts})
    run = carry_out(job)
    demand_done("look", run)
    found = json_records.decode(demanded_back("canary", "look", run).encode(), CanaryResult, "what the worker found")
    if job.state:
        remote.fetch(job.state, settings.canary.folder)
        remote.remove(job.state)
    return found


@task(**RETRIED)
def decide(settings: Settings, found: CanaryResult) -> RollbackResult | None:
    """Takes back what a concept is back in, if it is still live."""
    return stage.decide(settings, found)


def back(found: CanaryResult, taken: RollbackResult) -> DeleaturError:
    """What to say where a concept is back."""
    instead = f"version {taken.champion} is live now" if taken.champion else "nothing is live now"
    concepts = ",".join(look.concept for look in found.checks if look.outcome == "fail")
    return DeleaturError(
        f"{found.breach}. Version {taken.quarantined} is quarantined; {instead}",
        hint="deleatur canary" if taken.champion else f"deleatur emergency {concepts} --as NAME --reason WHY",
    )


if __name__ == "__main__":
    print(run_here(canary) or "Nothing is live that has anything erased")
