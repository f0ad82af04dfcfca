"""delta, prompts, tokens, attacks → samples: base, champion and candidate sampled from the same noise.

Only the candidate is sampled with the guide. The base is the unmodified model and a champion a version of the registry,
which holds weights alone: both are sampled with plain guidance of the same scale.

An image is identified by the digest of everything that determines it and is never sampled twice: a killed run resumes
at the current shard, a new prompt adds its own images, and a new candidate leaves the base model's in place.
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
from deleatur.diffusion.model import Model, digest_tensors
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.predict import Weights
from deleatur.errors import ModelError
from deleatur.guides import Guide
from deleatur.guides.cfg import CFG
from deleatur.maths.seeds import derive
from deleatur.records.model import Concept
from deleatur.records.sampling import Prompt, Recipe, Role, Sample, Variant
from deleatur.runtime import models, provenance
from deleatur.runtime.distributed import dask_client, map_batches, worker_cache
from deleatur.runtime.progress import bar
from deleatur.storage import files, images, samples, tensors
from deleatur.storage.cache import chunked


@dataclass(frozen=True)
class SamplingConfig:
    """How one variant is sampled."""

    weights: Weights
    """Edited tensors, in place of the base model's."""
    guide: Guide
    conditions: dict[str, Tensor]
    one_step: int | None
    """As `Delta.one_step`; guide and conditions are then unused."""
    recipe: Recipe
    """The fields that all its samples share."""


@dataclass(frozen=True)
class _AttackMetadata:
    """What is read of the metadata of a soft prompt."""

    concept: str
    attack: str


@dataclass(frozen=True)
class SampleRequest:
    """One sample to generate, with its prompt's text-encoder states (L, d)."""

    sample: Sample
    states: Tensor

    @property
    def key(self) -> str:
        return self.sample.recipe.key


def run(settings: Settings) -> None:
    model = models.base_model(settings)
    configs, prompt_states = sampling_configs(settings, model), list(_encoded_prompts(settings, model))
    requests = {v: list(_requests(settings, v, config.recipe, prompt_states)) for v, config in configs.items()}
    keys = {v: [request.key for request in of_variant] for v, of_variant in requests.items()}
    cache, size = samples.image_cache(settings.paths.samples), settings.sample.shard_size
    with dask_client(settings.workers) as client, bar("sample", sum(map(len, requests.values()))) as advance:
        for variant, config in configs.items():
            missing, request_of = cache.missing(keys[variant]), dict(zip(keys[variant], requests[variant], strict=True))
            advance.reused(len(keys[variant]) - len(missing))
            shards = chunked([request_of[key] for key in missing], size)
            if client:
                plugins = [type(config.guide)]
                for shard, rows in map_batches(client, sample_on_worker, (settings, config), shards, list, plugins):
                    cache.add(rows)
                    advance(len(shard))
            else:
                for shard in shards:
                    cache.add(_sample_shard(settings, model, config, shard, advance))
    # The listing is written before anything is deleted, so that the images it names exist at every moment.
    listing = pd.DataFrame([_listing_row(r.sample) for of_variant in requests.values() for r in of_variant])
    samples.write_listing(settings.paths.samples, listing)
    cache.compact(*keys.values(), size=size)
    files.keep_only(settings.paths.samples, {settings.paths.samples / samples.LISTING, cache.folder})


def sampling_configs(settings: Settings, model: Model) -> dict[Variant, SamplingConfig]:
    """The base model and the champion with plain guidance, the candidate with the guide of the settings."""
    concepts = [tokens.load_concept(settings, model, name) for name in settings.targets]
    guide = methods.guide(settings)
    plain, guided = (methods.PLAIN_GUIDE, CFG(scale=guide.scale)), (settings.guide.method, guide)

    def config(delta_folder: Path | None, method: str, guide: Guide) -> SamplingConfig:
        delta = tensors.load_delta(delta_folder / tensors.DELTA_FILE) if delta_folder else None
        weights, one_step = (edited_weights(model, delta), delta.one_step) if delta else ({}, None)
        conditions = guide.conditions(model, concepts)
        recipe = Recipe(
            pipeline=model.pipeline_digest,
            precision=settings.base.dtype,
            weights=digest_tensors(dict(weights)),
            states="",
            conditions=digest_tensors(conditions),
            guidance=json.dumps({"method": method, **guide.model_dump()} if one_step is None else {"from": one_step}),
            steps=settings.sample.steps if one_step is None else 1,
            noise_seed=0,
            code=provenance.digest_code(sampler.sample, type(guide), libraries=provenance.SAMPLING_LIBRARIES),
        )
        return SamplingConfig(weights, guide, conditions, one_step, recipe)

    configs: dict[Variant, SamplingConfig] = {"base": config(None, *plain)}
    if settings.sample.champion:
        configs["champion"] = config(Path(models.local_path(settings, settings.sample.champion, "delta")), *plain)
    return configs | {"candidate": config(settings.paths.delta, *guided)}


def _encoded_prompts(settings: Settings, model: Model) -> Iterator[tuple[Prompt, Tensor]]:
    """Every prompt of the evaluation with its text-encoder states (L, d)."""
    for prompt, parts in _prompts(settings, model):
        # One at a time: in a batch, states can differ in the last bits, and a new prompt would rename all images.
        with torch.no_grad():
            yield prompt, encode.encode(model, [parts]).states[0]


def _prompts(settings: Settings, model: Model) -> Iterator[tuple[Prompt, encode.PromptParts]]:
    yield from ((p, (p.text,)) for p in prompts.read_all(settings, settings.sample.split))
    for name in settings.targets:
        # Both, whichever was erased: the report shows whether a word survives its token, or the other way round.
        concepts: dict[Role, Concept] = {"word": encode.concept_from_words(model, name, settings.concepts[name].words)}
        if settings.sample.images_per_prompt.get("token", 1) and tokens.is_learned(settings, name):
            concepts["token"] = encode.concept_from_token(model, tokens.load_token(settings, name))
        for role, concept in concepts.items():
            for i, (text, parts) in enumerate(zip(concept.prompts, concept.prompt_parts, strict=True)):
                yield Prompt(f"{name}-{role}-{i}", text, role, "", name), parts
    for path in sorted(settings.paths.attacks.glob("*.safetensors")):
        loaded, metadata = tensors.load(path, _AttackMetadata)
        for i, rows in enumerate(loaded["vectors"]):
            name = f"{path.stem}-{i}"
            yield Prompt(name, f"<{name}>", "attack", "", metadata.concept), (rows,)


def _requests(
    settings: Settings, variant: Variant, shared: Recipe, prompt_states: Sequence[tuple[Prompt, Tensor]]
) -> Iterator[SampleRequest]:
    for prompt, states in prompt_states:
        states_digest = digest_tensors({"c": states})
        for i in range(settings.sample.images_per_prompt.get(prompt.role, 1)):
            seed = derive(settings.seed, "sample", prompt.id, i)
            recipe = replace(shared, states=states_digest, noise_seed=seed)
            yield SampleRequest(Sample(variant, prompt, i, recipe), states)


def _sample_shard(
    settings: Settings,
    model: Model,
    config: SamplingConfig,
    requests: Sequence[SampleRequest],
    advance: Callable[[int], None],
) -> pd.DataFrame:
    """Rows of the image cache."""
    sampled = sampler.sample(
        model,
        torch.stack([request.states for request in requests]),
        [request.sample.recipe.noise_seed for request in requests],
        guide=config.guide,
        conditions=config.conditions,
        steps=settings.sample.steps,
        weights=config.weights,
        one_step=config.one_step,
        batch_size=settings.sample.batch_size,
        on_batch=advance,
    )
    return pd.DataFrame({"key": [r.key for r in requests], "image": [images.encode(image) for image in sampled]})


def sample_on_worker(common: tuple[Settings, SamplingConfig], requests: Sequence[SampleRequest]) -> pd.DataFrame:
    """Runs in a worker process, which loads the base model itself. Raises ModelError when it is another one."""
    settings, config = common
    model = worker_cache("model", settings.base.model_dump_json(), lambda: models.base_model(settings))
    if model.pipeline_digest != config.recipe.pipeline:
        host = socket.gethostname()
        raise ModelError(
            f"{settings.base.model} is another model on {host} than here", hint=f"deleatur check, on {host}"
        )
    return _sample_shard(settings, model, config, requests, lambda n: None)


def _listing_row(sample: Sample) -> dict[str, object]:
    recipe = {"key": sample.recipe.key, **asdict(sample.recipe)}
    return {"variant": sample.variant, **asdict(sample.prompt), "index": sample.index, **recipe}
