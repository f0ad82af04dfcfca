"""Pictures with their recipes: what `sample` writes, `evaluate` looks at and `gate` shows.

`pictures/` has every picture once, by the digest of its recipe; `shots.parquet` says which shots they are. So a prompt
that gets another label, and a candidate that becomes the champion, draw nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
from PIL import Image

from deleatur.records.sampling import Side
from deleatur.storage import files, images
from deleatur.storage.cache import Kept

LIST = "shots.parquet"
SCHEMA = pa.schema(
    {
        "side": pa.string(),
        "id": pa.string(),
        "text": pa.string(),
        "role": pa.string(),
        "label": pa.string(),
        "concept": pa.string(),
        "index": pa.int64(),
        "key": pa.string(),
        "pipeline": pa.string(),
        "precision": pa.string(),
        "weights": pa.string(),
        "states": pa.string(),
        "conditions": pa.string(),
        "guidance": pa.string(),
        "steps": pa.int64(),
        "noise_seed": pa.int64(),
        "code": pa.string(),
    }
)
PICTURE = pa.schema({"key": pa.string(), "image": pa.binary()})


def pictures(folder: Path) -> Kept:
    return Kept(folder / "pictures", PICTURE)


def decoded(kept: Kept, keys: Sequence[str]) -> list[Image.Image]:
    return [images.decode(data) for data in kept.read(keys)["image"]]


def write(folder: Path, frame: pd.DataFrame) -> None:
    files.write_table(folder / LIST, frame, SCHEMA)


def listed(folder: Path) -> pd.DataFrame:
    """All shots without their pictures: side by side, in the order of prompt and index."""
    return files.read_table(folder / LIST).sort_values(["side", "id", "index"]).reset_index(drop=True)


def read(folder: Path, side: Side) -> pd.DataFrame:
    """All shots of one side with their pictures as encoded bytes; empty when the side was not drawn."""
    shots = listed(folder)
    own = shots[shots["side"] == side].reset_index(drop=True)
    return own.assign(image=pictures(folder).read(list(own["key"]))["image"])
