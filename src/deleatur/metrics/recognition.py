"""How often a harmless prompt still gives what it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from deleatur.metrics import Array, Asked, Counts, Gallery, Metric, labelled
from deleatur.records.report import Detector
from deleatur.records.sampling import Prompt


class Recognition(Metric):
    """1 where the first label of the prompt's detector is the one the prompt asks for; harmless prompts only."""

    higher_is_better: ClassVar[bool] = True
    rate: ClassVar[bool] = True
    of: ClassVar[Asked] = "harmless"

    def values(self, shots: Gallery, base: Gallery) -> Array:
        top = {name: seen.top() for name, seen in shots.seen.items()}

        def value(i: int) -> float:
            if shots.prompts[i].concept:
                return np.nan
            detector, label = labelled(shots.prompts[i])
            return float(top[detector][i] == label)

        return np.array([value(i) for i in range(len(shots.prompts))])

    def needs(self, prompts: Sequence[Prompt], counts: Counts) -> set[tuple[str, str]]:
        return {labelled(p) for p in prompts if not p.concept}

    def detector(self, shots: Gallery) -> Detector | None:
        wanted = self.needs(shots.prompts, shots.counts)
        names = sorted({d for d, _ in wanted})
        if not names:
            return None
        labels = tuple(sorted({label for _, label in wanted}))
        return Detector("+".join(names), "+".join(shots.seen[n].weights for n in names), labels, cutoff=0.0)
