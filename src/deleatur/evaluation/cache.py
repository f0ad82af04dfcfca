"""On-disk cache of predictions and metric values: one row cache per network and per metric."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from deleatur.storage import files
from deleatur.storage.cache import RowCache

SHARD_SIZE = 128
"""Images per shard: the most that a killed run has to recompute."""

VALUES_FILE = "values.parquet"
"""All metric values of the report, for other tools; not a part of the cache."""

PREDICTIONS = pa.schema({"key": pa.string(), "numbers": pa.list_(pa.float32())})
METRIC_VALUES = pa.schema({"key": pa.string(), "value": pa.float64()})


class EvaluationCache:
    """A folder of row caches, each named by the digest of everything that determines its rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._in_use = {folder / VALUES_FILE}

    def open(self, digest: str, schema: pa.Schema) -> RowCache:
        """The row cache of this digest, which `remove_unused` then keeps."""
        folder = self.folder / digest[:24]
        self._in_use.add(folder)
        return RowCache(folder, schema)

    def remove_unused(self) -> None:
        """Deletes every row cache that was not opened."""
        files.keep_only(self.folder, self._in_use)
