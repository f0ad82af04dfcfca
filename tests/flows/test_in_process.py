"""A Prefect server that is down, or refuses the credentials, is a message with the next command, not a stack trace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from in_process import exit_with_message

from deleatur.errors import ServiceError, SettingsError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refusing() -> Iterator[str]:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def run(script: str, url: str) -> tuple[int, list[str]]:
    """Exit code and lines of stderr."""
    command = [sys.executable, str(ROOT / "flows" / script)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PREFECT_API_URL": url}, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("script", ["erase.py", "setup.py"])
def test_a_server_that_is_down_is_a_message(script: str) -> None:
    code, lines = run(script, "http://127.0.0.1:9/api")
    assert code == ServiceError.exit_code
    assert len(lines) == 2, lines
    assert lines[0].startswith("ServiceError: the Prefect server of PREFECT_API_URL: http://127.0.0.1:9/api/admin/")
    assert lines[1] == "Next: prefect server start, or, to run without a server: unset PREFECT_API_URL"


def test_refused_credentials_are_a_message(refusing: str) -> None:
    code, lines = run("erase.py", refusing)
    assert code == SettingsError.exit_code
    assert "refuses the credentials (401)" in lines[0]
    assert lines[1] == "Next: export PREFECT_API_AUTH_STRING=admin:PASSWORD"


def test_a_server_that_goes_away_is_a_message_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_with_message():
        raise httpx.ConnectError("connection refused")
    assert ended.value.code == ServiceError.exit_code
    assert "ServiceError: the Prefect server does not respond: connection refused\nNext: " in capsys.readouterr().err
