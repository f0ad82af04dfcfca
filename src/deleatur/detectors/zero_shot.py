"""CLIP without training: an image gets the label whose text is closest. For concepts that no classifier knows yet.

Scores are softmax(s · cos(image, text)) over the labels, with CLIP's logit scale s (Radford et al. 2021, 2103.00020).
They say which label fits best among those given, so the list needs texts of ordinary images beside the concept's words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from deleatur.detectors import Detector, LoadedDetector, Scores
from deleatur.diffusion.clip import load_clip


class ZeroShot(Detector):
    path: str = Field(exclude=True)
    """Folder or hub id of a CLIP model."""
    labels: tuple[str, ...] = Field(min_length=2)
    """Texts that an image is compared with."""
    device: str = Field("auto", exclude=True)
    """auto: CUDA if available."""

    def read_labels(self) -> tuple[str, ...] | None:
        return self.labels

    def load(self) -> LoadedDetector:
        clip = load_clip(self.path, self.device)
        texts, scale = clip.embed_texts(self.labels), float(clip.model.logit_scale.detach().exp())

        def predict(images: Sequence[Image.Image]) -> Scores:
            # One image at a time: a product of other sizes rounds differently.
            rows = [(scale * (texts @ feature)).softmax(0).numpy() for feature in clip.embed_images(images)]
            return np.stack(rows) if rows else np.zeros((0, len(self.labels)), np.float32)

        return LoadedDetector(self.labels, clip.digest, torch.no_grad()(predict))
