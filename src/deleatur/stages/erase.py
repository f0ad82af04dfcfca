"""tokens (or words) → delta/: SDD, or any other eraser. Saves as it goes; killed, it goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.finetune import Probe, Progress, Reading
from deleatur.diffusion.load import Model
from deleatur.diffusion.predict import Weights
from deleatur.diffusion.sample import sample
from deleatur.erasers import Eraser
from deleatur.io import tables, tensors
from deleatur.maths.distances import cosine
from deleatur.maths.seeds import derive
from deleatur.records import Concept
from deleatur.settings import Settings
from deleatur.stages import inputs
from deleatur.stages.progress import bar

LOOK = 20
"""Prompts of each kind that are drawn and rated at a look: small enough to be cheap, fixed so that looks compare."""


def run(settings: Settings) -> None:
    model = inputs.model(settings)
    eraser = inputs.method(
        "erasers", Eraser, settings.erase.method, inputs.numbers_of(settings.erase, "source"), "erase"
    )
    concepts = [inputs.concept(settings, model, name) for name in settings.targets]
    kept = inputs.to_preserve(settings)
    with bar(f"erase {'+'.join(settings.targets)}", 1) as advance:

        def on_step(p: Progress) -> None:
            advance.total(p.total)
            note = f"loss {p.loss:.4f}"
            if p.state and p.state.looks:
                note += f"  concept {p.state.looks[-1]['concept']:.2f}  kept {p.state.looks[-1]['kept']:.3f}"
            advance(note=note)

        delta = eraser.erase(
            model,
            concepts,
            keep=encode.encode_text(model, ["", *kept]),
            seed=settings.seed,
            on_step=on_step,
            probe=_probe(settings, model, concepts, kept),
        )
    folder = tables.emptied(settings.paths.delta)
    tensors.save_delta(folder / inputs.DELTA, delta)
    record = {"method": delta.method, "concepts": list(delta.concepts), **delta.record}
    for name in ("curve", "looks"):
        tables.write_json(folder / f"{name}.json", record.pop(name, []))
    tables.write_json(folder / "record.json", record)


def _probe(settings: Settings, model: Model, concepts: Sequence[Concept], kept: Sequence[str]) -> Probe:
    """Draws a few concept prompts, the concept's own tokens or words, and preserved prompts, always from the same
    noise, and rates them with r_ψ and CLIP. Only prompts of the dev split: what is reported later is never looked at.
    """
    clip, guide = inputs.clip(settings), inputs.guide(settings)
    empty = encode.encode_text(model, [""])
    others = guide.conditions(empty, concepts)
    rated: list[tuple[Any, Tensor]] = []
    for concept in concepts:
        spec = settings.concepts[concept.name]
        asked = [p.text for p in inputs.prompts(spec.prompts, "dev", concept.name) if p.role == "concept"][:LOOK]
        c = torch.cat([encode.encode_text(model, asked), concept.states])
        rated.append((inputs.head(settings, concept.name, "train"), c))
    calm_texts = list(kept[:: max(1, len(kept) // LOOK)])[:LOOK]
    calm = encode.encode_text(model, calm_texts)
    words = clip.texts(calm_texts)

    def draw(c: Tensor, purpose: str, weights: Weights) -> Tensor:
        seeds = [derive(settings.seed, "erase", "look", purpose, i) for i in range(len(c))]
        steps, batch = settings.sample.steps, settings.sample.batch
        pictures = sample(model, c, seeds, guide=guide, others=others, steps=steps, weights=weights, batch=batch)
        return clip.pictures(pictures)

    def probe(weights: Weights) -> Reading:
        hits = torch.cat([inputs.present(head, draw(c, "concept", weights)) for head, c in rated])
        return Reading(float(hits.float().mean()), float(cosine(draw(calm, "kept", weights), words).mean()))

    return probe
