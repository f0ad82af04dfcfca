"""Descriptions of a concept, and the weight differences that erase it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # torch takes seconds to import; a verdict is read without it
    from PIL.Image import Image
    from torch import Tensor


ConceptSource = Literal["words", "token"]
"""Whether a concept is specified by words or by learned soft tokens."""


@dataclass(frozen=True)
class SoftToken:
    """Learned rows of the text encoder's *input* embedding table.

    `vectors` is (m, v, d): m alternative tokens of v consecutive rows each, d the embedding width.
    """

    concept: str
    vectors: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Names of the tokens in prompts: `<weapon-1>`, `<weapon-2>`, …"""
        return tuple(f"<{self.concept}-{i}>" for i in range(1, len(self.vectors) + 1))


@dataclass(frozen=True)
class RatedImages:
    """Images that most raters said show the concept (`positive`) or do not (`negative`)."""

    positive: Sequence[Image]
    negative: Sequence[Image]


@dataclass(frozen=True)
class Concept:
    """A concept as the networks see it, from words and from soft tokens alike.

    prompts:            n readable prompts, each a description of the concept
    prompt_parts:       their parts (before, description, after): text, or soft rows (v, d)
    states:             (n, L, d) their text-encoder states
    content_positions:  n tuples, the positions of the description's tokens in each prompt
    end_positions:      n positions of the end-of-text token
    images:             for methods that learn from images instead of descriptions
    """

    name: str
    source: ConceptSource
    prompts: tuple[str, ...]
    prompt_parts: tuple[tuple[str | Tensor, ...], ...]
    states: Tensor
    content_positions: tuple[tuple[int, ...], ...]
    end_positions: tuple[int, ...]
    images: RatedImages | None = None


@dataclass(frozen=True, eq=False)
class LowRank(Mapping[str, "Tensor"]):
    """Low-rank differences of several matrices that read the same input, computed on access: up[name] @ down.

    up: (o, r) by name, down: (r, d), in fp32. Stores o·r values per matrix and r·d once, instead of o·d per matrix.
    """

    up: Mapping[str, Tensor]
    down: Tensor

    def __getitem__(self, name: str) -> Tensor:
        # In float64, so that a machine's order of summation does not show in the fp32 result.
        return (self.up[name].double() @ self.down.double()).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.up)

    def __len__(self) -> int:
        return len(self.up)


@dataclass(frozen=True)
class Delta:
    """The result of an eraser: weight differences relative to one base model, never a complete model."""

    tensors: Mapping[str, Tensor]
    """UNet parameter name → difference, in fp32. May be a `LowRank`, in memory and on disk."""
    base: str
    """Digest of the UNet that the differences apply to."""
    method: str
    settings: Mapping[str, Any]
    concepts: tuple[str, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    """Training log: steps, stop reason, curves. Not part of the delta's identity."""
    one_step: int | None = None
    """Timestep from which the weights generate an image in one unguided call; None: they need the full sampler."""


@dataclass(frozen=True)
class ErasureRecord:
    """The fields that other stages read of the record that `erase` writes beside the delta; it has more, for people."""

    notes: Sequence[str]
    selected: int | None = None
    """Step of the evaluation whose weights are returned; None: no step was taken."""
