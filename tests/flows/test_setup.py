"""Automations of the server: crashed runs are restarted; notifications end with the next command."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import prefect_workers
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from prefect import flow, tags  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.events import emit_event  # noqa: E402
from prefect.events.actions import DoNothing  # noqa: E402
from prefect.events.schemas.automations import AutomationCore  # noqa: E402
from prefect.states import Crashed, Pending, Running  # noqa: E402
from test_deployments import clear_server, prefect  # noqa: E402

from deleatur.errors import SettingsError  # noqa: E402

Inbox = list[str]


@pytest.fixture
def hook() -> Iterator[tuple[str, Inbox]]:
    """A webhook, and the messages it has received."""
    received: Inbox = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", received
        server.shutdown()


@pytest.fixture
def mail() -> Iterator[tuple[str, Inbox]]:
    """A mail server, as an address of Apprise, and the mails it has received."""
    received: Inbox = []

    class Mail(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 here\r\n")
            for line in self.rfile:
                if line.upper().startswith(b"DATA"):
                    self.wfile.write(b"354 go on\r\n")
                    received.append("".join(part.decode() for part in iter(self.rfile.readline, b".\r\n")))
                self.wfile.write(b"221 bye\r\n" if line.upper().startswith(b"QUIT") else b"250 ok\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"mailto://127.0.0.1:{server.server_address[1]}?from=a@example.org&to=b@example.org&format=text", received
        server.shutdown()


def test_a_notification_ends_with_the_next_command(hook: tuple[str, Inbox], mail: tuple[str, Inbox]) -> None:
    from setup import setup
    from tasks import error_with_next_command

    @flow(name="broken")
    def broken() -> None:
        with error_with_next_command():
            raise SettingsError("lr: too large", hint="deleatur check")

    @flow(name="worse")
    def worse() -> None:
        raise KeyError("x")

    try:
        setup("process", [], [hook[0], mail[0]])
        with tags("restart"):
            with pytest.raises(SettingsError):
                broken()
            with pytest.raises(KeyError):
                worse()
        prefect_workers.wait_until(lambda: len(hook[1]) == len(mail[1]) == 2, "a message")
        [message] = [text for text in hook[1] if "broken" in text]
        assert message.startswith("deleatur: broken failed\n")
        assert message.endswith("SettingsError: lr: too large\nNext: deleatur check")
        [message] = [text for text in hook[1] if "worse" in text]
        assert message.splitlines()[-1].startswith("Next: prefect flow-run logs ")
        [mailed] = [text for text in mail[1] if "broken" in text]
        assert mailed.rstrip().endswith("Next: deleatur check")
    finally:
        clear_server()


def test_setup_removes_addresses_that_are_not_given_again(hook: tuple[str, Inbox], mail: tuple[str, Inbox]) -> None:
    from setup import run_trigger, setup

    def server_content() -> tuple[set[str], list[str]]:
        with get_client(sync_client=True) as client:
            named = {automation.name for automation in client.read_automations()}
            return named, sorted(f"{d.block_type_name} {d.name}" for d in client.read_block_documents())

    try:
        with get_client(sync_client=True) as client:
            theirs = client.create_automation(
                AutomationCore(name="another", trigger=run_trigger("x", expect={"x"}), actions=[DoNothing()])
            )
        setup("process", [], [hook[0], mail[0]])
        automations, blocks = server_content()
        assert blocks == ["Custom Webhook deleatur-1", "Slack Webhook deleatur-2"]
        setup("process", [], [mail[0]])
        assert server_content() == (automations, ["Slack Webhook deleatur-1"])
        setup("process", [], [])
        assert server_content() == (automations - {"deleatur: notify"}, [])
        with get_client(sync_client=True) as client:
            assert client.read_automation(theirs), "automations of others stay"
    finally:
        clear_server()


@pytest.mark.large
def test_crashed_runs_are_restarted(server: dict[str, str]) -> None:
    """Sends the events of a flow process up to its crash, without running one."""
    from setup import setup

    try:
        setup("process", [], [], heartbeat_timeout=12)
        prefect(server, prefect_workers.ROOT, "--no-prompt", "deploy", "--name", "chain")
        with get_client(sync_client=True) as client:
            chain = client.read_deployment_by_name("erase/chain").id

            def start_run() -> Any:
                run = client.create_flow_run_from_deployment(chain, state=Pending()).id
                client.set_flow_run_state(run, Running(), force=True)
                return run

            def beat(run: Any) -> None:
                resource = {"prefect.resource.id": f"prefect.flow-run.{run}"}
                role = {"prefect.resource.role": "tag"}
                marks = [role | {"prefect.resource.id": f"prefect.tag.{t}"} for t in ("deleatur", "restart")]
                emit_event("prefect.flow-run.heartbeat", resource=resource, related=marks)

            def states(run: Any) -> list[str]:
                return [state.name for state in client.read_flow_run_states(run)]

            silent, killed, heartbeatless = start_run(), start_run(), start_run()
            for _ in range(3):  # a busy server on SQLite may drop one
                beat(silent)
            checks = count()
            prefect_workers.wait_until(
                lambda: "AwaitingRetry" in states(silent),
                "the restart of a run without heartbeats",
                meanwhile=lambda: None if next(checks) % 40 else beat(killed),
            )
            assert states(silent)[-2:] == ["Lost", "AwaitingRetry"]
            for run in (killed, heartbeatless):
                client.set_flow_run_state(run, Crashed(), force=True)
            prefect_workers.wait_until(lambda: "AwaitingRetry" in states(killed), "the restart of a crashed run")
            assert "AwaitingRetry" not in states(heartbeatless), "a run that never started is not restarted"
    finally:
        clear_server()


def test_a_run_that_is_lost_too_often_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks

    from deleatur.errors import ServiceError

    monkeypatch.setattr(tasks, "MAX_RESTARTS", 0)

    @flow
    def one() -> None:
        with tasks.error_with_next_command():
            raise AssertionError("not even begun")

    with pytest.raises(ServiceError, match=r"its process was lost 0 times\nNext: prefect flow-run logs "):
        one()
