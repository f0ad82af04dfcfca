"""Registry, ledger and DVC's pointers as one set in a folder, and back. Light: loads no weights.

Taken while nobody decides anything, so the three belong together. What DVC's pointers point to lies in its remote,
which keeps itself: the set names it by digest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.registry import ledger
from deleatur.registry.decisions import deciding, registry_of
from deleatur.registry.history import history
from deleatur.registry.ledger import Ledger
from deleatur.registry.registry_dump import Copy
from deleatur.storage import dvc, dvc_remote, files

POINTERS = ("params.yaml", "dvc.yaml", "dvc.lock", ".dvc/config")
"""Of the workspace; all else of it is git's."""
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Set:
    """What a folder with a backup says of itself."""

    taken: str
    """UTC, ISO 8601."""
    commit: str | None
    versions: int
    decisions: int


def backup(settings: Settings, folder: Path) -> Set:
    """Raises DataError where the folder exists, the ledger was changed, or an alias was moved by hand: parts that
    contradict each other are nothing to go back to.
    """
    if folder.exists():
        raise DataError(f"{folder} exists already", hint="name a new folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        with deciding(settings) as release:
            copy = Copy(release.registry, partial / "registry")
            copy.save()
            known = release.ledger
            shutil.copyfile(known.path, partial / "ledger.jsonl")
        for name in filter(os.path.exists, POINTERS):
            (partial / "workspace" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, partial / "workspace" / name)
        about = {
            "taken": datetime.now(UTC).isoformat(timespec="seconds"),
            "deleatur": version("deleatur"),
            "commit": dvc.commit(Path()).hash,
            "versions": len(copy.listed),
            "decisions": known.head.number,
            "ledger": str(known.head),
            "files": dict(_digests(partial)),
        }
        files.write_json(partial / MANIFEST, about)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _set(about)


def restore(settings: Settings, folder: Path) -> Set:
    """Puts a set back, into an empty registry and beside no other ledger. Killed, it goes on where it was.

    Raises DataError, before anything is changed, where the set is not whole, or something is there that is not in it.
    """
    about = _whole(folder)
    saved, target = ledger.read(folder / "ledger.jsonl"), settings.register_.ledger
    saved.demand_whole()
    _demand_room(saved, ledger.read(target))
    _demand_unsaved_nothing(folder / "workspace")
    registry = registry_of(settings)
    Copy(registry, folder / "registry").load()
    with files.replacing(target) as partial:
        shutil.copyfile(folder / "ledger.jsonl", partial)
    registry.set_aliases(saved.aliases)
    registry.set_mark(saved.head)
    for name in POINTERS:  # whatever else lies there
        if (path := folder / "workspace" / name).is_file():
            with files.replacing(Path(name)) as partial:
                shutil.copyfile(path, partial)
    for problem in history(settings).problems:
        raise problem
    return _set(about)


def _whole(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = files.read_json(folder / MANIFEST)
    found = dict(_digests(folder))
    for name in sorted(about["files"].keys() | found.keys()):
        if about["files"].get(name) != found.get(name):
            what = "is missing" if name not in found else "was added" if name not in about["files"] else "was changed"
            raise DataError(f"{folder / name} {what}: this is not the set that was taken", hint="take an older backup")
    return about


def _demand_room(saved: Ledger, here: Ledger) -> None:
    if here.marks and here.marks != saved.marks:
        raise DataError(
            f"{here.path} has {here.head.number} decisions of its own, which the set lacks",
            hint=f"mv {here.path} {here.path}.before (they are lost to the registry), then the same command again",
        )


def _demand_unsaved_nothing(workspace: Path) -> None:
    names = [path.relative_to(workspace).as_posix() for path in _files(workspace)]
    other = [
        name for name in names if Path(name).exists() and Path(name).read_bytes() != (workspace / name).read_bytes()
    ]
    if other and (lost := dvc_remote.uncommitted(Path(), *other)):
        raise DataError(
            f"{', '.join(lost)}: changed here and not committed, and the set has another",
            hint=f"git stash push {' '.join(lost)}, then the same command again",
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in _files(folder):
        if path != folder / MANIFEST:
            with path.open("rb") as file:
                yield path.relative_to(folder).as_posix(), hashlib.file_digest(file, "sha256").hexdigest()


def _set(about: dict[str, Any]) -> Set:
    return Set(about["taken"], about["commit"], about["versions"], about["decisions"])
