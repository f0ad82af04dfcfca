"""A store that fails is a message with its cause and the next command, never a stack trace."""

from __future__ import annotations

import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import registry
from full_disk import max_file_size
from registry import register_fail, register_pass
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import DataError, ServiceError
from deleatur.operations.exporter.releases import registry_metrics
from deleatur.registry import history
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHAMPION, LAST_KNOWN_GOOD, QUARANTINED, Registry

ACTOR = ("--as", "Ada", "--reason", "seen in the wild")


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


@pytest.mark.parametrize(
    ("replace", "problem"),
    [
        (lambda store, empty: None, "is missing, and ledger.jsonl has 4 decisions"),
        (lambda store, empty: store.touch(), "is missing, and ledger.jsonl has 4 decisions"),
        (lambda store, empty: shutil.copy(empty, store), "has applied none of the 4 lines of ledger.jsonl"),
    ],
    ids=["deleted", "emptied", "recreated"],
)
def test_lost_store_is_not_an_empty_one(
    replace: Callable[[Path, Path], object],
    problem: str,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = registry.create(shared, tmp_path)
    register_pass(settings, "a")
    register_pass(settings, "b")
    # Another address, as MLflow has the deleted file open.
    params, lost = tmp_path / "params.yaml", tmp_path / "lost.db"
    params.write_text(params.read_text("utf-8").replace("mlflow.db", "lost.db"), "utf-8")
    replace(lost, registry.empty_store(shared))
    size = lost.stat().st_size if lost.exists() else None
    for command in (
        ("history",),
        ("verify", "1"),
        ("canary", "--dry-run"),
        ("rollback", *ACTOR),
        ("quarantine", "1", *ACTOR),
        ("export", "exported", "--version", "1"),
        ("backup", "saved"),
        ("settle", *ACTOR),
    ):
        result = CliRunner().invoke(app, list(command))
        assert (result.exit_code, type(result.exception)) == (3, SystemExit), (command, result.output)
        message, _, hint = result.output.partition("Next: ")
        assert (problem in message, "deleatur restore" in hint) == (True, True), (command, result.output)
    assert (lost.stat().st_size if lost.exists() else None) == size, "nothing was created"
    lost_settings = Settings.load()
    with pytest.raises(DataError, match=problem):
        register_fail(lost_settings, "c")
    [known] = [m for m in registry_metrics(lost_settings) if m.name.endswith("ledger_known")]
    assert known.samples[0].value == 0
    result = CliRunner().invoke(app, ["settle", "--adopt", "--as", "Ada", "--reason", "the disk died"])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, ["history"]).exit_code == 0
    assert len([*tmp_path.glob("ledger.jsonl.*")]) == 1, "the ledger of the lost store is kept"


def test_read_only_store_can_be_read_and_says_what_a_decision_needs(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = registry.create(shared, tmp_path)
    register_pass(settings, "a")
    register_pass(settings, "b")
    params, store = tmp_path / "params.yaml", tmp_path / "mlflow.db"
    text = params.read_text("utf-8")
    params.write_text(text.replace(f"sqlite:///{store}", f"sqlite:///file:{store}?mode=ro&uri=true"), "utf-8")
    assert CliRunner().invoke(app, ["history"]).exit_code == 0
    result = CliRunner().invoke(app, ["rollback", *ACTOR])
    assert (result.exit_code, type(result.exception)) == (3, SystemExit), result.output
    message, _, hint = result.output.partition("Next: ")
    assert ("readonly database" in message, f"ls -l {store}" in hint) == (True, True), result.output
    params.write_text(text, "utf-8")
    assert CliRunner().invoke(app, ["rollback", *ACTOR]).exit_code == 0, "the same command completes the decision"
    assert open_registry(settings).aliases() == {CHAMPION: "1", QUARANTINED: "2"}


@pytest.mark.parametrize(("limit", "file"), [(1_000, "ledger.jsonl"), (20_000, "mlflow.db")])
def test_full_disk_is_reported_and_the_decision_completes_afterwards(
    limit: int, file: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = registry.create(shared, tmp_path)
    register_pass(settings, "a")
    register_pass(settings, "b")
    with max_file_size(limit):
        result = CliRunner().invoke(app, ["rollback", *ACTOR])
    assert (result.exit_code, type(result.exception)) in ((3, SystemExit), (6, SystemExit)), result.output
    message, _, hint = result.output.partition("Next: ")
    assert (file in message, "df -h" in hint) == (True, True), result.output
    assert open_registry(settings).aliases() == {CHAMPION: "2", LAST_KNOWN_GOOD: "1"}
    assert CliRunner().invoke(app, ["rollback", *ACTOR]).exit_code == 0
    assert open_registry(settings).aliases() == {CHAMPION: "1", QUARANTINED: "2"}
    assert history.history(settings).problems == []


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


@pytest.mark.parametrize("command", [("history",), ("backup", "copy"), ("verify", "1")])
def test_missing_database_driver_is_named(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    params = (registry.ROOT / "params.yaml").read_text("utf-8")
    Path("params.yaml").write_text(params.replace("sqlite:///mlflow.db", "postgresql://me:PW@127.0.0.1:9/db"), "utf-8")
    result = CliRunner().invoke(app, list(command))
    assert result.exit_code == 2, result.exception
    assert "postgresql://***@127.0.0.1:9/db needs the package psycopg2" in result.output
    assert "Next: pip install psycopg2-binary" in result.output
    assert not Path("copy").exists()
