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
from deleatur.diffusion.sample import encode_pictures
from deleatur.erasers import Eraser
from deleatur.errors import DataError
from deleatur.maths.noise import Schedule
from deleatur.maths.seeds import generator
from deleatur.records.model import Concept, Delta, Given
from deleatur.training.cost import Work
from deleatur.training.finetune import Probe, Progress, Training, finetune
from deleatur.training.losses import Networks, Rows, squared
from deleatur.training.optimizer_state import Saved
from deleatur.training.parameters import Selector, select


def mosaic(picture: Image.Image, cells: int) -> Image.Image:
    """The picture in cells × cells squares of one colour each, their mean."""
    small = picture.convert("RGB").resize((cells, cells), Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def exact(schedule: Schedule, t: Tensor, limit: float) -> Tensor:
    """f_t (b,) = √ᾱ_t / √(1−ᾱ_t), at most `limit`: the clean latent in z_t is the mosaic's if ε + f_t (z₀ − z̃₀) is the
    noise, since z_t = √ᾱ z₀ + √(1−ᾱ) ε.
    """
    a = schedule.alphas_cumprod.to(t.device)[t]
    return (a / (1 - a)).sqrt().clamp(max=limit)


@dataclass
class Noised:
    """Pictures at random levels under the empty prompt, and the noise that leads to other pictures from there."""

    schedule: Schedule
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

    train: Selector = "selfattn"
    iterations: int = Field(1000, gt=0)
    ema: float = Field(0.99, ge=0, le=1)
    """m. The release averages too; this value is ours."""
    batch: int = Field(5, gt=0)
    """b, marked pictures per iteration, and as many passed ones; 5 as released, where they come one by one."""


class SafeGen(Eraser):
    learns_from_pictures: ClassVar[bool] = True

    target: Literal["exact", "released"] = "exact"
    """f_t: exact, so that the mosaic is what the target leads to; or 1, as released."""
    limit: float = Field(10.0, gt=0)
    """Largest f_t of the exact target: it grows without bound as the noise goes."""
    cells: int = Field(16, gt=0)
    """Squares of a mosaic, per side."""
    censor: float = Field(0.1, ge=0)
    """w_m."""
    spare: float = Field(0.9, ge=0)
    """w_p."""
    loop: SafeGenTraining = Field(default_factory=SafeGenTraining)

    def notes(self) -> list[str]:
        return [
            "SafeGen's mosaics cover whole pictures here; the published ones cover the region in question.",
            *self.loop.notes(),
        ]

    def work(self, source: Given) -> Work:
        return self.loop.work(self.loop.batch, self.loop.batch)

    def touches(self, model: Model) -> set[str]:
        return set(select(model.unet, self.loop.train))

    def terms(self, model: Model, z_0: Tensor, z_mosaic: Tensor, z_passed: Tensor, seed: int) -> dict[str, Noised]:
        """Of clean latents: marked (n, C, H, W), their mosaics (n, C, H, W), passed (m, C, H, W)."""
        c_0 = encode_text(model, [""])

        def factor(t: Tensor) -> Tensor:
            return exact(model.schedule, t, self.limit) if self.target == "exact" else torch.ones(len(t))

        def term(name: str, z: Tensor, seen: Tensor, weight: float) -> Noised:
            return Noised(model.schedule, z, seen, factor, c_0, self.loop.batch, weight, generator(seed, "erase", name))

        return {
            "erase": term("marked", z_0, z_mosaic, self.censor),
            "keep": term("passed", z_passed, z_passed, self.spare),
        }

    def erase(
        self,
        model: Model,
        concepts: Sequence[Concept],
        *,
        keep: Tensor | None,
        seed: int,
        on_step: Callable[[Progress], None] = lambda p: None,
        probe: Probe | None = None,
        state: Saved | None = None,
    ) -> Delta:
        marked, passed = triplets(concepts)
        self.touches(model)
        mosaics = [mosaic(p, self.cells) for p in marked]
        z_0, z_mosaic, z_passed = (encode_pictures(model, pictures) for pictures in (marked, mosaics, passed))
        terms = self.terms(model, z_0, z_mosaic, z_passed, seed)
        tensors, record = finetune(
            model, self.loop, terms, c_0=encode_text(model, [""]), on_step=on_step, probe=probe, state=state
        )
        return Delta(tensors, model.digest, "safegen", self.model_dump(), tuple(c.name for c in concepts), record)


def triplets(concepts: Sequence[Concept]) -> tuple[list[Image.Image], list[Image.Image]]:
    """Marked and passed pictures of all concepts. Raises DataError where a concept has none of either."""
    for c in concepts:
        if c.pictures is None or not c.pictures.marked or not c.pictures.passed:
            n, m = (len(c.pictures.marked), len(c.pictures.passed)) if c.pictures else (0, 0)
            raise DataError(
                f"SafeGen learns from rated pictures: {c.name} has {n} that raters marked and {m} that they passed, "
                "and at least one of each is needed",
                hint="bring feedback (docs/feedback.md), or choose an erase.method that works from words or tokens",
            )
    known = [c.pictures for c in concepts if c.pictures]
    return [p for k in known for p in k.marked], [p for k in known for p in k.passed]
