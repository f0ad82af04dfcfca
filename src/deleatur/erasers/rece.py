"""RECE, reliable and efficient concept erasure (Gong et al. 2024, arXiv 2407.12383).

Starts from UCE. Every epoch then finds the states that best regenerate the concept in the edited model, and erases
those too:

c' = argmin_x Σ_l ‖W'_l x − W_l c‖² + λ_r ‖x‖²  =  (Σ_l W'_lᵀW'_l + λ_r I)⁻¹ Σ_l W'_lᵀW_l c

W: key and value projections of the base model, W': as edited so far. UCE's formula is then applied to W' with c' in
place of c, at all L positions of a prompt. Deviations: concept and alternative are aligned at their last tokens, as in
UCE, not position by position; an epoch preserves all that UCE preserves, not only the empty prompt; no detector on
sampled images chooses the number of epochs: it is fixed, or follows from how much of the concept c' regenerates
(`target_rate`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.maths.closed_form import projected_distance, regenerate
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.closed_form_editor import ClosedFormConfig, ClosedFormEditor, edit_pairs, text_projections
from deleatur.training.cost import Workload
from deleatur.training.loop import ErasureContext


class RECE(Eraser):
    epochs: int = Field(3, ge=0)
    """Published: 3 for nudity, 2 for a list of harms, 1 for a style or an object. 0 is UCE."""
    lam_r: float = Field(0.1, gt=0)
    """λ_r, which keeps c' short, and with it the edit small. Published: 0.1; 1e-3 for a persistent style or object."""
    target_rate: float = Field(0.0, ge=0, le=1)
    """Stop (ours) once c' regenerates at most this share of the difference between the concept and its alternative."""
    hold: bool = False
    """Erase (ours), with c', all states that were erased before. A published epoch erases c' alone, which partly undoes
    the earlier ones: if preserved prompts have much weight, most of the concept returns."""
    alternatives: dict[str, str] = Field(default_factory=dict)
    """What the model generates in a concept's place, {weapon: toy}; for concepts not listed, as without a prompt."""
    edit: ClosedFormConfig = Field(default_factory=ClosedFormConfig)

    def notes(self) -> list[str]:
        note = "An epoch erases the states it finds together with all earlier ones; as published, by themselves."
        return [note] if self.hold and self.epochs else []

    def workload(self, source: ConceptSource) -> Workload:
        return self.edit.workload(1 + self.epochs)

    def touched_parameters(self, model: Model) -> set[str]:
        return set(text_projections(model))

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        editor = ClosedFormEditor(model, self.edit, context, steps=1 + self.epochs)
        erased = [edit_pairs(model, concepts, self.alternatives, self.edit.columns)]
        editor.step(*erased[0])
        c, g = edit_pairs(model, concepts, self.alternatives, "all")
        distance = projected_distance(editor.gram, c, g)
        for _ in range(self.epochs):
            c_new = regenerate(editor.gram, editor.m, c, self.lam_r)
            residual = projected_distance(editor.gram, c_new @ editor.m.T, c)
            regenerated = 1 - residual / distance if distance else 0.0
            if regenerated <= self.target_rate:
                editor.stop = "target"
            if editor.stop:
                break
            erased.append((c_new, g))
            pairs = erased if self.hold else erased[-1:]
            stacked = (torch.cat(states) for states in zip(*pairs, strict=True))
            editor.step(*stacked, back=regenerated, length=float(c_new.norm() / c.norm()))
        return editor.delta("rece", self.model_dump(), concepts)
