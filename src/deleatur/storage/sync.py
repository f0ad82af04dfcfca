"""Synchronizes the files of a running stage with a remote address, from which another machine resumes it.

A stage writes files atomically, so every uploaded file is usable: a machine that fails loses only what it wrote since
the last poll.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deleatur.storage import remote

POLL_INTERVAL = 1.0
"""Seconds between two scans for new files."""

FileVersion = tuple[int, int]


@contextmanager
def synced(
    folders: Iterable[Path], address: str, on_problem: Callable[[str], None] = lambda problem: None
) -> Iterator[None]:
    """Downloads the folders from `address`, then uploads every new or changed file of them while the block runs.

    If the block raises, the newest files are uploaded before the error propagates. Failed uploads are reported to
    `on_problem` and retried.
    """
    folders = list(folders)
    for folder in folders:
        remote.fetch(f"{address}/{folder.as_posix()}", folder)
    uploaded = _file_versions(folders)
    stop = threading.Event()

    def upload_changes() -> None:
        for file, version in _file_versions(folders).items():
            if uploaded.get(file) != version:
                try:
                    remote.upload(file, f"{address}/{file.as_posix()}")
                    uploaded[file] = version
                except Exception as e:  # whatever it is, the stage continues, and the next scan retries
                    if file.is_file():  # otherwise the stage has deleted it meanwhile
                        on_problem(str(e))

    def poll() -> None:
        while not stop.wait(POLL_INTERVAL):
            upload_changes()

    watcher = threading.Thread(target=poll, daemon=True)
    watcher.start()
    try:
        yield
    except BaseException:
        stop.set()
        watcher.join()
        upload_changes()
        raise
    finally:
        stop.set()
        watcher.join()


def _file_versions(folders: Iterable[Path]) -> dict[Path, FileVersion]:
    """Files with modification time and size; a name with a leading dot is a file still being written."""
    versions = {}
    for directory, _, names in (entry for folder in folders for entry in os.walk(folder)):
        for file in (Path(directory, name) for name in names if not name.startswith(".")):
            with suppress(FileNotFoundError):  # deleted since it was listed
                info = file.stat()
                versions[file] = (info.st_mtime_ns, info.st_size)
    return versions
