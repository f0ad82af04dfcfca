"""Workers of a real Prefect server, each in a folder of its own, that can be killed or evicted."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import finished
import psutil
import yaml

from deleatur.config.settings import merged

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300.0


def project(shared: Path, place: Path, **sections: Any) -> Path:
    """A finished project with its flows, at a commit that workers can clone, and a DVC remote that they reach.

    sections: changes of params.yaml, after the commit.
    """
    root = place / "project"
    finished.copy(shared, root)
    finished.dvc(root, "remote", "add", "--quiet", "--default", "store", str(place / "store"))
    commit_flows(root)
    change_params(root, **sections)
    return root


def commit_flows(root: Path) -> None:
    """Commit everything in a project, and the flows."""
    for name in ("flows", "prefect.yaml"):
        copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copied(ROOT / name, root / name)
    finished.git(root, "add", "--all")
    finished.git(root, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", "flows")


def change_params(root: Path, **sections: Any) -> None:
    path = root / "params.yaml"
    params = yaml.safe_load(path.read_text("utf-8"))
    path.write_text(yaml.safe_dump(merged(params, sections), sort_keys=False), "utf-8")


class Worker:
    """`prefect worker start --pool gpu`, one run at a time."""

    def __init__(self, env: dict[str, str], folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self._log = name, folder / "worker.log"
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu", "--name", name, "--limit", "1"]
        quick = {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.2"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=env | quick, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def processes(self) -> list[psutil.Process]:
        """Descendant processes, down to the stage."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def flow_process(self) -> psutil.Process:
        """The process of the run."""
        return psutil.Process(self._process.pid).children()[0]

    def evict(self) -> None:
        """Terminate the worker, as an eviction does."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill the worker and all its descendants, as a power loss does."""
        for process in [psutil.Process(self._process.pid), *self.processes()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process.poll() is None:
            self.kill()


def wait_until(condition: Callable[[], bool], description: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        meanwhile()
        assert time.monotonic() < deadline, f"{description}: not within {TIMEOUT_SECONDS:.0f} s"
        time.sleep(0.05)
