"""Rows by key in Parquet shards: what somebody paid for once is not paid for again.

A shard is named by the digest of its keys and never changes. Work adds shards; at its end `settle` brings the rows that
are still asked for into shards that nothing but their keys decides, and only then deletes the others. So a process
killed at any moment loses the one shard it was at, and the folder in the end does not tell how it came about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from deleatur.errors import DataError
from deleatur.storage import files

T = TypeVar("T")


def parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Stretches of at most `size`, in order."""
    return [items[i : i + size] for i in range(0, len(items), size)]


class Kept:
    """The rows of one folder. `schema` has the column `key`; a row is a function of its key."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder, self._schema = folder, schema
        self._place = {key: path for path in sorted(folder.glob("*.parquet")) for key in _keys(path)}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that have no row yet, each once, in the order given."""
        return [key for key in dict.fromkeys(keys) if key not in self._place]

    def add(self, rows: pd.DataFrame) -> Path:
        """One shard, whole or not at all."""
        path = self._shard(rows["key"])
        files.write_table(path, rows, self._schema)
        self._place |= dict.fromkeys(rows["key"], path)
        return path

    def read(self, keys: Sequence[str]) -> pd.DataFrame:
        """Their rows, in the order given. Raises DataError when one is missing."""
        if missing := self.missing(keys):
            raise DataError(f"{self.folder} lacks {len(missing)} of the rows asked for", hint="dvc repro")
        asked, found = set(keys), [pd.DataFrame(columns=self._schema.names)]
        for path in dict.fromkeys(self._place[key] for key in keys):
            rows = files.read_table(path)
            found.append(rows[rows["key"].isin(asked)])
        return pd.concat(found[1:] or found).drop_duplicates("key").set_index("key").loc[list(keys)].reset_index()

    def settle(self, *groups: Sequence[str], size: int) -> None:
        """Keeps exactly these rows. Each group is cut for itself, so one that stays keeps its shards."""
        seen: set[str] = set()
        wanted: set[Path] = set()
        for group in groups:
            own = [key for key in dict.fromkeys(group) if key not in seen]
            seen.update(own)
            for part in parts(own, size):
                path = self._shard(part)
                wanted.add(path)
                if path.is_file():
                    self._place |= dict.fromkeys(part, path)  # the same row may lie in a shard that goes, too
                else:
                    self.add(self.read(part))
        files.keep_only(self.folder, wanted)

    def _shard(self, keys: Iterable[str]) -> Path:
        return self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:24]}.parquet"


def _keys(path: Path) -> list[str]:
    try:
        keys: list[str] = pq.read_table(path, columns=["key"])["key"].to_pylist()
    except (pa.ArrowException, KeyError) as e:
        raise DataError(f"{path} is not a shard of ours: {e}", hint=f"rm {path}: its rows are made again") from e
    return keys
