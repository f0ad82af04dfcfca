"""All but One (Hong et al. 2023, arXiv 2312.12807): a reconstruction from what the abstract and captions say.

G(z, c) = ε(z, t, c) − ε(z, t, c₀)                                      guidance; θ: student, θ₀: base model, frozen
min_θ E ‖ G_θ(z, c) − sg[G_θ₀(z, c_alt)] ‖²  +  anchor · E ‖ ε_θ(z, t, c₀) − sg[ε_θ₀(z, t, c₀)] ‖²

z comes from the base model's trajectories, prompted with c. Where both terms are 0, guided sampling of c is that of
c_alt at every guidance scale. With nothing for an alternative, c_alt = c₀, c becomes "no guidance". Neither code nor
full text was to be had: the loss fits what is published, the numbers are ours.
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
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.cost import Work
from deleatur.training.finetune import ErasureContext, Loop, finetune, prompted
from deleatur.training.losses import Error, Networks, Target, squared
from deleatur.training.parameters import select


def led(c_alt: Tensor, c_0: Tensor) -> Target:
    """(2b, …): G_θ₀(z, c_alt), and ε_θ₀(z, t, c₀) below it. c_alt (n, L, d)."""

    def target(networks: Networks, z: Tensor, t: Tensor, which: Tensor) -> Tensor:
        both = torch.cat([c_alt[which], c_0.expand(len(z), -1, -1)])
        eps_alt, eps_0 = networks.base(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return torch.cat([eps_alt - eps_0, eps_0])

    return target


def surgical(anchor: float) -> Error:
    """(b,) of what the student says under c and, below it, c₀ (2b, …)."""

    def error(said: Tensor, goal: Tensor) -> Tensor:
        (eps_c, eps_0), (g, base_0) = said.chunk(2), goal.chunk(2)
        return squared(eps_c - eps_0, g) + anchor * squared(eps_0, base_0)

    return error


class ABOLoop(Loop):
    """Numbers of ours."""

    iterations: int = Field(500, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """0 is plain Adam."""
    ema_decay: float = Field(0.0, ge=0, le=1)
    """0: the student itself comes back."""
    batch_size: int = Field(4, gt=0)
    trajectories: Literal["fresh", "pool"] = "pool"
    trajectory_model: Literal["teacher", "base"] = "base"


class AllButOne(Eraser):
    alternatives: dict[str, str] = Field(default_factory=dict)
    """What is drawn instead, for each concept: {weapon: toy}; "" for nothing, as if there had been no prompt."""
    anchor_weight: float = Field(1.0, ge=0)
    """Weight of the unconditional prediction's staying where it is."""
    training: ABOLoop = Field(default_factory=ABOLoop)

    def notes(self) -> list[str]:
        return [
            "All-but-One is a reconstruction: its authors released no code, and only the abstract and captions were "
            "read.",
            *self.training.notes(),
        ]

    def work(self, source: ConceptSource) -> Work:
        return self.training.prompted(2, beside=1)

    def touches(self, model: Model) -> set[str]:
        return set(select(model.unet, self.training.trainable))

    def fits(self, concepts: Sequence[str]) -> None:
        if missing := [name for name in concepts if name not in self.alternatives]:
            raise SettingsError(
                f"erase.abo.alternatives: expected what to draw instead of {', '.join(missing)}, got nothing",
                hint=f'say {missing[0]}: toy there, for example, or {missing[0]}: "" for nothing; then: deleatur check',
            )

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        self.fits([c.name for c in concepts])
        c, c_0 = torch.cat([c.states for c in concepts]), encode_text(model, [""])
        c_alt = torch.cat([encode_replacement(model, c, self.alternatives[c.name]) for c in concepts])
        terms = prompted(
            model,
            self.training,
            led(c_alt, c_0),
            c_p=c,
            c_s=c,
            c_0=c_0,
            paired=True,
            context=context,
            beside=c_0,
            error=surgical(self.anchor_weight),
        )
        tensors, record = finetune(model, self.training, terms, c_0=c_0, context=context)
        return Delta(tensors, model.unet_digest, "abo", self.model_dump(), tuple(c.name for c in concepts), record)
