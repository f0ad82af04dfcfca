"""SFD, score forgetting distillation (Chen et al. 2025, arXiv 2409.11219): a generator of one step that unlearns.

x = G(c): one call at level t₀, from √(1−ᾱ_t₀) n with noise n                     x_t: x at another level t
f(x_t, c): the clean latent that a network sees in x_t, guided by κ              φ: base model, frozen
ψ: a third copy, trained to see what is in G's own pictures ("fake score")

ψ:  min E ‖ ε_ψ(x_t, t, c) − ε ‖²
G:  min E ⟨ f_φ(x_t, c_T) − f_ψ(x_t, c),  f_φ(x_t, c_T) − x − α (f_φ(x_t, c_T) − f_ψ(x_t, c)) ⟩ / w,  w = mean |x − f_φ|

Where φ and ψ see the same, G has nothing to learn. For preserved prompts c_T = c: G learns to draw what the base model
draws. For the concept c_T is its alternative's. What comes back is no model for the sampler: it draws in one step, and
no guide steers it. As in SiD-LSG, which it builds on, all three networks start as the base model, and κ guides both
scores. Deviations: the gradient's norm is capped and not each of its numbers; the released code starts from a generator
that was distilled before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from pydantic import Field, field_validator
from torch import Tensor

from deleatur.diffusion.encode import encode_replacement, encode_text
from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.errors import SettingsError
from deleatur.maths.guidance import cfg
from deleatur.maths.seeds import generator
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.cost import Work
from deleatur.training.finetune import ErasureContext, Training, finetune
from deleatur.training.losses import Network, Networks, Rows
from deleatur.training.optimizer_state import moments, parts, restore_moments
from deleatur.training.parameters import Selector, select


def score_identity(x: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """(b,) of G's pictures x and of what φ (real) and ψ (fake) see in them, each (b, C, H, W)."""
    apart = real - fake
    w = (x - real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    loss: Tensor = (apart * (real - x - alpha * apart)).flatten(1).mean(1) / w
    return loss


def guided(network: Network, z: Tensor, t: Tensor, c: Tensor, c_0: Tensor, kappa: float) -> Tensor:
    """ε (b, …) with classifier-free guidance, in one call of 2b rows; gradients pass."""
    both = torch.cat([c_0.expand(len(z), -1, -1), c])
    eps_0, eps_c = network(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
    return cfg(eps_0, eps_c, kappa)


class SFDTraining(Training):
    """Numbers of the released script for Stable Diffusion."""

    trainable: Selector = "full"
    iterations: int = Field(12500, gt=0)
    lr: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.0, ge=0, lt=1)
    ema_decay: float = Field(0.0, ge=0, le=1)
    """0: the generator itself comes back."""
    batch_size: int = Field(8, gt=0)
    """b, pictures of the concept per iteration, and as many of preserved prompts."""


class SFD(Eraser):
    alternatives: dict[str, str] = Field(default_factory=dict)
    """What a concept is drawn as from now on, {weapon: toy}; nothing for those that are not named."""
    start: int = Field(625, ge=0, lt=1000)
    """t₀."""
    kappa: float = 4.5
    """κ, guidance of both scores. The generator itself is not guided: what it draws is guided already."""
    alpha: float = 1.0
    """α. 1.2 for small pictures, in the paper."""
    levels: tuple[int, int] = (20, 980)
    """t is at least the first and below the second."""
    fake_lr: float = Field(3e-6, gt=0)
    """Learning rate of ψ."""
    forget_weight: float = Field(1.0, ge=0)
    """Weight of the concept's pictures."""
    remain_weight: float = Field(1.0, ge=0)
    """Weight of preserved prompts' pictures, which the generator learns to draw from."""
    training: SFDTraining = Field(default_factory=SFDTraining)

    @field_validator("levels")
    @classmethod
    def in_order(cls, given: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= given[0] < given[1] <= 1000:
            raise ValueError(f"expected two of 0 to 1000, the smaller one first, got {given[0]} and {given[1]}")
        return given

    def notes(self) -> list[str]:
        return [
            "SFD's candidate draws each picture in one step, the base model in many: part of every difference between "
            "them is that.",
            *self.training.notes(),
        ]

    @property
    def one_step(self) -> int:
        return self.start

    def work(self, source: ConceptSource) -> Work:
        """For each of b: ψ learns from four rows, guided and of both kinds; G draws two, and learns through eight."""
        b, n = self.training.batch_size, self.training.iterations
        scores = Work(forward=2 * b * n, backward=(4 + 8) * b * n, wide=2 * b, deep=(2 + 8) * b, held=4 + 8)
        student = self.training.work(b, b)
        return replace(student + scores, held=student.held + scores.held)

    def touches(self, model: Model) -> set[str]:
        return set(select(model.unet, self.training.trainable))

    def terms(self, model: Model, c: Tensor, c_alt: Tensor, keep: Tensor, seed: int) -> dict[str, Distilled]:
        """c, c_alt (n, L, d): the concepts, and what φ is asked in their place; keep (q, L, d)."""
        fake = Fake(model, self, encode_text(model, [""]), torch.cat([c, keep]))
        return {
            "erase": Distilled(fake, c, c_alt, self.forget_weight, generator(seed, "erase", "forget"), learns=True),
            "keep": Distilled(fake, keep, keep, self.remain_weight, generator(seed, "erase", "remain")),
        }

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        if (keep := context.preserve) is None:
            raise SettingsError("sfd learns to draw from prompts to preserve, and there are none")
        c = torch.cat([c.states for c in concepts])
        c_alt = torch.cat([encode_replacement(model, c, self.alternatives.get(c.name, "")) for c in concepts])
        terms = self.terms(model, c, c_alt, keep, context.seed)
        tensors, record = finetune(model, self.training, terms, c_0=encode_text(model, [""]), context=context)
        names = tuple(c.name for c in concepts)
        return Delta(tensors, model.unet_digest, "sfd", self.model_dump(), names, record, one_step=self.start)


class Fake:
    """ψ, and how it learns."""

    def __init__(self, model: Model, numbers: SFD, c_0: Tensor, asked: Tensor) -> None:
        self.model, self.numbers, self.c_0, self.asked = model, numbers, c_0, asked
        self.own = {n: p.detach().clone().float().requires_grad_() for n, p in select(model.unet, "full").items()}
        betas = (numbers.training.adam_beta1, 0.999)
        self.optimiser = torch.optim.AdamW(self.own.values(), lr=numbers.fake_lr, betas=betas, weight_decay=0.0)

    def network(self, *, learning: bool = False) -> Network:
        weights = {n: (w if learning else w.detach()).to(self.model.dtype) for n, w in self.own.items()}
        return Network(self.model, weights)

    def learn(self, student: Network, draws: torch.Generator) -> None:
        """One step of the optimiser, on new pictures of everything that G is asked for."""
        schedule, b = self.model.schedule, 2 * self.numbers.training.batch_size
        c = self.asked[torch.randint(len(self.asked), (b,), generator=draws).to(self.asked.device)]
        z, t_0, t, eps = self.draw(b, draws)
        x_t = schedule.add_noise(schedule.predict_z0(z, student(z, t_0, c), t_0), eps, t)
        with torch.enable_grad():
            said = guided(self.network(learning=True), x_t.detach(), t, c, self.c_0, self.numbers.kappa)
            self.optimiser.zero_grad(set_to_none=True)
            (said.float() - eps.float()).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.own.values(), self.numbers.training.max_grad_norm)
        self.optimiser.step()

    def draw(self, b: int, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What G starts from, z (b, C, H, W) at t₀ (b,); levels t (b,) and their noise (b, C, H, W)."""
        n, eps = torch.randn(2, b, *self.model.latent_shape, generator=draws).to(self.model.device, self.model.dtype)
        t = torch.randint(*self.numbers.levels, (b,), generator=draws).to(self.model.device)
        t_0 = torch.full_like(t, self.numbers.start)
        return self.model.schedule.add_noise(torch.zeros_like(n), n, t_0), t_0, t, eps

    def tensors(self) -> dict[str, Tensor]:
        adam = moments(self.optimiser, self.own)
        return {f"fake/{n}": w.detach() for n, w in self.own.items()} | {f"adam/{path}": t for path, t in adam.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        saved = parts(tensors)
        for name, value in saved["fake"].items():
            self.own[name].copy_(value)
        restore_moments(self.optimiser, self.own, saved["adam"])


@dataclass
class Distilled:
    """G's loss on pictures of some prompts."""

    fake: Fake
    c: Tensor
    """(n, L, d): what G and ψ are asked."""
    c_t: Tensor
    """(n, L, d): what φ is asked in their place."""
    weight: float
    generator: torch.Generator
    learns: bool = False
    """Whether ψ learns at this term's turn, and is saved with it."""
    drawn: tuple[Network, Tensor, Tensor, Tensor, Tensor] | None = field(default=None, init=False)
    """Of this iteration: φ, which prompts, t₀, t, noise."""

    def rows(self, networks: Networks, step: int) -> Rows:
        if self.learns:
            self.fake.learn(networks.student, self.generator)
        b = self.fake.numbers.training.batch_size
        which = torch.randint(len(self.c), (b,), generator=self.generator).to(self.c.device)
        z, t_0, t, eps = self.fake.draw(b, self.generator)
        self.drawn = (networks.base, which, t_0, t, eps)
        return Rows(z, t_0, self.c[which], z)

    def error(self, said: Tensor, goal: Tensor, /) -> Tensor:
        """goal: what G started from."""
        assert self.drawn
        (base, which, t_0, t, eps), numbers, schedule = self.drawn, self.fake.numbers, self.fake.model.schedule
        x = schedule.predict_z0(goal, said, t_0)
        x_t = schedule.add_noise(x, eps.float(), t)

        def seen(network: Network, c: Tensor) -> Tensor:
            given = x_t.to(self.fake.model.dtype)
            return schedule.predict_z0(
                x_t, guided(network, given, t, c[which], self.fake.c_0, numbers.kappa).float(), t
            )

        return score_identity(x, seen(base, self.c_t), seen(self.fake.network(), self.c), numbers.alpha)

    def tensors(self) -> dict[str, Tensor]:
        return self.fake.tensors() if self.learns else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if self.learns:
            self.fake.restore(tensors)
