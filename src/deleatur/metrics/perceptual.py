"""Perceptual distance of an image to the base model's image of the same prompt and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from deleatur.metrics import Array, EvaluationSet, Metric
from deleatur.records.report import DetectorInfo


class Perceptual(Metric):
    """LPIPS's form (Zhang et al. 2018, eq. 1) with patch states of CLIP's vision tower, all layers weighted equally.

    d(x, y) = mean over layers and patches of ‖ x̂ − ŷ ‖², unit-normalised states; 0 for equal images, at most 4.
    Not comparable with LPIPS on AlexNet; reports name the feature space.
    """

    higher_is_better: ClassVar[bool] = False

    def values(self, samples: EvaluationSet, base: EvaluationSet) -> Array:
        pairs = zip(samples.clip.patch_features(samples.images), base.clip.patch_features(base.images), strict=True)
        distances = [_distance(a, b)[:n] for (a, n), (b, _) in pairs]
        return torch.cat(distances).double().cpu().numpy()

    def cache_inputs(self, samples: EvaluationSet, row: int) -> Mapping[str, Any]:
        return {"clip": samples.clip.digest}

    def detector(self, samples: EvaluationSet) -> DetectorInfo | None:
        return DetectorInfo("clip-vision-layers", samples.clip.digest, ("unit-normalised patch states",), cutoff=0.0)


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(n,) from the states of each layer, (n, patches, width)."""
    return torch.stack([(x - y).square().sum(-1).mean(-1) for x, y in zip(a, b, strict=True)]).mean(0)
