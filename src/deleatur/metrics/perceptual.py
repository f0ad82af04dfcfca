"""How far a picture moved from the untouched model's picture of the same prompt and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deleatur.metrics import Array, Gallery, Metric
from deleatur.records.report import Detector


class Perceptual(Metric):
    """LPIPS's form (Zhang et al. 2018, eq. 1) in the patch states of CLIP's vision tower, all layers weighing alike.

    d(x, y) = mean over layers and patches of ‖ x̂ − ŷ ‖², unit-normalised states; 0 for equal pictures, at most 4.
    Not comparable with LPIPS on AlexNet: the feature space is named beside the number.
    """

    higher_is_better: ClassVar[bool] = False

    def values(self, shots: Gallery, base: Gallery) -> Array:
        pairs = zip(shots.clip.layers(shots.pictures), base.clip.layers(base.pictures), strict=True)
        apart = [_distance(a, b)[:n] for (a, n), (b, _) in pairs]
        return torch.cat(apart).double().cpu().numpy()

    def reads(self, shots: Gallery, row: int) -> Mapping[str, Any]:
        return {"clip": shots.clip.digest}

    def detector(self, shots: Gallery) -> Detector | None:
        return Detector("clip-vision-layers", shots.clip.digest, ("unit-normalised patch states",), cutoff=0.0)


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(n,) of layers (n, patches, width) each."""
    return torch.stack([(x - y).square().sum(-1).mean(-1) for x, y in zip(a, b, strict=True)]).mean(0)
