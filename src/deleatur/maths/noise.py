"""The noise schedule and the deterministic DDIM step (Song et al. 2021, eq. 12 with η = 0).

t: training timestep, 0 … T−1            ᾱ_t: cumulative alpha
z_t = √ᾱ_t z₀ + √(1−ᾱ_t) ε               k: sampler steps already done; τ_k the noise level of the state after k steps
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Everything the sampler and the losses need to know of a checkpoint's scheduler config."""

    alphas_cumprod: Tensor
    """(T,) ᾱ."""
    final_alpha: float
    """ᾱ behind the last step: ᾱ₀, or 1 where the checkpoint sets `set_alpha_to_one`."""
    offset: int
    """`steps_offset`, 1 for Stable Diffusion 1.x."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"

    def taus(self, n: int) -> list[int]:
        """The n noise levels of an n-step sampler, "leading" spacing: 981, 961, …, 1 for n = 50, T = 1000."""
        stride = len(self.alphas_cumprod) // n
        return [k * stride + self.offset for k in reversed(range(n))]

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t of clean latents (B, …) at timesteps t (B,)."""
        a = self.alphas_cumprod.to(z0)[t].reshape(-1, *[1] * (z0.ndim - 1))
        return a.sqrt() * z0 + (1 - a).sqrt() * eps

    def clean(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The clean latents (B, …) that are in z if ε is its noise."""
        a = self.alphas_cumprod.to(z)[t].reshape(-1, *[1] * (z.ndim - 1))
        return (z - (1 - a).sqrt() * eps) / a.sqrt()

    def ddim(self, z: Tensor, eps: Tensor, t: Tensor, n: int) -> Tensor:
        """One step of the n-step sampler from level t (B,) to the next, for states (B, …)."""
        before = t - len(self.alphas_cumprod) // n
        alphas = self.alphas_cumprod.to(z)
        a_next = torch.where(before >= 0, alphas[before.clamp(min=0)], alphas.new_tensor(self.final_alpha))
        a_next = a_next.reshape(-1, *[1] * (z.ndim - 1))
        z0 = self.clean(z, eps, t)
        return a_next.sqrt() * z0 + (1 - a_next).sqrt() * eps

    def to_epsilon(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The network's output as a noise prediction, for ε and v checkpoints alike."""
        if self.prediction == "epsilon":
            return output
        a = self.alphas_cumprod.to(z)[t].reshape(-1, *[1] * (z.ndim - 1))
        return a.sqrt() * output + (1 - a).sqrt() * z
