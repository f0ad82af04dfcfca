from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "flows"))
os.environ.setdefault("DO_NOT_TRACK", "true")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One Prefect server with an empty database for the whole session: it takes its time to start. Gives the variables
    that make other processes use it.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_LOGGING_LEVEL, temporary_settings

    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/api"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env = clean | {"PREFECT_HOME": str(home), "PREFECT_API_URL": address, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    start = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(start, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert process.poll() is None, (home / "server.log").read_text()
            try:
                urlopen(f"{address}/health").close()
                break
            except URLError:
                time.sleep(0.5)
        with temporary_settings({PREFECT_API_URL: address, PREFECT_HOME: home, PREFECT_LOGGING_LEVEL: "ERROR"}):
            yield env
    finally:
        process.terminate()
        process.wait(60)


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
