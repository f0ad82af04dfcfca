"""Concept inversion (Pham et al. 2023, arXiv 2308.01508): textual inversion against the *erased* model.

If the erased weights still generate the concept for some soft prompt, the concept was hidden, not removed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from deleatur.attacks import Access, Attack, AttackContext, AttackResult, AttackTarget
from deleatur.maths.seeds import generator
from deleatur.training.cost import Workload
from deleatur.training.textual_inversion import MultiTokenConfig, TokenTarget, learn_tokens


class ConceptInversion(Attack):
    """White box: needs the erased weights and images of the concept."""

    access: ClassVar[Access] = "white_box"
    num_attempts: int = Field(1, gt=0)
    """Number of soft prompts, each with its own random numbers. With a single prompt, the rate has no interval."""
    training: MultiTokenConfig = Field(default_factory=MultiTokenConfig)

    def workload(self) -> Workload:
        return self.training.workload(self.num_attempts, self.training.tokens_per_batch)

    def attack(self, target: AttackTarget, context: AttackContext) -> AttackResult:
        n, config = len(target.latents), self.training
        generators = [
            generator(context.seed, "attack", "concept_inversion", target.concept, i) for i in range(self.num_attempts)
        ]
        token_targets = [TokenTarget(target.latents, torch.full((n,), 1 / n), target.templates, g) for g in generators]
        learned = learn_tokens(
            target.model,
            config,
            token_targets,
            target.initializer.repeat(self.num_attempts, config.num_vectors, 1),
            tokens_per_batch=config.tokens_per_batch,
            unet_weights=target.weights,
            on_step=context.on_step,
            state=context.state,
        )
        calls = self.num_attempts * config.iterations * config.batch_size
        losses = torch.tensor([token.losses for token in learned]).mean(0).tolist()
        return AttackResult(torch.stack([t.vectors for t in learned]), {"forward": calls, "backward": calls}, losses)
