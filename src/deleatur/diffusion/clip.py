"""Frozen CLIP: what pictures and prompts look like to a network that was never trained on the task at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from deleatur.diffusion.batches import full
from deleatur.diffusion.model import device_of, identify, loading, quiet, whole

BATCH = 32
"""Pictures or prompts per network call."""


@dataclass(frozen=True)
class Clip:
    """No row that it gives depends on the others: all calls have one shape."""

    model: Any
    processor: Any
    digest: str
    """SHA-256 over weights, configuration, tokenizer and image processor."""
    device: torch.device

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """L2-normalised projected image embeddings (n, d)."""
        parts = [torch.zeros(0, self.model.config.projection_dim)]
        for batch, n in full(pictures, BATCH):
            pooled = self.model.vision_model(self._pixels(batch)).pooler_output
            parts.append(F.normalize(self.model.visual_projection(pooled).float(), dim=-1)[:n].cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised projected text embeddings (n, d)."""
        parts = [torch.zeros(0, self.model.config.projection_dim)]
        length = self.model.config.text_config.max_position_embeddings
        shape = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        for batch, n in full(texts, BATCH):
            tokens = self.processor.tokenizer(batch, **shape).to(self.device)
            pooled = self.model.text_model(**tokens).pooler_output
            parts.append(F.normalize(self.model.text_projection(pooled).float(), dim=-1)[:n].cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def layers(self, pictures: Sequence[Image.Image]) -> Iterator[tuple[list[Tensor], int]]:
        """Unit-normalised patch states of every layer, the space of a perceptual distance: too much for many pictures,
        so full batches, each layer (BATCH, patches, width), and how many pictures of each batch count.
        """
        for batch, n in full(pictures, BATCH):
            states = self.model.vision_model(self._pixels(batch), output_hidden_states=True).hidden_states
            yield [F.normalize(layer[:, 1:].float(), dim=-1) for layer in states], n

    def _pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        rgb = [p.convert("RGB") for p in pictures]
        pixels: Tensor = self.processor.image_processor(images=rgb, return_tensors="pt").pixel_values
        return pixels.to(self.device, self.model.dtype)


def load_clip(path: str, device: str = "auto") -> Clip:
    """A CLIP folder or hub id. Raises ModelError when it does not load."""
    quiet()
    from transformers import CLIPModel, CLIPProcessor

    with loading(path, "a CLIP model"):
        model = whole(CLIPModel, path)
        processor = CLIPProcessor.from_pretrained(path)
    digest, place = identify(model, processor.tokenizer, processor.image_processor), device_of(device)
    model.float().to(place).eval().requires_grad_(False)
    return Clip(model, processor, digest, place)
