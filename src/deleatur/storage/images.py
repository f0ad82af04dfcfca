"""Pictures as bytes, as Parquet shards, and as one sheet to look at."""

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

PICTURES = pa.schema(
    {"sha256": pa.string(), "image": pa.binary(), "width": pa.int64(), "height": pa.int64()},
)
FORMATS = ("PNG", "WEBP")
SHARD = 1000  # pictures a file: half a gigabyte at 512 pixels


@dataclass(frozen=True)
class Picture:
    """An encoded picture and its name: the SHA-256 of its bytes."""

    sha256: str
    image: bytes
    width: int
    height: int


def encode(image: Image.Image) -> bytes:
    """PNG without metadata: the same pixels give the same bytes."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """Encoded bytes as an RGB image. Raises DataError when they are neither PNG nor WebP."""
    try:
        return Image.open(BytesIO(data), formats=FORMATS).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise DataError(f"expected a PNG or WebP picture, got {len(data)} bytes that are neither") from e


def picture(image: Image.Image) -> Picture:
    data = encode(image)
    return Picture(hashlib.sha256(data).hexdigest(), data, image.width, image.height)


def problem(found: Picture) -> tuple[str, str] | None:
    """What was expected and what came, when a picture is not what it says it is."""
    digest = hashlib.sha256(found.image).hexdigest()
    if digest != found.sha256:
        return "bytes whose SHA-256 is the one given", f"SHA-256 {digest}"
    try:
        size = decode(found.image).size
    except DataError as e:
        return "a PNG or WebP picture that can be read", str(e)
    if size != (found.width, found.height):
        return f"{found.width}×{found.height} pixels, as given", f"{size[0]}×{size[1]} pixels"
    return None


def write(path: Path, pictures: Iterable[Picture]) -> None:
    """One Parquet file; the encoded bytes are compressed already."""
    table = pa.Table.from_pandas(pd.DataFrame(map(asdict, pictures), columns=PICTURES.names), schema=PICTURES)
    with files.replacing(path) as partial:
        pq.write_table(table.replace_schema_metadata(None), partial, compression="none")


def read(path: Path) -> Iterator[Picture]:
    """Pictures in the order of the file, a few in memory at a time. Raises DataError when it is not such a file."""
    if not path.is_file():
        raise DataError(f"no picture archive {path}")
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=PICTURES.names):
                for row in pa.Table.from_batches([batch]).select(PICTURES.names).cast(PICTURES).to_pylist():
                    yield Picture(row["sha256"] or "", row["image"] or b"", row["width"] or 0, row["height"] or 0)
    except (pa.ArrowException, KeyError) as e:
        raise DataError(f"{path} is not a picture archive ({', '.join(PICTURES.names)}): {e}") from e


def write_shards(folder: Path, pictures: Iterable[Picture]) -> int:
    """`images-0000.parquet`, … of at most `SHARD` pictures each, in the order given; returns how many pictures.

    New pictures come last, so a growing collection leaves the full shards as they were. There is always a first one.
    """
    rest, total = iter(pictures), 0
    for number in range(10_000):
        shard = list(islice(rest, SHARD))
        if shard or number == 0:
            write(folder / f"images-{number:04d}.parquet", shard)
        total += len(shard)
        if len(shard) < SHARD:
            return total
    raise DataError(f"more than {total} pictures", hint="split the sources")


def read_shards(folder: Path) -> Iterator[Picture]:
    for path in sorted(folder.glob("images-*.parquet")):
        yield from read(path)


def grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    *,
    corner: str = "",
    cell: int | None = None,
) -> Image.Image:
    """A contact sheet: rows may differ in length, every picture is scaled to fit a square cell.

    corner: what is said above the row labels. cell: side in pixels; the largest picture's when left out.
    """
    assert len(row_labels) in (0, len(rows)), "a label for every row, or none"
    gap, side = 4, cell or max(max(image.size) for row in rows for image in row)
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
