"""Shelf: rated pictures → soft token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.training.cost import Work
from deleatur.training.optimizer_state import Saved
from deleatur.training.textual_inversion import Learned, Look, Progress, Templates


@dataclass(frozen=True)
class InversionData:
    """The pool of rated pictures of one concept."""

    latents: Tensor
    """(n, C, H, W) clean latents."""
    rewards: Tensor
    """(n,) r_ψ of each."""
    features: Tensor
    """(n, d) CLIP features."""
    rank: bool
    """Rewards are standardised ranking scores, not vote shares."""
    rejected: Tensor
    """(n,) bool: most raters of the picture itself said no, whatever r_ψ thinks of it."""
    templates: Sequence[Templates]
    """(n) sentences that a token may stand in for each."""


@dataclass(frozen=True)
class InversionContext:
    """Arguments of one inversion beside the model and its data."""

    seed: int
    evaluate: Look
    """Scores images sampled from the learned vectors at every evaluation interval."""
    on_step: Callable[[Progress], None] = lambda progress: None
    """Called after every step."""
    state: Saved | None = None
    """Checkpoint of a run with the same arguments, to resume from."""


class Inverter(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def notes(self) -> list[str]:
        """What a reader of a report must know: what is ours and not the paper's."""
        return []

    @abstractmethod
    def work(self) -> Work:
        """What learning the tokens of one concept asks of the networks, without the looks."""

    @abstractmethod
    def invert(
        self,
        model: Model,
        rated: InversionData,
        initial: Tensor,
        context: InversionContext,
    ) -> list[Learned]:
        """The m tokens of a concept, each (v, d), from the start row `initial` (d,)."""


def initial_vectors(initial: Tensor, vectors: int, generator: torch.Generator) -> Tensor:
    """(v, d): the start row repeated, later rows jittered by 1 % of its norm so that they can part."""
    rows = initial.repeat(vectors, 1)
    jitter = torch.randn(vectors, len(initial), generator=generator).to(initial)
    jitter[0] = 0
    out: Tensor = rows + jitter * initial.norm() * 0.01 / len(initial) ** 0.5
    return out
