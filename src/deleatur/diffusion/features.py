"""Frozen CLIP: what pictures and prompts look like to a network that was never trained on the task at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from deleatur.diffusion.load import device_of, fingerprint, loading, quiet, whole


@dataclass(frozen=True)
class Clip:
    model: Any
    processor: Any
    digest: str
    device: torch.device

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image], batch: int = 128) -> Tensor:
        """L2-normalised projected image embeddings (n, d)."""
        parts = [self._pixels(pictures[i : i + batch]) for i in range(0, len(pictures), batch)]
        vision = [self.model.vision_model(p).pooler_output for p in parts]
        return F.normalize(self.model.visual_projection(torch.cat(vision)).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised projected text embeddings (n, d)."""
        tokens = self.processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        out = self.model.text_model(**tokens.to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(out).float(), dim=-1).cpu()

    @torch.no_grad()
    def layers(self, pictures: Sequence[Image.Image], batch: int = 128) -> list[Tensor]:
        """Unit-normalised patch states of every layer, each (n, patches, width): the space of a perceptual distance."""
        parts = [
            self.model.vision_model(self._pixels(pictures[i : i + batch]), output_hidden_states=True).hidden_states
            for i in range(0, len(pictures), batch)
        ]
        return [F.normalize(torch.cat(layer)[:, 1:].float(), dim=-1).cpu() for layer in zip(*parts, strict=True)]

    def _pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        rgb = [p.convert("RGB") for p in pictures]
        pixels: Tensor = self.processor.image_processor(images=rgb, return_tensors="pt").pixel_values
        return pixels.to(self.device, self.model.dtype)


def load_clip(path: str, device: str = "auto") -> Clip:
    """A CLIP folder or hub id. Raises ModelError when it does not load."""
    quiet()
    from transformers import CLIPModel, CLIPProcessor

    with loading(path, "a CLIP model"):
        model = whole(CLIPModel, path).float()
        processor = CLIPProcessor.from_pretrained(path)
    place = device_of(device)
    model.to(place).eval().requires_grad_(False)
    return Clip(model, processor, fingerprint(model), place)
