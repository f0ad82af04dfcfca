"""Reward heads, as the stage `reward` wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from deleatur.config.settings import Settings
from deleatur.feedback.reward import RewardHead
from deleatur.storage import tensors


@dataclass(frozen=True)
class HeadMetadata:
    """Metadata in the file of a reward head."""

    rank: bool
    """Whether it was trained on rankings."""


def is_trained(settings: Settings, concept: str) -> bool:
    """Whether there is a reward head of the concept: `reward` skips concepts that nobody rated."""
    return _path(settings, concept).is_file()


def load_head(settings: Settings, concept: str, split: str) -> RewardHead:
    """r_ψ of one half of the raters: "train" guides inversion and erasure, "held_out" is for evaluation only."""
    loaded, metadata = tensors.load(_path(settings, concept), HeadMetadata)
    return RewardHead({n.split("/", 1)[1]: t for n, t in loaded.items() if n.startswith(f"{split}/")}, metadata.rank)


def shows_concept(head: RewardHead, features: Tensor) -> Tensor:
    """(n,) bool: predicted vote share of at least one half or, of a ranking head, above the mean of the rated pool."""
    return head(features) >= (0.0 if head.rank else 0.5)


def _path(settings: Settings, concept: str) -> Path:
    return settings.paths.reward / f"{concept}.safetensors"
