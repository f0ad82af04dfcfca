"""Textual inversion (Gal et al. 2022, arXiv 2208.01618) on all images equally: the baseline without feedback."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.inversion import InversionContext, InversionData, Inverter, initial_vectors
from deleatur.maths.seeds import generator
from deleatur.training.cost import Workload
from deleatur.training.textual_inversion import LearnedToken, TextualInversionConfig, TokenTarget, learn_tokens


class TextualInversion(Inverter):
    training: TextualInversionConfig = Field(default_factory=TextualInversionConfig)

    def workload(self) -> Workload:
        return self.training.workload()

    def invert(
        self, model: Model, data: InversionData, initializer: Tensor, context: InversionContext
    ) -> list[LearnedToken]:
        n, g = len(data.latents), generator(context.seed, "invert", 0)
        token_target = TokenTarget(data.latents, torch.full((n,), 1 / n), data.templates, g)
        initial = initial_vectors(initializer, self.training.num_vectors, g)[None]
        # No evaluation, so the last vectors are returned, not the best-rated ones: the baseline uses no rating.
        return learn_tokens(model, self.training, [token_target], initial, on_step=context.on_step, state=context.state)
