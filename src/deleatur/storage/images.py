"""Images as encoded bytes, as Parquet archives, and as contact sheets."""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from deleatur.diffusion.rgb import UNREADABLE, to_rgb
from deleatur.errors import DataError
from deleatur.storage import files

SCHEMA = pa.schema(
    {"sha256": pa.string(), "image": pa.binary(), "width": pa.int64(), "height": pa.int64()},
)
FORMATS = ("PNG", "WEBP", "JPEG", "GIF")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SRGB_CICP = bytes([1, 13, 0])
SRGB_GAMA = (45_455,)
SRGB_CHRM = (31_270, 32_900, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000)
"""Colour encoding of sRGB in PNG chunks: times 100,000."""
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
    to_rgb(image).save(buffer, "PNG")
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """Decodes to the RGB pixels that a browser shows (`diffusion.rgb`). Of animations, the first frame.

    Raises DataError for other formats, damaged or truncated data, images of more than 89 million pixels, and the few
    PNG colour encodings that browsers show and we do not convert: they have to be saved as sRGB.
    """
    try:
        if unsupported := _unsupported_png(data):
            raise DataError(f"expected an image in sRGB or with an ICC profile, got a PNG with {unsupported}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data), formats=FORMATS)
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError:
        raise DataError(f"expected an image ({', '.join(FORMATS)}), got {len(data)} bytes of another kind") from None
    except (*UNREADABLE, Image.DecompressionBombWarning, Image.DecompressionBombError) as e:
        raise DataError(
            f"expected an image ({', '.join(FORMATS)}) that can be decoded, got {len(data)} bytes: {e}"
        ) from e


def _unsupported_png(data: bytes) -> str:
    """What in a PNG's header changes its colours in a way that is not converted here; empty: nothing."""
    chunks = _png_header(data)
    depth, colour_type = struct.unpack(">8x2B", chunks.get(b"IHDR", bytes(10))[:10])
    if b"tRNS" in chunks and colour_type in (0, 2) and (depth, colour_type) not in ((1, 0), (8, 0), (16, 0), (8, 2)):
        return f"a transparent colour at {depth} bits"
    if b"cICP" in chunks:
        return "" if chunks[b"cICP"][:3] == SRGB_CICP else "a cICP colour space other than sRGB"
    if b"iCCP" in chunks or b"sRGB" in chunks:
        return ""  # these take precedence over gamma and chromaticities
    for name, values in (("gAMA", SRGB_GAMA), ("cHRM", SRGB_CHRM)):
        if chunk := chunks.get(name.encode()):
            got = struct.unpack(f">{len(values)}I", chunk)
            if any(abs(g - v) > 0.01 * 100_000 for g, v in zip(got, values, strict=True)):
                return f"{'a gamma' if name == 'gAMA' else 'primaries'} other than those of sRGB ({name})"
    return ""


def _png_header(data: bytes) -> dict[bytes, bytes]:
    """Chunk type → content, of the chunks before the pixels; empty for other formats."""
    chunks: dict[bytes, bytes] = {}
    position = len(PNG_SIGNATURE)
    while data.startswith(PNG_SIGNATURE) and position + 12 <= len(data) and b"IDAT" not in chunks:
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        chunks.setdefault(kind, data[position + 8 : position + 8 + length])
        position += length + 12
    return chunks


def encode_image(image: Image.Image) -> EncodedImage:
    """Encodes an image as PNG, with its digest and size in pixels."""
    data = encode(image)
    return EncodedImage(hashlib.sha256(data).hexdigest(), data, image.width, image.height)


def find_mismatch(image: EncodedImage) -> tuple[str, str] | None:
    """(expected, got) when digest, format or size of an image contradict its record; None if they agree."""
    digest = hashlib.sha256(image.image).hexdigest()
    if digest != image.sha256:
        return "bytes whose SHA-256 is the one given", f"SHA-256 {digest}"
    try:
        shown = decode(image.image).size
    except DataError as e:
        expected, _, got = str(e).removeprefix("expected ").partition(", got ")
        return expected, got
    stored = Image.open(BytesIO(image.image)).size  # before it is turned upright
    if (image.width, image.height) not in (shown, stored):
        return f"{image.width}×{image.height} pixels, as in the archive", f"{shown[0]}×{shown[1]} pixels"
    return None


def write_archive(path: Path, images: Iterable[EncodedImage]) -> None:
    """Writes one Parquet file, uncompressed: the encoded images already are compressed."""
    table = pa.Table.from_pandas(pd.DataFrame(map(asdict, images), columns=SCHEMA.names), schema=SCHEMA)
    with files.atomic_write(path) as partial:
        pq.write_table(table.replace_schema_metadata(None), partial, compression="none")


def read_archive(path: Path) -> Iterator[EncodedImage]:
    """Yields the images of an archive in order, a batch in memory at a time. Raises DataError for any other file."""
    files.require_file(path)
    files.require_no_pointer(path)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=SCHEMA.names):
                for row in pa.Table.from_batches([batch]).select(SCHEMA.names).cast(SCHEMA).to_pylist():
                    yield EncodedImage(row["sha256"] or "", row["image"] or b"", row["width"] or 0, row["height"] or 0)
    except files.UNREADABLE_PARQUET as e:
        raise DataError(
            f"{path} is not an intact image archive ({', '.join(SCHEMA.names)}): {e}", hint=files.RECOMPUTE_HINT
        ) from e


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
    """Yields the images that `write_shards` wrote, in order."""
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
    gap, size = 4, cell_size or max(max(image.size) for row in rows for image in row)
    font = ImageFont.load_default(size=max(10, size // 10))
    ascent = font.getbbox("Ág")[3]
    left = int(max((font.getlength(label) for label in (*row_labels, corner) if label), default=-gap)) + gap
    top = int(ascent) + gap if column_labels or corner else 0
    columns = max([len(column_labels), *map(len, rows)])
    sheet = Image.new("RGB", (left + columns * (size + gap), top + len(rows) * (size + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((0, 0), corner, "black", font)
    for c, label in enumerate(column_labels):
        draw.text((left + c * (size + gap), 0), label, "black", font)
    for r, row in enumerate(rows):
        y = top + r * (size + gap)
        if row_labels:
            draw.text((0, y + (size - ascent) // 2), row_labels[r], "black", font)
        for c, image in enumerate(row):
            sheet.paste(ImageOps.contain(image, (size, size)), (left + c * (size + gap), y))
    return sheet
