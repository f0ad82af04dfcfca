"""Prompts → text-encoder states. A prompt is a sequence of words and soft vectors; both give the same values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.errors import DataError
from deleatur.records.model import Concept, SoftToken

Prompt = Sequence[str | Tensor]
"""("a photo of ", vectors (v, d)): text fragments and rows that stand for tokens."""


@dataclass(frozen=True)
class Encoded:
    """states (n, L, d); per prompt the positions of its soft vectors (or of all its words) and of its end token."""

    states: Tensor
    content: tuple[tuple[int, ...], ...]
    end: tuple[int, ...]


@contextmanager
def spliced(text_encoder: Any, where: Tensor, rows: Tensor) -> Iterator[None]:
    """Inside, the input embeddings at mask `where` (n, L) are replaced by `rows` (where.sum(), d), with gradient.

    A hook on the embedding table instead of a longer table: no tensor of the encoder changes, and only the rows
    carry a gradient.
    """

    def replace(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output.masked_scatter(where.unsqueeze(-1), rows.to(output))

    handle = text_encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def encode(model: Model, prompts: Sequence[Prompt]) -> Encoded:
    """Last hidden states of the text encoder, each prompt padded to L.

    Gradients flow to soft vectors that require them. Raises DataError when a prompt is longer than L.
    """
    tok, length = model.tokenizer, model.length
    ids = torch.full((len(prompts), length), tok.pad_token_id)
    soft = torch.zeros(len(prompts), length, dtype=torch.bool)
    rows: list[Tensor] = []
    content: list[tuple[int, ...]] = []
    end: list[int] = []
    for n, prompt in enumerate(prompts):
        sentence: list[int] = [tok.bos_token_id]
        places: list[int] = []
        for part in prompt:
            if isinstance(part, str):
                sentence += tok(part, add_special_tokens=False).input_ids
            else:
                places += range(len(sentence), len(sentence) + len(part))
                sentence += [tok.unk_token_id if tok.unk_token_id is not None else tok.pad_token_id] * len(part)
                rows.append(part)
        if len(sentence) >= length:
            said = "".join(part if isinstance(part, str) else "<token>" for part in prompt)
            raise DataError(
                f"“{said[:60]}” has {len(sentence) - 1} tokens; the text encoder takes {length - 2}",
                hint="shorten it; where it lists a concept's words or tokens, an eraser with `order: single` takes "
                "them one at a time",
            )
        ids[n, : len(sentence) + 1] = torch.tensor([*sentence, tok.eos_token_id])
        soft[n, places] = True
        content.append(tuple(places) or tuple(range(1, len(sentence))))
        end.append(len(sentence))
    ids, soft = ids.to(model.device), soft.to(model.device)
    if rows:
        with spliced(model.text_encoder, soft, torch.cat([r.to(model.device) for r in rows])):
            states = model.text_encoder(ids).last_hidden_state
    else:
        states = model.text_encoder(ids).last_hidden_state
    return Encoded(states, tuple(content), tuple(end))


@torch.no_grad()
def encode_text(model: Model, texts: Sequence[str]) -> Tensor:
    """States (n, L, d) of plain prompts; the empty prompt is ""."""
    return encode(model, [(t,) for t in texts]).states


BARE = ("{}",)
"""A description that stands alone, as the papers have it."""


@torch.no_grad()
def concept_from_words(model: Model, name: str, words: Sequence[str], sentences: Sequence[str] = BARE) -> Concept:
    """A concept as the text-only methods know it: each of its words, in each of the sentences."""
    texts, pieces = _told([(w, w) for w in words], sentences)
    return _concept(model, name, "words", texts, pieces)


@torch.no_grad()
def concept_from_token(model: Model, token: SoftToken, sentences: Sequence[str] = BARE) -> Concept:
    """A concept as HFI knows it: each of its soft tokens, in each of the sentences."""
    texts, pieces = _told(list(zip(token.placeholders, token.vectors, strict=True)), sentences)
    return _concept(model, token.concept, "token", texts, pieces)


def _told(
    named: Sequence[tuple[str, str | Tensor]], sentences: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, str | Tensor, str]]]:
    """Text and (before, description, after) of every description in every sentence."""
    both = [(name, what, *s.partition("{}")[::2]) for name, what in named for s in sentences]
    return tuple(f"{b}{name}{a}" for name, _, b, a in both), [(b, what, a) for _, what, b, a in both]


def _concept(
    model: Model,
    name: str,
    source: Literal["words", "token"],
    texts: tuple[str, ...],
    pieces: Sequence[tuple[str, str | Tensor, str]],
) -> Concept:
    e = encode(model, pieces)
    starts = [1 + tokens_of(model, before) for before, _, _ in pieces]
    content = tuple(tuple(range(i, i + tokens_of(model, p[1]))) for i, p in zip(starts, pieces, strict=True))
    return Concept(name, source, texts, tuple(pieces), e.states, content, e.end)


def tokens_of(model: Model, *parts: str | Tensor) -> int:
    """How many of the text encoder's L places words and soft rows take."""
    ids = model.tokenizer
    return sum(len(p) if isinstance(p, Tensor) else len(ids(p, add_special_tokens=False).input_ids) for p in parts)


@torch.no_grad()
def instead(model: Model, concept: Concept, text: str) -> Tensor:
    """States (n, L, d) of the concept's sentences with `text` in its place; "" empties the whole sentence."""
    if not text:
        return encode_text(model, [""]).expand(len(concept.states), -1, -1)
    return encode(model, [(before, text, after) for before, _, after in concept.pieces]).states


@torch.no_grad()
def joined(model: Model, concepts: Sequence[Concept]) -> Tensor:
    """E("c₁, c₂, …, c_K") (1, L, d): every description of every concept in one sentence."""
    return encode(model, [_list([p for c in concepts for p in c.pieces])]).states


@torch.no_grad()
def listed(model: Model, concepts: Sequence[Concept]) -> Tensor:
    """(s, L, d): every description of every concept in as few sentences as L allows, equally long; as a rule s = 1.

    What guides steer away from: one sentence, as published, or the mean of its parts where it is too long. No
    concepts: E("").
    """
    every, room = [p for c in concepts for p in c.pieces], model.length - 2  # without start and end
    for s in range(1, len(every) + 1):
        cuts = [len(every) * i // s for i in range(s + 1)]
        sentences = [_list(every[a:b]) for a, b in pairwise(cuts)]
        if all(tokens_of(model, *sentence) <= room for sentence in sentences):
            return encode(model, sentences).states
    return encode(model, [()]).states


def _list(prompts: Sequence[Prompt]) -> Prompt:
    """ "c₁, c₂, …" """
    sentence: list[str | Tensor] = []
    for prompt in prompts:
        sentence += [", ", *prompt] if sentence else prompt
    return sentence


def embedding_of(model: Model, word: str) -> Tensor:
    """The input-embedding row (d,) of a word; the mean of its rows when the tokenizer splits it."""
    ids = model.tokenizer(word, add_special_tokens=False).input_ids
    table: Tensor = model.text_encoder.get_input_embeddings().weight
    return table[ids].mean(0).detach().float()


def nearest_words(model: Model, row: Tensor, n: int = 4) -> list[str]:
    """The vocabulary words whose embedding rows have the largest cosine with `row` (d,): a token explained."""
    table = model.text_encoder.get_input_embeddings().weight.float()
    order = torch.nn.functional.cosine_similarity(table, row.to(table), dim=-1).argsort(descending=True)
    words = (model.tokenizer.convert_ids_to_tokens(int(i)) for i in order)
    whole = (w.removesuffix("</w>") for w in words if w.endswith("</w>") and len(w) > 5)
    return [w for w, _ in zip(whole, range(n), strict=False)]
