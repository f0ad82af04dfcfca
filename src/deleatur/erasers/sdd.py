"""SDD, safe self-distillation (Kim et al. 2023, arXiv 2307.05977), Algorithm 1.

min_θ E ‖ ε_θ(z⁽ᵏ⁾, τ_k, c_s) − sg[ε_θ(z⁽ᵏ⁾, τ_k, c₀)] ‖²

The EMA teacher samples z⁽ᵏ⁾ with guidance, prompted with c_p; the target is the student's own unconditional prediction;
the teacher is returned. Deviations from the released code: its errors are not repeated (a finished image trained on
for k = 0, a timestep off by up to 18, roles swapped, gradients kept on frozen tensors).
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
from deleatur.maths.noise import NoiseSchedule
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.config import TrajectoryTrainingConfig
from deleatur.training.cost import Workload
from deleatur.training.loop import ErasureContext, finetune, trajectory_terms
from deleatur.training.losses import Denoisers, TargetFunction
from deleatur.training.parameters import select
from deleatur.training.trajectories import TimestepDistribution


def unconditional_target(c_0: Tensor, *, frozen: bool) -> TargetFunction:
    """sg[ε(z, t, c₀)] of the student at the current step, or of the base model (`frozen`)."""

    def target(denoisers: Denoisers, z: Tensor, t: Tensor, index: Tensor) -> Tensor:
        # A separate call without gradient: in one call with ε_s, the backward pass would run over both.
        return (denoisers.base if frozen else denoisers.student)(z, t, c_0)

    return target


DEFAULT_DISTRIBUTIONS: dict[ConceptSource, TimestepDistribution] = {"words": "uniform", "token": "beta33"}
"""Timestep distribution if none is configured: SDD's for words, HFI's for tokens."""


class SDD(Eraser):
    """Safe self-distillation. With soft tokens as concepts this is HFI+SDD (Kim et al. 2024, arXiv 2407.21032)."""

    order: Literal["paper", "code", "single"] = "paper"
    """Roles of several descriptions:
    paper   c_p one of them in turn, c_s all joined in one prompt (Algorithm 1)
    code    c_p all joined, c_s one of them in turn (the released code)
    single  c_p = c_s = one of them in turn (ours; the only one that affects single words)"""
    training: TrajectoryTrainingConfig = Field(default_factory=TrajectoryTrainingConfig)
    """With a `preservation_weight` above 0 the target is the base model's unconditional prediction, which cannot drift
    (ours)."""

    def notes(self) -> list[str]:
        notes = self.training.notes()
        if self.order == "single":
            notes.append("Each word or token was erased by itself; in the papers, several share the two roles.")
        if self.training.preservation_weight:
            notes.append("The target is the base model's unconditional prediction; in the papers, the student's own.")
        return notes

    def workload(self, source: ConceptSource) -> Workload:
        return self.training.trajectory_workload(1, default_distribution=DEFAULT_DISTRIBUTIONS[source])

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        schedule.timesteps(self.training.sampler_steps)

    def touched_parameters(self, model: Model) -> set[str]:
        return set(select(model.unet, self.training.trainable))

    def condition_roles(self, model: Model, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor]:
        """(c_p, c_s), each (n, L, d)."""
        each = torch.cat([c.states for c in concepts])
        if self.order == "single":
            return each, each
        joint = encode_joint_prompt(model, concepts)
        return (each, joint) if self.order == "paper" else (joint, each)

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        c_0 = encode_text(model, [""])
        c_p, c_s = self.condition_roles(model, concepts)
        source: ConceptSource = "token" if all(c.source == "token" for c in concepts) else "words"
        terms = trajectory_terms(
            model,
            self.training,
            unconditional_target(c_0, frozen=self.training.preservation_weight > 0),
            c_p=c_p,
            c_s=c_s,
            c_0=c_0,
            paired=self.order == "single",
            context=context,
            default_distribution=DEFAULT_DISTRIBUTIONS[source],
        )
        tensors, record = finetune(model, self.training, terms, c_0=c_0, context=context)
        return Delta(tensors, model.unet_digest, "sdd", self.model_dump(), tuple(c.name for c in concepts), record)
