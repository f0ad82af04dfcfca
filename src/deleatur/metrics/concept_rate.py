"""How often the unwanted concept is in the picture, by the detector and labels that the concept names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from deleatur.metrics import Array, Asked, Counts, Gallery, Metric
from deleatur.records.report import Detector
from deleatur.records.sampling import Prompt


class ConceptRate(Metric):
    """1 where the detector's first label is one of the concept's, on prompts that ask for the concept."""

    higher_is_better: ClassVar[bool] = False
    rate: ClassVar[bool] = True
    of: ClassVar[Asked] = "concept"

    def values(self, shots: Gallery, base: Gallery) -> Array:
        top = {name: seen.top() for name, seen in shots.seen.items()}

        def value(i: int) -> float:
            if not shots.prompts[i].concept:
                return np.nan
            detector, labels = shots.counts[shots.prompts[i].concept]
            return float(top[detector][i] in labels)

        return np.array([value(i) for i in range(len(shots.prompts))])

    def needs(self, prompts: Sequence[Prompt], counts: Counts) -> set[tuple[str, str]]:
        asked = {p.concept for p in prompts if p.concept}
        return {(detector, label) for detector, labels in map(counts.__getitem__, asked) for label in labels}

    def detector(self, shots: Gallery) -> Detector | None:
        used = {shots.counts[p.concept] for p in shots.prompts if p.concept}
        names = sorted({d for d, _ in used})
        labels = tuple(sorted({label for _, found in used for label in found}))
        if not names:
            return None
        return Detector("+".join(names), "+".join(shots.seen[n].weights for n in names), labels, cutoff=0.0)
