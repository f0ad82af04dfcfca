"""ESD, erased stable diffusion (Gandikota et al. 2023, arXiv 2303.07345).

min_θ E ‖ ε_θ(z, t, c) − sg[ε_θ₀(z, t, c_from) − η (ε_θ₀(z, t, c) − ε_θ₀(z, t, c₀))] ‖²

The student samples z with guidance, prompted with c; the target is the frozen base model's, with negative guidance.
ESD-x is `training.trainable: xattn`, ESD-x-strict `xattn_kv`; ESD-u is `noxattn`: everything except cross-attention,
the last convolution and the time embedding. Deviations: several descriptions are cycled through, not sampled at random;
t is the timestep of z itself, not one up to 20 above it; gradients are clipped, as for the tables of the SDD paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from deleatur.diffusion.encode import encode_text
from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.maths.guidance import cfg
from deleatur.maths.noise import NoiseSchedule
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.config import TrajectoryTrainingConfig
from deleatur.training.cost import Workload
from deleatur.training.loop import ErasureContext, finetune, trajectory_terms
from deleatur.training.losses import Denoisers, TargetFunction
from deleatur.training.parameters import Selector, select


def negative_guidance_target(c: Tensor, c_0: Tensor, s: float) -> TargetFunction:
    """ε_θ₀(c₀) + s (ε_θ₀(c) − ε_θ₀(c₀)) with s ≤ 0: guidance away from c (n, L, d)."""

    def target(denoisers: Denoisers, z: Tensor, t: Tensor, index: Tensor) -> Tensor:
        both = torch.cat([c_0.expand(len(z), -1, -1), c[index]])
        eps_0, eps_c = denoisers.base(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return cfg(eps_0, eps_c, s)

    return target


class ESDTraining(TrajectoryTrainingConfig):
    """Defaults of the first release. The current one: 200 iterations, lr 5e-5, trajectory_model base, η = 2 from c."""

    also_published: ClassVar[tuple[Selector, ...]] = ("noxattn",)  # ESD-u
    iterations: int = Field(1000, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """0 is plain Adam."""
    ema_decay: float = Field(0.0, ge=0, le=1)
    """0: no teacher; the student samples the trajectories and is returned."""


class ESD(Eraser):
    eta: float = Field(1.0, ge=0)
    """η. 1 and 3 in the paper's tables; 2 from the concept equals 1 from the empty prompt."""
    start: Literal["empty", "concept"] = "empty"
    """c_from, where the negative guidance starts: the empty prompt (first release) or c itself (current one)."""
    training: ESDTraining = Field(default_factory=ESDTraining)

    def workload(self, source: ConceptSource) -> Workload:
        return self.training.trajectory_workload(2)

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        schedule.timesteps(self.training.sampler_steps)

    def touched_parameters(self, model: Model) -> set[str]:
        return set(select(model.unet, self.training.trainable))

    def notes(self) -> list[str]:
        return self.training.notes()

    @property
    def guidance(self) -> float:
        """s of the target: c₀ − η (c − c₀), or c − η (c − c₀) = c₀ + (1 − η) (c − c₀)."""
        return -self.eta if self.start == "empty" else 1 - self.eta

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        c, c_0 = torch.cat([c.states for c in concepts]), encode_text(model, [""])
        target = negative_guidance_target(c, c_0, self.guidance)
        terms = trajectory_terms(model, self.training, target, c_p=c, c_s=c, c_0=c_0, paired=True, context=context)
        tensors, record = finetune(model, self.training, terms, c_0=c_0, context=context)
        return Delta(tensors, model.unet_digest, "esd", self.model_dump(), tuple(c.name for c in concepts), record)
