"""delta, prompts, tokens, attacks → shots/: base, champion and candidate drawn from the same noise, in shards.

Only the candidate is steered by the guide. The base is the model as it is, a champion is a version of the registry,
which holds weights alone: both are drawn with plain guidance of the same scale.

A picture is named by the digest of everything that made it, so a shard that is there is never drawn again: a killed
run goes on at the shard it was in, and the base model's pictures survive a new candidate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.load import Model, digest
from deleatur.diffusion.overlay import weights_of
from deleatur.diffusion.predict import Weights
from deleatur.diffusion.sample import sample
from deleatur.guides import Guide
from deleatur.guides.cfg import CFG
from deleatur.io import images, shots, tables, tensors
from deleatur.io.objects import local
from deleatur.maths.seeds import derive
from deleatur.records import Concept, Prompt, Role, Shot, Side
from deleatur.settings import Settings
from deleatur.stages import inputs
from deleatur.stages.progress import bar


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    shot: Shot
    states: Tensor

    @property
    def key(self) -> str:
        recipe = json.dumps(asdict(self.shot), sort_keys=True)
        return hashlib.sha256((recipe + digest({"c": self.states})).encode()).hexdigest()


def run(settings: Settings) -> None:
    model, guide = inputs.model(settings), inputs.guide(settings)
    concepts = [inputs.concept(settings, model, name) for name in settings.targets]
    asked, plain = list(_asked(settings, model)), CFG(scale=guide.scale)
    folder, sides = settings.paths.shots, _sides(settings, model)
    guides: dict[Side, tuple[str, Guide]] = {side: (inputs.PLAIN, plain) for side in sides}
    guides["candidate"] = (settings.guide.method, guide)
    plan = {side: _jobs(settings, *guides[side], side, name, asked) for side, (name, _) in sides.items()}
    wanted: set[Path] = set()
    with bar("sample", sum(map(len, plan.values()))) as advance:
        for side, (_, weights) in sides.items():
            for shard in _shards(plan[side], settings.sample.shard):
                path = folder / side / f"{_name(shard)}.parquet"
                wanted.add(path)
                if path.is_file():
                    advance(len(shard), note="reused")
                else:
                    drawn = _draw(settings, model, guides[side][1], concepts, shard, weights, advance)
                    tables.write_table(path, drawn, shots.SCHEMA)
    for stale in set(folder.rglob("*.parquet")) - wanted:
        stale.unlink()


def _sides(settings: Settings, model: Model) -> dict[Side, tuple[str, Weights]]:
    """Side → (digest of its weights, what is laid over the base model)."""
    delta = weights_of(model, tensors.load_delta(settings.paths.delta / inputs.DELTA))
    sides: dict[Side, tuple[str, Weights]] = {"base": (model.digest, {})}
    if settings.sample.champion:
        champion = weights_of(model, tensors.load_delta(Path(local(settings.sample.champion, "delta")) / inputs.DELTA))
        sides["champion"] = (digest(champion), champion)
    return sides | {"candidate": (digest(delta), delta)}


def _asked(settings: Settings, model: Model) -> Iterator[tuple[Prompt, Tensor]]:
    """Every prompt of the evaluation with its text-encoder states (L, d)."""
    split = settings.sample.split
    written = [p for n in settings.targets for p in inputs.prompts(settings.concepts[n].prompts, split, n)]
    written += [p for p in inputs.prompts(settings.paths.prompts, split, "")]
    yield from zip(written, encode.encode_text(model, [p.text for p in written]), strict=True)
    for name in settings.targets:
        # Whichever of the two was erased: a word that the token took along, or left behind, is worth knowing.
        word = encode.concept_from_words(model, name, settings.concepts[name].words)
        token = encode.concept_from_token(model, inputs.token(settings, name))
        alone: tuple[tuple[Role, Concept], ...] = (("word", word), ("token", token))
        for role, c in alone:
            for i, (text, states) in enumerate(zip(c.texts, c.states, strict=True)):
                yield Prompt(f"{name}-{role}-{i}", text, role, "", name), states
    for path in sorted(settings.paths.attacks.glob("*.safetensors")):
        found, facts = tensors.load(path)
        for i, rows in enumerate(found["vectors"]):
            name = f"{path.stem}-{i}"
            states = encode.encode_marked(model, ["<>"], {"<>": rows})[0]
            yield Prompt(name, f"<{name}>", "attack", "", facts["concept"]), states


def _jobs(
    settings: Settings, method: str, guide: Guide, side: Side, weights: str, asked: list[tuple[Prompt, Tensor]]
) -> list[Job]:
    rule, steps = json.dumps({"method": method, **guide.model_dump()}), settings.sample.steps
    return [
        Job(Shot(side, prompt, i, derive(settings.seed, "sample", prompt.id, i), rule, steps, weights), states)
        for prompt, states in asked
        for i in range(settings.sample.per_prompt.get(prompt.role, 1))
    ]


def _shards(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    for i in range(0, len(jobs), size):
        yield jobs[i : i + size]


def _name(shard: list[Job]) -> str:
    return hashlib.sha256("".join(job.key for job in shard).encode()).hexdigest()[:24]


def _draw(
    settings: Settings,
    model: Model,
    guide: Guide,
    concepts: list[Concept],
    shard: list[Job],
    weights: Weights,
    advance: Any,
) -> pd.DataFrame:
    import torch

    pictures = sample(
        model,
        torch.stack([job.states for job in shard]),
        [job.shot.noise_seed for job in shard],
        guide=guide,
        conditions=guide.conditions(model, concepts),
        steps=settings.sample.steps,
        weights=weights,
        batch=settings.sample.batch,
        on_batch=advance,
    )
    return pd.DataFrame([_row(job, images.encode(p)) for job, p in zip(shard, pictures, strict=True)])


def _row(job: Job, image: bytes) -> dict[str, Any]:
    shot, prompt = job.shot, asdict(job.shot.prompt)
    return {
        "key": job.key,
        **prompt,
        "side": shot.side,
        "index": shot.index,
        "noise_seed": shot.noise_seed,
        "guidance": shot.guidance,
        "steps": shot.steps,
        "weights": shot.weights,
        "image": image,
    }
