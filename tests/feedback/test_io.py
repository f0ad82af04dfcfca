"""Storage used by ingest: atomic writes, deterministic bytes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from deleatur.errors import DataError
from deleatur.storage import files, images


def test_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, float("nan"))
    with pytest.raises(UnicodeEncodeError):
        files.write_lines(path, ["whole", "half \ud800"])
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_tables_keep_their_types_when_empty(tmp_path: Path) -> None:
    schema = pa.schema({"n": pa.int64(), "items": pa.list_(pa.string())})
    files.write_table(tmp_path / "t", pd.DataFrame(columns=["n", "items"]), schema)
    assert files.read_table(tmp_path / "t")["n"].dtype == "int64"


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": ["007", "None"], "text": ["", "a, “b”\nc"]})
    files.write_csv(tmp_path / "t.csv", frame)
    assert files.read_csv(tmp_path / "t.csv").equals(frame.astype(files.read_csv(tmp_path / "t.csv").dtypes))


CSV = {
    "byte order mark": (b"\xef\xbb\xbfid,text\r\n1,a\r\n", None),
    "old line ends": (b"id,text\r1,a\r", None),
    "blank lines": (b"id,text\n\n1,a\n\n", None),
    "semicolons": (b"id;text\n1;a\n", "separated by commas, got ';'"),
    "tabs": (b"id\ttext\n1\ta\n", "separated by commas"),
    "a field too many": (b"id,text\n1,a,b\n", "row 2: expected 2 fields, got 3"),
    "a field too few": (b"id,text\n1,a\n2\n", "row 3: expected 2 fields, got 1"),
    "a column twice": (b"id,id\n1,2\n", "every column once"),
    "NUL": (b"id,text\n1,a\0\n", "NUL"),
    "open quote": (b'id,text\n1,"a\n', "is not a CSV table"),
    "UTF-16": ("id,text\n1,a\n".encode("utf-16"), "is not a CSV table"),
    "nothing": (b"", "is not a CSV table"),
    "pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
        "pointer of Git LFS",
    ),
}


@pytest.mark.parametrize(("content", "message"), CSV.values(), ids=CSV.keys())
def test_csv_is_read_or_refused_with_the_reason(tmp_path: Path, content: bytes, message: str | None) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    if message is None:
        assert files.read_csv(path).to_dict("records") == [{"id": "1", "text": "a"}]
    else:
        with pytest.raises(DataError, match=message):
            files.read_csv(path)


@pytest.mark.parametrize("read", [files.read_table, files.read_csv, files.read_json])
def test_unreadable_file_raises_a_data_error(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(DataError, match="no file"):
        read(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="is not"):
        read(tmp_path / "bad")


def test_images_round_trip_and_problems_are_reported() -> None:
    image = Image.new("RGB", (6, 4), (1, 2, 3))
    valid = images.encode_image(image)
    assert images.decode(valid.image).tobytes() == image.tobytes()
    assert images.find_mismatch(valid) is None
    invalid = {
        "SHA-256": replace(valid, sha256="0" * 64),
        "1 bytes": replace(valid, image=b"x", sha256=hashlib.sha256(b"x").hexdigest()),
        "6×4": replace(valid, width=5),
    }
    for message, bad in invalid.items():
        problem = images.find_mismatch(bad)
        assert problem
        assert message in problem[1]
    truncated = valid.image[:45]
    assert images.find_mismatch(replace(valid, image=truncated, sha256=hashlib.sha256(truncated).hexdigest()))


def test_shards_are_ordered_and_earlier_ones_do_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "SHARD_SIZE", 2)
    encoded = [images.encode_image(Image.new("RGB", (2, 2), (i, 0, 0))) for i in range(5)]
    assert images.write_shards(tmp_path, encoded[:4]) == 4
    first = (tmp_path / "images-0000.parquet").read_bytes()
    assert images.write_shards(tmp_path, encoded) == 5
    assert (tmp_path / "images-0000.parquet").read_bytes() == first
    assert list(images.read_shards(tmp_path)) == encoded
    assert len(list(tmp_path.glob("images-*"))) == 3


def test_archive_without_the_columns_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"sha256": ["a"]}).to_parquet(tmp_path / "a")
    with pytest.raises(DataError, match="not an intact image archive"):
        list(images.read_archive(tmp_path / "a"))


def test_contact_sheet_shows_every_image() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    sheet = images.contact_sheet([[red, blue], [blue]], ["base", "candidate"], ["one", "two"])
    counts = {colour: n for n, colour in sheet.getcolors(10_000) or []}
    assert (counts[255, 0, 0], counts[0, 0, 255]) == (64, 128)
    assert images.contact_sheet([[red]]).size == (12, 12)


def test_damaged_archive_raises_no_other_error(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.images.parquet", np.random.default_rng(0)
    images.write_archive(path, [images.encode_image(Image.new("RGB", (16, 16), (i, 0, 0))) for i in range(20)])
    intact, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(intact)
        for position in rng.integers(len(intact) - 900, len(intact), rng.integers(1, 30)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(len(intact) // 2, 2 * len(intact))])
        try:
            [images.find_mismatch(image) for image in images.read_archive(path)]
        except DataError:
            refused += 1
    assert refused > 100
