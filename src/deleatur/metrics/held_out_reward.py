"""Reward of a head fitted to held-out raters: how strongly they would see the concept in an image."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from deleatur.metrics import Array, EvaluationSet, Metric, PromptScope
from deleatur.records.report import DetectorInfo


class HeldOutReward(Metric):
    """r_ψ of the head fitted to held-out raters' answers; prompts with a concept that was rated only."""

    higher_is_better: ClassVar[bool] = False
    prompt_scope: ClassVar[PromptScope] = "concept"

    def values(self, samples: EvaluationSet, base: EvaluationSet) -> Array:
        return np.array(
            [
                float(samples.rewards[p.concept].values[i]) if p.concept in samples.rewards else np.nan
                for i, p in enumerate(samples.prompts)
            ]
        )

    def detector(self, samples: EvaluationSet) -> DetectorInfo | None:
        names = sorted({p.concept for p in samples.prompts if p.concept in samples.rewards})
        if not names:
            return None
        networks = {"clip": samples.clip.digest} | {
            f"held-out head of {name}": samples.rewards[name].head for name in names
        }
        return DetectorInfo("+".join(networks), "+".join(networks.values()), ("r_psi of held-out raters",), cutoff=0.0)
