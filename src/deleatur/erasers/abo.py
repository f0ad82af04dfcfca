"""All but One (Hong et al. 2023, arXiv 2312.12807): a reconstruction from what the abstract and captions say.

G(z, c) = ε(z, t, c) − ε(z, t, c₀)                                      guidance; θ: student, θ₀: base model, frozen
min_θ E ‖ G_θ(z, c) − sg[G_θ₀(z, c_alt)] ‖²  +  anchor · E ‖ ε_θ(z, t, c₀) − sg[ε_θ₀(z, t, c₀)] ‖²

z comes from the base model's trajectories, prompted with c. Where both terms are 0, guided sampling with c equals that
with c_alt at every guidance scale. An empty alternative, c_alt = c₀, turns c into no guidance. Neither code nor full
text was available: the loss is consistent with what is published, the hyperparameters are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from deleatur.diffusion.encode import encode_replacement, encode_text
from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.errors import SettingsError
from deleatur.maths.noise import NoiseSchedule
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.config import TrajectoryTrainingConfig
from deleatur.training.cost import Workload
from deleatur.training.loop import ErasureContext, finetune, trajectory_terms
from deleatur.training.losses import Denoisers, ErrorFunction, TargetFunction, mean_squared_error
from deleatur.training.parameters import select


def guidance_target(c_alt: Tensor, c_0: Tensor) -> TargetFunction:
    """(2b, …): G_θ₀(z, c_alt), and ε_θ₀(z, t, c₀) below it. c_alt (n, L, d)."""

    def target(denoisers: Denoisers, z: Tensor, t: Tensor, index: Tensor) -> Tensor:
        both = torch.cat([c_alt[index], c_0.expand(len(z), -1, -1)])
        eps_alt, eps_0 = denoisers.base(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return torch.cat([eps_alt - eps_0, eps_0])

    return target


def guidance_error(anchor: float) -> ErrorFunction:
    """(b,) of the student's predictions for c and, below them, for c₀ (2b, …)."""

    def error(prediction: Tensor, target: Tensor) -> Tensor:
        (eps_c, eps_0), (g, base_0) = prediction.chunk(2), target.chunk(2)
        return mean_squared_error(eps_c - eps_0, g) + anchor * mean_squared_error(eps_0, base_0)

    return error


class ABOTraining(TrajectoryTrainingConfig):
    """Our defaults: the paper's were not available."""

    iterations: int = Field(500, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """0 is plain Adam."""
    ema_decay: float = Field(0.0, ge=0, le=1)
    """0: the student itself is returned."""
    batch_size: int = Field(4, gt=0)
    trajectories: Literal["fresh", "pool"] = "pool"
    trajectory_model: Literal["teacher", "base"] = "base"


class AllButOne(Eraser):
    alternatives: dict[str, str] = Field(default_factory=dict)
    """What the model generates in each concept's place: {weapon: toy}; "" for nothing, as without a prompt."""
    anchor_weight: float = Field(1.0, ge=0)
    """Weight of the term that holds the unconditional prediction."""
    training: ABOTraining = Field(default_factory=ABOTraining)

    def notes(self) -> list[str]:
        return [
            "All-but-One is a reconstruction: its authors released no code, and only the abstract and captions were "
            "read.",
            *self.training.notes(),
        ]

    def workload(self, source: ConceptSource) -> Workload:
        return self.training.trajectory_workload(2, extra_conditions=1)

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        schedule.timesteps(self.training.sampler_steps)

    def touched_parameters(self, model: Model) -> set[str]:
        return set(select(model.unet, self.training.trainable))

    def check_concepts(self, concepts: Sequence[str]) -> None:
        if missing := [name for name in concepts if name not in self.alternatives]:
            raise SettingsError(
                f"erase.abo.alternatives: expected an alternative to {', '.join(missing)}, got none",
                hint=f'add {missing[0]}: toy, for example, or {missing[0]}: "" for nothing; then: deleatur check',
            )

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        self.check_concepts([c.name for c in concepts])
        c, c_0 = torch.cat([c.states for c in concepts]), encode_text(model, [""])
        c_alt = torch.cat([encode_replacement(model, c, self.alternatives[c.name]) for c in concepts])
        terms = trajectory_terms(
            model,
            self.training,
            guidance_target(c_alt, c_0),
            c_p=c,
            c_s=c,
            c_0=c_0,
            paired=True,
            context=context,
            extra_conditions=c_0,
            error=guidance_error(self.anchor_weight),
        )
        tensors, record = finetune(model, self.training, terms, c_0=c_0, context=context)
        return Delta(tensors, model.unet_digest, "abo", self.model_dump(), tuple(c.name for c in concepts), record)
