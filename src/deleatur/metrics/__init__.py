"""Plug-in kind: values per image. Means, confidence intervals and paired differences are computed elsewhere."""

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
from deleatur.records.report import DetectorInfo
from deleatur.records.sampling import Prompt

Array = NDArray[np.float64]
PromptScope = Literal["concept", "harmless", "any"]
"""Prompts with a concept, prompts without one, or all."""
ConceptLabels = Mapping[str, tuple[str, tuple[str, ...]]]
"""Concept → the detector and its labels that count as the concept."""


@dataclass(frozen=True)
class Detections:
    """One detector's scores of n images."""

    labels: tuple[str, ...]
    scores: NDArray[np.float32]
    """(n, L); nan in rows that no metric needs."""
    weights: str
    """The detector's digest, for the report."""
    identity: str
    """Digest of everything that determines the scores: weights, hyperparameters and code."""

    def top_labels(self) -> list[str]:
        """The label with the highest score of each image."""
        return [self.labels[i] for i in self.scores.argmax(1)]


@dataclass(frozen=True)
class RewardScores:
    """Held-out r_ψ of n images, (n,), from a head fitted to raters whose answers no token was learned from."""

    values: Tensor
    head: str
    """Digest of the head."""


@dataclass(frozen=True)
class EvaluationSet:
    """n images of one variant, in the order of `prompts`, with the outputs of the frozen networks."""

    prompts: Sequence[Prompt]
    image_keys: Sequence[str]
    """Key of each image: the digest of its recipe."""
    load_images: Callable[[Sequence[str]], list[Image.Image]]
    """Loads images by key."""
    detections: Mapping[str, Detections]
    features: Tensor
    """(n, d) CLIP embeddings."""
    clip: Clip
    concept_labels: ConceptLabels
    rewards: Mapping[str, RewardScores]
    """By concept."""

    @property
    def images(self) -> list[Image.Image]:
        """The images, decoded on demand: most metrics only use the network outputs."""
        return self.load_images(self.image_keys)

    def select(self, rows: Sequence[int]) -> EvaluationSet:
        """The subset of these rows."""
        index = list(rows)
        return replace(
            self,
            prompts=[self.prompts[i] for i in index],
            image_keys=[self.image_keys[i] for i in index],
            detections={name: replace(d, scores=d.scores[index]) for name, d in self.detections.items()},
            features=self.features[index],
            rewards={name: replace(reward, values=reward.values[index]) for name, reward in self.rewards.items()},
        )


class Metric(BaseModel):
    """A value per image, nan where the metric does not apply."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    higher_is_better: ClassVar[bool]
    is_rate: ClassVar[bool] = False
    """Whether values are 0 or 1, so that their mean is a rate."""
    prompt_scope: ClassVar[PromptScope] = "any"
    """The prompts for which it has a value."""

    @abstractmethod
    def values(self, samples: EvaluationSet, base: EvaluationSet) -> Array:
        """Values (n,). `base` holds the base model's images of the same prompts from the same noise.

        The value of an image may only depend on its own row of both sets, because values are cached per image.
        """

    def required_labels(self, prompts: Sequence[Prompt], concept_labels: ConceptLabels) -> set[tuple[str, str]]:
        """(detector, label) pairs that the metric needs for images of these prompts. Detectors run on no other images;
        their scores there are nan.
        """
        return set()

    def cache_inputs(self, samples: EvaluationSet, row: int) -> Mapping[str, Any]:
        """Everything besides the two images that determines an image's value, as JSON: part of its cache key.

        The default includes every input. A metric that runs a network itself overrides it with what it uses, so that
        unrelated changes do not recompute its values.
        """
        detectors = {name: detections.identity for name, detections in samples.detections.items()}
        heads = {name: reward.head for name, reward in samples.rewards.items()}
        labels = dict(samples.concept_labels)
        networks = {"clip": samples.clip.digest, "seen": detectors, "counts": labels, "heads": heads}
        return {"prompt": asdict(samples.prompts[row]), **networks}

    @abstractmethod
    def detector(self, samples: EvaluationSet) -> DetectorInfo | None:
        """The networks behind the values; None where none was used."""


class SetMetric(Metric):
    """A metric with one value for a set of images and none per image."""

    min_images: ClassVar[int] = 8
    """Minimum number of images."""

    def values(self, samples: EvaluationSet, base: EvaluationSet) -> Array:
        return np.full(len(samples.prompts), np.nan)

    @abstractmethod
    def of_set(self, samples: Tensor, base: Tensor) -> float:
        """The value for the features of both variants, (n, d) each."""


def split_label(prompt: Prompt) -> tuple[str, str]:
    """Splits a prompt's label: "judge:cat" → (detector "judge", label "cat")."""
    detector, _, label = prompt.label.partition(":")
    return detector, label
