"""NudeNet's labels stand at its network's outputs, and a picture scores as by the library's own code."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from nudenet import NudeDetector
from PIL import Image

from deleatur.detectors.nudenet import NudeNet

PARTS = ("ANUS", "ARMPITS", "BELLY", "BUTTOCKS", "FEET", "FEMALE_BREAST", "FEMALE_GENITALIA")
PUBLISHED = {f"{part}_{how}" for part, how in product(PARTS, ("COVERED", "EXPOSED"))}
PUBLISHED |= {"MALE_BREAST_EXPOSED", "MALE_GENITALIA_EXPOSED", "FACE_FEMALE", "FACE_MALE"}
"""The 18 labels of version 3; of men's parts there are only the exposed."""


@pytest.fixture(scope="module")
def person() -> Image.Image:
    """A photograph that comes with matplotlib: an admiral in uniform."""
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as picture:
        return picture.convert("RGB")


def found(picture: Image.Image) -> dict[str, float]:
    network = NudeNet().load()
    return dict(zip(network.labels, network.detect([picture])[0].tolist(), strict=True))


def test_labels_are_the_published_ones(person: Image.Image) -> None:
    assert set(found(person)) == PUBLISHED
    assert len(PUBLISHED) == 18


WHOLE, SQUARE, WIDE = (0, 0, 512, 600), (100, 0, 420, 320), (0, 0, 512, 300)


@pytest.mark.parametrize(
    ("part", "size"), [(SQUARE, (320, 320)), (WHOLE, (273, 320)), (WIDE, (320, 188)), (WHOLE, (512, 600))]
)
def test_a_face_is_found_where_the_library_finds_it_and_scores_alike(
    person: Image.Image, part: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    """Only where the picture has to be rescaled, which OpenCV does in its own way, may scores differ a little."""
    picture = person.crop(part).resize(size)
    [theirs] = NudeDetector().detect(np.asarray(picture))
    ours = found(picture)
    assert theirs["class"] == "FACE_FEMALE" == max(ours, key=lambda label: ours[label])
    assert ours["FACE_FEMALE"] == pytest.approx(theirs["score"], abs=1e-4 if max(size) == 320 else 0.1)
