"""Prompts → text-encoder states. A prompt is a sequence of text and soft-token vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.errors import DataError, SettingsError
from deleatur.records.model import Concept, ConceptSource, SoftToken

PromptParts = Sequence[str | Tensor]
"""("a photo of ", vectors (v, d)): text, and embedding rows in place of tokens."""

BARE_TEMPLATE = ("{}",)
"""The description alone is the prompt, as in the papers."""


@dataclass(frozen=True)
class EncodedPrompts:
    """Text-encoder states of n prompts, and the positions of their tokens."""

    states: Tensor
    """(n, L, d)."""
    content_positions: tuple[tuple[int, ...], ...]
    """Per prompt: of its soft vectors or, without any, of all its tokens between start and end token."""
    end_positions: tuple[int, ...]
    """Per prompt: of its end-of-text token."""


@contextmanager
def replaced_embeddings(text_encoder: Any, mask: Tensor, rows: Tensor) -> Iterator[None]:
    """Inside, `rows` (mask.sum(), d) replace the input embeddings where `mask` (n, L) is set, with gradient.

    A hook on the embedding table instead of a longer table: no tensor of the encoder changes, and only the rows
    carry a gradient.
    """

    def replace(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output.masked_scatter(mask.unsqueeze(-1), rows.to(output))

    handle = text_encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def encode(model: Model, prompts: Sequence[PromptParts]) -> EncodedPrompts:
    """Last hidden states of the text encoder, each prompt padded to L.

    Gradients flow to soft vectors that require them. Raises DataError if a prompt is longer than L.
    """
    ids = torch.full((len(prompts), model.max_tokens), model.tokenizer.pad_token_id)
    mask = torch.zeros(len(prompts), model.max_tokens, dtype=torch.bool)
    content: list[tuple[int, ...]] = []
    end: list[int] = []
    for n, prompt in enumerate(prompts):
        tokens, soft = _tokenize(model, prompt)
        ids[n, : len(tokens)] = torch.tensor(tokens)
        mask[n, soft] = True
        end.append(len(tokens) - 1)
        content.append(tuple(soft) or tuple(range(1, end[-1])))
    ids, mask = ids.to(model.device), mask.to(model.device)
    rows = [part.to(model.device) for prompt in prompts for part in prompt if isinstance(part, Tensor)]
    if rows:
        with replaced_embeddings(model.text_encoder, mask, torch.cat(rows)):
            states = model.text_encoder(ids).last_hidden_state
    else:
        states = model.text_encoder(ids).last_hidden_state
    return EncodedPrompts(states, tuple(content), tuple(end))


class HasTokenizer(Protocol):
    """What the length of a prompt depends on: a `Model`, or `pipelines.TextLimits`, which needs no weights."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def max_tokens(self) -> int: ...


def check_lengths(model: HasTokenizer, prompts: Sequence[PromptParts]) -> None:
    """Raises DataError if a prompt is longer than the text encoder's L, without encoding any."""
    for prompt in prompts:
        _tokenize(model, prompt)


def _tokenize(model: HasTokenizer, prompt: PromptParts) -> tuple[list[int], list[int]]:
    """Token ids with start and end token, and the positions of soft rows, which hold a placeholder id."""
    tokenizer = model.tokenizer
    placeholder = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else tokenizer.pad_token_id
    ids: list[int] = [tokenizer.bos_token_id]
    soft: list[int] = []
    for part in prompt:
        if isinstance(part, str):
            ids += tokenizer(part, add_special_tokens=False).input_ids
        else:
            soft += range(len(ids), len(ids) + len(part))
            ids += [placeholder] * len(part)
    if len(ids) >= model.max_tokens:
        text = "".join(part if isinstance(part, str) else "<token>" for part in prompt)
        raise DataError(
            f"“{text[:60]}” has {len(ids) - 1} tokens; the text encoder takes {model.max_tokens - 2}",
            hint="shorten it; if it lists a concept's words or tokens, an eraser with `order: single` takes "
            "them one at a time",
        )
    return [*ids, tokenizer.eos_token_id], soft


@torch.no_grad()
def encode_texts(model: Model, texts: Sequence[str]) -> EncodedPrompts:
    """States and positions of plain prompts, without gradient; the empty prompt is ""."""
    return encode(model, [(t,) for t in texts])


def encode_text(model: Model, texts: Sequence[str]) -> Tensor:
    """States (n, L, d) of plain prompts; the empty prompt is ""."""
    return encode_texts(model, texts).states


@torch.no_grad()
def concept_from_words(
    model: Model, name: str, words: Sequence[str], prompt_templates: Sequence[str] = BARE_TEMPLATE
) -> Concept:
    """A concept specified by words: each word in each of the templates."""
    prompts, parts = fill_templates([(w, w) for w in words], prompt_templates)
    return _concept(model, name, "words", prompts, parts)


@torch.no_grad()
def concept_from_token(model: Model, token: SoftToken, prompt_templates: Sequence[str] = BARE_TEMPLATE) -> Concept:
    """A concept specified by soft tokens: each token in each of the templates."""
    prompts, parts = fill_templates(list(zip(token.placeholders, token.vectors, strict=True)), prompt_templates)
    return _concept(model, token.concept, "token", prompts, parts)


def fill_templates(
    descriptions: Sequence[tuple[str, str | Tensor]], templates: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, str | Tensor, str]]]:
    """Readable prompt and (before, description, after) of each (name, description) in each template."""
    filled = [(name, part, *t.partition("{}")[::2]) for name, part in descriptions for t in templates]
    prompts = tuple(f"{before}{name}{after}" for name, _, before, after in filled)
    return prompts, [(before, part, after) for _, part, before, after in filled]


def _concept(
    model: Model,
    name: str,
    source: ConceptSource,
    prompts: tuple[str, ...],
    prompt_parts: Sequence[tuple[str, str | Tensor, str]],
) -> Concept:
    encoded = encode(model, prompt_parts)
    starts = [1 + count_tokens(model, before) for before, _, _ in prompt_parts]
    lengths = [count_tokens(model, description) for _, description, _ in prompt_parts]
    content = tuple(tuple(range(i, i + n)) for i, n in zip(starts, lengths, strict=True))
    return Concept(name, source, prompts, tuple(prompt_parts), encoded.states, content, encoded.end_positions)


def count_tokens(model: Model, *parts: str | Tensor) -> int:
    """Number of token positions that text and soft rows take, without start and end token."""
    tokenize = partial(model.tokenizer, add_special_tokens=False)
    return sum(len(part) if isinstance(part, Tensor) else len(tokenize(part).input_ids) for part in parts)


@torch.no_grad()
def replace_description(model: Model, concept: Concept, text: str) -> Concept:
    """The concept's prompts with `text` in place of the description."""
    parts = [(str(before), text, str(after)) for before, _, after in concept.prompt_parts]
    return _concept(model, concept.name, "words", tuple(map("".join, parts)), parts)


@torch.no_grad()
def encode_replacement(model: Model, concept: Concept, text: str) -> Tensor:
    """States (n, L, d) of the concept's prompts with `text` in place of the description; "" gives the empty prompt."""
    if not count_tokens(model, text):  # empty or white space
        return encode_text(model, [""]).expand(len(concept.states), -1, -1)
    return replace_description(model, concept, text).states


@torch.no_grad()
def encode_joint_prompt(model: Model, concepts: Sequence[Concept]) -> Tensor:
    """E("c₁, c₂, …, c_K") (1, L, d): all descriptions of all concepts in one prompt, each in its first template."""
    return encode(model, [join_prompts(list_descriptions(concepts))]).states


@torch.no_grad()
def encode_concept_list(model: Model, concepts: Sequence[Concept]) -> Tensor:
    """(s, L, d): all descriptions of all concepts, each in its first template, in as few prompts of similar length as L
    allows; usually s = 1.

    For guides that steer away from concepts: one prompt, as published, or several, whose predictions the sampler
    averages, if one is too long. Without concepts: E("").
    """
    parts, limit = list_descriptions(concepts), model.max_tokens - 2  # without start and end token
    for s in range(1, len(parts) + 1):
        cuts = [len(parts) * i // s for i in range(s + 1)]
        prompts = [join_prompts(parts[a:b]) for a, b in pairwise(cuts)]
        if all(count_tokens(model, *prompt) <= limit for prompt in prompts):
            return encode(model, prompts).states
    return encode(model, [()]).states


def list_descriptions(concepts: Sequence[Concept]) -> list[PromptParts]:
    """The prompts of all words or tokens in the first template of each concept: a list names each of them once."""
    return [p for c in concepts for p in c.prompt_parts if p[::2] == c.prompt_parts[0][::2]]


def join_prompts(prompts: Sequence[PromptParts]) -> PromptParts:
    """Prompts as one, separated by commas: "c₁, c₂, …"."""
    joined: list[str | Tensor] = []
    for prompt in prompts:
        joined += [", ", *prompt] if joined else prompt
    return joined


def word_embedding(model: Model, word: str) -> Tensor:
    """The input-embedding row (d,) of a word; the mean of its rows when the tokenizer splits it.

    Raises SettingsError for a word without any token, whose mean would be NaN.
    """
    table: Tensor = model.text_encoder.get_input_embeddings().weight
    return table[word_token_ids(model, word)].mean(0).detach().float()


def word_token_ids(model: HasTokenizer, word: str) -> list[int]:
    """Token ids of a word. Raises SettingsError for a word without any token."""
    ids: list[int] = model.tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise SettingsError(
            f"concepts.*.initializer_token: expected a word of the text encoder's vocabulary, got {word!r}",
            hint="a word close to the concept, object for example; then: deleatur check",
        )
    return ids


def nearest_words(model: Model, row: Tensor, n: int = 4) -> list[str]:
    """The n vocabulary words whose embedding rows have the largest cosine with `row` (d,)."""
    table = model.text_encoder.get_input_embeddings().weight.float()
    order = torch.nn.functional.cosine_similarity(table, row.to(table), dim=-1).argsort(descending=True)
    tokens = (model.tokenizer.convert_ids_to_tokens(int(i)) for i in order)
    # Tokens that end a word and have at least two letters; others are fragments.
    words = (t.removesuffix("</w>") for t in tokens if t.endswith("</w>") and len(t) > 5)
    return [word for word, _ in zip(words, range(n), strict=False)]
