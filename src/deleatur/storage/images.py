"""Images as encoded bytes, as Parquet archives, and as contact sheets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont, ImageOps

from deleatur.errors import DataError
from deleatur.storage import files

SCHEMA = pa.schema(
    {"sha256": pa.string(), "image": pa.binary(), "width": pa.int64(), "height": pa.int64()},
)
FORMATS = ("PNG", "WEBP")
SHARD_SIZE = 1000  # images per file: half a gigabyte at 512 pixels


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image, identified by the SHA-256 of its bytes."""

    sha256: str
    image: bytes
    width: int
    height: int


def encode(image: Image.Image) -> bytes:
    """Encodes as PNG without metadata: the same pixels give the same bytes."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """Decodes PNG or WebP to RGB. Raises DataError for anything else."""
    try:
        return Image.open(BytesIO(data), formats=FORMATS).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise DataError(f"expected a PNG or WebP image, got {len(data)} bytes that are neither") from e


def encode_image(image: Image.Image) -> EncodedImage:
    data = encode(image)
    return EncodedImage(hashlib.sha256(data).hexdigest(), data, image.width, image.height)


def problem(image: EncodedImage) -> tuple[str, str] | None:
    """(expected, got) when digest, format or size of an image contradict its record; None when they agree."""
    digest = hashlib.sha256(image.image).hexdigest()
    if digest != image.sha256:
        return "bytes whose SHA-256 is the one given", f"SHA-256 {digest}"
    try:
        size = decode(image.image).size
    except DataError as e:
        return "a readable PNG or WebP image", str(e)
    if size != (image.width, image.height):
        return f"{image.width}×{image.height} pixels, as given", f"{size[0]}×{size[1]} pixels"
    return None


def write_archive(path: Path, images: Iterable[EncodedImage]) -> None:
    """Writes one Parquet file, uncompressed: the encoded images already are compressed."""
    table = pa.Table.from_pandas(pd.DataFrame(map(asdict, images), columns=SCHEMA.names), schema=SCHEMA)
    with files.atomic_write(path) as partial:
        pq.write_table(table.replace_schema_metadata(None), partial, compression="none")


def read_archive(path: Path) -> Iterator[EncodedImage]:
    """Yields the images of an archive in order, a batch in memory at a time. Raises DataError for any other file."""
    if not path.is_file():
        raise DataError(f"no image archive {path}")
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=SCHEMA.names):
                for row in pa.Table.from_batches([batch]).select(SCHEMA.names).cast(SCHEMA).to_pylist():
                    yield EncodedImage(row["sha256"] or "", row["image"] or b"", row["width"] or 0, row["height"] or 0)
    except (pa.ArrowException, KeyError) as e:
        raise DataError(f"{path} is not an image archive ({', '.join(SCHEMA.names)}): {e}") from e


def write_shards(folder: Path, images: Iterable[EncodedImage]) -> int:
    """Writes `images-0000.parquet`, … of at most SHARD_SIZE images each, in order; returns the number of images.

    A collection that grows at its end leaves full shards unchanged. There is always a first shard, if need be empty.
    """
    remaining, total = iter(images), 0
    for number in range(10_000):
        shard = list(islice(remaining, SHARD_SIZE))
        if shard or number == 0:
            write_archive(folder / f"images-{number:04d}.parquet", shard)
        total += len(shard)
        if len(shard) < SHARD_SIZE:
            return total
    raise DataError(f"more than {total} images", hint="split the sources")


def read_shards(folder: Path) -> Iterator[EncodedImage]:
    for path in sorted(folder.glob("images-*.parquet")):
        yield from read_archive(path)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    *,
    corner: str = "",
    cell_size: int | None = None,
) -> Image.Image:
    """A contact sheet: rows may differ in length; every image is scaled to fit a square cell.

    corner: header of the row labels. cell_size: in pixels; by default the largest side of any image.
    """
    assert len(row_labels) in (0, len(rows)), "a label for every row, or none"
    gap, side = 4, cell_size or max(max(image.size) for row in rows for image in row)
    font = ImageFont.load_default(size=max(10, side // 10))
    ascent = font.getbbox("Ág")[3]
    left = int(max((font.getlength(label) for label in (*row_labels, corner) if label), default=-gap)) + gap
    top = int(ascent) + gap if column_labels or corner else 0
    columns = max([len(column_labels), *map(len, rows)])
    sheet = Image.new("RGB", (left + columns * (side + gap), top + len(rows) * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((0, 0), corner, "black", font)
    for c, label in enumerate(column_labels):
        draw.text((left + c * (side + gap), 0), label, "black", font)
    for r, row in enumerate(rows):
        y = top + r * (side + gap)
        if row_labels:
            draw.text((0, y + (side - ascent) // 2), row_labels[r], "black", font)
        for c, image in enumerate(row):
            sheet.paste(ImageOps.contain(image, (side, side)), (left + c * (side + gap), y))
    return sheet
