"""Any image classifier that transformers loads: the built-in judge, the style judge, or one of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from deleatur.detectors import Detections, Detector
from deleatur.diffusion.load import device_of, fingerprint, quiet
from deleatur.errors import ModelError


class Classifier(Detector):
    """Scores are the softmax over the classifier's labels."""

    path: str
    """Folder or hub id for `AutoModelForImageClassification`."""
    batch: int = 64
    device: str = "auto"

    def detect(self, pictures: Sequence[Image.Image], on_batch: Callable[[int], None] = lambda n: None) -> Detections:
        quiet()
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            net = AutoModelForImageClassification.from_pretrained(self.path, use_safetensors=True)
            processor = AutoImageProcessor.from_pretrained(self.path)
        except (OSError, ValueError) as e:
            raise ModelError(f"{self.path!r} does not load as an image classifier: {e}", hint="deleatur check") from e
        digest = fingerprint(net)
        net = net.float().to(device_of(self.device)).eval()
        labels = tuple(net.config.id2label[i] for i in range(net.config.num_labels))
        parts = [np.zeros((0, len(labels)), np.float32)]
        for i in range(0, len(pictures), self.batch):
            chunk = [p.convert("RGB") for p in pictures[i : i + self.batch]]
            with torch.no_grad():
                logits = net(**processor(images=chunk, return_tensors="pt").to(net.device)).logits
            parts.append(logits.softmax(-1).cpu().numpy())
            on_batch(len(chunk))
        return Detections(labels, np.concatenate(parts), digest)
