"""SafeGen (Li et al. 2024, arXiv 2404.06666): self-attention learns to turn images of the concept into mosaics.

z_t, z'_t: a positive and a negative image at timestep t, with noise ε, ε'          z̃₀: the positive image's mosaic
min_θ  w_m E ‖ ε_θ(z_t, t, c₀) − sg[ε + f_t (z₀ − z̃₀)] ‖²  +  w_p E ‖ ε_θ(z'_t, t, c₀) − ε' ‖²

Only the empty prompt is used: descriptions of the concept play no part, rated images do. Deviations: in the released
script another network decides which region becomes a mosaic; here the whole image does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from deleatur.diffusion.encode import encode_text
from deleatur.diffusion.model import Model
from deleatur.diffusion.rgb import to_rgb
from deleatur.diffusion.sample import encode_images
from deleatur.erasers import Eraser
from deleatur.errors import DataError
from deleatur.maths.noise import NoiseSchedule
from deleatur.maths.seeds import generator
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.config import TrainingConfig
from deleatur.training.cost import Workload
from deleatur.training.loop import ErasureContext, finetune
from deleatur.training.losses import Batch, Denoisers, mean_squared_error
from deleatur.training.parameters import Selector, select


def mosaic(image: Image.Image, cells: int) -> Image.Image:
    """The image in cells × cells squares, each of its mean colour."""
    rgb = to_rgb(image)
    small = rgb.resize((cells, cells), Image.Resampling.BOX)
    return small.resize(rgb.size, Image.Resampling.NEAREST)


def exact_factor(schedule: NoiseSchedule, t: Tensor, limit: float) -> Tensor:
    """f_t (b,) = √ᾱ_t / √(1−ᾱ_t), at most `limit`: with the noise ε + f_t (z₀ − z̃₀), the clean latent in
    z_t = √ᾱ z₀ + √(1−ᾱ) ε is the mosaic's. For v-prediction, with v + f_t (z₀ − z̃₀), f_t = 1 / √(1−ᾱ_t).
    """
    a = schedule.alphas_cumprod.to(t.device)[t]
    signal = torch.ones_like(a) if schedule.prediction_type == "v_prediction" else a
    return (signal / (1 - a)).sqrt().clamp(max=limit)


@dataclass
class DenoisingTerm:
    """Loss on noisy images under the empty prompt; the target is the noise that denoises them to other images."""

    schedule: NoiseSchedule
    z_0: Tensor
    """(n, C, H, W) clean latents of the images."""
    z_target: Tensor
    """(n, C, H, W) clean latents of the images to predict instead."""
    factor: Callable[[Tensor], Tensor]
    """t (b,) → f_t (b,)."""
    c_0: Tensor
    batch_size: int
    weight: float
    generator: torch.Generator

    def batch(self, denoisers: Denoisers, step: int) -> Batch:
        g, b = self.generator, self.batch_size
        i = torch.randint(len(self.z_0), (b,), generator=g).to(self.z_0.device)
        t = torch.randint(len(self.schedule.alphas_cumprod), (b,), generator=g).to(self.z_0.device)
        eps = torch.randn(b, *self.z_0.shape[1:], generator=g).to(self.z_0)
        f = self.factor(t).to(eps).reshape(-1, 1, 1, 1)
        target = self.schedule.target(self.z_0[i], eps, t) + f * (self.z_0[i] - self.z_target[i])
        return Batch(self.schedule.add_noise(self.z_0[i], eps, t), t, self.c_0.expand(b, -1, -1), target)

    def error(self, prediction: Tensor, target: Tensor, /) -> Tensor:
        return mean_squared_error(prediction, target)

    def tensors(self) -> dict[str, Tensor]:
        return {}  # the generator is the only state

    def restore(self, tensors: dict[str, Tensor]) -> None:
        pass


class SafeGenTraining(TrainingConfig):
    """Defaults of the release."""

    trainable: Selector = "selfattn"
    iterations: int = Field(1000, gt=0)
    ema_decay: float = Field(0.99, ge=0, le=1)
    """m. The release averages too; this value is ours."""
    batch_size: int = Field(5, gt=0)
    """b, positive images per iteration, and as many negative ones; 5 as released, by gradient accumulation."""


class SafeGen(Eraser):
    learns_from_images: ClassVar[bool] = True

    target: Literal["exact", "released"] = "exact"
    """f_t: exact, so that the target denoises to the mosaic; or 1, as released."""
    limit: float = Field(10.0, gt=0)
    """Upper limit of the exact f_t, which diverges towards the last timesteps."""
    mosaic_cells: int = Field(16, gt=0)
    """Squares of a mosaic, per side."""
    censor_weight: float = Field(0.1, ge=0)
    """w_m."""
    preservation_weight: float = Field(0.9, ge=0)
    """w_p."""
    training: SafeGenTraining = Field(default_factory=SafeGenTraining)

    def notes(self) -> list[str]:
        return [
            "SafeGen's mosaics cover whole images here; the published ones cover the region in question.",
            *self.training.notes(),
        ]

    def workload(self, source: ConceptSource) -> Workload:
        return self.training.workload(self.training.batch_size, self.training.batch_size)

    def touched_parameters(self, model: Model) -> set[str]:
        return set(select(model.unet, self.training.trainable))

    def loss_terms(
        self, model: Model, z_positive: Tensor, z_mosaic: Tensor, z_negative: Tensor, seed: int
    ) -> dict[str, DenoisingTerm]:
        """Of clean latents: positive images (n, C, H, W), their mosaics (n, C, H, W), negative images (m, C, H, W)."""
        c_0 = encode_text(model, [""])

        def factor(t: Tensor) -> Tensor:
            return exact_factor(model.schedule, t, self.limit) if self.target == "exact" else torch.ones(len(t))

        def term(label: str, z_0: Tensor, z_target: Tensor, weight: float) -> DenoisingTerm:
            g = generator(seed, "erase", label)
            return DenoisingTerm(model.schedule, z_0, z_target, factor, c_0, self.training.batch_size, weight, g)

        return {
            "erase": term("marked", z_positive, z_mosaic, self.censor_weight),
            "keep": term("passed", z_negative, z_negative, self.preservation_weight),
        }

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        positive, negative = rated_images(concepts)
        self.touched_parameters(model)  # an impossible selection is refused before images are encoded
        mosaics = [mosaic(image, self.mosaic_cells) for image in positive]
        z_positive, z_mosaic, z_negative = (encode_images(model, images) for images in (positive, mosaics, negative))
        terms = self.loss_terms(model, z_positive, z_mosaic, z_negative, context.seed)
        tensors, record = finetune(model, self.training, terms, c_0=encode_text(model, [""]), context=context)
        return Delta(tensors, model.unet_digest, "safegen", self.model_dump(), tuple(c.name for c in concepts), record)


def rated_images(concepts: Sequence[Concept]) -> tuple[list[Image.Image], list[Image.Image]]:
    """Positive and negative images of all concepts. Raises DataError if a concept lacks either."""
    for c in concepts:
        if c.images is None or not c.images.positive or not c.images.negative:
            n, m = (len(c.images.positive), len(c.images.negative)) if c.images else (0, 0)
            raise DataError(
                f"SafeGen learns from rated images: expected at least one positive and one negative image of {c.name}, "
                f"got {n} and {m}",
                hint="collect feedback (docs/feedback.md), or choose an erase.method that works from words or tokens",
            )
    known = [c.images for c in concepts if c.images]
    return [image for k in known for image in k.positive], [image for k in known for image in k.negative]
