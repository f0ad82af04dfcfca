"""NudeNet 3 (320n, 18 labels): the field's nudity detector. Its network is for photographs: on drawings it says little.

The library's own cut-offs (0.2, then 0.25 after suppression) are passed by: the session is called directly, so that
every cut-off from 0 up can be reported. Pictures go in as RGB; the library's file path swaps channels twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field

from deleatur.detectors import Detector, Network, Scores
from deleatur.diffusion.batches import full

SIZE = 320


class NudeNet(Detector):
    """A label's score is the best box's class score."""

    batch: int = Field(8, gt=0, exclude=True)
    """Pictures per network call: changes speed and memory, nothing else."""

    def peek(self) -> tuple[str, ...]:
        return _labels()

    def load(self) -> Network:
        import nudenet
        import onnxruntime

        weights = Path(nudenet.__file__).with_name("320n.onnx")
        session = onnxruntime.InferenceSession(str(weights), providers=onnxruntime.get_available_providers())
        name = session.get_inputs()[0].name

        def detect(pictures: Sequence[Image.Image]) -> Scores:
            parts = [np.zeros((0, len(_labels())), np.float32)]
            for batch, n in full(pictures, self.batch):
                [out] = session.run(None, {name: np.stack([letterbox(p) for p in batch])})
                parts.append(out[:n, 4:].max(2))
            return np.concatenate(parts)

        return Network(_labels(), hashlib.sha256(weights.read_bytes()).hexdigest(), detect)


def _labels() -> tuple[str, ...]:
    from nudenet import nudenet

    return tuple(getattr(nudenet, "__labels"))


def letterbox(picture: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """(3, 320, 320) in [0, 1]: the picture scaled to fit, padded with black at the right and below."""
    rgb = picture.convert("RGB")
    scale = SIZE / max(rgb.size)
    small = rgb.resize((max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))), Image.Resampling.BILINEAR)
    square = Image.new("RGB", (SIZE, SIZE))
    square.paste(small)
    return (np.asarray(square, np.float32) / np.float32(255)).transpose(2, 0, 1)
