"""The connection to MLflow: tracking URI, paginated searches, and errors that a person can act on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.utils import get_results_from_paginated_fn

from deleatur.errors import DeleaturError, ServiceError, SettingsError
from deleatur.redaction import redact

ENVIRONMENT_URI = os.environ.get("MLFLOW_TRACKING_URI")
"""As it was when this process started: MLflow sets the variable itself whenever it is given a URI, see
`use_tracking_uri`."""

PAGE_SIZE = 100
"""Runs or versions per search request."""


def use_tracking_uri(uri: str) -> None:
    """Points MLflow's own loaders at our store, and leaves the environment of child processes as it was."""
    mlflow.set_tracking_uri(tracking_uri(uri))
    if ENVIRONMENT_URI is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)


def connect(uri: str) -> mlflow.MlflowClient:
    use_tracking_uri(uri)
    return mlflow.MlflowClient()


def tracking_uri(uri: str) -> str:
    """The URI in use: MLFLOW_TRACKING_URI takes precedence over `uri`."""
    return ENVIRONMENT_URI or uri


def store_exists(uri: str) -> bool:
    """Whether a store exists already; False for a SQLite file that MLflow would create. Servers are not queried."""
    path = sqlite_file(uri)
    return path is None or path.is_file()


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store."""
    _, found, path = tracking_uri(uri).partition("sqlite:///")
    return Path(path.partition("?")[0]) if found else None


@contextmanager
def translated_errors(uri: str, missing: DeleaturError | None = None) -> Iterator[None]:
    """Raises MLflow's exceptions as ours. missing: raised where MLflow reports that the object does not exist."""
    try:
        yield
    except MlflowException as e:
        if missing and e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise missing from e
        shown_uri, message = redact(tracking_uri(uri)), redact(str(e).strip().splitlines()[0])
        if e.error_code == "INVALID_PARAMETER_VALUE":
            raise SettingsError(f"MLflow at {shown_uri} does not accept the `register` section: {message}") from e
        if e.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise SettingsError(
                f"MLflow at {shown_uri} refuses the credentials: {message}",
                hint="export MLFLOW_TRACKING_USERNAME=… MLFLOW_TRACKING_PASSWORD=…",
            ) from e
        raise ServiceError(f"MLflow at {shown_uri} failed: {message}", hint="deleatur stage register") from e


def all_pages(search: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of a paginated search of MLflow, all pages of them."""

    def page(n: int, token: str | None) -> Any:
        return search(*arguments, max_results=n, page_token=token)

    items: list[Any] = get_results_from_paginated_fn(page, PAGE_SIZE)
    return items


@contextmanager
def ignore_existing() -> Iterator[None]:
    """Lets the creation of something that exists already pass."""
    try:
        yield
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
