"""The untouched model: the baseline row of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.cost import Work
from deleatur.training.finetune import ErasureContext


class Keep(Eraser):
    """θ = θ₀."""

    def work(self, source: ConceptSource) -> Work:
        return Work()

    def touches(self, model: Model) -> set[str]:
        return set()

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        return Delta({}, model.unet_digest, "keep", self.model_dump(), tuple(c.name for c in concepts))
