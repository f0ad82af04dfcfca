"""Content-addressed cache of rows in Parquet shards.

A shard is named by the digest of its keys and is immutable. A run adds shards; at its end `compact` rewrites the rows
in use into shards that depend on their keys alone, and only then deletes the others. A process killed at any moment
loses at most the shard it was computing, and the final folder is a function of the requested keys, not of its history.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from deleatur.errors import DataError
from deleatur.storage import files

T = TypeVar("T")


def chunked(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive slices of at most `size` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]


class RowCache:
    """The cached rows of one folder. `schema` has the column `key`; a row is a function of its key."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder, self._schema = folder, schema
        self._shard_of = {key: path for path in sorted(folder.glob("*.parquet")) for key in _read_keys(path)}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without a cached row, each once, in the order of `keys`."""
        return [key for key in dict.fromkeys(keys) if key not in self._shard_of]

    def add(self, rows: pd.DataFrame) -> Path:
        """Writes the rows as one shard, atomically."""
        path = self._shard_path(rows["key"])
        files.write_table(path, rows, self._schema)
        self._shard_of |= dict.fromkeys(rows["key"], path)
        return path

    def read(self, keys: Sequence[str]) -> pd.DataFrame:
        """The rows of `keys`, in that order. Raises DataError if one is missing."""
        if missing := self.missing(keys):
            raise DataError(f"{self.folder} lacks {len(missing)} of the requested rows", hint="dvc repro")
        requested, frames = set(keys), [pd.DataFrame(columns=self._schema.names)]
        for path in dict.fromkeys(self._shard_of[key] for key in keys):
            with _require_intact(path):
                rows = pq.read_table(path).to_pandas()
            frames.append(rows[rows["key"].isin(requested)])
        return pd.concat(frames[1:] or frames).drop_duplicates("key").set_index("key").loc[list(keys)].reset_index()

    def compact(self, *groups: Sequence[str], size: int) -> None:
        """Keeps exactly the rows of these keys. Groups are sharded separately: an unchanged group keeps its files."""
        seen: set[str] = set()
        shards: set[Path] = set()
        for group in groups:
            new_keys = [key for key in dict.fromkeys(group) if key not in seen]
            seen.update(new_keys)
            for chunk in chunked(new_keys, size):
                path = self._shard_path(chunk)
                shards.add(path)
                if path.is_file():
                    self._shard_of |= dict.fromkeys(chunk, path)  # a row may also be in a shard that is deleted below
                else:
                    self.add(self.read(chunk))
        files.keep_only(self.folder, shards)

    def _shard_path(self, keys: Iterable[str]) -> Path:
        return self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:24]}.parquet"


def _read_keys(path: Path) -> list[str]:
    with _require_intact(path):
        keys: list[str] = pq.read_table(path, columns=["key"])["key"].to_pylist()
    return keys


@contextmanager
def _require_intact(path: Path) -> Iterator[None]:
    """Errors of pyarrow inside become a DataError: DVC keeps the folder between runs, so a damaged shard would stay."""
    try:
        yield
    except files.UNREADABLE_PARQUET as e:
        hint = f"rm {path}, then the same command: its rows are recomputed"
        raise DataError(f"{path} is not a readable shard of the cache: {e}", hint=hint) from e
