"""tokens (or words) → delta/: SDD, or any other eraser. Saves as it goes; killed, it goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deleatur import dependencies
from deleatur.artifacts import prompts, rated_images, reward_heads, tokens
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion import encode
from deleatur.diffusion.clip import Clip
from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights
from deleatur.diffusion.sample import sample
from deleatur.erasers import Eraser
from deleatur.maths.distances import cosine_similarity
from deleatur.maths.seeds import derive
from deleatur.records.model import Concept
from deleatur.runtime import models, provenance
from deleatur.runtime.checkpoint import Checkpoint, belongs
from deleatur.runtime.progress import bar
from deleatur.storage import files, tensors
from deleatur.training.finetune import ErasureContext, Probe, Progress, Reading

EVAL_PROMPTS = 20
"""Prompts of each kind that are drawn and rated at a look: small enough to be cheap, fixed so that looks compare."""


def run(settings: Settings) -> None:
    model, clip = models.base_model(settings), models.clip_model(settings)
    eraser = methods.eraser(settings)
    concepts = [tokens.load_concept(settings, model, name) for name in settings.targets]
    if eraser.learns_from_pictures:
        concepts = [replace(c, images=rated_images.RatedPool(settings, c.name).labelled()) for c in concepts]
    kept = prompts.preserved_prompts(settings)
    checkpoint = Checkpoint(settings, "erase", "erase", _belongs(settings, eraser, model, clip))
    with checkpoint, bar(f"erase {'+'.join(settings.targets)}", 1) as advance:

        def on_step(p: Progress) -> None:
            note = f"loss {p.loss:.4f}"
            if p.state:
                checkpoint(p.state)
            if p.state and p.state.looks:
                note += f"  concept {p.state.looks[-1]['concept']:.2f}  kept {p.state.looks[-1]['kept']:.3f}"
            advance.at(p.step, p.total, note)

        delta = eraser.erase(
            model,
            concepts,
            ErasureContext(
                seed=settings.seed,
                preserve=encode.encode_text(model, ["", *kept]),
                on_step=on_step,
                probe=_probe(settings, model, clip, concepts, kept, eraser.one_step),
                state=checkpoint.state,
            ),
        )
    folder = files.empty_folder(settings.paths.delta)
    tensors.save_delta(folder / tensors.DELTA_FILE, delta)
    record = {"method": delta.method, "concepts": list(delta.concepts), **delta.record}
    record["notes"] = [*_of_tokens(settings), *eraser.notes()]
    for name in ("curve", "looks"):
        files.write_json(folder / f"{name}.json", record.pop(name, []))
    files.write_json(folder / "record.json", record)
    checkpoint.remove()


def _of_tokens(settings: Settings) -> list[str]:
    """What a reader must know of how the tokens were learned."""
    if settings.erase.source == "words":
        return []
    said = (tokens.load_token(settings, name).provenance.get("notes", []) for name in settings.targets)
    return list(dict.fromkeys(note for notes in said for note in notes))


def _belongs(settings: Settings, eraser: Eraser, model: Model, clip: Clip) -> dict[str, Any]:
    paths, specs = settings.paths, [settings.concepts[name] for name in settings.targets]
    content = {
        "reward": provenance.files_digest([paths.reward / f"{name}.safetensors" for name in settings.targets]),
        "prompts": provenance.files_digest([paths.prompts, *(spec.prompts for spec in specs)]),
    }
    if settings.erase.source == "token":
        content["tokens"] = provenance.files_digest(
            [p for n in settings.targets for p in sorted((paths.tokens / n).iterdir())]
        )
    if eraser.learns_from_pictures:
        content["feedback"] = files.read_json(paths.feedback / "summary.json")["feedback"]
    sections = ["base", "seed", "targets", *(f"concepts.{name}" for name in settings.targets), "guide", "erase"]
    return belongs(
        settings,
        sections=[*sections, "reward.clip", "sample.steps"],
        code=dependencies.stage_digests(
            "erase", {"erase": {"method": settings.erase.method}, "guide": {"method": settings.guide.method}}
        ),
        model=model,
        clip=clip,
        content=content,
    )


def _probe(
    settings: Settings,
    model: Model,
    clip: Clip,
    concepts: Sequence[Concept],
    kept: Sequence[str],
    one_step: int | None,
) -> Probe:
    """Draws a few concept prompts, the concept's own tokens or words, and preserved prompts, always from the same
    noise, and rates them with r_ψ and CLIP. Only prompts of the dev split: what is reported later is never looked at.
    """
    guide = methods.guide(settings)
    conditions = guide.conditions(model, concepts)
    rated: list[tuple[Any, Tensor]] = []
    for concept in concepts:
        spec = settings.concepts[concept.name]
        asked = [p.text for p in prompts.read(spec.prompts, "dev", concept.name, "concept")][:EVAL_PROMPTS]
        c = torch.cat([encode.encode_text(model, asked), concept.states])
        rated.append((reward_heads.load_head(settings, concept.name, "train"), c))
    calm_texts = list(kept[:: max(1, len(kept) // EVAL_PROMPTS)])[:EVAL_PROMPTS]
    calm = encode.encode_text(model, calm_texts)
    words = clip.embed_texts(calm_texts)

    def draw(c: Tensor, purpose: str, weights: Weights) -> list[Image.Image]:
        seeds = [derive(settings.seed, "erase", "look", purpose, i) for i in range(len(c))]
        steps, batch = settings.sample.steps, settings.sample.batch_size
        return sample(
            model,
            c,
            seeds,
            guide=guide,
            conditions=conditions,
            steps=steps,
            weights=weights,
            one_step=one_step if weights else None,
            batch=batch,
        )

    def probe(weights: Weights) -> Reading:
        hits = torch.cat(
            [reward_heads.shows_concept(head, clip.embed_images(draw(c, "concept", weights))) for head, c in rated]
        )
        kept = draw(calm, "kept", weights)
        followed = cosine_similarity(clip.embed_images(kept), words).mean()
        return Reading(float(hits.float().mean()), float(followed), float(np.mean([contrast(p) for p in kept])))

    return probe


def contrast(picture: Image.Image) -> float:
    """Standard deviation of an 8 × 8 thumbnail's pixels, 0 … 127: near 0 for a blank picture, and for noise too."""
    return float(np.asarray(picture.resize((8, 8), Image.Resampling.BOX), np.float64).std((0, 1)).mean())
