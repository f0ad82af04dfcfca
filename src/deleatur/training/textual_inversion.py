"""Soft vectors that make a frozen model draw given pictures: weighted textual inversion (Gal et al. 2022).

v: m·rows of the text encoder's input-embedding table     w: weight of each picture, Σw = 1
L(v) = Σ_x w(x) E_{t, ε} ‖ ε − ε_θ(√ᾱ_t z₀(x) + √(1−ᾱ_t) ε, t, E(template[v])) ‖²

The bare token stands in a third of the draws, since the erasers and guides use it bare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from deleatur.diffusion.encode import PromptParts, encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights, predict
from deleatur.errors import DataError
from deleatur.training.cost import Work
from deleatur.training.optimizer_state import Saved, moments, parts, restore_moments

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


class Descent(BaseModel):
    """Numbers of the optimisation of one token."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    num_vectors: int = Field(1, gt=0)
    """v: consecutive rows of one token."""
    iterations: int = Field(2000, gt=0)
    """Steps of the optimiser, for each token."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of AdamW, without weight decay."""
    batch_size: int = Field(8, gt=0)
    """Pictures per iteration and token."""
    max_norm: float | None = Field(None, gt=0)
    """Longest vector allowed, in mean norms of the vocabulary's rows; none: free, as published. Words lie near 1.
    Free vectors grow to several times that, and erasing what lies so far from every word takes more along."""

    def work(self, tokens: int = 1, together: int = 1, looks: int = 0) -> Work:
        rows = self.batch_size * min(together, tokens)
        return Work(backward=tokens * self.iterations * self.batch_size, deep=rows, looks=looks, found=tokens)


class Several(Descent):
    """Numbers where there are several tokens."""

    tokens_per_batch: int = Field(1, gt=0)
    """Tokens learned in the same network calls: changes speed and memory, not what is learned."""


class Inversion(Several):
    """Numbers where pictures drawn on the way are looked at."""

    eval_every: int = Field(250, gt=0)
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


@dataclass
class State:
    """All of a run: what one save must hold for the next process to go on with the same bits."""

    vectors: list[Tensor]
    """m tokens (v, d)."""
    optimiser: torch.optim.AdamW
    generators: list[torch.Generator]
    best: Tensor
    """(m, v, d)."""
    losses: Tensor
    """(m, iterations)."""
    looks: list[list[dict[str, float]]]
    step: int = 0
    """Of all groups of tokens, one after the other."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by a flat name."""
        names = self._named()
        flat = {f"vectors/{n}": v.detach() for n, v in names.items()} | {"best/": self.best, "losses/": self.losses}
        flat |= {f"adam/{path}": t for path, t in moments(self.optimiser, names).items()}
        return flat | {f"generator/{i}": g.get_state() for i, g in enumerate(self.generators)}

    def numbers(self) -> dict[str, Any]:
        """Everything that is not."""
        return {"step": self.step, "looks": self.looks}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Puts a saved run back into this freshly started one."""
        saved, names = parts(tensors), self._named()
        for name, value in saved["vectors"].items():
            names[name].copy_(value)
        self.best.copy_(saved["best"][""])
        self.losses.copy_(saved["losses"][""])
        restore_moments(self.optimiser, names, saved["adam"])
        for i, g in enumerate(self.generators):
            g.set_state(saved["generator"][str(i)])
        self.step, self.looks = numbers["step"], numbers["looks"]

    def _named(self) -> dict[str, Tensor]:
        return {str(i): v for i, v in enumerate(self.vectors)}


@dataclass(frozen=True)
class Progress:
    """What the callback is told after every iteration, and once by a run that goes on before its next."""

    step: int
    total: int
    loss: float
    """Mean of the tokens that are learned at the time."""
    state: State


Look = Callable[[Tensor], Sequence[float]]
"""vectors (m, v, d) → for each token, how much pictures drawn from it bare show the concept; higher is better."""


def around(rows: Tensor, template: str) -> PromptParts:
    """("a photo of ", rows), say."""
    before, _, after = template.partition("{}")
    return [p for p in (before, rows, after) if not isinstance(p, str) or p.strip()]


def start(model: Model, numbers: Descent, lessons: Sequence[Lesson], initial: Tensor) -> State:
    """A run before its first step."""
    first = initial.detach().to(model.device, torch.float32)
    vectors = [rows.clone().requires_grad_() for rows in first]
    # No weight decay: decay pulls v to zero, which is not where words live. Adam works on each number by itself, and
    # leaves alone what has no gradient: tokens that share an optimiser do not feel each other.
    optimiser = torch.optim.AdamW(vectors, lr=numbers.lr, weight_decay=0.0)
    losses = torch.zeros(len(lessons), numbers.iterations)
    generators = [lesson.generator for lesson in lessons]
    return State(vectors, optimiser, generators, first.clone(), losses, [[] for _ in lessons])


def learn(
    model: Model,
    numbers: Descent,
    lessons: Sequence[Lesson],
    initial: Tensor,
    *,
    together: int = 1,
    look: Look | None = None,
    check_every: int = 0,
    unet: Weights | None = None,
    on_step: Callable[[Progress], None] = lambda p: None,
    state: Saved | None = None,
) -> list[Learned]:
    """A token (v, d) for each of m lessons, starting at `initial` (m, v, d).

    Only the vectors carry a gradient: the network, its text encoder and the table stay as they are.
    `unet` lays other weights over the model, for inversion against an erased one. Without `look` the last vectors come
    back, with it the best of the looks, every `check_every` iterations and at the end. `state`: what the state of a run
    with the same arguments gave after some iteration; the result is the same to the bit as if that run had never been
    left.
    """
    run, n = start(model, numbers, lessons, initial), numbers.iterations
    total = -(-len(lessons) // together) * n

    def tell() -> None:
        group, step = divmod(run.step - 1, n)
        on_step(Progress(run.step, total, float(run.losses[_tokens(together, group), step].mean()), run))

    if state:
        run.restore(*state)
        tell()
    table = model.text_encoder.get_input_embeddings().weight.float()
    longest = numbers.max_norm * table.norm(dim=-1).mean() if numbers.max_norm else None
    while run.step < total:
        group, step = divmod(run.step, n)
        _iterate(model, numbers, lessons, run, _tokens(together, group), step, unet or {}, longest)
        run.step += 1
        if look and (step + 1 == n or (check_every and (step + 1) % check_every == 0)):
            _look(run, _tokens(together, group), step + 1, look)
        tell()
    kept = run.best if look else torch.stack(run.vectors).detach()
    effective = [float(1 / lesson.weights.double().square().sum()) for lesson in lessons]
    return [Learned(*token) for token in zip(kept, run.looks, run.losses.tolist(), effective, strict=True)]


def _tokens(together: int, group: int) -> slice:
    """Which tokens are learned in the same network calls."""
    return slice(group * together, (group + 1) * together)


def _iterate(
    model: Model,
    numbers: Descent,
    lessons: Sequence[Lesson],
    run: State,
    tokens: slice,
    step: int,
    unet: Weights,
    longest: Tensor | None,
) -> None:
    vectors = run.vectors[tokens]
    drawn = [_draw(model, numbers, lesson, v) for lesson, v in zip(lessons[tokens], vectors, strict=True)]
    z_t, t, eps = (torch.cat(part) for part in zip(*((d.z_t, d.t, d.eps) for d in drawn), strict=True))
    c = encode(model, [prompt for d in drawn for prompt in d.prompts]).states
    error = (predict(model, unet, z_t, t, c) - eps).float().square()
    own = error.reshape(len(vectors), -1).mean(1)
    run.optimiser.zero_grad()
    own.sum().backward()
    run.optimiser.step()
    if longest is not None:
        with torch.no_grad():
            for v in vectors:
                v *= (longest / v.norm(dim=-1, keepdim=True)).clamp(max=1)
    run.losses[tokens, step] = own.detach().cpu()
    if not run.losses[tokens, step].isfinite().all():
        raise DataError(
            f"the loss of the inversion became no number at iteration {step + 1}",
            hint="lower loop.lr, or begin at another word (concepts.*.initial)",
        )


def _look(run: State, tokens: slice, step: int, look: Look) -> None:
    vectors = torch.stack(run.vectors[tokens]).detach()
    for i, (rows, score) in enumerate(zip(vectors, look(vectors), strict=True), tokens.start):
        if score > max((earlier["score"] for earlier in run.looks[i]), default=-float("inf")):
            run.best[i] = rows
        run.looks[i].append({"step": step, "score": score})


@dataclass(frozen=True)
class _Drawn:
    z_t: Tensor
    t: Tensor
    eps: Tensor
    prompts: list[PromptParts]


def _draw(model: Model, numbers: Descent, lesson: Lesson, rows: Tensor) -> _Drawn:
    """One iteration's noisy latents of one token, and the sentences around it."""
    g, b, z_0 = lesson.generator, numbers.batch_size, lesson.latents
    n = torch.multinomial(lesson.weights, b, replacement=True, generator=g)
    t = torch.randint(len(model.schedule.alphas_cumprod), (b,), generator=g).to(model.device)
    eps = torch.randn(b, *z_0.shape[1:], generator=g).to(z_0)
    bare = torch.rand(b, generator=g) < 1 / 3
    pick = torch.randint(len(lesson.templates[0]), (b,), generator=g).masked_fill(bare, -1)
    said = ["{}" if i < 0 else lesson.templates[which][i] for which, i in zip(n.tolist(), pick.tolist(), strict=True)]
    z_t = model.schedule.add_noise(z_0[n.to(z_0.device)], eps, t)
    return _Drawn(z_t, t, eps, [around(rows, template) for template in said])
