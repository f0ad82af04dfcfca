"""delta, prompts, tokens, attacks → shots/: base, champion and candidate drawn from the same noise.

Only the candidate is steered by the guide. The base is the model as it is, a champion is a version of the registry,
which holds weights alone: both are drawn with plain guidance of the same scale.

A picture is named by the digest of everything that decides it, so one that is there is never drawn again: a killed run
goes on at the shard it was in, a new prompt adds its own pictures, and the base model's survive a new candidate.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from deleatur.artifacts import prompts, tokens
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion import encode
from deleatur.diffusion import sample as sampler
from deleatur.diffusion.model import Model, digest
from deleatur.diffusion.overlay import weights_of
from deleatur.diffusion.predict import Weights
from deleatur.errors import ModelError
from deleatur.guides import Guide
from deleatur.guides.cfg import CFG
from deleatur.maths.seeds import derive
from deleatur.records.model import Concept
from deleatur.records.sampling import Prompt, Recipe, Role, Shot, Side
from deleatur.runtime import models, provenance
from deleatur.runtime.distributed import hands, own, spread
from deleatur.runtime.progress import bar
from deleatur.storage import files, images, samples, tensors
from deleatur.storage.cache import parts


@dataclass(frozen=True)
class Way:
    """How one side is drawn."""

    weights: Weights
    """Laid over the base model."""
    guide: Guide
    conditions: dict[str, Tensor]
    one_step: int | None
    """As `Delta.one_step`; guide and conditions then play no part."""
    recipe: Recipe
    """What all its pictures have in common."""


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    shot: Shot
    states: Tensor

    @property
    def key(self) -> str:
        return self.shot.recipe.key


def run(settings: Settings) -> None:
    model = models.base_model(settings)
    ways, asked = _ways(settings, model), list(_asked(settings, model))
    plan = {side: list(_jobs(settings, side, way.recipe, asked)) for side, way in ways.items()}
    keys = {side: [job.key for job in jobs] for side, jobs in plan.items()}
    kept, size = samples.pictures(settings.paths.shots), settings.sample.shard
    with hands(settings.workers) as others, bar("sample", sum(map(len, plan.values()))) as advance:
        for side, way in ways.items():
            missing, jobs = kept.missing(keys[side]), dict(zip(keys[side], plan[side], strict=True))
            advance.reused(len(plan[side]) - len(missing))
            todo = parts([jobs[key] for key in missing], size)
            if others:
                for part, rows in spread(others, _draw_there, (settings, way), todo, list):
                    kept.add(rows)
                    advance(len(part))
            else:
                for part in todo:
                    kept.add(_draw(settings, model, way, part, advance))
    # Listed before anything is deleted: what the list names is there at any moment.
    samples.write(settings.paths.shots, pd.DataFrame([_row(job.shot) for jobs in plan.values() for job in jobs]))
    kept.settle(*keys.values(), size=size)
    files.keep_only(settings.paths.shots, {settings.paths.shots / samples.LIST, kept.folder})


def _ways(settings: Settings, model: Model) -> dict[Side, Way]:
    concepts = [tokens.load_concept(settings, model, name) for name in settings.targets]
    guide = methods.guide(settings)
    plain, steered = (methods.PLAIN_GUIDE, CFG(scale=guide.scale)), (settings.guide.method, guide)

    def way(folder: Path | None, method: str, guide: Guide) -> Way:
        delta = tensors.load_delta(folder / tensors.DELTA_FILE) if folder else None
        weights, one_step = (weights_of(model, delta), delta.one_step) if delta else ({}, None)
        conditions = guide.conditions(model, concepts)
        recipe = Recipe(
            pipeline=model.pipeline,
            precision=settings.base.dtype,
            weights=digest(dict(weights)),
            states="",
            conditions=digest(conditions),
            guidance=json.dumps({"method": method, **guide.model_dump()} if one_step is None else {"from": one_step}),
            steps=settings.sample.steps if one_step is None else 1,
            noise_seed=0,
            code=provenance.code_digest(sampler.sample, type(guide), libraries=provenance.DRAWING),
        )
        return Way(weights, guide, conditions, one_step, recipe)

    ways: dict[Side, Way] = {"base": way(None, *plain)}
    if settings.sample.champion:
        ways["champion"] = way(Path(models.local_path(settings, settings.sample.champion, "delta")), *plain)
    return ways | {"candidate": way(settings.paths.delta, *steered)}


def _asked(settings: Settings, model: Model) -> Iterator[tuple[Prompt, Tensor]]:
    """Every prompt of the evaluation with its text-encoder states (L, d)."""
    for prompt, pieces in _prompts(settings, model):
        # One at a time: in company, its states could differ in the last bits, and a new prompt would rename the others.
        with torch.no_grad():
            yield prompt, encode.encode(model, [pieces]).states[0]


def _prompts(settings: Settings, model: Model) -> Iterator[tuple[Prompt, encode.Prompt]]:
    split = settings.sample.split
    written = [p for n in settings.targets for p in prompts.read(settings.concepts[n].prompts, split, n)]
    written += [p for p in prompts.read(settings.paths.prompts, split, "")]
    yield from ((p, (p.text,)) for p in written)
    for name in settings.targets:
        # Whichever of the two was erased: a word that the token took along, or left behind, is worth knowing.
        alone: dict[Role, Concept] = {"word": encode.concept_from_words(model, name, settings.concepts[name].words)}
        if settings.sample.per_prompt.get("token", 1):
            alone["token"] = encode.concept_from_token(model, tokens.load_token(settings, name))
        for role, c in alone.items():
            for i, (text, pieces) in enumerate(zip(c.texts, c.pieces, strict=True)):
                yield Prompt(f"{name}-{role}-{i}", text, role, "", name), pieces
    for path in sorted(settings.paths.attacks.glob("*.safetensors")):
        found, facts = tensors.load(path)
        for i, rows in enumerate(found["vectors"]):
            name = f"{path.stem}-{i}"
            yield Prompt(name, f"<{name}>", "attack", "", facts["concept"]), (rows,)


def _jobs(settings: Settings, side: Side, common: Recipe, asked: Sequence[tuple[Prompt, Tensor]]) -> Iterator[Job]:
    for prompt, states in asked:
        c = digest({"c": states})
        for i in range(settings.sample.per_prompt.get(prompt.role, 1)):
            seed = derive(settings.seed, "sample", prompt.id, i)
            yield Job(Shot(side, prompt, i, replace(common, states=c, noise_seed=seed)), states)


def _draw(
    settings: Settings, model: Model, way: Way, jobs: Sequence[Job], advance: Callable[[int], None]
) -> pd.DataFrame:
    drawn = sampler.sample(
        model,
        torch.stack([job.states for job in jobs]),
        [job.shot.recipe.noise_seed for job in jobs],
        guide=way.guide,
        conditions=way.conditions,
        steps=settings.sample.steps,
        weights=way.weights,
        one_step=way.one_step,
        batch=settings.sample.batch,
        on_batch=advance,
    )
    return pd.DataFrame({"key": [job.key for job in jobs], "image": [images.encode(p) for p in drawn]})


def _draw_there(common: tuple[Settings, Way], jobs: Sequence[Job]) -> pd.DataFrame:
    """In another process, with the base model as it lies there."""
    settings, way = common
    model = own("model", settings.base.model_dump_json(), lambda: models.base_model(settings))
    if model.pipeline != way.recipe.pipeline:
        raise ModelError(
            f"{settings.base.model} is another model on {socket.gethostname()} than here", hint="deleatur check, there"
        )
    return _draw(settings, model, way, jobs, lambda n: None)


def _row(shot: Shot) -> dict[str, object]:
    recipe = {"key": shot.recipe.key, **asdict(shot.recipe)}
    return {"side": shot.side, **asdict(shot.prompt), "index": shot.index, **recipe}
