"""Textual inversion (Gal et al. 2022, arXiv 2208.01618) on all pictures alike: the control that uses no feedback."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.inversion import Inverter, Rated, start_rows
from deleatur.maths.seeds import generator
from deleatur.training.cost import Work
from deleatur.training.optimizer_state import Saved
from deleatur.training.textual_inversion import Descent, Learned, Lesson, Look, Progress, learn


class TextualInversion(Inverter):
    loop: Descent = Field(default_factory=Descent)

    def work(self) -> Work:
        return self.loop.work()

    def invert(
        self,
        model: Model,
        rated: Rated,
        initial: Tensor,
        *,
        seed: int,
        look: Look,
        on_step: Callable[[Progress], None] = lambda p: None,
        state: Saved | None = None,
    ) -> list[Learned]:
        n, g = len(rated.latents), generator(seed, "invert", 0)
        lesson = Lesson(rated.latents, torch.full((n,), 1 / n), rated.templates, g)
        start = start_rows(initial, self.loop.vectors, g)[None]
        # The last vectors are kept, not the best-rated ones: the control must not see a single rating.
        return learn(model, self.loop, [lesson], start, on_step=on_step, state=state)
