"""How much raters who never touched the token would say the concept is there."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from deleatur.metrics import Array, Asked, Gallery, Metric
from deleatur.records.report import Detector


class HeldOutReward(Metric):
    """r_ψ of the head fitted to held-out raters' answers, on prompts that ask for the concept."""

    higher_is_better: ClassVar[bool] = False
    of: ClassVar[Asked] = "concept"

    def values(self, shots: Gallery, base: Gallery) -> Array:
        return np.array(
            [float(shots.rewards[p.concept].values[i]) if p.concept else np.nan for i, p in enumerate(shots.prompts)]
        )

    def detector(self, shots: Gallery) -> Detector | None:
        names = sorted({p.concept for p in shots.prompts if p.concept})
        if not names:
            return None
        read = {"clip": shots.clip.digest} | {f"held-out head of {name}": shots.rewards[name].head for name in names}
        return Detector("+".join(read), "+".join(read.values()), ("r_psi of held-out raters",), cutoff=0.0)
