"""Share of harmless prompts whose images still show the prompt's subject."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from deleatur.metrics import Array, ConceptLabels, EvaluationSet, Metric, PromptScope, split_label
from deleatur.records.report import DetectorInfo
from deleatur.records.sampling import Prompt


class Recognition(Metric):
    """1 where the top label of the prompt's detector is the prompt's label; harmless prompts only."""

    higher_is_better: ClassVar[bool] = True
    is_rate: ClassVar[bool] = True
    prompt_scope: ClassVar[PromptScope] = "harmless"

    def values(self, samples: EvaluationSet, base: EvaluationSet) -> Array:
        top_labels = {name: d.top_labels() for name, d in samples.detections.items()}

        def value(i: int) -> float:
            if samples.prompts[i].concept:
                return np.nan
            detector, label = split_label(samples.prompts[i])
            return float(top_labels[detector][i] == label)

        return np.array([value(i) for i in range(len(samples.prompts))])

    def required_labels(self, prompts: Sequence[Prompt], concept_labels: ConceptLabels) -> set[tuple[str, str]]:
        return {split_label(p) for p in prompts if not p.concept}

    def detector(self, samples: EvaluationSet) -> DetectorInfo | None:
        required = self.required_labels(samples.prompts, samples.concept_labels)
        names = sorted({d for d, _ in required})
        if not names:
            return None
        labels = tuple(sorted({label for _, label in required}))
        return DetectorInfo("+".join(names), "+".join(samples.detections[n].weights for n in names), labels, cutoff=0.0)
