"""Machines of a deployment: real workers of a real server, each in a folder of its own, that can be taken away."""

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
PATIENCE = 300.0


def project(shared: Path, place: Path, **sections: Any) -> Path:
    """A finished project with its flows, at a commit that workers can clone; a DVC remote and a folder for states that
    they reach. sections: what is changed in params.yaml, after the commit.
    """
    root = place / "project"
    finished.copy(shared, root)
    finished.dvc(root, "remote", "add", "--quiet", "--default", "store", str(place / "store"))
    commit_flows(root)
    change(root, **sections)
    return root


def commit_flows(root: Path) -> None:
    """Into a project, with all else that lies there."""
    for name in ("flows", "prefect.yaml"):
        copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copied(ROOT / name, root / name)
    finished.git(root, "add", "--all")
    finished.git(root, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", "flows")


def change(root: Path, **sections: Any) -> None:
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

    def running(self) -> list[psutil.Process]:
        """What it has started, down to the stage."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def flow(self) -> psutil.Process:
        """The process of the run."""
        return psutil.Process(self._process.pid).children()[0]

    def evicted(self) -> None:
        """The machine is asked to go."""
        self._process.terminate()

    def vanishes(self) -> None:
        """The machine is gone, and nothing of it says so."""
        for process in [psutil.Process(self._process.pid), *self.running()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process.poll() is None:
            self.vanishes()


def awaited(true: Callable[[], bool], what: str, still: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        still()
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.05)
