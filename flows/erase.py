"""The whole chain as one Prefect flow: `python flows/erase.py`, or a deployment of `flows/erase.py:erase`.

Runs in the current directory, the project's root. Needs no Prefect server, an embedded one starts and ends with it;
where PREFECT_API_URL names a server, it uses that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from here import run_here
from prefect import flow
from prefect.context import FlowRunContext
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput, delete_flow_run_input, filter_flow_run_input, read_flow_run_input
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL
from pydantic import Field
from tasks import ON_GPU, decide, ending_in_a_command, page, publish, register, reproduce, waiting
from workers import Where, call_back, demand_published, send, there

from deleatur.config.settings import Settings
from deleatur.errors import DataError, ModelError
from deleatur.records.report import Outcome, Verdict
from deleatur.stages import STAGES
from deleatur.storage.dvc import CODE


class Approval(RunInput):
    """The form that a person fills in before a model goes live."""

    approver: str = Field(min_length=1, description="Your name; it stays with the version. Not who started the run.")
    decision: Literal["approve", "decline"]
    reason: str = Field(default="", description="For whoever asks later.")


@dataclass(frozen=True)
class Done:
    """What a run of the flow did."""

    ran: tuple[str, ...]
    """Stages that were not up to date."""
    outcome: Outcome
    decision: str | None = None
    """What a person said, if one was asked."""


def has_pages() -> bool:
    """Whether a person can find a form: the embedded server has no pages, and ends with the run."""
    return bool(PREFECT_API_URL.value())


@flow(name="erase", on_cancellation=[call_back])
def erase(approval_seconds: int = 7 * 24 * 3600, poll_seconds: int = 10, where: Where = "auto") -> Done:
    """Brings every stage up to date, shows the verdict, registers it, and asks a person where one is waited for and
    there is a server whose pages a person can open.

    Args:
        approval_seconds: How long a person may take. After that the flow fails, and the challenger still waits: running
            the flow again asks again.
        poll_seconds: How often a run of no deployment, whose process waits, looks for an answer.
        where: Which machine runs the stages that load networks: a worker of the pool `gpu`, or this one. `auto` sends
            them to workers where the deployment `stage/gpu` is known.
    """
    with ending_in_a_command():
        settings = Settings.load()
        if away := there(where):
            demand_published()
        reproduce(CODE)
        ran = tuple(s for s in STAGES[:-1] if (send if away and s in ON_GPU else reproduce)(s))
        verdict = publish(settings)
        register()
        found = waiting(settings) if verdict.outcome == "pass" else None
        if found is None:
            return Done(ran, verdict.outcome)
        if not has_pages():
            get_run_logger().warning("Version %s waits. Next: deleatur approve %s --as NAME", found[0], found[0])
            return Done(ran, verdict.outcome)
        answer = asked(form(settings, verdict, found), found[1], approval_seconds, poll_seconds)
        try:
            decide(settings, found, answer.approver, answer.decision == "approve", answer.reason)
        except (DataError, ModelError):
            forget(found[1])  # who tries this run again is asked again
            raise
        return Done(ran, verdict.outcome, answer.decision)


def form(settings: Settings, verdict: Verdict, found: tuple[str, str]) -> type[Approval]:
    version, evidence = found
    about = f"{page(settings, verdict)}\n\nYou decide about version {version}, evidence sha256:`{evidence}`"
    return Approval.with_initial_data(description=about)


def asked(form: type[Approval], evidence: str, seconds: int, poll: int) -> Approval:
    """What a person says about this evidence, and about no other.

    A run of a deployment ends here, and begins again from the top on some worker when there is an answer. It finds all
    stages done and the answer under the evidence's name; where another candidate was made meanwhile there is none.
    """
    context = FlowRunContext.get()
    if not (context and context.flow_run and context.flow_run.deployment_id):
        return pause_flow_run(wait_for_input=form, timeout=seconds, poll_interval=poll)
    if given := read_flow_run_input(f"{question(evidence)}-response"):  # also where a life ended before it was heeded
        return Approval(**given)
    forget(evidence)  # the form of a wait that had run out
    return suspend_flow_run(wait_for_input=form, timeout=seconds, key=evidence)


def question(evidence: str) -> str:
    """What Prefect calls a form, its text and its answer begins with this."""
    return f"suspended-{evidence}"


def forget(evidence: str) -> None:
    for said in filter_flow_run_input(question(evidence), limit=3):
        delete_flow_run_input(said.key)


if __name__ == "__main__":
    print(run_here(erase))
