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

from local import DEFAULT_PORTS, MissingProgram, Stack, free_ports  # noqa: E402


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One Prefect server with an empty database per session, since it takes long to start; on PostgreSQL if installed,
    where writers do not wait for each other.
    """
    with free_ports(len(DEFAULT_PORTS)) as ports:
        stack = Stack(tmp_path_factory.mktemp("prefect"), dict(zip(DEFAULT_PORTS, ports, strict=True)))
    try:
        try:
            stack.start("postgres")
        except MissingProgram:
            stack.prefect_database = f"sqlite+aiosqlite:///{stack.folder}/prefect.db"
        stack.start("prefect")
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(stack.database_folder, ignore_errors=True)  # logs stay


@pytest.fixture(scope="session")
def server(stack: Stack) -> Iterator[dict[str, str]]:
    """The server, as environment variables for subprocesses; this process uses it too."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        PREFECT_HOME,
        PREFECT_LOGGING_LEVEL,
        temporary_settings,
    )

    variables = {name: value for name, value in stack.client_environment.items() if name.startswith("PREFECT_")}
    variables["PREFECT_HOME"] = str(stack.folder / "client")
    variables["TMPDIR"] = str(stack.folder / "tmp")  # killed processes leave their temporary files
    Path(variables["TMPDIR"]).mkdir()
    others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    settings = {
        PREFECT_API_AUTH_STRING: variables["PREFECT_API_AUTH_STRING"],
        PREFECT_API_URL: variables["PREFECT_API_URL"],
        PREFECT_HOME: variables["PREFECT_HOME"],
        PREFECT_LOGGING_LEVEL: "ERROR",
    }
    with temporary_settings(settings):
        yield others | variables
        for queue in (
            APILogWorker,
            EventsWorker,
        ):  # at exit they would wait a minute for the server, which is gone then
            queue.drain_all()


@pytest.fixture
def one_gpu(server: dict[str, str]) -> Iterator[None]:
    """The concurrency limit that `prefect gcl create gpu --limit 1` creates."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

    with get_client(sync_client=True) as client:
        limit = GlobalConcurrencyLimitCreate(name="gpu", limit=1)
        client.create_global_concurrency_limit(limit)
        yield
        client.delete_global_concurrency_limit_by_name("gpu")
