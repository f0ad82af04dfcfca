"""Warnings about preserved prompts that ask for a target: to preserve them is to keep the concept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from deleatur.artifacts import prompts
from deleatur.config.sections import ConceptSpec
from deleatur.config.settings import Settings
from deleatur.diffusion.clip import Clip

OUTLIER = 3.5
"""Modified z-score from which a value is an outlier (Iglewicz & Hoaglin 1993)."""
ENDINGS = {
    "ves": "f",
    "fes": "f",
    "fe": "f",
    "ies": "y",
    "xes": "x",
    "ches": "ch",
    "shes": "sh",
    "sses": "ss",
    "ss": "ss",
    "s": "",
}
"""Ending of a singular or plural → the ending that both are reduced to; the first match applies."""
MIN_PROMPTS = 8
"""Minimum number of prompts: the median and MAD of fewer mean little."""


def naming_targets(settings: Settings) -> Iterator[str]:
    """A warning for each preserved prompt that contains a word or a detector label of a target."""
    for concept, spec, preserved in _preserved(settings):
        phrases = {phrase: _stems(phrase) for phrase in _phrases(spec)}
        for prompt in preserved:
            stems = _stems(prompt)
            named = [phrase for phrase, words in phrases.items() if _contains(stems, words)]
            if named:
                yield f"the preserved prompt {prompt!r} names the target {concept} ({', '.join(named)})"


def similar_to_targets(settings: Settings, clip: Clip) -> Iterator[str]:
    """A warning for each preserved prompt that is far closer to a target than most, by CLIP's text embeddings.

    Similarities of one CLIP model are not comparable with another's, so a prompt is judged by its modified z-score
    among all preserved prompts: 0.6745 (s − median s) / MAD of s, its highest cosine with a word or label.
    """
    for concept, spec, preserved in _preserved(settings):
        if len(preserved) < MIN_PROMPTS:
            continue
        similarity = (clip.embed_texts(preserved) @ clip.embed_texts(_phrases(spec)).T).max(1).values.double()
        deviation = similarity - similarity.quantile(0.5)
        z = 0.6745 * deviation / deviation.abs().quantile(0.5).clamp(min=1e-6)
        for i in torch.nonzero(z > OUTLIER).flatten().tolist():
            yield (
                f"the preserved prompt {preserved[i]!r} is close to the target {concept} "
                f"(CLIP similarity {similarity[i]:.2f}, median {similarity.quantile(0.5):.2f})"
            )


def _preserved(settings: Settings) -> Iterator[tuple[str, ConceptSpec, list[str]]]:
    preserved = list(dict.fromkeys(prompts.preserved_prompts(settings)))
    yield from ((name, settings.concepts[name], preserved) for name in settings.targets)


def _phrases(spec: ConceptSpec) -> list[str]:
    return list(dict.fromkeys([*spec.words, *spec.detection.labels]))


def _stems(text: str) -> list[str]:
    """Words in lower case, of which singular and plural are the same: knife and knives, box and boxes."""
    return [_stem(word) for word in re.findall(r"\w+", text.casefold())]


def _stem(word: str) -> str:
    ending, stem = next((pair for pair in ENDINGS.items() if word.endswith(pair[0])), ("", ""))
    return word.removesuffix(ending) + stem


def _contains(words: Sequence[str], phrase: Sequence[str]) -> bool:
    n = len(phrase)
    return n > 0 and any(list(words[i : i + n]) == list(phrase) for i in range(len(words) - n + 1))
