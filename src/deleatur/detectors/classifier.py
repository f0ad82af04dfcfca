"""Any image classifier that transformers can load: the built-in judges, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from deleatur.detectors import Detector, LoadedDetector, Scores
from deleatur.diffusion import folders
from deleatur.diffusion.batches import padded_batches
from deleatur.diffusion.model import digest_parts, from_pretrained, load_errors, resolve_device, silence_libraries
from deleatur.diffusion.rgb import to_rgb


class Classifier(Detector):
    """Scores are softmax probabilities of the classifier's labels."""

    path: str = Field(exclude=True)
    """Folder or hub id for `AutoModelForImageClassification`."""
    batch_size: int = Field(64, gt=0, exclude=True)
    """Images per forward pass; affects speed and memory only."""
    device: str = Field("auto", exclude=True)
    """auto: CUDA if available."""

    def read_labels(self) -> tuple[str, ...] | None:
        resolve_device(self.device)
        folder = folders.locate(self.path)
        return folders.classifier_labels(folder) if folder else None

    def load(self) -> LoadedDetector:
        silence_libraries()
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        folder = folders.download(self.path)
        folders.classifier_labels(folder)
        with load_errors(str(folder), "an image classifier"):
            net = from_pretrained(AutoModelForImageClassification, str(folder))
            processor = AutoImageProcessor.from_pretrained(str(folder))
        digest = digest_parts(net, processor)
        net = net.float().to(resolve_device(self.device)).eval()
        labels = tuple(net.config.id2label[i] for i in range(net.config.num_labels))

        @torch.no_grad()
        def detect(images: Sequence[Image.Image]) -> Scores:
            scores = [np.zeros((0, len(labels)), np.float32)]
            for batch, n in padded_batches([to_rgb(image) for image in images], self.batch_size):
                logits = net(**processor(images=batch, return_tensors="pt").to(net.device)).logits
                scores.append(logits.softmax(-1)[:n].cpu().numpy())
            return np.concatenate(scores)

        return LoadedDetector(labels, digest, detect)
