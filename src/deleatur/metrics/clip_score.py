"""CLIP score: mean cosine between image and prompt embedding, with weight 1 (elsewhere 2.5 or 100)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from deleatur.maths.distances import cosine_similarity
from deleatur.metrics import Array, EvaluationSet, Metric, PromptScope
from deleatur.records.report import DetectorInfo


class ClipScore(Metric):
    """cos(CLIP(x), CLIP(prefix + prompt)), harmless prompts only. Identical embeddings give 1."""

    higher_is_better: ClassVar[bool] = True
    prompt_scope: ClassVar[PromptScope] = "harmless"
    prefix: str = ""
    """The SDD release puts "A photo depicts " before COCO captions."""

    def values(self, samples: EvaluationSet, base: EvaluationSet) -> Array:
        harmless = np.array([not p.concept for p in samples.prompts], dtype=bool)
        texts = samples.clip.embed_texts([self.prefix + p.text for p in samples.prompts if not p.concept])
        values = np.full(len(harmless), np.nan)
        values[harmless] = cosine_similarity(samples.features[torch.from_numpy(harmless)], texts).double().numpy()
        return values

    def cache_inputs(self, samples: EvaluationSet, row: int) -> Mapping[str, Any]:
        prompt = samples.prompts[row]
        return {"clip": samples.clip.digest, "text": prompt.text, "concept": prompt.concept}

    def detector(self, samples: EvaluationSet) -> DetectorInfo | None:
        return DetectorInfo("clip", samples.clip.digest, (f"cos, prefix {self.prefix!r}",), cutoff=0.0)
