"""What a server does by itself: runs that die go on, and people are told, with the command to run next."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import machines
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from prefect import flow, tags  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.events import emit_event  # noqa: E402
from prefect.events.actions import DoNothing  # noqa: E402
from prefect.events.schemas.automations import AutomationCore  # noqa: E402
from prefect.states import Crashed, Pending, Running  # noqa: E402
from test_deployments import cleared, prefect  # noqa: E402

from deleatur.errors import SettingsError  # noqa: E402

Inbox = list[str]


@pytest.fixture
def hook() -> Iterator[tuple[str, Inbox]]:
    """An address that takes messages as Slack does, and the messages."""
    came: Inbox = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", came
        server.shutdown()


@pytest.fixture
def mail() -> Iterator[tuple[str, Inbox]]:
    """A mail server, as an address for Apprise, and the mails."""
    came: Inbox = []

    class Mail(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 here\r\n")
            for line in self.rfile:
                if line.upper().startswith(b"DATA"):
                    self.wfile.write(b"354 go on\r\n")
                    came.append("".join(part.decode() for part in iter(self.rfile.readline, b".\r\n")))
                self.wfile.write(b"221 bye\r\n" if line.upper().startswith(b"QUIT") else b"250 ok\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"mailto://127.0.0.1:{server.server_address[1]}?from=a@example.org&to=b@example.org&format=text", came
        server.shutdown()


def test_a_message_ends_with_the_command_to_run_next(hook: tuple[str, Inbox], mail: tuple[str, Inbox]) -> None:
    from setup import setup
    from tasks import ending_in_a_command

    @flow(name="broken")
    def broken() -> None:
        with ending_in_a_command():
            raise SettingsError("lr: too large", hint="deleatur check")

    @flow(name="worse")
    def worse() -> None:
        raise KeyError("x")

    try:
        setup("process", [], [hook[0], mail[0]])
        with tags("goes-on"):
            with pytest.raises(SettingsError):
                broken()
            with pytest.raises(KeyError):
                worse()
        machines.awaited(lambda: len(hook[1]) == len(mail[1]) == 2, "a message")
        [told] = [text for text in hook[1] if "broken" in text]
        assert told.startswith("deleatur: broken failed\n")
        assert told.endswith("SettingsError: lr: too large\nNext: deleatur check")
        [told] = [text for text in hook[1] if "worse" in text]
        assert told.splitlines()[-1].startswith("Next: prefect flow-run logs ")
        [mailed] = [text for text in mail[1] if "broken" in text]
        assert mailed.rstrip().endswith("Next: deleatur check")
    finally:
        cleared()


def test_who_is_not_asked_for_any_more_is_not_told(hook: tuple[str, Inbox], mail: tuple[str, Inbox]) -> None:
    from setup import of, setup

    def there() -> tuple[set[str], list[str]]:
        with get_client(sync_client=True) as client:
            named = {automation.name for automation in client.read_automations()}
            return named, sorted(f"{d.block_type_name} {d.name}" for d in client.read_block_documents())

    try:
        with get_client(sync_client=True) as client:
            theirs = client.create_automation(
                AutomationCore(name="another", trigger=of("x", expect={"x"}), actions=[DoNothing()])
            )
        setup("process", [], [hook[0], mail[0]])
        told, blocks = there()
        assert blocks == ["Custom Webhook deleatur-1", "Slack Webhook deleatur-2"]
        setup("process", [], [mail[0]])
        assert there() == (told, ["Slack Webhook deleatur-1"])
        setup("process", [], [])
        assert there() == (told - {"deleatur: somebody is told"}, [])
        with get_client(sync_client=True) as client:
            assert client.read_automation(theirs), "not ours to take away"
    finally:
        cleared()


@pytest.mark.large
def test_runs_that_die_go_on(server: dict[str, str]) -> None:
    """No process runs here: what a server hears of one that does is said to it, up to the moment it dies."""
    from setup import setup

    try:
        setup("process", [], [], silent=12)
        prefect(server, machines.ROOT, "--no-prompt", "deploy", "--name", "chain")
        with get_client(sync_client=True) as client:
            chain = client.read_deployment_by_name("erase/chain").id

            def begun() -> Any:
                run = client.create_flow_run_from_deployment(chain, state=Pending()).id
                client.set_flow_run_state(run, Running(), force=True)
                return run

            def beat(run: Any) -> None:
                resource = {"prefect.resource.id": f"prefect.flow-run.{run}"}
                role = {"prefect.resource.role": "tag"}
                marks = [role | {"prefect.resource.id": f"prefect.tag.{t}"} for t in ("deleatur", "goes-on")]
                emit_event("prefect.flow-run.heartbeat", resource=resource, related=marks)

            def states(run: Any) -> list[str]:
                return [state.name for state in client.read_flow_run_states(run)]

            silent, killed, never = begun(), begun(), begun()
            for _ in range(3):  # a server on SQLite may drop one when it has much to do
                beat(silent)
            looks = count()
            machines.awaited(
                lambda: "AwaitingRetry" in states(silent),
                "the end of the silence",
                still=lambda: None if next(looks) % 40 else beat(killed),
            )
            assert states(silent)[-2:] == ["Lost", "AwaitingRetry"]
            for run in (killed, never):
                client.set_flow_run_state(run, Crashed(), force=True)
            machines.awaited(lambda: "AwaitingRetry" in states(killed), "another life")
            assert "AwaitingRetry" not in states(never), "what has not begun would only be killed again"
    finally:
        cleared()


def test_a_run_that_is_lost_again_and_again_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks

    from deleatur.errors import ServiceError

    monkeypatch.setattr(tasks, "LIVES", 0)

    @flow
    def one() -> None:
        with tasks.ending_in_a_command():
            raise AssertionError("not even begun")

    with pytest.raises(ServiceError, match=r"its process was lost 0 times\nNext: prefect flow-run logs "):
        one()
