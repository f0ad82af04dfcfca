"""feedback + reward → tokens/<concept>/: HFI, the ratings condensed into soft tokens.

Saves as it goes; killed, it goes on where it was.
"""

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
from deleatur.diffusion.sample import encode_images, sample
from deleatur.feedback import votes
from deleatur.feedback.reward import RewardHead
from deleatur.inversion import InversionContext, InversionData
from deleatur.maths.seeds import derive
from deleatur.records.feedback import FeedbackKind
from deleatur.records.model import SoftToken
from deleatur.runtime import models, provenance
from deleatur.runtime.checkpoint import Checkpoint, belongs
from deleatur.runtime.progress import Bar, bar
from deleatur.storage import files, tensors
from deleatur.training.textual_inversion import Learned, Look, Progress, templates_of

IMAGES_PER_TOKEN = 4
"""Pictures drawn from the bare token at each look."""


def run(settings: Settings) -> None:
    model, clip = models.base_model(settings), models.clip_model(settings)
    tokens, checkpoints, metrics = [], [], {}
    for name in settings.targets:
        spec, pool = settings.concepts[name], rated_images.RatedPool(settings, name)
        method = methods.inverter(settings, name)
        head, features = reward_heads.load_head(settings, name, "train"), clip.embed_images(pool.images)
        rewards = head(features)
        templates = templates_of(spec.learnable_property, pool.prompts)
        latents = encode_images(model, pool.images)
        rated = InversionData(latents, rewards, features, head.rank, _refused(pool, spec.kind), templates)
        look = _look(settings, model, clip, head, name)
        checkpoint = Checkpoint(settings, "invert", f"invert-{name}", _belongs(settings, model, clip, name))
        checkpoints.append(checkpoint)
        with checkpoint, bar(f"invert {name}", 1) as advance:

            def on_step(p: Progress, checkpoint: Checkpoint = checkpoint, advance: Bar = advance) -> None:
                checkpoint(p.state)
                advance.at(p.step, p.total, f"loss {p.loss:.4f}")

            learned = method.invert(
                model,
                rated,
                encode.word_embedding(model, spec.initializer_token),
                InversionContext(settings.seed, look, on_step, checkpoint.state),
            )
        vectors = torch.stack([t.vectors for t in learned]).cpu()
        path = settings.paths.reward / f"{name}.safetensors"
        recipe = {
            "text_encoder": model.text_encoder_digest,
            "base": model.unet_digest,
            "initial": spec.initializer_token,
            "method": method.model_dump(),
            "notes": method.notes(),
            "reward": hashlib.sha256(path.read_bytes()).hexdigest(),
            "seed": settings.seed,
        }
        tokens.append(SoftToken(name, vectors, recipe))
        metrics[name] = [_describe(model, t) for t in learned]
    folder = files.empty_folder(settings.paths.tokens)
    for token in tokens:
        tensors.save_token(folder / token.concept, token)
    files.write_json(folder / "metrics.json", metrics)
    for checkpoint in checkpoints:
        checkpoint.remove()


def _belongs(settings: Settings, model: Model, clip: Clip, name: str) -> dict[str, Any]:
    """Of one concept: what the others are changes nothing."""
    content = {
        "feedback": files.read_json(settings.paths.feedback / "summary.json")["feedback"],
        "reward": provenance.files_digest([settings.paths.reward / f"{name}.safetensors"]),
    }
    selected = {"invert": {"method": settings.invert.method}, "guide": {"method": settings.guide.method}}
    code = dependencies.stage_digests("invert", selected)
    sections = ["base", "seed", f"concepts.{name}", "guide", "invert", "reward.clip", "sample.steps"]
    return belongs(settings, sections=sections, code=code, model=model, clip=clip, content=content)


def _refused(pool: rated_images.RatedPool, kind: FeedbackKind) -> Tensor:
    """Pictures that their own raters said no to. A reward that has learned from few answers may think otherwise."""
    out = torch.zeros(len(pool.images), dtype=torch.bool)
    if kind == "binary":
        found = votes.vote_table(pool.answers, votes.rater_table(pool.answers)).dropna(subset=["vote"])
        out[[pool.row_of[d] for d in found["item"][found["vote"] < 0.5]]] = True
    return out


def _describe(model: Model, learned: Learned) -> dict[str, Any]:
    """What a person wants to know of a token: the words nearest to it, and how it came about."""
    table = model.text_encoder.get_input_embeddings().weight.float()
    return {
        "nearest_words": encode.nearest_words(model, learned.vectors[0]),
        "norm_over_vocabulary_mean": float(learned.vectors.norm(dim=-1).mean() / table.norm(dim=-1).mean()),
        "effective_pictures": learned.effective,
        "looks": learned.looks,
        "losses": [round(x, 5) for x in learned.losses],
    }


def _look(settings: Settings, model: Model, clip: Clip, head: RewardHead, name: str) -> Look:
    """Pictures from each bare token, always from the same noise, scored with r_ψ."""
    guide, n = methods.guide(settings), IMAGES_PER_TOKEN
    seeds = [derive(settings.seed, "invert", "look", name, i) for i in range(n)]
    conditions = guide.conditions(model, [])  # steered towards nothing but the token

    def look(vectors: Tensor) -> list[float]:
        with torch.no_grad():
            c = encode.encode(model, [(rows,) for rows in vectors]).states.repeat_interleave(n, 0)
        pictures = sample(
            model,
            c,
            seeds * len(vectors),
            guide=guide,
            conditions=conditions,
            steps=settings.sample.steps,
            batch=settings.sample.batch_size,
        )
        scores: list[float] = head(clip.embed_images(pictures)).reshape(-1, n).mean(1).tolist()
        return scores

    return look
