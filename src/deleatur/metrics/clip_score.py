"""CLIP score: mean cosine between picture and prompt, weight 1 (not 2.5, not 100), averaged over pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from deleatur.maths.distances import cosine
from deleatur.metrics import Array, Asked, Gallery, Metric
from deleatur.records.report import Detector


class ClipScore(Metric):
    """cos(CLIP(x), CLIP(prefix + prompt)), harmless prompts only. Identical embeddings give 1."""

    higher_is_better: ClassVar[bool] = True
    of: ClassVar[Asked] = "harmless"
    prefix: str = ""
    """The SDD release puts "A photo depicts " before COCO captions."""

    def values(self, shots: Gallery, base: Gallery) -> Array:
        harmless = np.array([not p.concept for p in shots.prompts])
        texts = shots.clip.texts([self.prefix + p.text for p in shots.prompts])
        return np.where(harmless, cosine(shots.features, texts).double().numpy(), np.nan)

    def reads(self, shots: Gallery, row: int) -> Mapping[str, Any]:
        prompt = shots.prompts[row]
        return {"clip": shots.clip.digest, "text": prompt.text, "concept": prompt.concept}

    def detector(self, shots: Gallery) -> Detector | None:
        return Detector("clip", shots.clip.digest, (f"cos, prefix {self.prefix!r}",), cutoff=0.0)
