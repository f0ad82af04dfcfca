"""NudeNet: labels and scores equal those of the library."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import workspace
from nudenet import NudeDetector
from PIL import Image

from deleatur.detectors.nudenet import NudeNet
from deleatur.errors import DeleaturError, ModelError
from deleatur.operations import preflight
from deleatur.runtime import provenance

PARTS = ("ANUS", "ARMPITS", "BELLY", "BUTTOCKS", "FEET", "FEMALE_BREAST", "FEMALE_GENITALIA")
PUBLISHED = {f"{part}_{state}" for part, state in product(PARTS, ("COVERED", "EXPOSED"))}
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


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    for use in (NudeNet().read_labels, NudeNet().load):
        with pytest.raises(ModelError, match="the extra `nudity` installs") as error:
            use()
        assert "pip install 'deleatur[nudity]'" in error.value.hint


def test_check_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = workspace.small_params(tmp_path)["evaluate"]
    changed = evaluate | {"detectors": evaluate["detectors"] | {"nudenet": {"method": "nudenet"}}}
    monkeypatch.chdir(tmp_path)
    settings = workspace.create(tmp_path, evaluate=changed)
    assert any(line == "evaluate.detectors.nudenet: 18 labels" for line in preflight.check(settings))
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(DeleaturError, match=r"evaluate\.detectors\.nudenet: .*the extra `nudity` installs"):
        preflight.check(settings)


def test_only_installed_packages_have_versions() -> None:
    assert provenance.installed(["numpy", "not-a-package-of-anyone"]) == {"numpy": np.__version__}


def test_the_core_runs_without_the_extra() -> None:
    """Every module can be imported, and the detector is listed."""
    program = """if True:
        import pkgutil, sys
        sys.modules |= {"nudenet": None, "onnxruntime": None}
        import deleatur
        from deleatur import plugins
        for module in pkgutil.walk_packages(deleatur.__path__, "deleatur."):
            if not module.name.endswith("__main__"):
                __import__(module.name)
        assert "nudenet" in plugins.names("detectors")
    """
    subprocess.run([sys.executable, "-c", program], check=True)
