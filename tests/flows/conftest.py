from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "flows"))
os.environ.setdefault("DO_NOT_TRACK", "true")


@pytest.fixture(scope="session")
def server() -> Iterator[None]:
    """One Prefect server with an empty database for the whole session: it takes its time to start."""
    from prefect.settings import PREFECT_LOGGING_LEVEL, PREFECT_SERVER_ANALYTICS_ENABLED, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    quiet = {PREFECT_SERVER_ANALYTICS_ENABLED: False, PREFECT_LOGGING_LEVEL: "ERROR"}
    with temporary_settings(quiet), prefect_test_harness(server_startup_timeout=300):
        yield
