"""Addresses → local folders, and back: s3://… by fsspec, models:/name@alias by MLflow, all else as it is."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deleatur.errors import DataError, ServiceError
from deleatur.storage import files

CACHE = Path.home() / ".cache" / "deleatur"


def local(address: str) -> str:
    """A path or hub id that the libraries load themselves. Downloads are kept and not repeated."""
    if address.startswith("s3://"):
        target = CACHE / hashlib.sha256(address.encode()).hexdigest()[:16]
        fetch(address, target)
        return str(target)
    return address


def fetch(address: str, target: Path) -> None:
    """Every file below an address, a folder or s3://bucket/prefix, into `target`; nothing where there is nothing.

    What is there in the same size, and no older, is not fetched again. Raises ServiceError when the address cannot be
    reached, DataError for a name that leads out of `target`: whoever may write there may not write anywhere here.
    """
    with _reached(address) as (fs, root):
        for place, facts in fs.find(root, detail=True).items():
            file = target / place.removeprefix(root).lstrip("/")
            if not file.resolve().is_relative_to(target.resolve()):
                raise DataError(
                    f"{address}: the name {place!r} leads out of the folder", hint=f"remove it from {address}"
                )
            if file.name.startswith("."):  # what a process left that was killed while it wrote
                continue
            made = int(fs.modified(place).timestamp() * 1e9)
            here = file.stat() if file.is_file() else None
            if here is None or here.st_size != facts["size"] or here.st_mtime_ns < made:
                with files.replacing(file) as partial:
                    fs.get_file(place, str(partial))
                    os.utime(partial, ns=(made, made))


def put(file: Path, address: str) -> None:
    """One file to an address, whole or not at all."""
    from fsspec.implementations.local import LocalFileSystem

    with _reached(address) as (fs, place):
        if isinstance(fs, LocalFileSystem):
            with files.replacing(Path(place)) as partial:
                shutil.copyfile(file, partial)
        else:
            fs.put_file(str(file), place)


def older(address: str, than: float) -> list[str]:
    """What lies right below an address, a folder's files all older than a time in seconds since 1970."""
    with _reached(address) as (fs, root):
        newest: dict[str, float] = {}
        for place in fs.find(root):
            name = place.removeprefix(root).lstrip("/").partition("/")[0]
            newest[name] = max(newest.get(name, 0.0), fs.modified(place).timestamp())
        return [f"{address.rstrip('/')}/{name}" for name, at in sorted(newest.items()) if at < than]


def remove(address: str) -> None:
    """All that lies below an address."""
    with _reached(address) as (fs, root):
        if fs.exists(root):
            fs.rm(root, recursive=True)


@contextmanager
def _reached(address: str) -> Iterator[tuple[Any, str]]:
    """File system and place of an address; what goes wrong inside is a ServiceError."""
    import fsspec
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        fs, place = fsspec.core.url_to_fs(address)
        fs.invalidate_cache()  # others write there too
        yield fs, place.rstrip("/")
    except (OSError, ValueError, ImportError, BotoCoreError, ClientError) as e:
        hint = "check AWS_ENDPOINT_URL_S3 and AWS_*" if address.startswith("s3://") else f"ls {address}"
        raise ServiceError(f"{address} could not be reached: {e}", hint=hint) from e


def without_password(text: str) -> str:
    """postgresql://me:secret@host/db → postgresql://host/db."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
