"""Runs a flow in this process: against the server of PREFECT_API_URL or, without one, a temporary embedded server."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_KEY,
    PREFECT_API_URL,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    PREFECT_SERVER_LOGGING_LEVEL,
    temporary_settings,
)
from pydantic import SecretStr

from deleatur.errors import DeleaturError, Interrupted, ServiceError
from deleatur.operations.http_clients import PrefectClient

T = TypeVar("T")

SERVER_HINT = "prefect server start, or, to run without a server: unset PREFECT_API_URL"

EMBEDDED_SERVER_SETTINGS = {
    PREFECT_SERVER_ANALYTICS_ENABLED: False,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 180,  # the first start creates a database, which takes over 20 s
    PREFECT_SERVER_LOGGING_LEVEL: "CRITICAL",  # at shutdown it logs errors about events that it could not store
}
"""Defaults of the embedded server; the user's Prefect settings take precedence."""


def run_in_process(flow: Callable[..., T], **parameters: Any) -> T:
    """Run a flow and return its result. An error ends the process with a message and the exit code of errors.py."""
    os.environ.setdefault("DO_NOT_TRACK", "true")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM interrupts like Ctrl-C: the stage saves first
    with temporary_settings(set_defaults=EMBEDDED_SERVER_SETTINGS), exit_with_message():
        require_server()
        return flow(**parameters)


@contextmanager
def exit_with_message() -> Iterator[None]:
    """End the process with a message, the next command and an exit code instead of a stack trace."""
    try:
        try:
            yield
        except httpx.HTTPError as e:
            raise ServiceError(f"the Prefect server does not respond: {e}", hint=SERVER_HINT) from e
    except DeleaturError as e:
        # Errors of a flow end with their hint already, see tasks.error_with_next_command.
        hint = f"\nNext: {e.hint}" if e.hint and "\nNext: " not in str(e) else ""
        print(f"{type(e).__name__}: {e}{hint}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("Interrupted.\nNext: the same command, to resume", file=sys.stderr)
        sys.exit(Interrupted.exit_code)


def require_server() -> None:
    """Raises ServiceError if the configured Prefect server does not respond, SettingsError if it refuses the
    credentials. Prefect itself would retry for a while and end with several stack traces.
    """
    if not (url := PREFECT_API_URL.value()):
        return
    # A secret in a profile or the environment, a plain string where the setting is overridden in this process.
    values = (PREFECT_API_KEY.value() or "", PREFECT_API_AUTH_STRING.value() or "")
    key, credentials = (v.get_secret_value() if isinstance(v, SecretStr) else v for v in values)
    client = PrefectClient.with_credentials(url, key, credentials)
    try:
        _ = client.version
    except ServiceError as e:
        raise ServiceError(f"the Prefect server of PREFECT_API_URL: {e}", hint=SERVER_HINT) from e
