"""Share of images with the unwanted concept, by the concept's detector and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from deleatur.metrics import Array, ConceptLabels, EvaluationSet, Metric, PromptScope
from deleatur.records.report import DetectorInfo
from deleatur.records.sampling import Prompt


class ConceptRate(Metric):
    """1 where the detector's top label is one of the concept's labels; prompts with a concept only."""

    higher_is_better: ClassVar[bool] = False
    is_rate: ClassVar[bool] = True
    prompt_scope: ClassVar[PromptScope] = "concept"

    def values(self, samples: EvaluationSet, base: EvaluationSet) -> Array:
        top_labels = {name: d.top_labels() for name, d in samples.detections.items()}

        def value(i: int) -> float:
            if not samples.prompts[i].concept:
                return np.nan
            detector, labels = samples.concept_labels[samples.prompts[i].concept]
            return float(top_labels[detector][i] in labels)

        return np.array([value(i) for i in range(len(samples.prompts))])

    def required_labels(self, prompts: Sequence[Prompt], concept_labels: ConceptLabels) -> set[tuple[str, str]]:
        concepts = {p.concept for p in prompts if p.concept}
        return {(detector, label) for c in concepts for detector, labels in [concept_labels[c]] for label in labels}

    def detector(self, samples: EvaluationSet) -> DetectorInfo | None:
        used = {samples.concept_labels[p.concept] for p in samples.prompts if p.concept}
        names = sorted({d for d, _ in used})
        labels = tuple(sorted({label for _, labels in used for label in labels}))
        if not names:
            return None
        return DetectorInfo("+".join(names), "+".join(samples.detections[n].weights for n in names), labels, cutoff=0.0)
