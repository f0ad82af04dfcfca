"""Checks that every prompt of a run fits the text encoder, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import torch

from deleatur.artifacts import prompts
from deleatur.config import methods
from deleatur.config.settings import Settings, merged
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
from deleatur.stages import ingest
from deleatur.training.textual_inversion import prompt_templates

Located = tuple[str, PromptParts]
"""Where a prompt is defined, and its parts."""


def check_prompt_lengths(settings: Settings, limits: TextLimits) -> None:
    """Tokenize what the run encodes: words, tokens, replacements and prompts, in all their templates.

    Raises DataError with the place of a prompt that is longer than the text encoder takes, SettingsError for an
    initializer token that its vocabulary lacks.
    """
    concepts = dict.fromkeys([*settings.targets, *(settings.compare.concepts if settings.compare else ())])
    for name in concepts:
        with error_context(f"concepts.{name}"):
            word_token_ids(limits, settings.concepts[name].initializer_token)
    _check(limits, (item for name in concepts for item in _descriptions(settings, name)))
    _check(limits, _prompt_files(settings, list(concepts)))
    check_eraser_prompts(settings, limits)
    if settings.emergency:
        with error_context("emergency"):
            erase = {"erase": settings.emergency.erase}
            check_eraser_prompts(Settings.of(merged(settings.model_dump(by_alias=True), erase), "emergency"), limits)


def check_eraser_prompts(settings: Settings, limits: TextLimits) -> None:
    """As `check_prompt_lengths`, for the prompts that only the selected eraser forms."""
    _check(limits, _joined(settings))
    _check(limits, _replacements(settings))


def _check(limits: TextLimits, located: Iterable[Located]) -> None:
    for where, prompt in located:
        with error_context(where):
            check_lengths(limits, [prompt])


def _descriptions(settings: Settings, concept: str) -> Iterator[Located]:
    """Words and soft tokens of a concept in its templates; soft tokens, and soft prompts of attacks, in those of the
    inversion, which for a style contain the prompts of the rated images.
    """
    spec, where = settings.concepts[concept], f"concepts.{concept}"
    for word, template in product(spec.words, spec.prompt_templates):
        yield f"{where}.words, prompt_templates", fill_templates([(word, word)], [template])[1][0]
    token = _soft_token(settings, concept)
    for template in spec.prompt_templates:
        yield f"{where}.prompt_templates with a token", fill_templates([("<token>", token)], [template])[1][0]
    is_style = spec.learnable_property == "style"
    rated = sorted(set(ingest.current_answers(settings, concept)["prompt"])) if is_style else [""]
    attacks = methods.attacks(settings, None)
    soft = [("invert", token), *((f"attack.methods.{name}", _zeros(attack)) for name, attack in attacks.items())]
    for prompt, (what, rows) in product(rated, soft):
        for template in prompt_templates(spec.learnable_property, [prompt])[0]:
            of_image = f", for an image rated with the prompt {prompt!r}" if prompt else ""
            yield (
                f"{what} with {where}.learnable_property{of_image}",
                fill_templates([("<token>", rows)], [template])[1][0],
            )


def _joined(settings: Settings) -> Iterator[Located]:
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
        parts += fill_templates(described, spec.prompt_templates)[1]
    yield f"erase.{settings.erase.method}.order {eraser.order}, all words or tokens in one prompt", join_prompts(parts)


def _replacements(settings: Settings) -> Iterator[Located]:
    """The alternatives that an eraser replaces words or tokens with."""
    alternatives: dict[str, str] = getattr(methods.eraser(settings), "alternatives", {})
    for name in settings.targets:
        if text := alternatives.get(name):
            for prompt in fill_templates([(text, text)], settings.concepts[name].prompt_templates)[1]:
                yield f"erase.{settings.erase.method}.alternatives.{name}", prompt


def _prompt_files(settings: Settings, concepts: list[str]) -> Iterator[Located]:
    """Every prompt of the splits that stages, benchmark and canary sample from."""
    splits = {"dev", settings.sample.split, settings.canary.split}
    splits |= {settings.compare.split} if settings.compare else set()
    for name in [*concepts, ""]:
        path = settings.concepts[name].prompts if name else settings.paths.prompts
        yield from ((f"{path}, prompt {p.id}", (p.text,)) for p in prompts.read_splits(path, splits, name))


def _soft_token(settings: Settings, concept: str) -> torch.Tensor:
    """As many rows as one soft token of the concept has; their width plays no part."""
    return _zeros(methods.inverter(settings, concept))


def _zeros(method: object) -> torch.Tensor:
    return torch.zeros(getattr(getattr(method, "training", None), "num_vectors", 1), 1)
