"""Shelf: numbers per picture first, so that intervals and paired differences come from one place afterwards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deleatur.diffusion.clip import Clip
from deleatur.records.report import Detector
from deleatur.records.sampling import Prompt

Array = NDArray[np.float64]
Asked = Literal["concept", "harmless", "any"]
"""Prompts that ask for a concept, those that do not, or all."""
Counts = Mapping[str, tuple[str, tuple[str, ...]]]
"""Concept → the detector and the labels of it that count as the concept."""


@dataclass(frozen=True)
class Seen:
    """What one detector said of n pictures."""

    labels: tuple[str, ...]
    scores: NDArray[np.float32]
    """(n, L); nan where no metric needs them."""
    weights: str
    """The detector's digest, for the report."""
    identity: str
    """Digest of all that decides the scores: weights, numbers and code."""

    def top(self) -> list[str]:
        """The label with the highest score, per picture."""
        return [self.labels[i] for i in self.scores.argmax(1)]


@dataclass(frozen=True)
class Reward:
    """Held-out r_ψ of n pictures, (n,): from raters whose answers the token never saw."""

    values: Tensor
    head: str
    """Digest of the head."""


@dataclass(frozen=True)
class Gallery:
    """n pictures of one side, in the order of `prompts`, with what the frozen networks said of them."""

    prompts: Sequence[Prompt]
    keys: Sequence[str]
    """Their names, each the digest of its recipe."""
    fetch: Callable[[Sequence[str]], list[Image.Image]]
    """Pictures by name."""
    seen: Mapping[str, Seen]
    features: Tensor
    """(n, d) CLIP embeddings."""
    clip: Clip
    counts: Counts
    rewards: Mapping[str, Reward]
    """By concept."""

    @property
    def pictures(self) -> list[Image.Image]:
        """Decoded when asked for: most metrics read only what the networks said."""
        return self.fetch(self.keys)

    def take(self, rows: Sequence[int]) -> Gallery:
        """Some of the pictures."""
        at = list(rows)
        return replace(
            self,
            prompts=[self.prompts[i] for i in at],
            keys=[self.keys[i] for i in at],
            seen={name: replace(seen, scores=seen.scores[at]) for name, seen in self.seen.items()},
            features=self.features[at],
            rewards={name: replace(reward, values=reward.values[at]) for name, reward in self.rewards.items()},
        )


class Metric(BaseModel):
    """A number per picture. nan where it does not apply."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    higher_is_better: ClassVar[bool]
    rate: ClassVar[bool] = False
    """Values are 0 or 1, and their mean is a share."""
    of: ClassVar[Asked] = "any"
    """Which prompts it has a number for."""

    @abstractmethod
    def values(self, shots: Gallery, base: Gallery) -> Array:
        """(n,). `base` holds the untouched model's pictures of the same prompts from the same noise.

        A picture's value depends on its own row of both galleries alone: it is kept, and not asked for again.
        """

    def needs(self, prompts: Sequence[Prompt], counts: Counts) -> set[tuple[str, str]]:
        """(detector, label) of all that has to be there for pictures of these prompts. A detector looks at no others,
        and its scores of them are nan.
        """
        return set()

    def reads(self, shots: Gallery, row: int) -> Mapping[str, Any]:
        """What decides a picture's value besides the two pictures, as JSON: the value is kept under it.

        By default all there is, which is never wrong; a metric that asks a network itself names what it looks at.
        """
        seen = {name: found.identity for name, found in shots.seen.items()}
        heads = {name: reward.head for name, reward in shots.rewards.items()}
        known = {"clip": shots.clip.digest, "seen": seen, "counts": dict(shots.counts), "heads": heads}
        return {"prompt": asdict(shots.prompts[row]), **known}

    @abstractmethod
    def detector(self, shots: Gallery) -> Detector | None:
        """What made the numbers; None where no network did."""


class SetMetric(Metric):
    """A number of a whole set of pictures; per picture it gives nothing."""

    least: ClassVar[int] = 8
    """Fewer pictures give no number."""

    def values(self, shots: Gallery, base: Gallery) -> Array:
        return np.full(len(shots.prompts), np.nan)

    @abstractmethod
    def of_set(self, shots: Tensor, base: Tensor) -> float:
        """From the feature rows of both sides, (n, d) each."""


def labelled(prompt: Prompt) -> tuple[str, str]:
    """ "judge:cat" → ("judge", "cat"): who should find what in the picture."""
    detector, _, label = prompt.label.partition(":")
    return detector, label
