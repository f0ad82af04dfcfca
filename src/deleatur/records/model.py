"""What describes a concept, and what an eraser returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # torch takes seconds to import; a verdict is read without it
    from PIL.Image import Image
    from torch import Tensor


Given = Literal["words", "token"]
"""What a concept was given in."""


@dataclass(frozen=True)
class SoftToken:
    """What HFI learns: rows of the text encoder's *input* embedding table.

    `vectors` is (m, v, d): m tokens that each stand alone, v consecutive rows each, d the embedding width.
    """

    concept: str
    vectors: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def placeholders(self) -> tuple[str, ...]:
        """What people type: `<weapon-1>`, `<weapon-2>`, …"""
        return tuple(f"<{self.concept}-{i}>" for i in range(1, len(self.vectors) + 1))


@dataclass(frozen=True)
class Pictures:
    """What raters said of pictures: `marked` show the concept, `passed` do not."""

    marked: Sequence[Image]
    passed: Sequence[Image]


@dataclass(frozen=True)
class Concept:
    """A concept as the networks see it. Words and soft tokens give the same kind of value.

    pieces:   n prompts (before, description, after), text fragments and soft rows (v, d); each stands alone
    states:   (n, L, d) their text-encoder states
    content:  n tuples, the positions of the concept's own tokens in each sentence
    end:      n positions of the end-of-text token
    pictures: for methods that learn from pictures instead of descriptions
    """

    name: str
    source: Given
    texts: tuple[str, ...]
    pieces: tuple[tuple[str | Tensor, ...], ...]
    states: Tensor
    content: tuple[tuple[int, ...], ...]
    end: tuple[int, ...]
    pictures: Pictures | None = None


@dataclass(frozen=True, eq=False)
class LowRank(Mapping[str, "Tensor"]):
    """Differences of many matrices that read the same input, each made when it is asked for: up[name] @ down.

    up: (o, r) by name, down: (r, d), in fp32. Instead of o·d numbers for each matrix, o·r, and r·d for all of them.
    """

    up: Mapping[str, Tensor]
    down: Tensor

    def __getitem__(self, name: str) -> Tensor:
        # In float64, so that the order in which a machine adds up does not show in the fp32 result.
        return (self.up[name].double() @ self.down.double()).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.up)

    def __len__(self) -> int:
        return len(self.up)


@dataclass(frozen=True)
class Delta:
    """What an eraser gives back: differences of weights against one base model, never a whole model."""

    tensors: Mapping[str, Tensor]
    """Parameter name of the UNet → difference, in fp32. LowRank where they are, in memory and on disk."""
    base: str
    """Digest of the UNet the differences belong to."""
    method: str
    settings: Mapping[str, Any]
    concepts: tuple[str, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    """How the run went: steps, stop reason, curves. Not part of the identity."""
    one_step: int | None = None
    """The noise level from which the weights draw a picture in one unguided call; None: they are the sampler's."""
