"""Fréchet distance between the evaluated and the base model's images of the same prompts."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from deleatur.maths.distances import frechet_distance
from deleatur.metrics import EvaluationSet, SetMetric
from deleatur.records.report import DetectorInfo


class Frechet(SetMetric):
    """FID's formula with CLIP image embeddings. Biased upwards for small n: compare at equal n only."""

    higher_is_better: ClassVar[bool] = False

    def of_set(self, samples: Tensor, base: Tensor) -> float:
        return frechet_distance(samples, base)

    def detector(self, samples: EvaluationSet) -> DetectorInfo | None:
        return DetectorInfo("clip", samples.clip.digest, ("projected image embedding",), cutoff=0.0)
