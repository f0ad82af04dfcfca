"""feedback + reward → tokens/<concept>/: soft tokens learned from rated images, by HFI. Checkpointed: a run resumes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from deleatur import dependencies
from deleatur.artifacts import rated_images, reward_heads
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion import encode
from deleatur.diffusion.clip import Clip
from deleatur.diffusion.model import Model
from deleatur.diffusion.sample import encode_images
from deleatur.evaluation.probe import token_evaluator
from deleatur.feedback import votes
from deleatur.inversion import InversionContext, InversionData
from deleatur.records.feedback import FeedbackKind, FeedbackSummary
from deleatur.records.model import SoftToken
from deleatur.runtime import models, provenance
from deleatur.runtime.checkpoint import Checkpoint, run_identity
from deleatur.runtime.progress import Bar, bar
from deleatur.storage import files, tensors
from deleatur.training.textual_inversion import InversionProgress, LearnedToken, prompt_templates


def run(settings: Settings) -> None:
    model, clip = models.base_model(settings), models.clip_model(settings)
    soft_tokens, checkpoints, metrics = [], [], dict[str, Any]()
    for name in settings.targets:
        if not reward_heads.is_trained(settings, name):
            metrics[name] = []  # nobody has rated images of it
            continue
        spec, pool = settings.concepts[name], rated_images.RatedPool(settings, name)
        method = methods.inverter(settings, name)
        head, features = reward_heads.load_head(settings, name, "train"), clip.embed_images(pool.images)
        rewards = head(features)
        templates = prompt_templates(spec.learnable_property, pool.prompts)
        latents = encode_images(model, pool.images)
        data = InversionData(latents, rewards, features, head.rank, _negatives(pool, spec.kind), templates)
        evaluator = token_evaluator(settings, model, clip, head, name)
        checkpoint = Checkpoint(settings, "invert", f"invert-{name}", _run_identity(settings, model, clip, name))
        checkpoints.append(checkpoint)
        with checkpoint, bar(f"invert {name}", 1) as advance:

            def on_step(p: InversionProgress, checkpoint: Checkpoint = checkpoint, advance: Bar = advance) -> None:
                checkpoint(p.state)
                advance.set(p.step, p.total, f"loss {p.loss:.4f}")

            learned = method.invert(
                model,
                data,
                encode.word_embedding(model, spec.initializer_token),
                InversionContext(settings.seed, evaluator, on_step, checkpoint.state),
            )
        vectors = torch.stack([t.vectors for t in learned]).cpu()
        path = settings.paths.reward / f"{name}.safetensors"
        token_provenance = {
            "text_encoder": model.text_encoder_digest,
            "base": model.unet_digest,
            "initializer_token": spec.initializer_token,
            "method": method.model_dump(),
            "notes": method.notes(),
            "reward": hashlib.sha256(path.read_bytes()).hexdigest(),
            "seed": settings.seed,
        }
        soft_tokens.append(SoftToken(name, vectors, token_provenance))
        metrics[name] = [_describe(model, t) for t in learned]
    with files.replace_folder(settings.paths.tokens) as folder:
        for token in soft_tokens:
            tensors.save_token(folder / token.concept, token)
        files.write_json(folder / "metrics.json", metrics)
    for checkpoint in checkpoints:
        checkpoint.remove()


def _run_identity(settings: Settings, model: Model, clip: Clip, name: str) -> dict[str, Any]:
    """Everything that can change the tokens of one concept; other concepts cannot."""
    content = {
        "feedback": files.read_json_as(settings.paths.feedback / "summary.json", FeedbackSummary).feedback,
        "reward": provenance.digest_files([settings.paths.reward / f"{name}.safetensors"]),
    }
    selected = {"invert": {"method": settings.invert.method}, "guide": {"method": settings.guide.method}}
    code = dependencies.stage_digests("invert", selected)
    sections = ["base", "seed", f"concepts.{name}", "guide", "invert", "reward.clip", "sample.steps"]
    return run_identity(settings, sections=sections, code=code, model=model, clip=clip, content=content)


def _negatives(pool: rated_images.RatedPool, kind: FeedbackKind) -> Tensor:
    """(n,) bool: images that raters voted against. A reward head trained on few answers may rate them higher."""
    negative = torch.zeros(len(pool.images), dtype=torch.bool)
    if kind == "binary":
        voted = votes.vote_table(pool.answers, votes.rater_table(pool.answers)).dropna(subset=["vote"])
        negative[[pool.row_of[d] for d in voted["item"][voted["vote"] < 0.5]]] = True
    return negative


def _describe(model: Model, learned: LearnedToken) -> dict[str, Any]:
    """Summary of a token for people: the nearest words, its norm, and the course of its training."""
    table = model.text_encoder.get_input_embeddings().weight.float()
    return {
        "nearest_words": encode.nearest_words(model, learned.vectors[0]),
        "norm_over_vocabulary_mean": float(learned.vectors.norm(dim=-1).mean() / table.norm(dim=-1).mean()),
        "effective_images": learned.effective_images,
        "evaluations": learned.evaluations,
        "losses": [round(x, 5) for x in learned.losses],
    }
