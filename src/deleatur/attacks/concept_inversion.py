"""Concept inversion (Pham et al. 2023, arXiv 2308.01508): textual inversion against the *erased* model.

If a soft vector exists for which the erased weights still draw the concept, the concept was hidden, not removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field

from deleatur.attacks import Access, Attack, Found, Target
from deleatur.diffusion.invert import Inversion, Lesson, Progress, learn
from deleatur.diffusion.state import Saved
from deleatur.maths.seeds import generator


class ConceptInversion(Attack):
    """White box: needs the erased weights and pictures of the concept."""

    access: ClassVar[Access] = "white_box"
    loop: Inversion = Field(default_factory=Inversion)

    def attack(
        self,
        target: Target,
        *,
        seed: int,
        on_step: Callable[[Progress], None] = lambda p: None,
        state: Saved | None = None,
    ) -> Found:
        n, numbers = len(target.latents), self.loop
        g = generator(seed, "attack", "concept_inversion", target.concept)
        lesson = Lesson(target.latents, torch.full((n,), 1 / n), target.templates, g)
        start = target.initial.repeat(1, numbers.vectors, 1)
        [learned] = learn(target.model, numbers, [lesson], start, unet=target.weights, on_step=on_step, state=state)
        calls = numbers.iterations * numbers.batch
        return Found(learned.vectors[None], {"forward": calls, "backward": calls}, learned.losses)
