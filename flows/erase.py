"""The whole chain as one Prefect flow: `python flows/erase.py`, or a deployment of `flows/erase.py:erase`.

Runs in the current directory, the project's root. Needs no Prefect server, an embedded one starts and ends with it;
where PREFECT_API_URL names a server, it uses that.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from typing import Literal

from prefect import flow
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    PREFECT_SERVER_LOGGING_LEVEL,
    temporary_settings,
)
from pydantic import Field
from tasks import decide, page, publish, register, reproduce, waiting

from deleatur.errors import ContinueMe, DeleaturError
from deleatur.io.versions import METHODS
from deleatur.records import Outcome
from deleatur.settings import Settings
from deleatur.stages import STAGES

EMBEDDED = {
    PREFECT_SERVER_ANALYTICS_ENABLED: False,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 180,  # the first start makes a database; 20 are too few for it
    PREFECT_SERVER_LOGGING_LEVEL: "CRITICAL",  # or it complains at the end about events it could not store
}
"""Settings of the embedded server, where nobody has set them."""


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


@flow(name="erase")
def erase(approval_seconds: int = 7 * 24 * 3600, poll_seconds: int = 10) -> Done:
    """Brings every stage up to date, shows the verdict, registers it, and asks a person where one is waited for and
    there is a server whose pages a person can open.

    approval_seconds: how long a person may take. After that the flow fails, and the challenger still waits: running
    the flow again asks again. poll_seconds: how often the flow looks for an answer.
    """
    settings = Settings.load()
    reproduce(METHODS)
    ran = tuple(stage for stage in STAGES if stage != "register" and reproduce(stage))
    verdict = publish(settings)
    register()
    found = waiting(settings) if verdict.outcome == "pass" else None
    if found is None:
        return Done(ran, verdict.outcome)
    if not has_pages():
        get_run_logger().warning("Version %s waits. Next: deleatur approve %s --as NAME", found[0], found[0])
        return Done(ran, verdict.outcome)
    form = Approval.with_initial_data(description=page(settings, verdict))
    answer = pause_flow_run(wait_for_input=form, timeout=approval_seconds, poll_interval=poll_seconds)
    decide(settings, found, answer.approver, answer.decision == "approve", answer.reason)
    return Done(ran, verdict.outcome, answer.decision)


if __name__ == "__main__":
    os.environ.setdefault("DO_NOT_TRACK", "true")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the end of this process is an end by request
    with temporary_settings(set_defaults=EMBEDDED):
        try:
            print(erase())
        except DeleaturError as e:
            print(f"{type(e).__name__}: {e}\nNext: {e.hint}", file=sys.stderr)
            sys.exit(e.exit_code)
        except KeyboardInterrupt:
            print("Stopped.\nNext: the same command, to go on", file=sys.stderr)
            sys.exit(ContinueMe.exit_code)
