"""Weighted textual inversion (Gal et al. 2022): soft vectors that make a frozen model generate given images.

v: m·rows of the text encoder's input-embedding table     w: weight of each image, Σw = 1
L(v) = Σ_x w(x) E_{t, ε} ‖ ε − ε_θ(√ᾱ_t z₀(x) + √(1−ᾱ_t) ε, t, E(template[v])) ‖²        (v-prediction: of v_t)

A third of the samples use the token alone, without a template, since erasers and guides use it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from deleatur.diffusion.encode import PromptParts, check_lengths, encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights, predict
from deleatur.training.cost import Workload
from deleatur.training.optimizer_state import (
    SavedState,
    check_finite,
    group_by_prefix,
    optimizer_tensors,
    restore_optimizer,
)

PROMPT_TEMPLATES = {
    "object": ("a {}", "a picture of a {}", "a photo of a {}", "a painting of a {}", "one {}", "a small {}"),
    # A style's token must not learn the subjects of the images: the images' own prompts name those.
    "style": ("{prompt} in {} style", "{prompt} drawn in {} style", "{} style {prompt}", "{} {prompt}"),
}
"""Learnable property → templates, as in the reference implementation of textual inversion."""

PromptTemplates = Sequence[str]
"""Templates of one image, each with {} in the place of the token."""

BARE_SHARE = 1 / 3
"""Share of the samples whose prompt is the token alone."""


def prompt_templates(learnable_property: str, prompts: Sequence[str]) -> list[PromptTemplates]:
    """The templates of each image, given the prompt that it was sampled and rated with."""
    templates = PROMPT_TEMPLATES[learnable_property]
    return [[t.replace("{prompt}", prompt) for t in templates] for prompt in prompts]


class TextualInversionConfig(BaseModel):
    """Hyperparameters of the optimization of one token."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_vectors: int = Field(1, gt=0)
    """v, vectors of one token: consecutive rows of the prompt."""
    iterations: int = Field(2000, gt=0)
    """Optimizer steps for each token."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of AdamW, without weight decay."""
    batch_size: int = Field(8, gt=0)
    """Images per iteration and token."""
    max_norm: float | None = Field(None, gt=0)
    """Upper limit of a vector's norm, in mean norms of the vocabulary's rows; none: unlimited, as published. Words have
    norms near 1. Unlimited vectors grow to several times that, and erasing a concept so far from all words also erases
    others."""

    def workload(self, num_tokens: int = 1, tokens_per_batch: int = 1, evaluations: int = 0) -> Workload:
        return Workload(
            backward=num_tokens * self.iterations * self.batch_size,
            max_backward_batch=self.batch_size * min(tokens_per_batch, num_tokens),
            evaluations=evaluations,
            num_tokens=num_tokens,
        )


class MultiTokenConfig(TextualInversionConfig):
    """Hyperparameters for several tokens."""

    tokens_per_batch: int = Field(1, gt=0)
    """Tokens learned in the same network calls: changes speed and memory, not the result."""


class EvaluatedInversionConfig(MultiTokenConfig):
    """Hyperparameters where sampled images select the best vectors."""

    eval_every: int = Field(250, gt=0)
    """Evaluation interval in iterations; the best-scoring vectors are returned, not the last."""


@dataclass(frozen=True)
class TokenTarget:
    """The training data of one token."""

    latents: Tensor
    """(n, C, H, W) clean latents of its images."""
    weights: Tensor
    """(n,) w, sum 1."""
    templates: Sequence[PromptTemplates]
    """(n) prompt templates of each image."""
    generator: torch.Generator


@dataclass(frozen=True)
class LearnedToken:
    """The result for one token."""

    vectors: Tensor
    """(v, d), those of the best evaluation; without evaluations, the last."""
    evaluations: list[dict[str, float]]
    losses: list[float]
    effective_images: float
    """Effective number of images, 1/Σw²."""


@dataclass
class InversionState:
    """The complete state of a run. Saved and restored, the run continues bit for bit."""

    vectors: list[Tensor]
    """m tokens (v, d)."""
    optimizer: torch.optim.AdamW
    generators: list[torch.Generator]
    best: Tensor
    """(m, v, d)."""
    losses: Tensor
    """(m, iterations)."""
    evaluations: list[list[dict[str, float]]]
    step: int = 0
    """Counts through all groups of tokens, one group after the other."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by a flat name."""
        vectors = self._vectors_by_name()
        flat = {f"vectors/{n}": v.detach() for n, v in vectors.items()} | {"best/": self.best, "losses/": self.losses}
        flat |= {f"adam/{path}": t for path, t in optimizer_tensors(self.optimizer, vectors).items()}
        return flat | {f"generator/{i}": g.get_state() for i, g in enumerate(self.generators)}

    def metadata(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        return {"step": self.step, "evaluations": self.evaluations}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Loads a saved state into this initial one."""
        saved, vectors = group_by_prefix(tensors), self._vectors_by_name()
        for name, value in saved["vectors"].items():
            vectors[name].copy_(value)
        self.best.copy_(saved["best"][""])
        self.losses.copy_(saved["losses"][""])
        restore_optimizer(self.optimizer, vectors, saved["adam"])
        for i, g in enumerate(self.generators):
            g.set_state(saved["generator"][str(i)])
        self.step, self.evaluations = metadata["step"], metadata["evaluations"]

    def _vectors_by_name(self) -> dict[str, Tensor]:
        return {str(i): v for i, v in enumerate(self.vectors)}


@dataclass(frozen=True)
class InversionProgress:
    """Argument of the callback after every iteration, and once after restoring a checkpoint."""

    step: int
    total: int
    loss: float
    """Mean over the tokens of the current group."""
    state: InversionState


TokenEvaluator = Callable[[Tensor], Sequence[float]]
"""vectors (m, v, d) → for each token, how much images sampled from it alone show the concept; higher is better."""


def learn_tokens(
    model: Model,
    config: TextualInversionConfig,
    targets: Sequence[TokenTarget],
    initial: Tensor,
    *,
    tokens_per_batch: int = 1,
    evaluate: TokenEvaluator | None = None,
    eval_every: int = 0,
    unet_weights: Weights | None = None,
    on_step: Callable[[InversionProgress], None] = lambda progress: None,
    state: SavedState | None = None,
) -> list[LearnedToken]:
    """One token (v, d) for each of m targets, starting from `initial` (m, v, d).

    Only the vectors carry a gradient: UNet, text encoder and embedding table are frozen. `unet_weights` replace the
    base model's, for inversion against an erased model. With `evaluate`, called every `eval_every` iterations and
    after the last, the vectors of the best evaluation are returned, otherwise the last ones. Resuming from `state`
    gives the same bits as an uninterrupted run. Raises ErasureRefused when training diverges.
    """
    run, n = _initial_state(model, config, targets, initial), config.iterations
    # Groups are learned one after the other: memory is that of one group, whatever the number of tokens.
    groups = [slice(i, i + tokens_per_batch) for i in range(0, len(targets), tokens_per_batch)]
    total = len(groups) * n

    def report() -> None:
        group, step = divmod(run.step - 1, n)
        on_step(InversionProgress(run.step, total, float(run.losses[groups[group], step].mean()), run))

    if state:
        run.restore(*state)
        report()
    # Templates are sampled at random: one that is too long would end the run after hours.
    templates = {t for target in targets for of_image in target.templates for t in of_image}
    check_lengths(model, [_fill_template(t, run.vectors[0]) for t in sorted(templates)])
    table = model.text_encoder.get_input_embeddings().weight.float()
    max_norm = config.max_norm * table.norm(dim=-1).mean() if config.max_norm else None
    while run.step < total:
        group, step = divmod(run.step, n)
        _train_step(model, config, targets, run, groups[group], step, unet_weights or {}, max_norm)
        run.step += 1
        if evaluate and (step + 1 == n or (eval_every and (step + 1) % eval_every == 0)):
            _evaluate(run, groups[group], step + 1, evaluate)
        report()
    vectors = run.best if evaluate else torch.stack(run.vectors).detach()
    effective = [float(1 / target.weights.double().square().sum()) for target in targets]
    return [LearnedToken(*t) for t in zip(vectors, run.evaluations, run.losses.tolist(), effective, strict=True)]


def _initial_state(
    model: Model, config: TextualInversionConfig, targets: Sequence[TokenTarget], initial: Tensor
) -> InversionState:
    first = initial.detach().to(model.device, torch.float32)
    vectors = [v.clone().requires_grad_() for v in first]
    # No weight decay, which pulls v to zero, far from all words. Adam is elementwise and skips tensors without a
    # gradient, so tokens that share an optimizer do not influence each other.
    optimizer = torch.optim.AdamW(vectors, lr=config.lr, weight_decay=0.0)
    losses = torch.zeros(len(targets), config.iterations)
    return InversionState(
        vectors, optimizer, [t.generator for t in targets], first.clone(), losses, [[] for _ in targets]
    )


def _train_step(
    model: Model,
    config: TextualInversionConfig,
    targets: Sequence[TokenTarget],
    run: InversionState,
    group: slice,
    step: int,
    unet_weights: Weights,
    max_norm: Tensor | None,
) -> None:
    """One optimizer step of the tokens of a group."""
    vectors = run.vectors[group]
    batches = [_sample_batch(model, config, target, v) for target, v in zip(targets[group], vectors, strict=True)]
    z_t, t, target = (torch.cat(part) for part in zip(*((b.z_t, b.t, b.target) for b in batches), strict=True))
    c = encode(model, [prompt for b in batches for prompt in b.prompts]).states
    error = (predict(model, unet_weights, z_t, t, c) - target).square()
    losses = error.reshape(len(vectors), -1).mean(1)
    run.losses[group, step] = losses.detach().cpu()
    run.optimizer.zero_grad()
    losses.sum().backward()  # a sum, so that each token's gradient is that of its own loss
    norm = max(float(v.grad.norm()) for v in vectors if v.grad is not None)
    values = {"the inversion's loss": float(losses.detach().sum()), "its gradient norm": norm}
    check_finite(values, step + 1, config.lr, "training.lr of the inversion or attack", trained=step > 0)
    run.optimizer.step()
    if max_norm is not None:
        with torch.no_grad():
            for v in vectors:
                v *= (max_norm / v.norm(dim=-1, keepdim=True)).clamp(max=1)


def _evaluate(run: InversionState, group: slice, step: int, evaluate: TokenEvaluator) -> None:
    vectors = torch.stack(run.vectors[group]).detach()
    for i, (v, score) in enumerate(zip(vectors, evaluate(vectors), strict=True), group.start):
        if score > max((earlier["score"] for earlier in run.evaluations[i]), default=-float("inf")):
            run.best[i] = v
        run.evaluations[i].append({"step": step, "score": score})


@dataclass(frozen=True)
class _NoisyBatch:
    z_t: Tensor
    t: Tensor
    target: Tensor
    prompts: list[PromptParts]


def _sample_batch(model: Model, config: TextualInversionConfig, target: TokenTarget, vectors: Tensor) -> _NoisyBatch:
    """Noisy latents of one token's images, and prompts that contain the token."""
    g, b, z_0 = target.generator, config.batch_size, target.latents
    # Weights decide how often an image is sampled, not how much its loss counts: equal in expectation, less variance.
    image = torch.multinomial(target.weights, b, replacement=True, generator=g)
    t = torch.randint(len(model.schedule.alphas_cumprod), (b,), generator=g).to(model.device)
    eps = torch.randn(b, *z_0.shape[1:], generator=g).to(z_0)
    bare = torch.rand(b, generator=g) < BARE_SHARE
    choice = torch.randint(len(target.templates[0]), (b,), generator=g).masked_fill(bare, -1)
    templates = [
        "{}" if j < 0 else target.templates[i][j] for i, j in zip(image.tolist(), choice.tolist(), strict=True)
    ]
    z_0 = z_0[image.to(z_0.device)]
    z_t, regression_target = model.schedule.add_noise(z_0, eps, t), model.schedule.target(z_0, eps, t)
    return _NoisyBatch(z_t, t, regression_target, [_fill_template(template, vectors) for template in templates])


def _fill_template(template: str, vectors: Tensor) -> PromptParts:
    """("a photo of ", vectors), for example."""
    before, _, after = template.partition("{}")
    return [p for p in (before, vectors, after) if not isinstance(p, str) or p.strip()]
