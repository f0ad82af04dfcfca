"""Prepares a Prefect server for the deployments of prefect.yaml: work pools, GPU slots, what becomes of runs that die,
and who is told. Done again, it changes pools, automations and addresses to what is asked for now; slots under other
names stay.

python flows/setup.py
DELEATUR_TELL=https://hooks.slack.com/services/… python flows/setup.py --type kubernetes --gpu gpu:2
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

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

TELL = "DELEATUR_TELL"
OURS = "deleatur: "
"""What the names of our automations begin with."""
BLOCK = re.compile(r"deleatur-\d+")
TEMPLATES = Path(__file__).parents[1] / "infra" / "pools"

SILENT = 75
"""Seconds without a heartbeat, of which prefect.yaml asks for one every 30: one may be late."""
STARTING = 900
"""Seconds from a worker's taking a run up to the run's beginning: what a checkout may take at most."""

LIVES = ("Scheduled", "Late", "AwaitingRetry", "AwaitingConcurrencySlot", "Paused", "Suspended", "Cancelling")
ENDS = ("Completed", "Failed", "Cancelled", "Crashed", LOST_STATE)
HEARTBEAT, PENDING, RUNNING = "prefect.flow-run.heartbeat", "prefect.flow-run.Pending", "prefect.flow-run.Running"


def states(*names: str) -> set[str]:
    return {f"prefect.flow-run.{name}" for name in names}


def of(tag: str, **what: Any) -> EventTrigger:
    """Events of runs with a tag, each run for itself."""
    return EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{tag}"},
        for_each={"prefect.resource.id"},
        **what,
    )


def silence(tag: str, after: set[str], expect: set[str], seconds: float) -> EventTrigger:
    return of(
        tag, posture=Posture.Proactive, threshold=1, after=after, expect=expect, within=timedelta(seconds=seconds)
    )


def automations(blocks: Sequence[UUID], silent: float = SILENT) -> Iterator[Automation]:
    """A run whose process, worker or machine has vanished says nothing of it: it falls silent. It is called lost then,
    and begins again; stages that it had sent to workers, the flow that sent them begins again.
    """
    lost = ChangeFlowRunState(
        state=StateType.CRASHED, name=LOST_STATE, message="No sign of life: its process has vanished"
    )
    yield Automation(
        name="deleatur: a run has fallen silent",
        description="A run that has had a heartbeat, and has none any more, is lost.",
        trigger=silence("deleatur", {HEARTBEAT}, {HEARTBEAT} | states(*LIVES, *ENDS), silent),
        actions=[lost],
    )
    yield Automation(
        name="deleatur: a run never began",
        description="A run that a worker has taken, and that never began, is lost.",
        trigger=silence("deleatur", {PENDING}, {RUNNING, HEARTBEAT} | states(*LIVES, *ENDS), STARTING),
        actions=[lost],
    )
    again = ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="Goes on where it was")
    yield Automation(
        name="deleatur: a lost run goes on",
        trigger=of("goes-on", expect=states(LOST_STATE)),
        actions=[again],
    )
    yield Automation(
        name="deleatur: a run that was killed goes on",
        description="One that had not even begun would be killed again.",
        trigger=of("goes-on", after={HEARTBEAT}, expect=states("Crashed"), within=timedelta(days=30)),
        actions=[again],
    )
    if blocks:
        yield Automation(
            name="deleatur: somebody is told",
            trigger=of("goes-on", expect=states("Failed", "Crashed", LOST_STATE, "Paused", "Suspended")),
            actions=[SendNotification(block_document_id=block, subject=SUBJECT, body=BODY) for block in blocks],
        )


SUBJECT = "deleatur: {{ flow.name }} {{ flow_run.state.name | lower }}"
BODY = """{{ flow_run | ui_url }}
{{ flow_run.state.message or '' }}
{%- if flow_run.state.name in ('Paused', 'Suspended') %}
Next: open the page above; the run waits for an answer
{%- elif 'Next: ' not in (flow_run.state.message or '') %}
Next: prefect flow-run logs {{ flow_run.id }}
{%- endif %}"""


def template(kind: str, pool: str) -> dict[str, Any]:
    if kind == "process":
        return ProcessWorker.get_default_base_job_template()
    found: dict[str, Any] = json.loads((TEMPLATES / f"{kind}-{pool}.json").read_text("utf-8"))
    return found


def block(name: str, address: str) -> UUID:
    """Where messages go: a web address gets {"text": …}, as Slack, Mattermost and others take it; any other address is
    Apprise's, mailtos://user:password@host?to=… for one. Prefect has no block for all of these, but the one for Slack
    hands on what is not Slack's.
    """
    if address.startswith(("http://", "https://")):
        hook = CustomWebhookNotificationBlock(
            name=name, url="{{address}}", json_data={"text": "{{subject}}\n{{body}}"}, secrets={"address": address}
        )
        return hook.save(name, overwrite=True)
    return SlackWebhook(url=address).save(name, overwrite=True)


def pool(client: SyncPrefectClient, asked: WorkPoolCreate) -> None:
    """Raises SettingsError where there is one of another type, which Prefect would leave as it is."""
    with suppress(ObjectNotFound):
        if (found := client.read_work_pool(asked.name)).type != asked.type:
            raise SettingsError(
                f"expected the pool {asked.name} to be of the type {asked.type}, and it is of the type {found.type}",
                hint=f"prefect work-pool delete {asked.name} (its deployments are to be deployed again)",
            )
    client.create_work_pool(asked, overwrite=True)


def put(automation: Automation) -> None:
    try:
        automation.id = Automation.read(name=automation.name).id
    except ValueError:
        automation.create()
    else:
        automation.update()


def forget(client: SyncPrefectClient, names: set[str], blocks: Sequence[UUID]) -> None:
    """What of ours an earlier setup made and this one does not want."""
    for found in client.read_automations():
        if found.name.startswith(OURS) and found.name not in names:
            client.delete_automation(found.id)
    for document in client.read_block_documents(include_secrets=False):
        if document.id not in blocks and BLOCK.fullmatch(document.name or ""):
            client.delete_block_document(document.id)


def setup(kind: str, slots: Sequence[tuple[str, int]], addresses: Sequence[str], silent: float = SILENT) -> None:
    with get_client(sync_client=True) as client:
        for name in ("cpu", "gpu"):
            pool(client, WorkPoolCreate(name=name, type=kind, base_job_template=template(kind, name)))
        for name, limit in slots:
            client.upsert_global_concurrency_limit_by_name(name, limit)
    blocks = [block(f"deleatur-{i}", address) for i, address in enumerate(addresses, 1)]
    wanted = list(automations(blocks, silent))
    for automation in wanted:
        put(automation)
    with get_client(sync_client=True) as client:
        forget(client, {automation.name for automation in wanted}, blocks)


def slot(text: str) -> tuple[str, int]:
    name, _, limit = text.partition(":")
    return name, int(limit or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--type", default="process", choices=["process", "docker", "kubernetes"], help="what workers start"
    )
    parser.add_argument(
        "--gpu",
        type=slot,
        action="append",
        metavar="NAME:SLOTS",
        help="stages at a time on one GPU, whose workers have DELEATUR_GPU=NAME; gpu:1 is meant when left out",
    )
    parser.add_argument(
        "--tell",
        action="append",
        metavar="ADDRESS",
        help="whom to tell of runs that failed or wait for a person: a webhook (Slack's and the like), or mailtos://… "
        "and whatever else Apprise knows. Better, since the list of processes shows arguments: left out, the addresses "
        "in DELEATUR_TELL, with spaces between. Where there is neither, nobody is told any more",
    )
    asked = parser.parse_args()
    try:
        setup(asked.type, asked.gpu or [("gpu", 1)], asked.tell or os.environ.get(TELL, "").split())
    except SettingsError as e:
        print(f"SettingsError: {e}\nNext: {e.hint}", file=sys.stderr)
        sys.exit(e.exit_code)
    print("Next: prefect --no-prompt deploy --all")


if __name__ == "__main__":
    main()
