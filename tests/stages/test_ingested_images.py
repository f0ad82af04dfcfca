"""What ingest and reward make of image files in unusual encodings."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import image_files
import numpy as np
import pytest
import workspace
from PIL import Image

from deleatur import stages
from deleatur.artifacts.rated_images import RatedPool
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.storage import files, images

ARCHIVE = Path("feedback/weapon.images.parquet")
ANSWERS = Path("feedback/weapon.jsonl")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    return workspace.create(tmp_path)


def replace_images(encoded: Sequence[bytes], size: tuple[int, int] = (image_files.W, image_files.H)) -> None:
    """Replaces the rated images by other files, in the same order."""
    lines = ANSWERS.read_text("utf-8")
    archive = []
    for old, data in zip(images.read_archive(ARCHIVE), encoded, strict=True):
        digest = hashlib.sha256(data).hexdigest()
        lines = lines.replace(old.sha256, digest)
        archive.append(images.EncodedImage(digest, data, *size))
    ANSWERS.write_text(lines, "utf-8")
    images.write_archive(ARCHIVE, archive)


def test_sixteen_bit_images_stay_different(settings: Settings) -> None:
    rng = np.random.default_rng(0)
    shape = (image_files.H, image_files.W)
    greys = [rng.integers(0, 65536, shape).astype(">u2") for _ in range(24)]
    replace_images([image_files.png(image_files.packed(grey), 16, 0) for grey in greys])
    stages.run("ingest", settings)
    pool = RatedPool(settings, "weapon")
    assert {image.tobytes() for image in pool.images} == {
        np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2).tobytes() for grey in greys
    }


def test_files_that_all_show_the_same_are_refused(settings: Settings) -> None:
    blank = np.zeros((image_files.H, image_files.W, 4), np.uint8)
    blank[0, 0, 0] = 1
    replace_images([image_files.png(image_files.packed(blank * np.uint8(i)), 8, 6) for i in range(1, 25)])
    stages.run("ingest", settings)
    with pytest.raises(DataError, match="24 files with the same pixels"):
        stages.run("reward", settings)


def test_files_that_cannot_be_decoded_are_quarantined_with_the_reason(settings: Settings) -> None:
    encoded = [image.image for image in images.read_archive(ARCHIVE)]
    damaged = [data for _, data, _ in image_files.undecodable() if data]
    replace_images([*damaged, *encoded[len(damaged) :]])
    archive = list(images.read_archive(ARCHIVE))
    sizes = [image_files.W if i < len(damaged) else 16 for i in range(24)]
    images.write_archive(
        ARCHIVE, [images.EncodedImage(a.sha256, a.image, w, 16) for a, w in zip(archive, sizes, strict=True)]
    )
    stages.run("ingest", settings)
    table = files.read_table(settings.paths.feedback / "quarantine.parquet")
    rows = table[table["rule"] == "image bytes"]
    assert len(rows) == len(damaged)
    for (_, _, reason), got in zip([u for u in image_files.undecodable() if u[1]], rows["got"], strict=True):
        assert reason in got
    assert len(RatedPool(settings, "weapon").images) == 24 - len(damaged)


def test_a_damaged_archive_is_quarantined_and_the_other_sources_are_used(settings: Settings) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    replace_images([images.encode(Image.fromarray(pixels)) for pixels in noise], size=(64, 64))
    for path in (ARCHIVE, ANSWERS):
        shutil.copy(path, path.with_name(path.name.replace("weapon", "damaged")))
    damaged = ARCHIVE.with_name("damaged.images.parquet")
    data = bytearray(damaged.read_bytes())
    data[4:40] = bytes(36)  # the header of the first page
    damaged.write_bytes(data)
    with pytest.raises(DataError, match=r"damaged\.images\.parquet is not an intact image archive"):
        list(images.read_archive(damaged))
    stages.run("ingest", settings)
    quarantine = files.read_table(settings.paths.feedback / "quarantine.parquet")
    assert list(quarantine["rule"]) == ["image archive"]
    assert quarantine["file"].tolist() == [damaged.as_posix()]
    assert len(RatedPool(settings, "weapon").images) == 24


def test_a_failed_ingest_leaves_the_tables_of_the_last_one(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    stages.run("ingest", settings)
    before = {path: path.read_bytes() for path in settings.paths.feedback.iterdir()}
    monkeypatch.setattr(files, "write_table", _no_space)
    with pytest.raises(OSError, match="No space left"):
        stages.run("ingest", settings)
    assert {path: path.read_bytes() for path in settings.paths.feedback.iterdir()} == before


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")
