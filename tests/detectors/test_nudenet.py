"""NudeNet: labels and scores equal those of the library."""

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
"""The 18 labels of version 3; male parts exist only as exposed."""


@pytest.fixture(scope="module")
def person() -> Image.Image:
    """A photograph of a person, from matplotlib's sample data."""
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as photo:
        return photo.convert("RGB")


def label_scores(image: Image.Image) -> dict[str, float]:
    network = NudeNet().load()
    return dict(zip(network.labels, network.detect([image])[0].tolist(), strict=True))


def test_labels_are_the_published_ones(person: Image.Image) -> None:
    assert set(label_scores(person)) == PUBLISHED
    assert len(PUBLISHED) == 18


FULL, SQUARE, WIDE = (0, 0, 512, 600), (100, 0, 420, 320), (0, 0, 512, 300)


@pytest.mark.parametrize(
    ("crop", "size"), [(SQUARE, (320, 320)), (FULL, (273, 320)), (WIDE, (320, 188)), (FULL, (512, 600))]
)
def test_face_score_equals_that_of_the_library(
    person: Image.Image, crop: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    """Scores may differ slightly only where the image is rescaled, because OpenCV interpolates differently."""
    image = person.crop(crop).resize(size)
    [reference] = NudeDetector().detect(np.asarray(image))
    ours = label_scores(image)
    assert reference["class"] == "FACE_FEMALE" == max(ours, key=lambda label: ours[label])
    assert ours["FACE_FEMALE"] == pytest.approx(reference["score"], abs=1e-4 if max(size) == 320 else 0.1)
