"""Runs a flow in this process: against the server of PREFECT_API_URL or, without one, a temporary embedded server."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from prefect.settings import (
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    PREFECT_SERVER_LOGGING_LEVEL,
    temporary_settings,
)

from deleatur.errors import DeleaturError, Interrupted

T = TypeVar("T")

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
    with temporary_settings(set_defaults=EMBEDDED_SERVER_SETTINGS):
        try:
            return flow(**parameters)
        except DeleaturError as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
            sys.exit(e.exit_code)
        except KeyboardInterrupt:
            print("Interrupted.\nNext: the same command, to resume", file=sys.stderr)
            sys.exit(Interrupted.exit_code)
