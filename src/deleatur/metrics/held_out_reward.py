"""How much raters who never touched the token would say the concept is there."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from deleatur.metrics import Array, Gallery, Metric
from deleatur.records import Detector


class HeldOutReward(Metric):
    """r_ψ of the head fitted to held-out raters' answers, on prompts that ask for the concept."""

    higher_is_better: ClassVar[bool] = False

    def values(self, shots: Gallery, base: Gallery) -> Array:
        return np.array(
            [float(shots.rewards[p.concept][i]) if p.concept else np.nan for i, p in enumerate(shots.prompts)]
        )

    def detector(self, shots: Gallery) -> Detector | None:
        return Detector("held-out reward head on clip", shots.clip.digest, ("r_psi of held-out raters",), cutoff=0.0)
