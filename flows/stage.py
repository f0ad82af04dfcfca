"""One stage, on a worker of the pool `gpu`. Other flows run it through `workers.run_on_worker`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger
from tasks import PROJECT, GpuStage, error_with_next_command, pull, push, reproduce
from workers import return_text

from deleatur.config.settings import Settings
from deleatur.errors import DeleaturError
from deleatur.registry.decisions import without_ledger
from deleatur.runtime import event_log
from deleatur.stages import STAGES
from deleatur.storage import dvc, dvc_remote, remote
from deleatur.storage.sync import synced


@flow(name="stage")
def stage(
    name: GpuStage, params: str, lock: str, store: str, storage_uri: str | None = None, dvc_options: Sequence[str] = ()
) -> bool:
    """Run one stage in this checkout and push its outputs to the DVC remote; True if it had to run.

    Args:
        name: The stage of dvc.yaml.
        params: Content of params.yaml, which may differ from the commit's.
        lock: Content of dvc.lock, which names the outputs of earlier stages.
        store: URL of the DVC remote.
        storage_uri: Folder or s3://… for the job's checkpoints, which an interrupted run left there. Removed when the
            stage is done.
        dvc_options: Options of `dvc repro`.
    """
    with error_with_next_command():
        root = Path()
        Path("params.yaml").write_text(params, "utf-8")
        Path("dvc.lock").write_text(lock, "utf-8")
        if "://" not in store:
            dvc_remote.use_remote(root, store)
        pull(root, *STAGES[: STAGES.index(name)])
        settings = Settings.load()
        with without_ledger(), resumed(name, settings, storage_uri):
            try:
                ran = reproduce(name, [*dvc.PULL, *dvc_options])
            except DeleaturError:
                return_text("event-log", name, event_log.text(settings.paths.checkpoints))
                raise
            push(root, name)
            return_text("lock", name, dvc_remote.lock_entry(name, root))
            return_text("event-log", name, event_log.text(settings.paths.checkpoints))
        return ran


@contextmanager
def resumed(name: str, settings: Settings, storage_uri: str | None) -> Iterator[None]:
    """Resume from the checkpoints that a lost worker has uploaded, and upload new ones meanwhile."""
    cached = {"sample": [settings.paths.samples], "evaluate": [settings.paths.scores]}.get(name, [])
    if cached:  # images and scores of earlier runs are reused
        pull(PROJECT, name, complete=False)
    if storage_uri is None:
        yield
        return
    with synced([settings.paths.checkpoints, *cached], storage_uri, get_run_logger().warning):
        yield
    remote.remove(storage_uri)
