"""Every test runs on one thread: small networks are slower on two, and sums do not change their order."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")

import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch

from deleatur.config.settings import Settings
from deleatur.diffusion.model import Model

if TYPE_CHECKING:
    from playwright.sync_api import Browser

torch.set_num_threads(1)

SLOW_FIXTURES = frozenset({"shared", "done", "browser", "server", "servers", "stack", "exporter"})
"""Fixtures that run the complete chain, a server or a browser: what uses them, however indirectly, is slow."""


FIRST_SERVER = {"test_erase", "test_workers", "test_deployments", "test_in_process"}
"""About half of the tests of the flows; the others use a second server."""
LONGEST = {"test_decisions", "test_stores", "test_trials"}
"""Files that start first, as those of the flows do, so that none is left over when the others are done."""

WARM = Path(__file__).parent / "warm"


def pytest_configure(config: pytest.Config) -> None:
    """Tests in several processes start hundreds of commands: the warm server spares them, and these processes, the
    imports of other packages. Commands that are started with PYTHONPATH overridden run as everywhere else.
    """
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        return
    folder = TemporaryDirectory(prefix="warm-")
    address = f"{folder.name}/socket"
    server = subprocess.Popen([sys.executable, WARM / "server.py", address], stdin=subprocess.DEVNULL)
    os.environ["WARM_SOCKET"] = address
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(WARM), os.environ.get("PYTHONPATH")]))

    def stop() -> None:
        server.terminate()
        server.wait()
        folder.cleanup()

    config.add_cleanup(stop)
    while server.poll() is None and not os.path.exists(address):
        time.sleep(0.05)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.parent.name != "flows" and item.path.stem not in LONGEST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        """Tests of a group run in one process: those of a file, or of the files that share a Prefect server."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if "/flows/" not in file:
                return file
            return "prefect 1" if Path(file).stem in FIRST_SERVER else "prefect 2"

    return Groups(config, log)


def pytest_collection_finish() -> None:
    """Garbage is collected rarely, in this process and in its many forks, and not in what is imported for good."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the warm server: signals reach the processes that they reach for users."""
    monkeypatch.delenv("WARM_SOCKET", raising=False)


@pytest.fixture(scope="session", autouse=True)
def networks_are_loaded_once() -> Iterator[None]:
    import loaded_once

    with pytest.MonkeyPatch.context() as patch:
        loaded_once.install(patch)
        yield


@pytest.fixture(scope="session")
def model() -> Model:
    """The tiny pipeline; frozen, so that all tests may share it."""
    return tiny.model()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run, the same one for all its processes."""
    basetemp = tmp_path_factory.getbasetemp()
    return basetemp.parent if "PYTEST_XDIST_WORKER" in os.environ else basetemp


@pytest.fixture
def done(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A finished project that passes, as the current directory."""
    import finished

    settings = finished.copy(shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    return settings


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser; of one file only, as its event loop runs in this thread until it is closed, and Prefect's
    synchronous calls become coroutines while one runs.
    """
    from browsing import started

    with started() as browser:
        yield browser
