"""UCE, unified concept editing (Gandikota et al. 2024, arXiv 2308.14761).

min over W'  η_e Σ ‖W'c − Wg‖²  +  η_p Σ ‖W'k − Wk‖²  +  λ ‖W' − W‖²      for every key and value projection W

c: states of the concept      g: of the alternative or the empty prompt, at the same places      k: of preserved prompts

Solved, not trained: no picture is needed and no random number drawn. Deviation: without an alternative, states are led
to the empty prompt's at their own places, where the releases count its places from the begin token; the releases'
solution in float32 is one in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.closed_form_editor import Edit, Editing, pairs, touched
from deleatur.training.cost import Work
from deleatur.training.finetune import ErasureContext


class UCE(Eraser):
    alternatives: dict[str, str] = Field(default_factory=dict)
    """What a concept is drawn as from now on, {weapon: toy}; nothing for those that are not named."""
    edit: Edit = Field(default_factory=Edit)

    def work(self, source: ConceptSource) -> Work:
        return self.edit.work(1)

    def touches(self, model: Model) -> set[str]:
        return set(touched(model))

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        editing = Editing(model, self.edit, context, steps=1)
        editing.step(*pairs(model, concepts, self.alternatives, self.edit.columns))
        return editing.delta("uce", self.model_dump(), concepts)
