"""Prepares a Prefect server for the deployments of prefect.yaml: work pools, GPU concurrency limits, automations for
crashed runs, and notifications. Idempotent: run again, it updates all of these; limits under other names stay.

python flows/setup.py
DELEATUR_NOTIFY=https://hooks.slack.com/services/… python flows/setup.py --type kubernetes --gpu gpu:2
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from in_process import exit_with_message, require_server
from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker
from tasks import LOST_STATE

from deleatur.errors import SettingsError

NOTIFY_VARIABLE = "DELEATUR_NOTIFY"
AUTOMATION_PREFIX = "deleatur: "
"""Prefix of the names of all automations of this script."""
BLOCK_NAME = re.compile(r"deleatur-\d+")
TEMPLATES = Path(__file__).parents[1] / "infra" / "pools"

HEARTBEAT_TIMEOUT = 75
"""Seconds. prefect.yaml asks for a heartbeat every 30 s, so one may be late."""
START_TIMEOUT = 900
"""Seconds from a worker's taking a run to the run's start, which includes the checkout."""

ACTIVE_STATES = ("Scheduled", "Late", "AwaitingRetry", "AwaitingConcurrencySlot", "Paused", "Suspended", "Cancelling")
FINAL_STATES = ("Completed", "Failed", "Cancelled", "Crashed", LOST_STATE)
HEARTBEAT, PENDING, RUNNING = "prefect.flow-run.heartbeat", "prefect.flow-run.Pending", "prefect.flow-run.Running"


def event_names(*names: str) -> set[str]:
    return {f"prefect.flow-run.{name}" for name in names}


def run_trigger(tag: str, **fields: Any) -> EventTrigger:
    """A trigger on events of flow runs with a tag, evaluated per run."""
    return EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{tag}"},
        for_each={"prefect.resource.id"},
        **fields,
    )


def silence_trigger(tag: str, after: set[str], expect: set[str], seconds: float) -> EventTrigger:
    """Fires when none of the expected events follows within so many seconds."""
    return run_trigger(
        tag, posture=Posture.Proactive, threshold=1, after=after, expect=expect, within=timedelta(seconds=seconds)
    )


def automations(blocks: Sequence[UUID], heartbeat_timeout: float = HEARTBEAT_TIMEOUT) -> Iterator[Automation]:
    """Automations for runs whose process, worker or machine was killed, which the server notices by missing heartbeats.

    Such a run gets the state `Lost` and is scheduled again. A stage on a worker is restarted by the flow that waits.
    """
    lost = ChangeFlowRunState(state=StateType.CRASHED, name=LOST_STATE, message="No heartbeat: its process was killed")
    yield Automation(
        name="deleatur: heartbeats stopped",
        description="A run whose heartbeats have stopped is lost.",
        trigger=silence_trigger(
            "deleatur", {HEARTBEAT}, {HEARTBEAT} | event_names(*ACTIVE_STATES, *FINAL_STATES), heartbeat_timeout
        ),
        actions=[lost],
    )
    yield Automation(
        name="deleatur: run did not start",
        description="A run that a worker has taken and that did not start in time is lost.",
        trigger=silence_trigger(
            "deleatur", {PENDING}, {RUNNING, HEARTBEAT} | event_names(*ACTIVE_STATES, *FINAL_STATES), START_TIMEOUT
        ),
        actions=[lost],
    )
    reschedule = ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="Resumes after a loss")
    yield Automation(
        name="deleatur: restart lost runs",
        trigger=run_trigger("restart", expect=event_names(LOST_STATE)),
        actions=[reschedule],
    )
    yield Automation(
        name="deleatur: restart killed runs",
        description="Only runs that had started: one that cannot even start would crash again.",
        trigger=run_trigger("restart", after={HEARTBEAT}, expect=event_names("Crashed"), within=timedelta(days=30)),
        actions=[reschedule],
    )
    if blocks:
        yield Automation(
            name="deleatur: notify",
            trigger=run_trigger("restart", expect=event_names("Failed", "Crashed", LOST_STATE, "Paused", "Suspended")),
            actions=[SendNotification(block_document_id=block, subject=SUBJECT, body=BODY) for block in blocks],
        )


SUBJECT = "deleatur: {{ flow.name }} {{ flow_run.state.name | lower }}"
BODY = """{{ flow_run | ui_url }}
{{ flow_run.state.message or '' }}
{%- if flow_run.state.name in ('Paused', 'Suspended') %}
Next: open the page above; the run waits for approval
{%- elif 'Next: ' not in (flow_run.state.message or '') %}
Next: prefect flow-run logs {{ flow_run.id }}
{%- endif %}"""


def base_job_template(kind: str, pool: str) -> dict[str, Any]:
    if kind == "process":
        return ProcessWorker.get_default_base_job_template()
    template: dict[str, Any] = json.loads((TEMPLATES / f"{kind}-{pool}.json").read_text("utf-8"))
    return template


def notification_block(name: str, address: str) -> UUID:
    """A block that sends notifications to an address: webhooks receive {"text": …}, as Slack and Mattermost expect.

    Any other address is one of Apprise, such as mailtos://user:password@host?to=…. Prefect has no block for arbitrary
    Apprise addresses, but its Slack block passes them on unchanged.
    """
    if address.startswith(("http://", "https://")):
        hook = CustomWebhookNotificationBlock(
            name=name, url="{{address}}", json_data={"text": "{{subject}}\n{{body}}"}, secrets={"address": address}
        )
        return hook.save(name, overwrite=True)
    return SlackWebhook(url=address).save(name, overwrite=True)


def create_pool(client: SyncPrefectClient, pool: WorkPoolCreate) -> None:
    """Create or update a work pool. Raises SettingsError if it exists with another type: Prefect cannot change that."""
    with suppress(ObjectNotFound):
        if (existing := client.read_work_pool(pool.name)).type != pool.type:
            raise SettingsError(
                f"expected the pool {pool.name} to have the type {pool.type}, got {existing.type}",
                hint=f"prefect work-pool delete {pool.name} (then deploy its deployments again)",
            )
    client.create_work_pool(pool, overwrite=True)


def save_automation(automation: Automation) -> None:
    try:
        automation.id = Automation.read(name=automation.name).id
    except ValueError:
        automation.create()
    else:
        automation.update()


def delete_stale(client: SyncPrefectClient, names: set[str], blocks: Sequence[UUID]) -> None:
    """Delete automations and notification blocks of an earlier setup that this one does not have."""
    for automation in client.read_automations():
        if automation.name.startswith(AUTOMATION_PREFIX) and automation.name not in names:
            client.delete_automation(automation.id)
    for document in client.read_block_documents(include_secrets=False):
        if document.id not in blocks and BLOCK_NAME.fullmatch(document.name or ""):
            client.delete_block_document(document.id)


def setup(
    kind: str,
    gpu_limits: Sequence[tuple[str, int]],
    addresses: Sequence[str],
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
) -> None:
    with get_client(sync_client=True) as client:
        for name in ("cpu", "gpu"):
            create_pool(client, WorkPoolCreate(name=name, type=kind, base_job_template=base_job_template(kind, name)))
        for name, limit in gpu_limits:
            client.upsert_global_concurrency_limit_by_name(name, limit)
    blocks = [notification_block(f"deleatur-{i}", address) for i, address in enumerate(addresses, 1)]
    current = list(automations(blocks, heartbeat_timeout))
    for automation in current:
        save_automation(automation)
    with get_client(sync_client=True) as client:
        delete_stale(client, {automation.name for automation in current}, blocks)


def parse_gpu_limit(text: str) -> tuple[str, int]:
    name, _, limit = text.partition(":")
    return name, int(limit or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--type", default="process", choices=["process", "docker", "kubernetes"], help="what workers run flows in"
    )
    parser.add_argument(
        "--gpu",
        type=parse_gpu_limit,
        action="append",
        metavar="NAME:SLOTS",
        help="concurrent stages on one GPU, whose workers have DELEATUR_GPU=NAME; default gpu:1",
    )
    parser.add_argument(
        "--notify",
        action="append",
        metavar="ADDRESS",
        help="where to send notifications about runs that failed or wait for approval: a webhook (such as Slack's), "
        "mailtos://… or any other address of Apprise. Default: the addresses in DELEATUR_NOTIFY, separated by spaces, "
        "which the list of processes does not show. Without either, notifications are removed",
    )
    arguments = parser.parse_args()
    with exit_with_message():
        require_server()
        setup(
            arguments.type,
            arguments.gpu or [("gpu", 1)],
            arguments.notify or os.environ.get(NOTIFY_VARIABLE, "").split(),
        )
    print("Next: prefect --no-prompt deploy --all")


if __name__ == "__main__":
    main()
