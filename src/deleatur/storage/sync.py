"""What a running stage leaves on disk goes along to an address that other machines reach, and comes from there first.

A stage writes whole files only, so whatever has arrived there is something to go on from: a machine that vanishes costs
what it had written since the last look.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deleatur.storage import remote

LOOK = 1.0
"""Seconds between two looks for new files."""

Stamp = tuple[int, int]


@contextmanager
def carried(
    folders: Iterable[Path], address: str, on_problem: Callable[[str], None] = lambda problem: None
) -> Iterator[None]:
    """Inside, every new or changed file of the folders is put to `address`, under the name it has here.

    What lies there is fetched at first. If the block raises, the newest files are put before the error goes on; an
    address that does not answer meanwhile is told to `on_problem` and tried again.
    """
    folders = list(folders)
    for folder in folders:
        remote.fetch(f"{address}/{folder.as_posix()}", folder)
    known = _files(folders)
    ended = threading.Event()

    def look() -> None:
        for file, stamp in _files(folders).items():
            if known.get(file) != stamp:
                try:
                    remote.put(file, f"{address}/{file.as_posix()}")
                    known[file] = stamp
                except Exception as e:  # whatever it is, the stage goes on, and the next look tries again
                    if file.is_file():  # or the stage has removed it meanwhile
                        on_problem(str(e))

    def keep_looking() -> None:
        while not ended.wait(LOOK):
            look()

    watcher = threading.Thread(target=keep_looking, daemon=True)
    watcher.start()
    try:
        yield
    except BaseException:
        ended.set()
        watcher.join()
        look()
        raise
    finally:
        ended.set()
        watcher.join()


def _files(folders: Iterable[Path]) -> dict[Path, Stamp]:
    """Whole files with their time and size; a name with a dot in front is one that is being written."""
    found = {}
    for place, _, names in (entry for folder in folders for entry in os.walk(folder)):
        for file in (Path(place, name) for name in names if not name.startswith(".")):
            with suppress(FileNotFoundError):  # gone since it was listed
                facts = file.stat()
                found[file] = (facts.st_mtime_ns, facts.st_size)
    return found
