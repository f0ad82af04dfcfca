from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "flows"), str(ROOT / "infra")]
os.environ.setdefault("DO_NOT_TRACK", "true")

from local import USUAL, Missing, Stack, free  # noqa: E402


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One Prefect server with an empty database for the whole session: it takes its time to start. On PostgreSQL where
    that is installed: writers of SQLite wait for each other.
    """
    with free(len(USUAL)) as ports:
        stack = Stack(tmp_path_factory.mktemp("prefect"), dict(zip(USUAL, ports, strict=True)))
    try:
        try:
            stack.start("postgres")
        except Missing:
            stack.prefect_database = f"sqlite+aiosqlite:///{stack.folder}/prefect.db"
        stack.start("prefect")
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(stack.database, ignore_errors=True)  # logs stay


@pytest.fixture(scope="session")
def server(stack: Stack) -> Iterator[dict[str, str]]:
    """The variables that make other processes use it; this one does."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        PREFECT_HOME,
        PREFECT_LOGGING_LEVEL,
        temporary_settings,
    )

    ours = {name: value for name, value in stack.clients.items() if name.startswith("PREFECT_")}
    ours["PREFECT_HOME"] = str(stack.folder / "client")
    others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    here = {
        PREFECT_API_AUTH_STRING: ours["PREFECT_API_AUTH_STRING"],
        PREFECT_API_URL: ours["PREFECT_API_URL"],
        PREFECT_HOME: ours["PREFECT_HOME"],
        PREFECT_LOGGING_LEVEL: "ERROR",
    }
    with temporary_settings(here):
        yield others | ours
        for told in (APILogWorker, EventsWorker):  # they would look for the server for a minute when it is gone
            told.drain_all()


@pytest.fixture
def one_gpu(server: dict[str, str]) -> Iterator[None]:
    """What `prefect gcl create gpu --limit 1` makes."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

    with get_client(sync_client=True) as client:
        limit = GlobalConcurrencyLimitCreate(name="gpu", limit=1)
        client.create_global_concurrency_limit(limit)
        yield
        client.delete_global_concurrency_limit_by_name("gpu")
