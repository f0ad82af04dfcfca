"""Any image classifier that transformers loads: the built-in judge, the style judge, or one of the user's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from deleatur.detectors import Detector, Network, Scores
from deleatur.diffusion import folders
from deleatur.diffusion.batches import full
from deleatur.diffusion.model import device_of, identify, loading, quiet, whole


class Classifier(Detector):
    """Scores are the softmax over the classifier's labels."""

    path: str = Field(exclude=True)
    """Folder or hub id for `AutoModelForImageClassification`."""
    batch: int = Field(64, gt=0, exclude=True)
    """Pictures per network call: changes speed and memory, nothing else."""
    device: str = Field("auto", exclude=True)
    """auto: CUDA when there is one."""

    def peek(self) -> tuple[str, ...] | None:
        device_of(self.device)
        folder = folders.find(self.path)
        return folders.classes(folder) if folder else None

    def load(self) -> Network:
        quiet()
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        with loading(self.path, "an image classifier"):
            net = whole(AutoModelForImageClassification, self.path)
            processor = AutoImageProcessor.from_pretrained(self.path)
        digest = identify(net, processor)
        net = net.float().to(device_of(self.device)).eval()
        labels = tuple(net.config.id2label[i] for i in range(net.config.num_labels))

        @torch.no_grad()
        def detect(pictures: Sequence[Image.Image]) -> Scores:
            parts = [np.zeros((0, len(labels)), np.float32)]
            for batch, n in full([p.convert("RGB") for p in pictures], self.batch):
                logits = net(**processor(images=batch, return_tensors="pt").to(net.device)).logits
                parts.append(logits.softmax(-1)[:n].cpu().numpy())
            return np.concatenate(parts)

        return Network(labels, digest, detect)
