"""Checks that every prompt of a run fits the text encoder, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path

import torch

from deleatur.artifacts import prompts
from deleatur.config import methods
from deleatur.config.settings import Settings, merged
from deleatur.detectors.zero_shot import ZeroShot
from deleatur.diffusion.encode import (
    PromptParts,
    check_lengths,
    fill_templates,
    join_prompts,
    word_token_ids,
)
from deleatur.diffusion.pipelines import TextLimits
from deleatur.erasers.sdd import SDD
from deleatur.errors import error_context
from deleatur.metrics.clip_score import ClipScore
from deleatur.records.sampling import Prompt
from deleatur.stages import ingest
from deleatur.training.textual_inversion import prompt_templates

LocatedPrompt = tuple[str, PromptParts]
"""Location of a prompt (setting, or file and id), for messages, and the prompt's parts."""


def check_prompt_lengths(settings: Settings, limits: TextLimits) -> None:
    """Tokenizes what the run encodes: words, tokens, replacements and prompts, in all their templates.

    Raises DataError with the place of a prompt that is longer than the text encoder takes, SettingsError for an
    initializer token that its vocabulary lacks.
    """
    concepts = dict.fromkeys([*settings.targets, *(settings.compare.concepts if settings.compare else ())])
    for name in concepts:
        with error_context(f"concepts.{name}"):
            word_token_ids(limits, settings.concepts[name].initializer_token)
    _check(limits, (item for name in concepts for item in _descriptions(settings, name)))
    _check(limits, ((place, (prompt.text,)) for place, prompt in _prompt_files(settings, list(concepts))))
    check_eraser_prompts(settings, limits)
    if settings.emergency:
        with error_context("emergency"):
            erase = {"erase": settings.emergency.erase}
            check_eraser_prompts(Settings.of(merged(settings.model_dump(by_alias=True), erase), "emergency"), limits)


def check_clip_texts(settings: Settings, folder_of: Callable[[str], Path | None]) -> None:
    """As `check_prompt_lengths`, for the texts that CLIP models compare images with; they may take fewer tokens.

    folder_of: the folder of a CLIP model, by its address; None if it is not on this disk.
    """
    concepts = dict.fromkeys([*settings.targets, *(settings.compare.concepts if settings.compare else ())])
    if folder := folder_of(settings.reward.clip):
        limits, scores = TextLimits.from_clip(folder), methods.metrics(settings).items()
        _check(
            limits, ((f"reward.clip, concepts.{n}.words", (w,)) for n in concepts for w in settings.concepts[n].words)
        )
        prefixes = {f"evaluate.metrics.{name}": m.prefix for name, m in scores if isinstance(m, ClipScore)}
        scored = [(location, p) for location, p in _prompt_files(settings, list(concepts)) if not p.concept]
        for (place, prefix), (location, prompt) in product(prefixes.items(), scored):
            _check(limits, [(f"{place}, {location}", (prefix + prompt.text,))])
    for name, detector in methods.detectors(settings).items():
        if isinstance(detector, ZeroShot) and (folder := folder_of(detector.path)):
            place = f"evaluate.detectors.{name}.labels"
            _check(TextLimits.from_clip(folder), ((place, (label,)) for label in detector.labels))


def check_eraser_prompts(settings: Settings, limits: TextLimits) -> None:
    """As `check_prompt_lengths`, for the prompts that only the selected eraser forms."""
    _check(limits, _joined(settings))
    _check(limits, _replacements(settings))


def _check(limits: TextLimits, located: Iterable[LocatedPrompt]) -> None:
    for location, prompt in located:
        with error_context(location):
            check_lengths(limits, [prompt])


def _descriptions(settings: Settings, concept: str) -> Iterator[LocatedPrompt]:
    """Words and soft tokens of a concept in its templates; soft tokens, and soft prompts of attacks, in those of the
    inversion, which for a style contain the prompts of the rated images.
    """
    spec, setting = settings.concepts[concept], f"concepts.{concept}"
    for word, template in product(spec.words, spec.prompt_templates):
        yield f"{setting}.words, prompt_templates", fill_templates([(word, word)], [template])[1][0]
    token = _soft_token(settings, concept)
    for template in spec.prompt_templates:
        yield f"{setting}.prompt_templates with a token", fill_templates([("<token>", token)], [template])[1][0]
    is_style = spec.learnable_property == "style"
    rated = sorted(set(ingest.current_answers(settings, concept)["prompt"])) if is_style else [""]
    attacks = methods.attacks(settings, None)
    soft = [("invert", token), *((f"attack.methods.{name}", _zeros(attack)) for name, attack in attacks.items())]
    for prompt, (what, rows) in product(rated, soft):
        for template in prompt_templates(spec.learnable_property, [prompt])[0]:
            of_image = f", for an image rated with the prompt {prompt!r}" if prompt else ""
            yield (
                f"{what} with {setting}.learnable_property{of_image}",
                fill_templates([("<token>", rows)], [template])[1][0],
            )


def _joined(settings: Settings) -> Iterator[LocatedPrompt]:
    """The prompt that lists all words or tokens of all targets, if the eraser uses one."""
    eraser = methods.eraser(settings)
    if not isinstance(eraser, SDD) or eraser.order == "single":
        return
    parts: list[PromptParts] = []
    for name in settings.targets:
        spec = settings.concepts[name]
        if settings.erase.source == "words":
            described: list[tuple[str, str | torch.Tensor]] = [(word, word) for word in spec.words]
        else:
            described = [("<token>", _soft_token(settings, name))] * methods.inverter(
                settings, name
            ).workload().num_tokens
        parts += fill_templates(described, spec.prompt_templates[:1])[1]  # as `encode.list_descriptions`
    yield f"erase.{settings.erase.method}.order {eraser.order}, all words or tokens in one prompt", join_prompts(parts)


def _replacements(settings: Settings) -> Iterator[LocatedPrompt]:
    """The alternatives that an eraser replaces words or tokens with."""
    alternatives: dict[str, str] = getattr(methods.eraser(settings), "alternatives", {})
    for name in settings.targets:
        if text := alternatives.get(name):
            for prompt in fill_templates([(text, text)], settings.concepts[name].prompt_templates)[1]:
                yield f"erase.{settings.erase.method}.alternatives.{name}", prompt


def _prompt_files(settings: Settings, concepts: list[str]) -> Iterator[tuple[str, Prompt]]:
    """Location, and prompt, of every prompt of the splits that stages, benchmark and canary sample from."""
    splits = {"dev", settings.sample.split, settings.canary.split}
    splits |= {settings.compare.split} if settings.compare else set()
    for name in [*concepts, ""]:
        path = settings.concepts[name].prompts if name else settings.paths.prompts
        yield from ((f"{path}, prompt {p.id}", p) for p in prompts.read_splits(path, splits, name))


def _soft_token(settings: Settings, concept: str) -> torch.Tensor:
    """A placeholder (v, 1) for a soft token of the concept: only its number of rows v counts for a length."""
    return _zeros(methods.inverter(settings, concept))


def _zeros(method: object) -> torch.Tensor:
    return torch.zeros(getattr(getattr(method, "training", None), "num_vectors", 1), 1)
