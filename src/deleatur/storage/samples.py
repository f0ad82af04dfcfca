"""Sampled images with their recipes, written by `sample` and read by `evaluate` and `gate`.

`images/` stores every image once, by the digest of its recipe; `samples.parquet` lists the samples. Another label for a
prompt, or a candidate that becomes the champion, therefore samples nothing again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
from PIL import Image

from deleatur.records.sampling import Variant
from deleatur.storage import files, images
from deleatur.storage.cache import RowCache

LISTING = "samples.parquet"
SCHEMA = pa.schema(
    {
        "variant": pa.string(),
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
IMAGE_SCHEMA = pa.schema({"key": pa.string(), "image": pa.binary()})


def image_cache(folder: Path) -> RowCache:
    return RowCache(folder / "images", IMAGE_SCHEMA)


def load_images(cache: RowCache, keys: Sequence[str]) -> list[Image.Image]:
    """The decoded images of these keys, in their order. Raises DataError if one is missing."""
    return [images.decode(data) for data in cache.read(keys)["image"]]


def write_listing(folder: Path, frame: pd.DataFrame) -> None:
    files.write_table(folder / LISTING, frame, SCHEMA)


def read_listing(folder: Path) -> pd.DataFrame:
    """All samples without their images, ordered by variant, prompt and index."""
    return files.read_table(folder / LISTING, SCHEMA).sort_values(["variant", "id", "index"]).reset_index(drop=True)


def read(folder: Path, variant: Variant) -> pd.DataFrame:
    """All samples of one variant with their encoded images; empty when the variant was not sampled."""
    listing = read_listing(folder)
    rows = listing[listing["variant"] == variant].reset_index(drop=True)
    return rows.assign(image=image_cache(folder).read(list(rows["key"]))["image"])
