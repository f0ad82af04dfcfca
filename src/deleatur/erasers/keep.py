"""The untouched model: the baseline row of every comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.records.model import Concept, Delta, Given
from deleatur.training.cost import Work
from deleatur.training.finetune import Probe, Progress
from deleatur.training.optimizer_state import Saved


class Keep(Eraser):
    """θ = θ₀."""

    def work(self, source: Given) -> Work:
        return Work()

    def touches(self, model: Model) -> set[str]:
        return set()

    def erase(
        self,
        model: Model,
        concepts: Sequence[Concept],
        *,
        keep: Tensor | None,
        seed: int,
        on_step: Callable[[Progress], None] = lambda p: None,
        probe: Probe | None = None,
        state: Saved | None = None,
    ) -> Delta:
        return Delta({}, model.digest, "keep", self.model_dump(), tuple(c.name for c in concepts))
