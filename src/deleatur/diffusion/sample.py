"""The sampler. All models and methods are sampled by it, the base model included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights, predict
from deleatur.diffusion.rgb import to_rgb
from deleatur.maths.finite import require_finite


class SamplerGuide(Protocol):
    """Guidance as the sampler calls it, see `guides.Guide`."""

    def combine(self, step: int, eps_p: Tensor, eps: Mapping[str, Tensor], state: object) -> tuple[Tensor, object]:
        """The guided prediction (B, C, H, W), and the state for the next step.

        step: counted from 0. eps_p (B, C, H, W): prediction for the prompts. eps: condition name → prediction of the
        same shape. state: what the previous step returned; None at step 0.
        """
        ...


Conditions = Mapping[str, Tensor]
"""Name → states (s, L, d) of prompts that a guide needs predictions for; it gets the mean over the s prompts."""


def initial_noise(model: Model, seeds: Sequence[int]) -> Tensor:
    """z_T (B, C, H, W): each row from a CPU generator with its own seed, so that it depends on that seed only."""
    rows = [torch.randn(model.latent_shape, generator=torch.Generator("cpu").manual_seed(s)) for s in seeds]
    return torch.stack(rows).to(model.device)


@torch.no_grad()
def denoise(
    model: Model, z: Tensor, c: Tensor, conditions: Conditions, guide: SamplerGuide, steps: int, weights: Weights
) -> Tensor:
    """z_T (B, …) → z₀ under prompts c (B, L, d). One network call per step, with B rows for the prompts and B for each
    prompt of the guide's conditions.
    """
    b, sizes = len(z), [len(states) for states in conditions.values()]
    m, state = sum(sizes), None  # m: prompts of all conditions
    rows = torch.cat([c, torch.cat(list(conditions.values())).repeat_interleave(b, 0)])
    for step, tau in enumerate(model.schedule.timesteps(steps)):
        t = torch.full((b,), tau, device=z.device)
        eps = predict(model, weights, z.repeat(m + 1, 1, 1, 1), t.repeat(m + 1), rows)
        eps_c = eps[b:].reshape(m, b, *z.shape[1:]).split(sizes)
        predictions = {name: e.mean(0) for name, e in zip(conditions, eps_c, strict=True)}
        eps_guided, state = guide.combine(step, eps[:b], predictions, state)
        z = model.schedule.ddim_step(z, eps_guided, t, steps)
    return z


@torch.no_grad()
def denoise_one_step(model: Model, n: Tensor, c: Tensor, timestep: int, weights: Weights) -> Tensor:
    """Noise n (B, …) → z₀ under prompts c (B, L, d) in one network call, with weights trained to sample from there."""
    t = torch.full((len(n),), timestep, device=n.device)
    z = model.schedule.add_noise(torch.zeros_like(n), n, t)
    return model.schedule.predict_z0(z, predict(model, weights, z, t, c), t)


@torch.no_grad()
def decode_latents(model: Model, z: Tensor) -> list[Image.Image]:
    """Latents (B, C, H, W) → images. Raises ModelError for NaN and infinity, which 8-bit pixels would hide."""
    require_finite(z, "latents that the UNet sampled")
    pixels = model.vae.decode((z / model.vae.config.scaling_factor).to(model.dtype)).sample.float()
    require_finite(pixels, "pixels that the VAE decoded")
    eight_bit = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in eight_bit]


@torch.no_grad()
def encode_images(model: Model, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
    """Images → clean latents z₀ (n, C, H, W), the scaled mean of the VAE's posterior; resized to the model's size."""
    return torch.cat([_encode(model, images[i : i + batch_size]) for i in range(0, len(images), batch_size)])


def _encode(model: Model, images: Sequence[Image.Image]) -> Tensor:
    size = (model.image_size, model.image_size)
    arrays = [torch.frombuffer(bytearray(to_rgb(i).resize(size).tobytes()), dtype=torch.uint8) for i in images]
    x = torch.stack(arrays).reshape(len(images), *size, 3).permute(0, 3, 1, 2).to(model.device)
    mean = model.vae.encode((x / 127.5 - 1).to(model.dtype)).latent_dist.mean
    z0: Tensor = mean.float() * model.vae.config.scaling_factor
    return require_finite(z0, "latents that the VAE encoded")


def sample(
    model: Model,
    c: Tensor,
    seeds: Sequence[int],
    *,
    guide: SamplerGuide,
    conditions: Conditions,
    steps: int,
    weights: Weights | None = None,
    one_step: int | None = None,
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[Image.Image]:
    """One image for each row of c (n, L, d) and its seed.

    The last batch is padded: every network call has the same shape, so an image's bits do not depend on the number of
    images nor on its position among them. `one_step`: see `Delta`; `guide` and `steps` then have no effect. `on_batch`
    is called with the number of images of each batch. Raises ModelError if latents or pixels are not finite.
    """
    images: list[Image.Image] = []
    for start in range(0, len(seeds), batch_size):
        rows, batch_seeds = c[start : start + batch_size], list(seeds[start : start + batch_size])
        padding = batch_size - len(batch_seeds)
        rows = torch.cat([rows, rows[-1:].expand(padding, -1, -1)])
        z = initial_noise(model, batch_seeds + batch_seeds[-1:] * padding)
        if one_step is None:
            z0 = denoise(model, z, rows, conditions, guide, steps, weights or {})
        else:
            z0 = denoise_one_step(model, z, rows, one_step, weights or {})
        images += decode_latents(model, z0)[: len(batch_seeds)]
        on_batch(len(batch_seeds))
    return images
