"""Soft vectors that make a frozen model draw given pictures: weighted textual inversion (Gal et al. 2022).

v: m·rows of the text encoder's input-embedding table     w: weight of each picture, Σw = 1
L(v) = Σ_x w(x) E_{t, ε} ‖ ε − ε_θ(√ᾱ_t z₀(x) + √(1−ᾱ_t) ε, t, E(template[v])) ‖²

The bare token stands in a third of the draws, since the erasers and guides use it bare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from deleatur.diffusion.encode import Prompt, encode
from deleatur.diffusion.load import Model
from deleatur.diffusion.predict import Weights, predict

TEMPLATES = {
    "object": ("a {}", "a picture of a {}", "a photo of a {}", "a painting of a {}", "one {}", "a small {}"),
    # A style's token must not learn what is in the pictures: their own prompts say that already.
    "style": ("{prompt} in {} style", "{prompt} drawn in {} style", "{} style {prompt}", "{} {prompt}"),
}

Templates = Sequence[str]
"""Sentences around the token of one picture, each with {} where it goes."""


def templates_of(kind: str, prompts: Sequence[str]) -> list[Templates]:
    """For each picture, by the prompt that it was drawn and rated under."""
    return [[t.replace("{prompt}", prompt) for t in TEMPLATES[kind]] for prompt in prompts]


class Inversion(BaseModel):
    """Numbers of the optimisation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    vectors: int = Field(1, gt=0)
    """v: consecutive rows of one token."""
    iterations: int = Field(2000, gt=0)
    lr: float = Field(1e-3, gt=0)
    batch: int = Field(8, gt=0)
    norm: float | None = Field(None, gt=0)
    """Longest vector allowed, in mean norms of the vocabulary's rows; none: free, as published. Words lie near 1.
    Free vectors grow to several times that, and erasing what lies so far from every word takes more along."""
    check_every: int = Field(250, gt=0)
    """Iterations between two looks; the best-scoring vectors are kept, not the last."""


@dataclass(frozen=True)
class Learned:
    vectors: Tensor
    """(v, d), the best of all looks."""
    looks: list[dict[str, float]]
    losses: list[float]
    effective: float
    """Effective number of pictures, 1/Σw²."""


Look = Callable[[Tensor], float]
"""vectors (v, d) → how much pictures drawn from the bare token show the concept; higher is better."""


def around(rows: Tensor, template: str) -> Prompt:
    """("a photo of ", rows), say."""
    before, _, after = template.partition("{}")
    return [p for p in (before, rows, after) if not isinstance(p, str) or p.strip()]


def learn(
    model: Model,
    numbers: Inversion,
    latents: Tensor,
    weights: Tensor,
    initial: Tensor,
    *,
    templates: Sequence[Templates],
    generator: torch.Generator,
    look: Look | None = None,
    unet: Weights | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Learned:
    """Learns (v, d) from clean latents (n, C, H, W) with weights (n,) and templates (n), starting at `initial` (v, d).

    Only the vectors carry a gradient: the network, its text encoder and the table stay as they are.
    `unet` lays other weights over the model, for inversion against an erased one.
    """
    v = initial.detach().clone().float().requires_grad_()
    # No weight decay: decay pulls v to zero, which is not where words live.
    optimiser = torch.optim.AdamW([v], lr=numbers.lr, weight_decay=0.0)
    words = model.text_encoder.get_input_embeddings().weight.float().norm(dim=-1).mean()
    best, best_score = v.detach().clone(), -float("inf")
    looks: list[dict[str, float]] = []
    losses: list[float] = []
    count = len(templates[0])
    for step in range(1, numbers.iterations + 1):
        n = torch.multinomial(weights, numbers.batch, replacement=True, generator=generator)
        t = torch.randint(len(model.schedule.alphas_cumprod), (numbers.batch,), generator=generator)
        eps = torch.randn(numbers.batch, *latents.shape[1:], generator=generator).to(latents)
        bare = torch.rand(numbers.batch, generator=generator) < 1 / 3
        pick = torch.randint(count, (numbers.batch,), generator=generator).masked_fill(bare, -1)
        t = t.to(model.device)
        z_t = model.schedule.add_noise(latents[n.to(latents.device)], eps, t)
        rows = zip(n.tolist(), pick.tolist(), strict=True)
        c = encode(model, [around(v, "{}" if i < 0 else templates[which][i]) for which, i in rows]).states
        loss = (predict(model, unet or {}, z_t, t, c) - eps).float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if numbers.norm:
            with torch.no_grad():
                v *= (numbers.norm * words / v.norm(dim=-1, keepdim=True)).clamp(max=1)
        losses.append(float(loss.detach()))
        on_step(step, losses[-1])
        if look and (step % numbers.check_every == 0 or step == numbers.iterations):
            score = look(v.detach())
            looks.append({"step": step, "score": score})
            if score > best_score:
                best, best_score = v.detach().clone(), score
    return Learned(best if look else v.detach(), looks, losses, float(1 / weights.double().square().sum()))
