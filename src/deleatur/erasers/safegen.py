"""SafeGen (Li et al. 2024, arXiv 2404.06666): self-attention learns to see a mosaic where it saw the concept.

z_t, z'_t: a marked and a passed picture at level t, noised with ε, ε'          z̃₀: the marked picture's mosaic
min_θ  w_m E ‖ ε_θ(z_t, t, c₀) − sg[ε + f_t (z₀ − z̃₀)] ‖²  +  w_p E ‖ ε_θ(z'_t, t, c₀) − ε' ‖²

Only the empty prompt is ever asked: how a concept is described plays no part, pictures from feedback do. Deviations:
the released script had mosaics of the explicit region from another network; here the whole picture is covered.
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
from deleatur.diffusion.sample import encode_images
from deleatur.erasers import Eraser
from deleatur.errors import DataError
from deleatur.maths.noise import NoiseSchedule
from deleatur.maths.seeds import generator
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.cost import Work
from deleatur.training.finetune import ErasureContext, Training, finetune
from deleatur.training.losses import Networks, Rows, squared
from deleatur.training.parameters import Selector, select


def mosaic(picture: Image.Image, cells: int) -> Image.Image:
    """The picture in cells × cells squares of one colour each, their mean."""
    small = picture.convert("RGB").resize((cells, cells), Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def exact(schedule: NoiseSchedule, t: Tensor, limit: float) -> Tensor:
    """f_t (b,) = √ᾱ_t / √(1−ᾱ_t), at most `limit`: the clean latent in z_t is the mosaic's if ε + f_t (z₀ − z̃₀) is the
    noise, since z_t = √ᾱ z₀ + √(1−ᾱ) ε.
    """
    a = schedule.alphas_cumprod.to(t.device)[t]
    return (a / (1 - a)).sqrt().clamp(max=limit)


@dataclass
class Noised:
    """Pictures at random levels under the empty prompt, and the noise that leads to other pictures from there."""

    schedule: NoiseSchedule
    z_0: Tensor
    """(n, C, H, W) clean latents."""
    seen: Tensor
    """(n, C, H, W) clean latents of what should be seen instead."""
    factor: Callable[[Tensor], Tensor]
    """f_t (b,)."""
    c_0: Tensor
    batch: int
    weight: float
    generator: torch.Generator

    def rows(self, networks: Networks, step: int) -> Rows:
        g, b = self.generator, self.batch
        i = torch.randint(len(self.z_0), (b,), generator=g).to(self.z_0.device)
        t = torch.randint(len(self.schedule.alphas_cumprod), (b,), generator=g).to(self.z_0.device)
        eps = torch.randn(b, *self.z_0.shape[1:], generator=g).to(self.z_0)
        f = self.factor(t).to(eps).reshape(-1, 1, 1, 1)
        goal = eps + f * (self.z_0[i] - self.seen[i])
        return Rows(self.schedule.add_noise(self.z_0[i], eps, t), t, self.c_0.expand(b, -1, -1), goal)

    def error(self, said: Tensor, goal: Tensor, /) -> Tensor:
        return squared(said, goal)

    def tensors(self) -> dict[str, Tensor]:
        return {}  # every draw comes from the generator

    def restore(self, tensors: dict[str, Tensor]) -> None:
        pass


class SafeGenTraining(Training):
    """Numbers of the release."""

    trainable: Selector = "selfattn"
    iterations: int = Field(1000, gt=0)
    ema_decay: float = Field(0.99, ge=0, le=1)
    """m. The release averages too; this value is ours."""
    batch_size: int = Field(5, gt=0)
    """b, marked pictures per iteration, and as many passed ones; 5 as released, where they come one by one."""


class SafeGen(Eraser):
    learns_from_pictures: ClassVar[bool] = True

    target: Literal["exact", "released"] = "exact"
    """f_t: exact, so that the mosaic is what the target leads to; or 1, as released."""
    limit: float = Field(10.0, gt=0)
    """Largest f_t of the exact target: it grows without bound as the noise goes."""
    mosaic_cells: int = Field(16, gt=0)
    """Squares of a mosaic, per side."""
    censor_weight: float = Field(0.1, ge=0)
    """w_m."""
    preservation_weight: float = Field(0.9, ge=0)
    """w_p."""
    training: SafeGenTraining = Field(default_factory=SafeGenTraining)

    def notes(self) -> list[str]:
        return [
            "SafeGen's mosaics cover whole pictures here; the published ones cover the region in question.",
            *self.training.notes(),
        ]

    def work(self, source: ConceptSource) -> Work:
        return self.training.work(self.training.batch_size, self.training.batch_size)

    def touches(self, model: Model) -> set[str]:
        return set(select(model.unet, self.training.trainable))

    def terms(self, model: Model, z_0: Tensor, z_mosaic: Tensor, z_passed: Tensor, seed: int) -> dict[str, Noised]:
        """Of clean latents: marked (n, C, H, W), their mosaics (n, C, H, W), passed (m, C, H, W)."""
        c_0 = encode_text(model, [""])

        def factor(t: Tensor) -> Tensor:
            return exact(model.schedule, t, self.limit) if self.target == "exact" else torch.ones(len(t))

        def term(name: str, z: Tensor, seen: Tensor, weight: float) -> Noised:
            return Noised(
                model.schedule, z, seen, factor, c_0, self.training.batch_size, weight, generator(seed, "erase", name)
            )

        return {
            "erase": term("marked", z_0, z_mosaic, self.censor_weight),
            "keep": term("passed", z_passed, z_passed, self.preservation_weight),
        }

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        marked, passed = triplets(concepts)
        self.touches(model)
        mosaics = [mosaic(p, self.mosaic_cells) for p in marked]
        z_0, z_mosaic, z_passed = (encode_images(model, pictures) for pictures in (marked, mosaics, passed))
        terms = self.terms(model, z_0, z_mosaic, z_passed, context.seed)
        tensors, record = finetune(model, self.training, terms, c_0=encode_text(model, [""]), context=context)
        return Delta(tensors, model.unet_digest, "safegen", self.model_dump(), tuple(c.name for c in concepts), record)


def triplets(concepts: Sequence[Concept]) -> tuple[list[Image.Image], list[Image.Image]]:
    """Marked and passed pictures of all concepts. Raises DataError where a concept has none of either."""
    for c in concepts:
        if c.images is None or not c.images.positive or not c.images.negative:
            n, m = (len(c.images.positive), len(c.images.negative)) if c.images else (0, 0)
            raise DataError(
                f"SafeGen learns from rated pictures: {c.name} has {n} that raters marked and {m} that they passed, "
                "and at least one of each is needed",
                hint="bring feedback (docs/feedback.md), or choose an erase.method that works from words or tokens",
            )
    known = [c.images for c in concepts if c.images]
    return [p for k in known for p in k.positive], [p for k in known for p in k.negative]
