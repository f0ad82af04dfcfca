"""A store that fails is a message with its cause and the next command, never a stack trace."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import registry
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import ServiceError
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import Registry


def corrupt(path: Path) -> None:
    path.write_bytes(b"\x07" * 20_000)


def of_another_release(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")


def without_tables(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE registered_models")


@pytest.mark.parametrize(
    ("damage", "cause", "advice"),
    [
        (corrupt, "file is not a database", "deleatur restore"),
        (of_another_release, "schema", "mlflow db upgrade"),
        (without_tables, "migration in unexpected state", "mlflow db upgrade"),
    ],
)
@pytest.mark.parametrize("command", [("history",), ("rollback", "--as", "Ada", "--reason", "seen")])
def test_damaged_database_is_reported(
    command: tuple[str, ...],
    damage: Callable[[Path], None],
    cause: str,
    advice: str,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    settings: Settings = registry.create(shared, tmp_path)
    damage(tmp_path / "mlflow.db")
    result = CliRunner().invoke(app, list(command))
    assert isinstance(result.exception, SystemExit), result.exception
    message, _, hint = result.output.partition("Next: ")
    assert (result.exit_code, cause in message, str(tmp_path / "mlflow.db") in message) == (3, True, True), message
    assert advice in hint, hint
    assert open_registry(settings).uri in message


def test_locked_database_is_reported(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = registry.create(shared, tmp_path)
    locked = Registry(f"{open_registry(settings).uri}?timeout=0.1", "erasing", "guard")
    assert locked.aliases() == {}
    database = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ServiceError, match="database is locked") as error:
        locked.aliases()
    database.close()
    assert "lsof" in error.value.hint


@contextmanager
def html_server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!DOCTYPE html><html><body>Sign in</body></html>")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_server_that_answers_html_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with html_server() as uri, pytest.raises(ServiceError, match="HTML page, not as MLflow") as error:
        Registry(uri, "erasing", "guard").aliases()
    assert error.value.hint == f"curl {uri}/version"
