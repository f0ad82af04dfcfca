"""How far a picture moved from the untouched model's picture of the same prompt and noise."""

from __future__ import annotations

from typing import ClassVar

import torch

from deleatur.metrics import Array, Gallery, Metric
from deleatur.records import Detector


class Perceptual(Metric):
    """LPIPS's form (Zhang et al. 2018, eq. 1) in the patch states of CLIP's vision tower, all layers weighing alike.

    d(x, y) = mean over layers and patches of ‖ x̂ − ŷ ‖², unit-normalised states; 0 for equal pictures, at most 4.
    Not comparable with LPIPS on AlexNet: the feature space is named beside the number.
    """

    higher_is_better: ClassVar[bool] = False

    def values(self, shots: Gallery, base: Gallery) -> Array:
        ours, theirs = shots.clip.layers(shots.pictures), shots.clip.layers(base.pictures)
        layers = [(a - b).square().sum(-1).mean(-1) for a, b in zip(ours, theirs, strict=True)]
        return torch.stack(layers).mean(0).double().numpy()

    def detector(self, shots: Gallery) -> Detector | None:
        return Detector("clip-vision-layers", shots.clip.digest, ("unit-normalised patch states",), cutoff=0.0)
