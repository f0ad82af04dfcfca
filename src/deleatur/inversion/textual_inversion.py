"""Textual inversion (Gal et al. 2022, arXiv 2208.01618) on all pictures alike: the control that uses no feedback."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.inversion import InversionContext, InversionData, Inverter, initial_vectors
from deleatur.maths.seeds import generator
from deleatur.training.cost import Work
from deleatur.training.textual_inversion import Descent, Learned, Lesson, learn


class TextualInversion(Inverter):
    training: Descent = Field(default_factory=Descent)

    def work(self) -> Work:
        return self.training.work()

    def invert(self, model: Model, rated: InversionData, initial: Tensor, context: InversionContext) -> list[Learned]:
        n, g = len(rated.latents), generator(context.seed, "invert", 0)
        lesson = Lesson(rated.latents, torch.full((n,), 1 / n), rated.templates, g)
        start = initial_vectors(initial, self.training.num_vectors, g)[None]
        # The last vectors are kept, not the best-rated ones: the control must not see a single rating.
        return learn(model, self.training, [lesson], start, on_step=context.on_step, state=context.state)
