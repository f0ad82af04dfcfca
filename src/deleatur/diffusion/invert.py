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

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    vectors: int = Field(1, gt=0)
    """v: consecutive rows of one token."""
    iterations: int = Field(2000, gt=0)
    """Steps of the optimiser, for each token."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of AdamW, without weight decay."""
    batch: int = Field(8, gt=0)
    """Pictures per iteration and token."""
    together: int = Field(1, gt=0)
    """Tokens learned in the same network calls: changes speed and memory, not what is learned."""
    norm: float | None = Field(None, gt=0)
    """Longest vector allowed, in mean norms of the vocabulary's rows; none: free, as published. Words lie near 1.
    Free vectors grow to several times that, and erasing what lies so far from every word takes more along."""
    check_every: int = Field(250, gt=0)
    """Iterations between two looks; the best-scoring vectors are kept, not the last."""


@dataclass(frozen=True)
class Lesson:
    """What one token is learned from."""

    latents: Tensor
    """(n, C, H, W) clean latents of its pictures."""
    weights: Tensor
    """(n,) w, sum 1."""
    templates: Sequence[Templates]
    """(n) sentences that the token may stand in for each picture."""
    generator: torch.Generator


@dataclass(frozen=True)
class Learned:
    vectors: Tensor
    """(v, d), the best of all looks."""
    looks: list[dict[str, float]]
    losses: list[float]
    effective: float
    """Effective number of pictures, 1/Σw²."""


Look = Callable[[Tensor], Sequence[float]]
"""vectors (m, v, d) → for each token, how much pictures drawn from it bare show the concept; higher is better."""


def around(rows: Tensor, template: str) -> Prompt:
    """("a photo of ", rows), say."""
    before, _, after = template.partition("{}")
    return [p for p in (before, rows, after) if not isinstance(p, str) or p.strip()]


def learn(
    model: Model,
    numbers: Inversion,
    lessons: Sequence[Lesson],
    initial: Tensor,
    *,
    look: Look | None = None,
    unet: Weights | None = None,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> list[Learned]:
    """A token (v, d) for each of m lessons, starting at `initial` (m, v, d).

    Only the vectors carry a gradient: the network, its text encoder and the table stay as they are.
    `unet` lays other weights over the model, for inversion against an erased one. Without `look` the last vectors come
    back, with it the best. on_step(step, total, loss) is called after every iteration of every group of tokens.
    """
    starts = range(0, len(lessons), numbers.together)
    total = len(starts) * numbers.iterations
    out: list[Learned] = []
    for turn, first in enumerate(starts):
        group = slice(first, first + numbers.together)

        def told(step: int, loss: float, done: int = turn * numbers.iterations) -> None:
            on_step(done + step, total, loss)

        out += _learn(model, numbers, lessons[group], initial[group], look, unet or {}, told)
    return out


def _learn(
    model: Model,
    numbers: Inversion,
    lessons: Sequence[Lesson],
    initial: Tensor,
    look: Look | None,
    unet: Weights,
    on_step: Callable[[int, float], None],
) -> list[Learned]:
    v = initial.detach().clone().float().requires_grad_()
    # No weight decay: decay pulls v to zero, which is not where words live. Adam works on each number by itself, so
    # tokens that share an optimiser do not feel each other.
    optimiser = torch.optim.AdamW([v], lr=numbers.lr, weight_decay=0.0)
    longest = (numbers.norm or 0) * model.text_encoder.get_input_embeddings().weight.float().norm(dim=-1).mean()
    m = len(lessons)
    best, best_scores = v.detach().clone(), [-float("inf")] * m
    looks: list[list[dict[str, float]]] = [[] for _ in lessons]
    losses: list[Tensor] = []
    for step in range(1, numbers.iterations + 1):
        drawn = [_draw(model, numbers, lesson, rows) for lesson, rows in zip(lessons, v, strict=True)]
        z_t, t, eps = (torch.cat(part) for part in zip(*((d.z_t, d.t, d.eps) for d in drawn), strict=True))
        c = encode(model, [prompt for d in drawn for prompt in d.prompts]).states
        error = (predict(model, unet, z_t, t, c) - eps).float().square()
        own = error.reshape(m, -1).mean(1)
        optimiser.zero_grad()
        own.sum().backward()
        optimiser.step()
        if numbers.norm:
            with torch.no_grad():
                v *= (longest / v.norm(dim=-1, keepdim=True)).clamp(max=1)
        losses.append(own.detach().cpu())
        on_step(step, float(losses[-1].mean()))
        if look and (step % numbers.check_every == 0 or step == numbers.iterations):
            for i, score in enumerate(look(v.detach())):
                looks[i].append({"step": step, "score": score})
                if score > best_scores[i]:
                    best[i], best_scores[i] = v[i].detach(), score
    kept, curves = best if look else v.detach(), torch.stack(losses, 1).tolist()
    effective = [float(1 / lesson.weights.double().square().sum()) for lesson in lessons]
    return [Learned(*token) for token in zip(kept, looks, curves, effective, strict=True)]


@dataclass(frozen=True)
class _Drawn:
    z_t: Tensor
    t: Tensor
    eps: Tensor
    prompts: list[Prompt]


def _draw(model: Model, numbers: Inversion, lesson: Lesson, rows: Tensor) -> _Drawn:
    """One iteration's noisy latents of one token, and the sentences around it."""
    g, b, z_0 = lesson.generator, numbers.batch, lesson.latents
    n = torch.multinomial(lesson.weights, b, replacement=True, generator=g)
    t = torch.randint(len(model.schedule.alphas_cumprod), (b,), generator=g).to(model.device)
    eps = torch.randn(b, *z_0.shape[1:], generator=g).to(z_0)
    bare = torch.rand(b, generator=g) < 1 / 3
    pick = torch.randint(len(lesson.templates[0]), (b,), generator=g).masked_fill(bare, -1)
    said = ["{}" if i < 0 else lesson.templates[which][i] for which, i in zip(n.tolist(), pick.tolist(), strict=True)]
    z_t = model.schedule.add_noise(z_0[n.to(z_0.device)], eps, t)
    return _Drawn(z_t, t, eps, [around(rows, template) for template in said])
