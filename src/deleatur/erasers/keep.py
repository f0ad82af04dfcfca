"""The unmodified model: the baseline row of every benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.cost import Workload
from deleatur.training.loop import ErasureContext


class Keep(Eraser):
    """θ = θ₀."""

    def workload(self, source: ConceptSource) -> Workload:
        return Workload()

    def touched_parameters(self, model: Model) -> set[str]:
        return set()

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        return Delta({}, model.unet_digest, "keep", self.model_dump(), tuple(c.name for c in concepts))
