"""The one sampler. Every row of every comparison goes through here, the untouched model included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights, predict


class Combines(Protocol):
    """What the sampler needs of a guide."""

    def combine(self, step: int, eps_p: Tensor, eps: Mapping[str, Tensor], state: object) -> tuple[Tensor, object]: ...


Conditions = Mapping[str, Tensor]
"""Name → sentences (s, L, d) that a guide has run beside the prompt; it gets the mean of their predictions."""


def noise(model: Model, seeds: Sequence[int]) -> Tensor:
    """z_T (B, C, H, W): each row from a CPU generator of its own seed, so it depends on nothing but that seed."""
    rows = [torch.randn(model.latent_shape, generator=torch.Generator("cpu").manual_seed(s)) for s in seeds]
    return torch.stack(rows).to(model.device, model.dtype)


@torch.no_grad()
def denoise(
    model: Model, z: Tensor, c: Tensor, conditions: Conditions, guide: Combines, steps: int, weights: Weights
) -> Tensor:
    """z_T (B, …) → z₀ under prompts c (B, L, d): one network call a step, of B rows for the prompt and for each
    sentence of the guide's conditions.
    """
    b, sizes = len(z), [len(sentences) for sentences in conditions.values()]
    m, state = sum(sizes), None
    rows = torch.cat([c, torch.cat(list(conditions.values())).repeat_interleave(b, 0)])
    for step, tau in enumerate(model.schedule.taus(steps)):
        t = torch.full((b,), tau, device=z.device)
        eps = predict(model, weights, z.repeat(m + 1, 1, 1, 1), t.repeat(m + 1), rows)
        rest = eps[b:].reshape(m, b, *z.shape[1:]).split(sizes)
        others = {name: e.mean(0) for name, e in zip(conditions, rest, strict=True)}
        combined, state = guide.combine(step, eps[:b], others, state)
        z = model.schedule.ddim(z, combined, t, steps)
    return z


@torch.no_grad()
def at_once(model: Model, n: Tensor, c: Tensor, level: int, weights: Weights) -> Tensor:
    """Noise n (B, …) → z₀ under prompts c (B, L, d) in one network call, of weights that learned to draw from there."""
    t = torch.full((len(n),), level, device=n.device)
    z = model.schedule.add_noise(torch.zeros_like(n), n, t)
    return model.schedule.clean(z, predict(model, weights, z, t, c), t)


@torch.no_grad()
def decode(model: Model, z: Tensor) -> list[Image.Image]:
    """Latents (B, C, H, W) → pictures."""
    pixels = model.vae.decode(z / model.vae.config.scaling_factor).sample
    eight_bit = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in eight_bit]


@torch.no_grad()
def encode_pictures(model: Model, pictures: Sequence[Image.Image], batch: int = 64) -> Tensor:
    """Pictures → clean latents z₀ (n, C, H, W), the mean of the VAE's posterior, scaled."""
    return torch.cat([_encode(model, pictures[i : i + batch]) for i in range(0, len(pictures), batch)])


def _encode(model: Model, pictures: Sequence[Image.Image]) -> Tensor:
    size = (model.pixels, model.pixels)
    arrays = [torch.frombuffer(bytearray(p.convert("RGB").resize(size).tobytes()), dtype=torch.uint8) for p in pictures]
    x = torch.stack(arrays).reshape(len(pictures), *size, 3).permute(0, 3, 1, 2).to(model.device, model.dtype)
    z0: Tensor = model.vae.encode(x / 127.5 - 1).latent_dist.mean * model.vae.config.scaling_factor
    return z0


def sample(
    model: Model,
    c: Tensor,
    seeds: Sequence[int],
    *,
    guide: Combines,
    conditions: Conditions,
    steps: int,
    weights: Weights | None = None,
    one_step: int | None = None,
    batch: int = 16,
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[Image.Image]:
    """One picture for each row of c (n, L, d) and its seed.

    The last batch is filled up to full size: every network call has the same shape, so a picture's bits do not
    depend on how many others are drawn, nor on its place among them. `one_step`: see `Delta`; there is no step at which
    a guide could steer, nor are there any steps.
    """
    pictures: list[Image.Image] = []
    for start in range(0, len(seeds), batch):
        rows, part = c[start : start + batch], list(seeds[start : start + batch])
        missing = batch - len(part)
        rows = torch.cat([rows, rows[-1:].expand(missing, -1, -1)])
        z = noise(model, part + part[-1:] * missing)
        if one_step is None:
            z0 = denoise(model, z, rows, conditions, guide, steps, weights or {})
        else:
            z0 = at_once(model, z, rows, one_step, weights or {})
        pictures += decode(model, z0)[: len(part)]
        on_batch(len(part))
    return pictures
