"""Any image classifier that transformers loads: the built-in judge, the style judge, or one of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from deleatur.detectors import Detections, Detector
from deleatur.diffusion import folders
from deleatur.diffusion.load import device_of, fingerprint, loading, quiet, whole


class Classifier(Detector):
    """Scores are the softmax over the classifier's labels."""

    path: str
    """Folder or hub id for `AutoModelForImageClassification`."""
    batch: int = Field(64, gt=0)
    """Pictures per network call: changes speed and memory, nothing else."""
    device: str = "auto"
    """auto: CUDA when there is one."""

    def peek(self) -> tuple[str, ...] | None:
        device_of(self.device)
        folder = folders.find(self.path)
        return folders.classes(folder) if folder else None

    def detect(self, pictures: Sequence[Image.Image], on_batch: Callable[[int], None] = lambda n: None) -> Detections:
        quiet()
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        with loading(self.path, "an image classifier"):
            net = whole(AutoModelForImageClassification, self.path)
            processor = AutoImageProcessor.from_pretrained(self.path)
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
