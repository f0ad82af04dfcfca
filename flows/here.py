"""A flow in this process. Needs no Prefect server, an embedded one starts and ends with it; where PREFECT_API_URL names
a server, it uses that.
"""

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

from deleatur.errors import ContinueMe, DeleaturError

T = TypeVar("T")

EMBEDDED = {
    PREFECT_SERVER_ANALYTICS_ENABLED: False,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 180,  # the first start makes a database; 20 are too few for it
    PREFECT_SERVER_LOGGING_LEVEL: "CRITICAL",  # or it complains at the end about events it could not store
}
"""Settings of the embedded server, where nobody has set them."""


def run_here(flow: Callable[..., T], **parameters: Any) -> T:
    """What the flow gives back. An error is told as a message, and its exit code is ours."""
    os.environ.setdefault("DO_NOT_TRACK", "true")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the end of this process is an end by request
    with temporary_settings(set_defaults=EMBEDDED):
        try:
            return flow(**parameters)
        except DeleaturError as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
            sys.exit(e.exit_code)
        except KeyboardInterrupt:
            print("Stopped.\nNext: the same command, to go on", file=sys.stderr)
            sys.exit(ContinueMe.exit_code)
