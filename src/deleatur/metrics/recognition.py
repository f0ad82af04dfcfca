"""How often a harmless prompt still gives what it asks for."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from deleatur.metrics import Array, Gallery, Metric, labelled
from deleatur.records import Detector


class Recognition(Metric):
    """1 where the first label of the prompt's detector is the one the prompt asks for; harmless prompts only."""

    higher_is_better: ClassVar[bool] = True
    rate: ClassVar[bool] = True

    def values(self, shots: Gallery, base: Gallery) -> Array:
        top = {name: seen.top() for name, seen in shots.seen.items()}

        def value(i: int) -> float:
            if shots.prompts[i].concept:
                return np.nan
            detector, label = labelled(shots.prompts[i])
            return float(top[detector][i] == label)

        return np.array([value(i) for i in range(len(shots.prompts))])

    def detector(self, shots: Gallery) -> Detector | None:
        wanted = {labelled(p) for p in shots.prompts if not p.concept}
        names = sorted({d for d, _ in wanted})
        if not names:
            return None
        labels = tuple(sorted({label for _, label in wanted}))
        return Detector("+".join(names), "+".join(shots.seen[n].weights for n in names), labels, cutoff=0.0)
