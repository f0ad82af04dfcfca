"""SFD, score forgetting distillation (Chen et al. 2025, arXiv 2409.11219): a one-step generator that unlearns.

x = G(c): one call at timestep t₀, from √(1−ᾱ_t₀) n with noise n                  x_t: x with noise of timestep t
f(x_t, c): a network's prediction of the clean latent in x_t, guided by κ         φ: base model, frozen
ψ: a third copy, trained to denoise G's own images ("fake score")

ψ:  min E ‖ ε_ψ(x_t, t, c) − ε ‖²
G:  min E ⟨ f_φ(x_t, c_T) − f_ψ(x_t, c),  f_φ(x_t, c_T) − x − α (f_φ(x_t, c_T) − f_ψ(x_t, c)) ⟩ / w,  w = mean |x − f_φ|

Where φ and ψ predict the same, G's loss is 0. For preserved prompts c_T = c: G learns to generate what the base model
generates. For the concept c_T is that of its alternative. The result does not work with the sampler: it generates in
one step, which no guide can steer. As in SiD-LSG, which it builds on, all three networks start as the base model, and κ
guides both scores. Deviations: the gradient is clipped by its norm, not elementwise; the released code starts from a
generator that was distilled before.
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
from deleatur.maths.noise import NoiseSchedule
from deleatur.maths.seeds import generator
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.config import TrainingConfig
from deleatur.training.cost import Workload
from deleatur.training.loop import ErasureContext, finetune
from deleatur.training.losses import Batch, Denoiser, Denoisers
from deleatur.training.optimizer_state import check_finite, group_by_prefix, optimizer_tensors, restore_optimizer
from deleatur.training.parameters import Selector, select


def score_identity(x: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """(b,) of G's images x, and of the clean latents that φ (real) and ψ (fake) predict, each (b, C, H, W)."""
    difference = real - fake
    w = (x - real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    loss: Tensor = (difference * (real - x - alpha * difference)).flatten(1).mean(1) / w
    return loss


def guided_noise(denoiser: Denoiser, z: Tensor, t: Tensor, c: Tensor, c_0: Tensor, kappa: float) -> Tensor:
    """ε (b, …) with classifier-free guidance, in one call of 2b rows, with gradient."""
    both = torch.cat([c_0.expand(len(z), -1, -1), c])
    eps_0, eps_c = denoiser(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
    return cfg(eps_0, eps_c, kappa)


class SFDTraining(TrainingConfig):
    """Defaults of the released script for Stable Diffusion."""

    trainable: Selector = "full"
    iterations: int = Field(12500, gt=0)
    lr: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.0, ge=0, lt=1)
    ema_decay: float = Field(0.0, ge=0, le=1)
    """0: the generator itself is returned."""
    batch_size: int = Field(8, gt=0)
    """b, images of the concept per iteration, and as many of preserved prompts."""


class SFD(Eraser):
    alternatives: dict[str, str] = Field(default_factory=dict)
    """What the model generates in a concept's place, {weapon: toy}; for concepts not listed, as without a prompt."""
    start: int = Field(625, ge=0)
    """t₀."""
    kappa: float = 4.5
    """κ, guidance scale of both scores. G itself is not guided: it learns guided images."""
    alpha: float = 1.0
    """α. 1.2 for small images, in the paper."""
    levels: tuple[int, int] = (20, 980)
    """Range of t: from the first to below the second."""
    fake_lr: float = Field(3e-6, gt=0)
    """Learning rate of ψ."""
    forget_weight: float = Field(1.0, ge=0)
    """Weight of the concept's images."""
    remain_weight: float = Field(1.0, ge=0)
    """Weight of the preserved prompts' images."""
    training: SFDTraining = Field(default_factory=SFDTraining)

    @field_validator("levels")
    @classmethod
    def check_order(cls, levels: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= levels[0] < levels[1]:
            raise ValueError(f"expected two timesteps, the smaller one first, got {levels[0]} and {levels[1]}")
        return levels

    def notes(self) -> list[str]:
        return [
            "SFD's candidate generates each image in one step, the base model in many: that is part of every "
            "difference between them.",
            *self.training.notes(),
        ]

    @property
    def one_step(self) -> int:
        return self.start

    def workload(self, source: ConceptSource) -> Workload:
        """For each of b: ψ trains on four rows, guided and of both kinds; G makes two, with gradient through eight."""
        b, n = self.training.batch_size, self.training.iterations
        scores = Workload(
            forward=2 * b * n,
            backward=(4 + 8) * b * n,
            max_forward_batch=2 * b,
            max_backward_batch=(2 + 8) * b,
            bytes_per_parameter=4 + 8,
        )
        student = self.training.workload(b, b)
        bytes_per_parameter = student.bytes_per_parameter + scores.bytes_per_parameter  # in memory at the same time
        return replace(student + scores, bytes_per_parameter=bytes_per_parameter)

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        last = max(self.start, self.levels[1] - 1)
        if last >= schedule.num_timesteps:
            raise SettingsError(
                f"expected start and levels below {schedule.num_timesteps}, as the model has timesteps, got {last}",
                hint="lower start or levels in params.yaml, then: deleatur check",
            )

    def touched_parameters(self, model: Model) -> set[str]:
        return set(select(model.unet, self.training.trainable))

    def loss_terms(
        self, model: Model, c: Tensor, c_alt: Tensor, c_keep: Tensor, seed: int
    ) -> dict[str, DistillationTerm]:
        """c, c_alt (n, L, d): the concepts, and the conditions of φ in their place; c_keep (q, L, d)."""
        fake = FakeScore(model, self, encode_text(model, [""]), (c, c_keep))
        forget, remain = (generator(seed, "erase", label) for label in ("forget", "remain"))
        return {
            "erase": DistillationTerm(fake, c, c_alt, self.forget_weight, forget, trains_fake=True),
            "keep": DistillationTerm(fake, c_keep, c_keep, self.remain_weight, remain),
        }

    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        if (c_keep := context.preserve) is None:
            raise SettingsError(
                "sfd learns to generate prompts to preserve, and there are none",
                hint="add prompts of the role keep to paths.prompts, then: deleatur check",
            )
        self.check_schedule(model.schedule)
        c = torch.cat([c.states for c in concepts])
        c_alt = torch.cat([encode_replacement(model, c, self.alternatives.get(c.name, "")) for c in concepts])
        terms = self.loss_terms(model, c, c_alt, c_keep, context.seed)
        tensors, record = finetune(model, self.training, terms, c_0=encode_text(model, [""]), context=context)
        names = tuple(c.name for c in concepts)
        return Delta(tensors, model.unet_digest, "sfd", self.model_dump(), names, record, one_step=self.start)


class FakeScore:
    """ψ and its training."""

    def __init__(self, model: Model, config: SFD, c_0: Tensor, conditions: tuple[Tensor, Tensor]) -> None:
        """conditions: of the concept (n, L, d), and of preserved prompts (q, L, d)."""
        self.model, self.config, self.c_0, self.conditions = model, config, c_0, conditions
        self.weights = {n: p.detach().clone().float().requires_grad_() for n, p in select(model.unet, "full").items()}
        betas = (config.training.adam_beta1, 0.999)
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=config.fake_lr, betas=betas, weight_decay=0.0)

    def denoiser(self, *, with_gradient: bool = False) -> Denoiser:
        weights = {n: (w if with_gradient else w.detach()).to(self.model.dtype) for n, w in self.weights.items()}
        return Denoiser(self.model, weights)

    def train_step(self, student: Denoiser, g: torch.Generator, step: int = 0) -> None:
        """One optimizer step on new images of G, b of the concept and b of preserved prompts."""
        schedule, b = self.model.schedule, self.config.training.batch_size
        # Equal parts, however many prompts are preserved: ψ must learn G's images of the concept as well as others.
        c = torch.cat([rows[torch.randint(len(rows), (b,), generator=g).to(rows.device)] for rows in self.conditions])
        z, t_0, t, eps = self.sample_noise(2 * b, g)
        x = schedule.predict_z0(z, student(z, t_0, c), t_0)
        images = {"the generator's images": float(x.abs().max())}
        check_finite(images, step + 1, self.config.training.lr, "training.lr", trained=step > 0)
        x_t = schedule.add_noise(x, eps, t)
        with torch.enable_grad():  # batches are made without gradient
            prediction = guided_noise(
                self.denoiser(with_gradient=True), x_t.detach(), t, c, self.c_0, self.config.kappa
            )
            self.optimizer.zero_grad(set_to_none=True)
            loss = (prediction - schedule.target(x, eps, t)).square().mean()
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.config.training.max_grad_norm)
        values = {"the fake score's loss": float(loss.detach()), "its gradient norm": float(norm)}
        check_finite(values, step + 1, self.config.fake_lr, "sfd.fake_lr", trained=step > 0)
        self.optimizer.step()

    def sample_noise(self, b: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """G's input z (b, C, H, W) at t₀ (b,); timesteps t (b,) and their noise (b, C, H, W)."""
        n, eps = torch.randn(2, b, *self.model.latent_shape, generator=g).to(self.model.device)
        t = torch.randint(*self.config.levels, (b,), generator=g).to(self.model.device)
        t_0 = torch.full_like(t, self.config.start)
        return self.model.schedule.add_noise(torch.zeros_like(n), n, t_0), t_0, t, eps

    def tensors(self) -> dict[str, Tensor]:
        weights = {f"fake/{n}": w.detach() for n, w in self.weights.items()}
        return weights | {f"adam/{path}": t for path, t in optimizer_tensors(self.optimizer, self.weights).items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        saved = group_by_prefix(tensors)
        for name, value in saved["fake"].items():
            self.weights[name].copy_(value)
        restore_optimizer(self.optimizer, self.weights, saved["adam"])


@dataclass(frozen=True)
class _Draw:
    """One iteration's random draws that `error` needs again."""

    step: int
    base: Denoiser
    index: Tensor
    t_0: Tensor
    t: Tensor
    eps: Tensor


@dataclass
class DistillationTerm:
    """G's loss on images of some prompts."""

    fake: FakeScore
    c: Tensor
    """(n, L, d): conditions of G and ψ."""
    c_t: Tensor
    """(n, L, d): conditions of φ."""
    weight: float
    generator: torch.Generator
    trains_fake: bool = False
    """Whether this term also trains ψ, and saves it."""
    draw: _Draw | None = field(default=None, init=False)

    def batch(self, denoisers: Denoisers, step: int) -> Batch:
        if self.trains_fake:
            self.fake.train_step(denoisers.student, self.generator, step)
        b = self.fake.config.training.batch_size
        index = torch.randint(len(self.c), (b,), generator=self.generator).to(self.c.device)
        z, t_0, t, eps = self.fake.sample_noise(b, self.generator)
        self.draw = _Draw(step, denoisers.base, index, t_0, t, eps)
        return Batch(z, t_0, self.c[index], z)

    def error(self, prediction: Tensor, target: Tensor, /) -> Tensor:
        """target: G's input z, since the loss has no regression target."""
        assert self.draw
        d, schedule = self.draw, self.fake.model.schedule
        x = schedule.predict_z0(target, prediction, d.t_0)
        x_t = schedule.add_noise(x, d.eps, d.t)

        def clean(denoiser: Denoiser, c: Tensor) -> Tensor:
            output = guided_noise(denoiser, x_t, d.t, c[d.index], self.fake.c_0, self.fake.config.kappa)
            return schedule.predict_z0(x_t, output, d.t)

        real, fake = clean(d.base, self.c_t), clean(self.fake.denoiser(), self.c)
        predictions = {"the fake score's prediction": float(fake.detach().abs().max())}
        check_finite(predictions, d.step + 1, self.fake.config.fake_lr, "sfd.fake_lr", trained=True)
        return score_identity(x, real, fake, self.fake.config.alpha)

    def tensors(self) -> dict[str, Tensor]:
        return self.fake.tensors() if self.trains_fake else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if self.trains_fake:
            self.fake.restore(tensors)
