"""What ingest writes with: whole or not at all, the same bytes for the same content."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from deleatur.errors import DataError
from deleatur.storage import files, images


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("read", [files.read_table, files.read_csv, files.read_json])
def test_what_cannot_be_read_says_so(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(DataError, match="no file"):
        read(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="is not"):
        read(tmp_path / "bad")


def test_pictures_survive_and_say_what_is_wrong_with_them() -> None:
    image = Image.new("RGB", (6, 4), (1, 2, 3))
    good = images.picture(image)
    assert images.decode(good.image).tobytes() == image.tobytes()
    assert images.problem(good) is None
    wrong = {
        "SHA-256": replace(good, sha256="0" * 64),
        "neither": replace(good, image=b"x", sha256=hashlib.sha256(b"x").hexdigest()),
        "6×4": replace(good, width=5),
    }
    for got, bad in wrong.items():
        found = images.problem(bad)
        assert found
        assert got in found[1]
    cut = good.image[:45]
    assert images.problem(replace(good, image=cut, sha256=hashlib.sha256(cut).hexdigest()))


def test_shards_hold_so_many_in_order_and_stay_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "SHARD", 2)
    found = [images.picture(Image.new("RGB", (2, 2), (i, 0, 0))) for i in range(5)]
    assert images.write_shards(tmp_path, found[:4]) == 4
    first = (tmp_path / "images-0000.parquet").read_bytes()
    assert images.write_shards(tmp_path, found) == 5
    assert (tmp_path / "images-0000.parquet").read_bytes() == first
    assert list(images.read_shards(tmp_path)) == found
    assert len(list(tmp_path.glob("images-*"))) == 3


def test_an_archive_without_the_columns_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"sha256": ["a"]}).to_parquet(tmp_path / "a")
    with pytest.raises(DataError, match="not a picture archive"):
        list(images.read(tmp_path / "a"))


def test_a_grid_shows_every_picture() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    sheet = images.grid([[red, blue], [blue]], ["base", "candidate"], ["one", "two"])
    counts = {colour: n for n, colour in sheet.getcolors(10_000) or []}
    assert (counts[255, 0, 0], counts[0, 0, 255]) == (64, 128)
    assert images.grid([[red]]).size == (12, 12)
