"""Concept inversion (Pham et al. 2023, arXiv 2308.01508): textual inversion against the *erased* model.

If a soft vector exists for which the erased weights still draw the concept, the concept was hidden, not removed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from deleatur.attacks import Access, Attack, AttackContext, AttackResult, AttackTarget
from deleatur.maths.seeds import generator
from deleatur.training.cost import Work
from deleatur.training.textual_inversion import Lesson, Several, learn


class ConceptInversion(Attack):
    """White box: needs the erased weights and pictures of the concept."""

    access: ClassVar[Access] = "white_box"
    num_attempts: int = Field(1, gt=0)
    """Soft prompts that are looked for, each from draws of its own. A rate of one prompt's pictures has no interval."""
    training: Several = Field(default_factory=Several)

    def work(self) -> Work:
        return self.training.work(self.num_attempts, self.training.tokens_per_batch)

    def attack(self, target: AttackTarget, context: AttackContext) -> AttackResult:
        n, numbers = len(target.latents), self.training
        draws = [
            generator(context.seed, "attack", "concept_inversion", target.concept, i) for i in range(self.num_attempts)
        ]
        lessons = [Lesson(target.latents, torch.full((n,), 1 / n), target.templates, g) for g in draws]
        learned = learn(
            target.model,
            numbers,
            lessons,
            target.initial.repeat(self.num_attempts, numbers.num_vectors, 1),
            together=numbers.tokens_per_batch,
            unet=target.weights,
            on_step=context.on_step,
            state=context.state,
        )
        calls = self.num_attempts * numbers.iterations * numbers.batch_size
        losses = torch.tensor([token.losses for token in learned]).mean(0).tolist()
        return AttackResult(torch.stack([t.vectors for t in learned]), {"forward": calls, "backward": calls}, losses)
