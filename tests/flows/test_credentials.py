"""What flows log, publish and pass on to workers, which Prefect stores, has no credentials."""

from __future__ import annotations

import logging
from io import StringIO
from pathlib import Path

import pytest
import tasks
import workers
from prefect.logging.formatters import JsonFormatter, PrefectFormatter

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.markdown import escape_markdown
from deleatur.registry import mlflow_client

ROOT = Path(__file__).parents[2]

FORMATTERS = [PrefectFormatter("%(message)s"), JsonFormatter("default", "", "%"), logging.Formatter()]


@pytest.mark.parametrize("formatter", FORMATTERS, ids=lambda f: type(f).__name__)
def test_messages_and_causes_in_the_log_have_no_credentials(formatter: logging.Formatter) -> None:
    assert logging.getLogRecordFactory() is tasks.RedactedRecord
    address, logger = "postgresql://me:PW@host/db", logging.getLogger("not of Prefect")
    handler = logging.StreamHandler(text := StringIO())
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    try:
        try:
            raise DataError("no such store") from OSError(f"could not translate {address}")
        except DataError:
            logger.exception("failed at %s", address)
    finally:
        logger.removeHandler(handler)
    assert "no such store" in text.getvalue(), "the stack trace is there"
    assert "PW" not in text.getvalue()


def test_artifacts_have_no_credentials() -> None:
    assert escape_markdown("store sftp://me:PW@host/x, `dvc pull https://me:PW@host`") == (
        "store sftp://\\*\\*\\*@host/x, `dvc pull https://***@host`"
    )


@pytest.mark.parametrize(
    ("uri", "passed_on"),
    [
        ("postgresql://me:PW@host/db", False),
        ("postgresql://host/db?user=me&password=PW", False),
        ("http://host:5000", True),
    ],
)
def test_workers_are_passed_no_uri_with_a_password(uri: str, passed_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_client, "ENVIRONMENT_URI", uri)
    environment = workers._tracking_environment(Settings.load(ROOT / "params.yaml"))
    assert environment == ({"MLFLOW_TRACKING_URI": uri} if passed_on else {})
