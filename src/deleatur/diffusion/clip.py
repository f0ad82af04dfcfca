"""Embeddings of images and texts by a frozen CLIP model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from deleatur.diffusion.batches import padded_batches
from deleatur.diffusion.encode import check_lengths
from deleatur.diffusion.folders import check_clip, download
from deleatur.diffusion.model import digest_parts, from_pretrained, load_errors, resolve_device, silence_libraries
from deleatur.diffusion.rgb import to_rgb
from deleatur.maths.finite import require_finite

BATCH_SIZE = 32
"""Images or texts per network call."""


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP model. All network calls have one shape, so each row depends on its own input only."""

    model: Any
    processor: Any
    digest: str
    """SHA-256 over weights, configuration, tokenizer and image processor."""
    device: torch.device

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def max_tokens(self) -> int:
        """L of the text encoder."""
        return int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """L2-normalised projected image embeddings (n, d)."""
        parts = [torch.zeros(0, self.model.config.projection_dim)]
        for batch, n in padded_batches(images, BATCH_SIZE):
            pooled = self.model.vision_model(self._pixels(batch)).pooler_output
            parts.append(F.normalize(self.model.visual_projection(pooled).float(), dim=-1)[:n].cpu())
        return require_finite(torch.cat(parts), "CLIP's image embeddings")

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised projected text embeddings (n, d). Raises DataError for a text that would be truncated."""
        check_lengths(self, [(text,) for text in texts])
        parts = [torch.zeros(0, self.model.config.projection_dim)]
        shape = {"padding": "max_length", "max_length": self.max_tokens, "return_tensors": "pt"}
        for batch, n in padded_batches(texts, BATCH_SIZE):
            tokens = self.tokenizer(batch, **shape).to(self.device)
            pooled = self.model.text_model(**tokens).pooler_output
            parts.append(F.normalize(self.model.text_projection(pooled).float(), dim=-1)[:n].cpu())
        return require_finite(torch.cat(parts), "CLIP's text embeddings")

    @torch.no_grad()
    def patch_features(self, images: Sequence[Image.Image]) -> Iterator[tuple[list[Tensor], int]]:
        """Yields L2-normalised patch states of every layer, each (BATCH_SIZE, patches, width), with the number of valid
        images in the batch. Batch by batch, since the features of many images do not fit in memory.
        """
        for batch, n in padded_batches(images, BATCH_SIZE):
            states = self.model.vision_model(self._pixels(batch), output_hidden_states=True).hidden_states
            normalized = (F.normalize(layer[:, 1:].float(), dim=-1) for layer in states)
            yield [require_finite(layer, "CLIP's patch states") for layer in normalized], n

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        rgb = [to_rgb(image) for image in images]
        pixels: Tensor = self.processor.image_processor(images=rgb, return_tensors="pt").pixel_values
        return pixels.to(self.device, self.model.dtype)


def load_clip(path: str, device: str = "auto") -> Clip:
    """Loads a CLIP model from a folder or hub id, in fp32. Raises ModelError if it does not load."""
    silence_libraries()
    from transformers import CLIPModel, CLIPProcessor

    folder = download(path)
    check_clip(folder)
    path = str(folder)
    with load_errors(path, "a CLIP model"):
        model = from_pretrained(CLIPModel, path)
        processor = CLIPProcessor.from_pretrained(path)
    digest = digest_parts(model, processor.tokenizer, processor.image_processor)
    target = resolve_device(device)
    model.float().to(target).eval().requires_grad_(False)
    return Clip(model, processor, digest, target)
