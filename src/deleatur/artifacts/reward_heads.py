"""Reward heads that `reward` wrote."""

from __future__ import annotations

from torch import Tensor

from deleatur.config.settings import Settings
from deleatur.feedback.reward import Head
from deleatur.storage import tensors


def load_head(settings: Settings, concept: str, which: str) -> Head:
    """r_ψ: "train" made the token, "held_out" may judge."""
    found, facts = tensors.load(settings.paths.reward / f"{concept}.safetensors")
    return Head({n.split("/", 1)[1]: t for n, t in found.items() if n.startswith(f"{which}/")}, facts["rank"])


def shows_concept(head: Head, features: Tensor) -> Tensor:
    """Whether raters would see the concept: vote share of at least one half, or above the mean of the ranked pool."""
    return head(features) >= (0.0 if head.rank else 0.5)
