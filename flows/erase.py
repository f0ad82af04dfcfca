"""The complete chain as one Prefect flow: `python flows/erase.py`, or a deployment of `flows/erase.py:erase`.

Runs in the current directory, the project's root, and needs no Prefect server (see in_process.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from in_process import run_in_process
from prefect import flow
from prefect.context import FlowRunContext
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput, delete_flow_run_input, filter_flow_run_input, read_flow_run_input
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL
from pydantic import Field
from tasks import (
    GPU_STAGES,
    decide,
    error_with_next_command,
    pending_version,
    publish_verdict,
    register,
    reproduce,
    verdict_markdown,
)
from workers import Placement, cancel_worker_runs, require_published, run_on_worker, use_workers

from deleatur.config.settings import Settings
from deleatur.errors import DataError, ModelError
from deleatur.records.report import Outcome, Verdict
from deleatur.stages import STAGES
from deleatur.storage.dvc import CODE_STAGE


class Approval(RunInput):
    """The form that a person fills in before a version becomes champion."""

    approver: str = Field(min_length=1, description="Your name; it stays with the version. Not who started the run.")
    decision: Literal["approve", "decline"]
    reason: str = Field(default="", description="Kept in the ledger.")


@dataclass(frozen=True)
class ErasureResult:
    """Result of a run of the flow."""

    stages_run: tuple[str, ...]
    """Stages that were not up to date."""
    outcome: Outcome
    decision: str | None = None
    """The approver's decision, if approval was required."""


def has_ui() -> bool:
    """Whether the server has a UI that can show a form: the embedded server has none."""
    return bool(PREFECT_API_URL.value())


@flow(name="erase", on_cancellation=[cancel_worker_runs])
def erase(
    approval_seconds: int = 7 * 24 * 3600, poll_seconds: int = 10, placement: Placement = "auto"
) -> ErasureResult:
    """Bring every stage up to date, publish and register the verdict, and wait for approval if it is required and the
    server has a UI.

    Args:
        approval_seconds: How long to wait for approval. After that the flow fails and the challenger stays; running the
            flow again asks again.
        poll_seconds: Polling interval of a run without a deployment, whose process waits.
        placement: Which machine runs the stages that load networks: a worker of the pool `gpu`, or this one. `auto`
            uses workers if the server has the deployment `stage/gpu`.
    """
    with error_with_next_command():
        settings = Settings.load()
        if on_workers := use_workers(placement):
            require_published()
        reproduce(CODE_STAGE)
        ran = tuple(s for s in STAGES[:-1] if (run_on_worker if on_workers and s in GPU_STAGES else reproduce)(s))
        verdict = publish_verdict(settings)
        register()
        pending = pending_version(settings) if verdict.outcome == "pass" else None
        if pending is None:
            return ErasureResult(ran, verdict.outcome)
        if not has_ui():
            get_run_logger().warning("Version %s waits. Next: deleatur approve %s --as NAME", pending[0], pending[0])
            return ErasureResult(ran, verdict.outcome)
        answer = ask_for_approval(approval_form(settings, verdict, pending), pending[1], approval_seconds, poll_seconds)
        try:
            decide(settings, pending, answer.approver, answer.decision == "approve", answer.reason)
        except (DataError, ModelError):
            delete_inputs(pending[1])  # a retry of this run asks again
            raise
        return ErasureResult(ran, verdict.outcome, answer.decision)


def approval_form(settings: Settings, verdict: Verdict, pending: tuple[str, str]) -> type[Approval]:
    version, evidence = pending
    description = (
        f"{verdict_markdown(settings, verdict)}\n\nYou decide about version {version}, evidence sha256:`{evidence}`"
    )
    return Approval.with_initial_data(description=description)


def ask_for_approval(form: type[Approval], evidence: str, seconds: int, poll: int) -> Approval:
    """A person's answer about this evidence, and no other.

    A run of a deployment is suspended: its process ends, and on an answer a worker runs it again from the top. It finds
    all stages up to date and the answer under the evidence's digest; if the candidate has changed there is none.
    """
    context = FlowRunContext.get()
    if not (context and context.flow_run and context.flow_run.deployment_id):
        return pause_flow_run(wait_for_input=form, timeout=seconds, poll_interval=poll)
    if answer := read_flow_run_input(f"{input_key(evidence)}-response"):  # may be from before a restart
        return Approval(**answer)
    delete_inputs(evidence)  # of a wait that timed out
    return suspend_flow_run(wait_for_input=form, timeout=seconds, key=evidence)


def input_key(evidence: str) -> str:
    """Prefix of the keys under which Prefect stores a form, its description and its answer."""
    return f"suspended-{evidence}"


def delete_inputs(evidence: str) -> None:
    for flow_input in filter_flow_run_input(input_key(evidence), limit=3):
        delete_flow_run_input(flow_input.key)


if __name__ == "__main__":
    print(run_in_process(erase))
