"""The connection to MLflow: tracking URI, paginated searches, and errors that a person can act on."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from alembic.util import CommandError
from mlflow.exceptions import MlflowException
from mlflow.utils import get_results_from_paginated_fn
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from deleatur.errors import DataError, DeleaturError, ServiceError, SettingsError
from deleatur.redaction import redact
from deleatur.registry.relocation import relocate
from deleatur.storage.files import disk_error_number, disk_errors

ENVIRONMENT_URI = os.environ.get("MLFLOW_TRACKING_URI")
"""As it was when this process started: MLflow sets the variable itself whenever it is given a URI, see
`use_tracking_uri`."""

STORE_FAULTS = (
    (("not a database", "malformed"), True, "mv {path} {path}.damaged, then: deleatur restore BACKUP"),
    (("database is locked",), False, "the same command again, once the process of `lsof {path}` has ended"),
    (("readonly", "read-only"), True, "ls -l {path} (this account has to be able to write file and folder)"),
    (("disk is full", "disk I/O"), False, "df -h {path}"),
    (("unable to open database",), True, "ls -ld {path} (this account has to be able to write file and folder)"),
    (
        ("out-of-date database schema", "Can't locate revision", "migration in unexpected", "no such column"),
        True,
        "deleatur backup FOLDER (with the release that wrote it), then: mlflow db upgrade {uri}",
    ),
)
"""(Symptoms in the message of a database, whether its data has to be repaired, the next command.)"""

FAILED_DOWNLOAD = "The following failures occurred while downloading"
"""MLflow's first line of several: each file's name and error follow, with numbers of the operating system."""

PAGE_SIZE = 100
"""Runs or versions per search request."""


DRIVER_PACKAGES = {"psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Module of a database driver → the package that installs it, where their names differ."""


def use_tracking_uri(uri: str) -> None:
    """Points MLflow's own loaders at our store, and leaves the environment of child processes as it was."""
    mlflow.set_tracking_uri(tracking_uri(uri))
    if ENVIRONMENT_URI is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)


def connect(uri: str) -> mlflow.MlflowClient:
    """A client of our store. After the project was moved, artifacts are read and written in its new folder.

    Raises DataError if the database is a folder, damaged or read-only, ServiceError if it is locked.
    """
    use_tracking_uri(uri)
    path = sqlite_file(uri)
    if path and path.is_dir():
        raise DataError(
            f"expected MLflow's database, and {path} is a folder",
            hint="move it away, or correct register.tracking_uri in params.yaml; then: deleatur doctor",
        )
    if path and path.is_file():
        try:
            relocate(path)
        except sqlite3.Error as e:
            raise _store_error(uri, str(e)) from e
    return mlflow.MlflowClient()


def tracking_uri(uri: str) -> str:
    """The URI in use: MLFLOW_TRACKING_URI takes precedence over `uri`."""
    return ENVIRONMENT_URI or uri


def store_exists(uri: str) -> bool:
    """Whether a store exists already; False for a SQLite file that MLflow would create. Servers are not queried."""
    path = sqlite_file(uri)
    return path is None or path.is_dir() or (path.is_file() and path.stat().st_size > 0)


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for any other store."""
    _, scheme, path = tracking_uri(uri).partition("sqlite:///")
    return Path(path.partition("?")[0].removeprefix("file:")) if scheme else None


@contextmanager
def translated_errors(uri: str, missing: DeleaturError | None = None, target: Path | None = None) -> Iterator[None]:
    """Raises exceptions of MLflow, its database and its server as ours.

    missing: raised if MLflow reports that the object does not exist. target: where files are downloaded to.
    """
    try:
        with disk_errors(sqlite_file(uri) or Path(redact(tracking_uri(uri)))):
            yield
    except ModuleNotFoundError as e:  # SQLAlchemy imports the driver of the database
        raise SettingsError(
            f"MLflow at {redact(tracking_uri(uri))} needs the package {e.name}, which is not installed",
            hint=f"pip install {DRIVER_PACKAGES.get(str(e.name), e.name)}",
        ) from e
    except (SQLAlchemyError, CommandError, RequestException) as e:
        raise _store_error(uri, str(getattr(e, "orig", None) or e)) from None
    except MlflowException as e:
        if missing and e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise missing from e
        if target and str(e).startswith(FAILED_DOWNLOAD) and (number := disk_error_number(str(e))):
            raise OSError(number, os.strerror(number), str(target)) from e
        shown_uri, message = redact(tracking_uri(uri)), redact(_first_cause(str(e)))
        if e.error_code == "INVALID_PARAMETER_VALUE":
            raise SettingsError(
                f"MLflow at {shown_uri} does not accept the `register` section: {message}",
                hint="correct the section register in params.yaml, then: deleatur check",
            ) from e
        if e.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise SettingsError(
                f"MLflow at {shown_uri} refuses the credentials: {message}",
                hint="export MLFLOW_TRACKING_USERNAME=… MLFLOW_TRACKING_PASSWORD=…",
            ) from e
        raise _store_error(uri, str(e)) from e


def _store_error(uri: str, text: str) -> DeleaturError:
    """The error for a store that fails: its cause in one line, and the command that helps."""
    shown_uri, path = redact(tracking_uri(uri)), sqlite_file(uri)
    if "<html" in text.lower() or "<!doctype" in text.lower():
        return ServiceError(f"{shown_uri} answers with an HTML page, not as MLflow", hint=f"curl {shown_uri}/version")
    message = _first_cause(text)
    for symptoms, damaged, advice in STORE_FAULTS:
        if any(symptom in text for symptom in symptoms):
            kind = DataError if damaged else ServiceError
            return kind(f"MLflow at {shown_uri} failed: {message}", hint=advice.format(uri=shown_uri, path=path))
    return ServiceError(f"MLflow at {shown_uri} failed: {message}", hint="deleatur doctor")


def _first_cause(text: str) -> str:
    """The first line without its SQL; where it only announces others, with the first of them that is no headline."""
    first, *others = (line for line in text.strip().splitlines() if line.strip() and not line.startswith("#####"))
    cause = f" {others[0].strip()}" if first.endswith(":") and others else ""
    return f"{first.partition(' [SQL:')[0]}{cause}"


def all_pages(search: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of a paginated search of MLflow, all pages of them."""

    def page(n: int, token: str | None) -> Any:
        return search(*arguments, max_results=n, page_token=token)

    items: list[Any] = get_results_from_paginated_fn(page, PAGE_SIZE)
    return items


@contextmanager
def ignore_existing() -> Iterator[None]:
    """Ignores MLflow's error if the object that is created inside exists already."""
    try:
        yield
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
