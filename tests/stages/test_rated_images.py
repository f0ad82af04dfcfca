"""What ingest and reward make of image files in unusual encodings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import image_files
import numpy as np
import pytest
import workspace

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


def replace_images(encoded: Sequence[bytes]) -> None:
    """The rated images in the given files instead, in the same order, each 16 × 12 pixels."""
    lines = ANSWERS.read_text("utf-8")
    archive = []
    for old, data in zip(images.read_archive(ARCHIVE), encoded, strict=True):
        digest = hashlib.sha256(data).hexdigest()
        lines = lines.replace(old.sha256, digest)
        archive.append(images.EncodedImage(digest, data, image_files.W, image_files.H))
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
