"""Pictures with their recipes, in shards: what `sample` writes, `evaluate` looks at and `gate` shows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa

from deleatur.io import tables
from deleatur.records import Side

SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "side": pa.string(),
        "id": pa.string(),
        "text": pa.string(),
        "role": pa.string(),
        "label": pa.string(),
        "concept": pa.string(),
        "index": pa.int64(),
        "noise_seed": pa.int64(),
        "guidance": pa.string(),
        "steps": pa.int64(),
        "weights": pa.string(),
        "image": pa.binary(),
    }
)


def read(folder: Path, side: Side) -> pd.DataFrame:
    """All shots of one side, in the order of prompt and index; empty when the side was not drawn."""
    parts = [tables.read_table(p) for p in sorted((folder / side).glob("*.parquet"))]
    if not parts:
        return pd.DataFrame(columns=SCHEMA.names)
    return pd.concat(parts).sort_values(["id", "index"]).reset_index(drop=True)
