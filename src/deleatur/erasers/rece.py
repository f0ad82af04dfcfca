"""RECE, reliable and efficient concept erasure (Gong et al. 2024, arXiv 2407.12383).

Starts from UCE, then in every epoch finds the states that best bring the concept back, and erases those too:

c' = argmin_x Σ_l ‖W'_l x − W_l c‖² + λ_r ‖x‖²  =  (Σ_l W'_lᵀW'_l + λ_r I)⁻¹ Σ_l W'_lᵀW_l c

W: key and value projections of the base model, W': as edited so far. Then UCE's formula for W', with c' in place of c,
at all L places of a sentence. Deviations: an epoch preserves all that UCE preserves, not the empty prompt alone; the
number of epochs is not chosen by a detector on sampled pictures: it is fixed, or found by how much of the concept c'
brings back (`stop_at`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.maths.closed_form import projected_distance, regenerate
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.closed_form_editor import Edit, Editing, pairs, touched
from deleatur.training.cost import Work
from deleatur.training.finetune import ErasureContext


class RECE(Eraser):
    epochs: int = Field(3, ge=0)
    """Published: 3 for nudity, 2 for a list of harms, 1 for a style or an object. 0 is UCE."""
    lam_r: float = Field(0.1, gt=0)
    """λ_r, what keeps c' short, and so the edit small. Published: 0.1; 1e-3 for a style or an object hard to erase."""
    target_rate: float = Field(0.0, ge=0, le=1)
    """Stop (ours) once c' brings back no more than this share of what tells the concept from its alternative."""
    hold: bool = False
    """Erase anew (ours), with c', all that was erased before. An epoch as published lets go of that, and where prompts
    are preserved with some weight, most of it comes back."""
    alternatives: dict[str, str] = Field(default_factory=dict)
    """What a concept is drawn as from now on, {weapon: toy}; nothing for those that are not named."""
    edit: Edit = Field(default_factory=Edit)

    def notes(self) -> list[str]:
        again = "What an epoch finds is erased together with all that was erased before; as published, by itself."
        return [again] if self.hold and self.epochs else []

    def work(self, source: ConceptSource) -> Work:
        return self.edit.work(1 + self.epochs)

    def touches(self, model: Model) -> set[str]:
        return set(touched(model))

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        editing = Editing(model, self.edit, context, steps=1 + self.epochs)
        erased = [pairs(model, concepts, self.alternatives, self.edit.columns)]
        editing.step(*erased[0])
        c, g = pairs(model, concepts, self.alternatives, "all")
        different = projected_distance(editing.gram, c, g)
        for _ in range(self.epochs):
            found = regenerate(editing.gram, editing.m, c, self.lam_r)
            missed = projected_distance(editing.gram, found @ editing.m.T, c)
            back = 1 - missed / different if different else 0.0
            if back <= self.target_rate:
                editing.stop = "target"
            if editing.stop:
                break
            erased.append((found, g))
            now = erased if self.hold else erased[-1:]
            both = (torch.cat(states) for states in zip(*now, strict=True))
            editing.step(*both, back=back, length=float(found.norm() / c.norm()))
        return editing.delta("rece", self.model_dump(), concepts)
