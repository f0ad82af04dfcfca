"""SDD, safe self-distillation (Kim et al. 2023, arXiv 2307.05977), Algorithm 1.

min_θ E ‖ ε_θ(z⁽ᵏ⁾, τ_k, c_s) − sg[ε_θ(z⁽ᵏ⁾, τ_k, c₀)] ‖²

z⁽ᵏ⁾ comes from the EMA teacher with guidance, prompted with c_p; the target is the student's own unconditional
output; the teacher is what is returned. Deviations from the released code: its errors (a finished picture trained on
for k = 0, a timestep label off by up to 18, roles swapped, gradients kept on frozen tensors) are not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from deleatur.diffusion.encode import encode_joint_prompt, encode_text
from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.cost import Work
from deleatur.training.finetune import ErasureContext, Loop, finetune, prompted
from deleatur.training.losses import Networks, Target
from deleatur.training.parameters import select
from deleatur.training.trajectories import Law


def towards_empty(c_0: Tensor, *, frozen: bool) -> Target:
    """sg[ε(z, t, c₀)]: the student's own unconditional output of this very step, or the base model's (`frozen`)."""

    def target(networks: Networks, z: Tensor, t: Tensor, which: Tensor) -> Tensor:
        # Not one pass with ε_s: the backward pass would then run over both.
        return (networks.base if frozen else networks.student)(z, t, c_0)

    return target


LAWS: dict[ConceptSource, Law] = {"words": "uniform", "token": "beta33"}
"""Which stages are trained on, where nothing is said: tokens are erased as in HFI."""


class SDD(Eraser):
    """Safe self-distillation. With soft tokens as concepts this is HFI+SDD (Kim et al. 2024, arXiv 2407.21032)."""

    order: Literal["paper", "code", "single"] = "paper"
    """Who plays c_p and c_s when there are several descriptions:
    paper   c_p one of them in turn, c_s all joined in one sentence (Algorithm 1)
    code    c_p all joined, c_s one of them in turn (the released code)
    single  c_p = c_s = one of them in turn (ours; the only one whose effect reaches single words)"""
    training: Loop = Field(default_factory=Loop)
    """With `loop.preserve` above 0 the unconditional target is the base model's, which cannot drift (ours)."""

    def notes(self) -> list[str]:
        found = self.training.notes()
        if self.order == "single":
            found.append("Each word or token was erased by itself; in the papers, several play their parts together.")
        if self.training.preservation_weight:
            found.append("The target is what the base model says without a prompt; in the papers, the student itself.")
        return found

    def work(self, source: ConceptSource) -> Work:
        return self.training.prompted(1, law=LAWS[source])

    def touches(self, model: Model) -> set[str]:
        return set(select(model.unet, self.training.trainable))

    def roles(self, model: Model, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor]:
        """(c_p, c_s), each (n, L, d)."""
        each = torch.cat([c.states for c in concepts])
        if self.order == "single":
            return each, each
        together = encode_joint_prompt(model, concepts)
        return (each, together) if self.order == "paper" else (together, each)

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        c_0 = encode_text(model, [""])
        c_p, c_s = self.roles(model, concepts)
        target = towards_empty(c_0, frozen=self.training.preservation_weight > 0)
        paired = self.order == "single"
        law = LAWS["token" if all(c.source == "token" for c in concepts) else "words"]
        terms = prompted(
            model, self.training, target, c_p=c_p, c_s=c_s, c_0=c_0, paired=paired, law=law, context=context
        )
        tensors, record = finetune(model, self.training, terms, c_0=c_0, context=context)
        return Delta(tensors, model.unet_digest, "sdd", self.model_dump(), tuple(c.name for c in concepts), record)
