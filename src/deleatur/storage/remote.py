"""Files at remote addresses (s3://… and whatever else fsspec reaches), downloaded and uploaded."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deleatur.errors import DataError, ServiceError
from deleatur.storage import files

CACHE = Path.home() / ".cache" / "deleatur"


def local_path(address: str) -> str:
    """A path or hub id that libraries can load: s3://… is downloaded once to CACHE, anything else returned as it is."""
    if address.startswith("s3://"):
        target = CACHE / hashlib.sha256(address.encode()).hexdigest()[:16]
        fetch(address, target)
        return str(target)
    return address


def fetch(address: str, target: Path) -> None:
    """Downloads every file below an address, a folder or s3://bucket/prefix, into `target`.

    A local file of the same size that is no older is not downloaded again. Raises ServiceError if the address cannot
    be reached, and DataError for a name that leads out of `target`: write access to the store must not become write
    access to this machine.
    """
    with _filesystem(address) as (fs, root):
        for remote_path, info in fs.find(root, detail=True).items():
            file = target / remote_path.removeprefix(root).lstrip("/")
            if not file.resolve().is_relative_to(target.resolve()):
                raise DataError(
                    f"{address}: the name {remote_path!r} leads out of the folder", hint=f"remove it from {address}"
                )
            if file.name.startswith("."):  # a temporary file of a process killed while it wrote
                continue
            modified_ns = int(fs.modified(remote_path).timestamp() * 1e9)
            local_stat = file.stat() if file.is_file() else None
            if local_stat is None or local_stat.st_size != info["size"] or local_stat.st_mtime_ns < modified_ns:
                with files.atomic_write(file) as partial:
                    fs.get_file(remote_path, str(partial))
                    os.utime(partial, ns=(modified_ns, modified_ns))


def upload(file: Path, address: str) -> None:
    """Uploads one file, atomically."""
    from fsspec.implementations.local import LocalFileSystem

    with _filesystem(address) as (fs, remote_path):
        if isinstance(fs, LocalFileSystem):
            with files.atomic_write(Path(remote_path)) as partial:
                shutil.copyfile(file, partial)
        else:
            fs.put_file(str(file), remote_path)


def list_older(address: str, before: float) -> list[str]:
    """Entries directly below an address whose files were all modified before a time in Unix seconds."""
    with _filesystem(address) as (fs, root):
        newest: dict[str, float] = {}
        for remote_path in fs.find(root):
            name = remote_path.removeprefix(root).lstrip("/").partition("/")[0]
            newest[name] = max(newest.get(name, 0.0), fs.modified(remote_path).timestamp())
        return [f"{address.rstrip('/')}/{name}" for name, modified in sorted(newest.items()) if modified < before]


def remove(address: str) -> None:
    """Deletes everything below an address."""
    with _filesystem(address) as (fs, root):
        if fs.exists(root):
            fs.rm(root, recursive=True)


@contextmanager
def _filesystem(address: str) -> Iterator[tuple[Any, str]]:
    """Yields the file system and path of an address; errors inside become ServiceErrors."""
    import fsspec
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        fs, remote_path = fsspec.core.url_to_fs(address)
        fs.invalidate_cache()  # other machines write there, too
        yield fs, remote_path.rstrip("/")
    except (OSError, ValueError, ImportError, BotoCoreError, ClientError) as e:
        hint = "check AWS_ENDPOINT_URL_S3 and AWS_*" if address.startswith("s3://") else f"ls {address}"
        raise ServiceError(f"{address} could not be reached: {e}", hint=hint) from e
