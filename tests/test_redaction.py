"""No text that leaves the process has credentials."""

from __future__ import annotations

from pathlib import Path
from time import process_time

import pytest
import yaml
from sqlalchemy import make_url
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.errors import DataError
from deleatur.redaction import redact, redacted_file

ROOT = Path(__file__).parents[1]
AWS_EXAMPLE = "AKIAIOSFODNN7EXAMPLE"  # of Amazon's documentation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgres://me:PW@host:5432/db is no store", "postgres://***@host:5432/db is no store"),
        ("postgresql+psycopg2://me:p@s/s:PW@host/db", "postgresql+psycopg2://***@host/db"),
        ("mysql://me:PW/x@host/db", "mysql://***@host/db"),
        ("url: 'https://PW@git.example.org/a.git'", "url: 'https://***@git.example.org/a.git'"),
        ("https://store/x?sig=PW&size=3", "https://store/x?sig=***&size=3"),
        (
            "s3://b/k?X-Amz-Security-Token=PW&a=1&access_token=PW",
            "s3://b/k?X-Amz-Security-Token=***&a=1&access_token=***",
        ),
        (
            "[remote]\n    secret_access_key = PW\n    url = s3://b",
            "[remote]\n    secret_access_key = ***\n    url = s3://b",
        ),
        ("https://proxy/?url=https://store/x?token=PW&a=1", "https://proxy/?url=https://store/x?token=***&a=1"),
        ("host=db password=PW user=me: no such host", "host=db password=*** user=me: no such host"),
        ("host=db password='P W' user=me", "host=db password=*** user=me"),
        ("password:\n    PW", "password:\n    ***"),
        (f"access key {AWS_EXAMPLE} is unknown", "access key *** is unknown"),
    ],
)
def test_credentials_are_removed(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected
    error = DataError(text, hint=text)
    assert (str(error), error.hint) == (expected, expected)


def test_a_url_keeps_what_sqlalchemy_reads_as_its_host() -> None:
    url = make_url("postgresql://me:a%2Fb@host:5432/db")
    assert redact(url.render_as_string(hide_password=False)).endswith(f"@{url.host}:{url.port}/{url.database}")


def test_texts_without_credentials_are_unchanged() -> None:
    for text in (
        (ROOT / "params.yaml").read_text("utf-8"),
        (ROOT / "dvc.lock").read_text("utf-8"),
        "models:/deleatur@champion, http://localhost:5000/path, sqlite:///mlflow.db, s3://bucket/key",
        "export MLFLOW_TRACKING_USERNAME=… MLFLOW_TRACKING_PASSWORD=…",
    ):
        assert redact(text) == text


@pytest.mark.parametrize(
    "unit", ["\n", "\t", " \n", "password", "token=", ";token", "://", "://a:b", "a@", "?a=", "password='", "AKIA", "x"]
)
def test_the_time_for_a_long_text_is_linear_in_its_length(unit: str) -> None:
    """A pattern of quadratic time takes minutes for one of these."""
    text = ";" + unit * (200_000 // len(unit))
    start = process_time()
    redact(text)
    assert process_time() - start < 2, "seconds, also on a slow machine"


def test_secrets_of_the_environment_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    assert redact("signed with wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY") == "signed with ***"


def test_files_with_credentials_are_copied_without_them(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    for uri, same in (("sqlite:///mlflow.db", True), ("postgresql://me:PW@host/db", False)):
        path.write_text(yaml.safe_dump({"register": {"tracking_uri": uri}}), "utf-8")
        with redacted_file(path) as copy:
            assert (copy == path, copy.name, "PW" in copy.read_text("utf-8")) == (same, "params.yaml", False)


@pytest.mark.parametrize("command", [("history",), ("verify", "1"), ("doctor",), ("canary",)])
def test_commands_print_no_password(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = (ROOT / "params.yaml").read_text("utf-8")
    Path("params.yaml").write_text(params.replace("sqlite:///mlflow.db", "postgres://me:PW@127.0.0.1:9/db"), "utf-8")
    result = CliRunner().invoke(app, list(command))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code not in (0, None)
    assert "PW" not in result.output
    assert "127.0.0.1:9" in result.output
