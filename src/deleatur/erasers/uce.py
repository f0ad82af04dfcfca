"""UCE, unified concept editing (Gandikota et al. 2024, arXiv 2308.14761).

min over W'  η_e Σ ‖W'c − Wg‖²  +  η_p Σ ‖W'k − Wk‖²  +  λ ‖W' − W‖²      for every key and value projection W

c: states of the concept   g: of its alternative, or of the empty prompt, at the same positions   k: states to preserve

A closed-form solution: no images, no random numbers. Deviations: without an alternative, g are the empty prompt's
states at the concept's own positions, where the releases count positions from the start token; solved in float64,
where the releases use float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.closed_form_editor import ClosedFormConfig, ClosedFormEditor, edit_pairs, text_projections
from deleatur.training.cost import Workload
from deleatur.training.loop import ErasureContext


class UCE(Eraser):
    alternatives: dict[str, str] = Field(default_factory=dict)
    """What the model generates in a concept's place, {weapon: toy}; for concepts not listed, as without a prompt."""
    edit: ClosedFormConfig = Field(default_factory=ClosedFormConfig)

    def workload(self, source: ConceptSource) -> Workload:
        return self.edit.workload(1)

    def touched_parameters(self, model: Model) -> set[str]:
        return set(text_projections(model))

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        editor = ClosedFormEditor(model, self.edit, context, steps=1)
        editor.step(*edit_pairs(model, concepts, self.alternatives, self.edit.columns))
        return editor.delta("uce", self.model_dump(), concepts)
