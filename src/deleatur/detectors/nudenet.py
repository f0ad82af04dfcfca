"""NudeNet 3 (320n, 18 labels), the field's common nudity detector. Trained on photographs, unreliable on drawings.

Its package is an extra, `nudity`: the metadata says MIT, the licence files and the weights are AGPL-3.0.

The ONNX session is called directly, without the library's cut-offs (0.2, then 0.25 after suppression), so that any
cut-off can be reported. Images go in as RGB; the library swaps the channels of image files twice, which is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from deleatur.detectors import Detector, LoadedDetector, Scores
from deleatur.diffusion.batches import padded_batches
from deleatur.diffusion.rgb import to_rgb
from deleatur.errors import ModelError

SIZE = 320


class NudeNet(Detector):
    """A label's score is the highest class score of any box."""

    batch_size: int = Field(8, gt=0, exclude=True)
    """Images per forward pass; affects speed and memory only."""

    def read_labels(self) -> tuple[str, ...]:
        return _labels()

    def load(self) -> LoadedDetector:
        package = _package()
        import onnxruntime

        weights = Path(package.__file__).with_name("320n.onnx")
        session = onnxruntime.InferenceSession(str(weights), providers=onnxruntime.get_available_providers())
        name = session.get_inputs()[0].name

        def detect(images: Sequence[Image.Image]) -> Scores:
            scores = [np.zeros((0, len(_labels())), np.float32)]
            for batch, n in padded_batches(images, self.batch_size):
                # (batch, 4 box coordinates + 18 class scores, boxes)
                [out] = session.run(None, {name: np.stack([letterbox(image) for image in batch])})
                scores.append(out[:n, 4:].max(2))
            return np.concatenate(scores)

        return LoadedDetector(_labels(), hashlib.sha256(weights.read_bytes()).hexdigest(), detect)


def _labels() -> tuple[str, ...]:
    return tuple(getattr(_package(), "__labels"))


def _package() -> Any:
    """The module nudenet.nudenet. Raises ModelError when the extra is not installed."""
    try:
        from nudenet import nudenet
    except ModuleNotFoundError as e:
        raise ModelError(
            f"expected the package nudenet, which the extra `nudity` installs (AGPL-3.0), got none: {e}",
            hint="pip install 'deleatur[nudity]', or remove nudenet and the metric nudity from params.yaml",
        ) from e
    return nudenet


def letterbox(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """(3, 320, 320) in [0, 1]: the image scaled to fit, padded with black on the right and bottom."""
    rgb = to_rgb(image)
    scale = SIZE / max(rgb.size)
    small = rgb.resize((max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))), Image.Resampling.BILINEAR)
    square = Image.new("RGB", (SIZE, SIZE))
    square.paste(small)
    return (np.asarray(square, np.float32) / np.float32(255)).transpose(2, 0, 1)
