"""Concept inversion (Pham et al. 2023, arXiv 2308.01508): textual inversion against the *erased* model.

If a soft vector exists for which the erased weights still draw the concept, the concept was hidden, not removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field

from deleatur.attacks import Access, Attack, Found, Target
from deleatur.diffusion.invert import Inversion, learn
from deleatur.maths.seeds import generator


class ConceptInversion(Attack):
    """White box: needs the erased weights and pictures of the concept."""

    access: ClassVar[Access] = "white_box"
    loop: Inversion = Field(default_factory=Inversion)

    def attack(self, target: Target, *, seed: int, on_step: Callable[[int, int, float], None]) -> Found:
        n, numbers = len(target.latents), self.loop
        learned = learn(
            target.model,
            numbers,
            target.latents,
            torch.full((n,), 1 / n),
            target.initial.repeat(numbers.vectors, 1),
            templates=target.templates,
            generator=generator(seed, "attack", "concept_inversion", target.concept),
            unet=target.weights,
            on_step=lambda step, loss: on_step(step, numbers.iterations, loss),
        )
        calls = numbers.iterations * numbers.batch
        return Found(learned.vectors[None], {"forward": calls, "backward": calls}, learned.losses)
