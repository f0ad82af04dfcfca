"""Shave, the worked example of docs/your-method.md: what tells the concept from no prompt at all is read no more.

W ← W − s (W d) dᵀ    for every key and value projection W of cross-attention

d: what the concept's states have that the empty prompt's have not, on average; of length 1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from deleatur.diffusion.encode import encode_text
from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.records.model import Concept, ConceptSource, Delta, LowRank
from deleatur.training.closed_form_editor import text_projections
from deleatur.training.cost import Workload
from deleatur.training.loop import ErasureContext


def direction(c: Tensor, c_0: Tensor) -> Tensor:
    """d (w,) of the concept's states c (n, L, w) and the empty prompt's c₀ (1, L, w)."""
    d = (c - c_0).mean((0, 1)).float().cpu()
    return d / d.norm()


class Shave(Eraser):
    strength: float = Field(1.0, ge=0, le=1)
    """s. 1 takes the direction away, 0 leaves everything as it was."""

    def workload(self, source: ConceptSource) -> Workload:
        """No network is asked; each number that changes is there once more."""
        return Workload(trainable="xattn_kv", bytes_per_parameter=4)

    def touched_parameters(self, model: Model) -> set[str]:
        return set(text_projections(model))

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        d = direction(torch.cat([c.states for c in concepts]), encode_text(model, [""]))
        up = {n: -self.strength * (w.detach().float().cpu() @ d)[:, None] for n, w in text_projections(model).items()}
        return Delta(
            LowRank(up, d[None]), model.unet_digest, "shave", self.model_dump(), tuple(c.name for c in concepts)
        )
