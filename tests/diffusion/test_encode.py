"""Text encoding of words and soft vectors; diffusers loads our tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model, digest_module
from deleatur.errors import DataError
from deleatur.records.model import SoftToken
from deleatur.storage.tensors import load_token, save_token


def test_prompts_encode_as_in_diffusers(model: Model) -> None:
    pipe = StableDiffusionPipeline(
        **tiny.parts(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    theirs, _ = pipe.encode_prompt("a cat of ink", "cpu", 1, False)
    assert torch.allclose(encode.encode_text(model, ["a cat of ink"]), theirs, atol=1e-6)


def test_a_soft_vector_equal_to_a_words_embedding_encodes_as_the_word(model: Model) -> None:
    row = encode.word_embedding(model, "gun")[None]
    with torch.no_grad():
        soft = encode.encode(model, [("a", row, "of cat")])
    assert torch.allclose(soft.states, encode.encode_text(model, ["a gun of cat"]), atol=1e-6)
    assert soft.content_positions == ((2,),)
    assert soft.end_positions == (5,)


def test_only_soft_vectors_get_a_gradient_and_the_encoder_is_unchanged(model: Model) -> None:
    before = digest_module(model.text_encoder)
    v = torch.zeros(1, tiny.WIDTH, requires_grad=True)
    encode.encode(model, [("a", v)]).states.square().sum().backward()
    assert v.grad is not None
    assert v.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.text_encoder.parameters())
    assert digest_module(model.text_encoder) == before


def test_a_joint_prompt_is_the_comma_separated_list(model: Model) -> None:
    words = encode.concept_from_words(model, "w", ["gun", "sword"])
    assert torch.allclose(
        encode.encode_joint_prompt(model, [words]), encode.encode_text(model, ["gun, sword"]), atol=1e-6
    )
    assert torch.allclose(words.states, encode.encode_text(model, ["gun", "sword"]), atol=1e-6)


def test_a_list_names_each_word_once_whatever_the_templates(model: Model) -> None:
    bare, framed = (
        encode.concept_from_words(model, "w", ["gun", "sword"], t) for t in (("{}",), ("{}", "a {}", "one {}"))
    )
    assert len(framed.states) == 6
    for encoded in (encode.encode_joint_prompt, encode.encode_concept_list):
        assert torch.equal(encoded(model, [framed]), encoded(model, [bare]))


def test_a_concept_list_is_one_prompt_if_it_fits_and_equal_parts_otherwise(model: Model) -> None:
    short, long = (encode.concept_from_words(model, "w", ["gun", "sword", "cat", "dog"] * n) for n in (1, 3))
    assert torch.equal(encode.encode_concept_list(model, [short]), encode.encode_joint_prompt(model, [short]))
    assert torch.equal(
        encode.encode_concept_list(model, [short, short])[:1], encode.encode_joint_prompt(model, [short])
    )
    parts = ["gun, sword, cat, dog"] * 3  # 23 tokens in one prompt, 11 in each of two; the limit is 14
    assert torch.allclose(
        encode.encode_concept_list(model, [long]),
        encode.encode_text(
            model, [", ".join(parts)[: len("gun, sword, cat, dog, gun, sword")], "cat, dog, gun, sword, cat, dog"]
        ),
        atol=1e-6,
    )
    assert torch.equal(encode.encode_concept_list(model, []), encode.encode_text(model, [""]))


def test_a_description_in_a_template_keeps_its_positions(model: Model) -> None:
    templates = ("{}", "a {}, no")
    words = encode.concept_from_words(model, "w", ["gun", "red cat"], templates)
    texts = ("gun", "a gun, no", "red cat", "a red cat, no")
    assert words.prompts == texts
    assert torch.allclose(words.states, encode.encode_text(model, texts), atol=1e-6)
    ids = [model.tokenizer(t).input_ids for t in texts]
    content = [
        model.tokenizer.decode([row[i] for i in positions]).strip()
        for row, positions in zip(ids, words.content_positions, strict=True)
    ]
    assert content == ["gun", "gun", "red cat", "red cat"]
    rows = torch.stack([encode.word_embedding(model, "gun")[None], encode.word_embedding(model, "cat")[None]])
    token = encode.concept_from_token(model, SoftToken("weapon", rows), templates)
    assert token.prompts[1] == "a <weapon-1>, no"
    assert torch.allclose(token.states[:2], words.states[:2], atol=1e-6)
    assert token.content_positions[:2] == words.content_positions[:2]


def test_a_prompt_that_is_too_long_is_an_error_with_both_lengths(model: Model) -> None:
    with pytest.raises(DataError, match=r"40 tokens.* takes 14"):
        encode.encode_text(model, [" ".join(["cat"] * 40)])


def test_the_longest_prompt_fills_the_text_encoder_exactly(model: Model) -> None:
    """L = 16 with start and end token: 14 words fit, in one prompt of a concept list too, and 15 do not."""
    longest = encode.concept_from_words(model, "w", [" ".join(["cat"] * 14)])
    assert longest.end_positions == (15,)
    assert torch.equal(encode.encode_concept_list(model, [longest]), longest.states)
    with pytest.raises(DataError, match=r"15 tokens.* takes 14"):
        encode.encode_text(model, [" ".join(["cat"] * 15)])


def test_the_nearest_word_of_a_words_embedding_is_the_word(model: Model) -> None:
    assert encode.nearest_words(model, encode.word_embedding(model, "sword"), 1) == ["sword"]


def test_diffusers_loads_our_token_and_encodes_it_equally(model: Model, tmp_path: Path) -> None:
    vectors = torch.randn(2, 2, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    save_token(tmp_path / "weapon", SoftToken("weapon", vectors, {"seed": 1}))
    again = load_token(tmp_path / "weapon")
    assert torch.equal(again.vectors, vectors)
    assert again.provenance["seed"] == 1
    save_token(tmp_path / "fewer", again)
    save_token(tmp_path / "fewer", replace(again, vectors=again.vectors[:1]))
    assert torch.equal(load_token(tmp_path / "fewer").vectors, vectors[:1]), "no row of the longer token remains"
    pipe = StableDiffusionPipeline(
        **tiny.parts(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.load_textual_inversion(sorted(map(str, (tmp_path / "weapon").iterdir())))
    for name, rows in zip(again.placeholders, vectors, strict=True):
        theirs, _ = pipe.encode_prompt(f"a {name}", "cpu", 1, False)
        with torch.no_grad():
            ours = encode.encode(model, [("a", rows)]).states
        assert torch.allclose(ours, theirs, atol=1e-5), name
