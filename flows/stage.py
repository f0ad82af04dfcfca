"""One stage on a worker of the pool `gpu`: what other flows run through `workers.send`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger
from tasks import HERE, OnGpu, ending_in_a_command, pull, push, reproduce
from workers import hand_back

from deleatur.config.settings import Settings
from deleatur.errors import DeleaturError
from deleatur.runtime import event_log
from deleatur.stages import STAGES
from deleatur.storage import dvc, dvc_remote, remote
from deleatur.storage.sync import carried


@flow(name="stage")
def stage(name: OnGpu, params: str, lock: str, store: str, state: str | None = None, how: Sequence[str] = ()) -> bool:
    """Runs one stage in this checkout and leaves what it made in the DVC remote; whether it had to run.

    Args:
        name: The stage of dvc.yaml.
        params: The text of params.yaml, which may differ from the commit's.
        lock: The text of dvc.lock, which names what the stages before have made.
        store: Address of the DVC remote.
        state: Folder or s3://… with what a stopped run of this very job left, and where this one leaves it. Empty
            again when the stage is done.
        how: Options of `dvc repro`.
    """
    with ending_in_a_command():
        root = Path()
        Path("params.yaml").write_text(params, "utf-8")
        Path("dvc.lock").write_text(lock, "utf-8")
        if "://" not in store:
            dvc_remote.use_store(root, store)
        pull(root, *STAGES[: STAGES.index(name)])
        settings = Settings.load()
        with _going_on(name, settings, state):
            try:
                ran = reproduce(name, [*dvc.PULL, *how])
            except DeleaturError:
                hand_back("journal", name, event_log.text(settings.paths.state))
                raise
            push(root, name)
            hand_back("lock", name, dvc_remote.entry(name, root))
            hand_back("journal", name, event_log.text(settings.paths.state))
        return ran


@contextmanager
def _going_on(name: str, settings: Settings, state: str | None) -> Iterator[None]:
    """Goes on from what a lost worker has left, and leaves the same to the next one."""
    kept = {"sample": [settings.paths.shots], "evaluate": [settings.paths.scores]}.get(name, [])
    if kept:  # what an earlier run of other settings has drawn is not drawn again
        pull(HERE, name, all_of_it=False)
    if state is None:
        yield
        return
    with carried([settings.paths.state, *kept], state, get_run_logger().warning):
        yield
    remote.remove(state)
