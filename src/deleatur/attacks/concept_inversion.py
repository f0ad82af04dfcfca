"""Concept inversion (Pham et al. 2023, arXiv 2308.01508): textual inversion against the *erased* model.

If a soft vector exists for which the erased weights still draw the concept, the concept was hidden, not removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field

from deleatur.attacks import Access, Attack, Found, Target
from deleatur.maths.seeds import generator
from deleatur.training.cost import Work
from deleatur.training.optimizer_state import Saved
from deleatur.training.textual_inversion import Lesson, Progress, Several, learn


class ConceptInversion(Attack):
    """White box: needs the erased weights and pictures of the concept."""

    access: ClassVar[Access] = "white_box"
    tries: int = Field(1, gt=0)
    """Soft prompts that are looked for, each from draws of its own. A rate of one prompt's pictures has no interval."""
    loop: Several = Field(default_factory=Several)

    def work(self) -> Work:
        return self.loop.work(self.tries, self.loop.together)

    def attack(
        self,
        target: Target,
        *,
        seed: int,
        on_step: Callable[[Progress], None] = lambda p: None,
        state: Saved | None = None,
    ) -> Found:
        n, numbers = len(target.latents), self.loop
        draws = [generator(seed, "attack", "concept_inversion", target.concept, i) for i in range(self.tries)]
        lessons = [Lesson(target.latents, torch.full((n,), 1 / n), target.templates, g) for g in draws]
        learned = learn(
            target.model,
            numbers,
            lessons,
            target.initial.repeat(self.tries, numbers.vectors, 1),
            together=numbers.together,
            unet=target.weights,
            on_step=on_step,
            state=state,
        )
        calls = self.tries * numbers.iterations * numbers.batch
        losses = torch.tensor([token.losses for token in learned]).mean(0).tolist()
        return Found(torch.stack([t.vectors for t in learned]), {"forward": calls, "backward": calls}, losses)
