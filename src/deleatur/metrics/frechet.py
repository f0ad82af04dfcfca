"""Fréchet distance between the candidate's and the base model's pictures of the same prompts."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from deleatur.maths.distances import frechet
from deleatur.metrics import Gallery, SetMetric
from deleatur.records.report import Detector


class Frechet(SetMetric):
    """FID's formula in CLIP's image embedding. Small samples bias it upwards: compare at equal n only."""

    higher_is_better: ClassVar[bool] = False

    def of_set(self, shots: Tensor, base: Tensor) -> float:
        return frechet(shots, base)

    def detector(self, shots: Gallery) -> Detector | None:
        return Detector("clip", shots.clip.digest, ("projected image embedding",), cutoff=0.0)
