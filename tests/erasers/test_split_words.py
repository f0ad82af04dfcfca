"""Concepts and alternatives of several tokens, as names are to CLIP's tokenizer: every method on a tokenizer that
splits words.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.sample import sample
from deleatur.erasers.abo import AllButOne
from deleatur.erasers.rece import RECE
from deleatur.erasers.sdd import SDD
from deleatur.erasers.uce import UCE
from deleatur.errors import DataError, SettingsError
from deleatur.guides import Guide
from deleatur.guides.negative import Negative
from deleatur.guides.sega import SEGA
from deleatur.guides.sld import SLD
from deleatur.records.model import Concept, SoftToken
from deleatur.training.closed_form_editor import edit_pairs, text_projections
from deleatur.training.loop import ErasureContext
from deleatur.training.textual_inversion import (
    LearnedToken,
    TextualInversionConfig,
    TokenTarget,
    learn_tokens,
    prompt_templates,
)

PAIRS = [
    ("gun", "sword"),
    ("sword", "gun"),
    ("gun", "cat dog"),
    ("cat dog", "gun"),
    ("weapon", "cat"),
    ("cat", "style"),
]
"""Concepts and alternatives of 1 to 4 tokens, with more, fewer or other tokens than each other."""


@pytest.fixture(scope="module")
def model() -> Model:
    """Wide states, so that an edit of several states is nearly exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WIDTH", 64)
        return tiny.model(tok=tiny.splitting_tokenizer())


def words(model: Model, *names: str, templates: tuple[str, ...] = ("{}",)) -> Concept:
    return encode.concept_from_words(model, "weapon", names, templates)


def soft_token(model: Model, word: str) -> SoftToken:
    """A soft token with the embedding rows of a word's tokens."""
    ids = model.tokenizer(word, add_special_tokens=False).input_ids
    return SoftToken("weapon", model.text_encoder.get_input_embeddings().weight[ids].detach()[None])


def last_content(model: Model, prompt: str) -> int:
    """As in UCE's releases: the sum of the attention mask, less the end token and one."""
    return int(model.tokenizer(prompt, return_tensors="pt").attention_mask.sum()) - 2


def states(model: Model, prompt: str) -> Tensor:
    return encode.encode_text(model, [prompt])[0].double()


def test_the_tokenizer_splits_words(model: Model) -> None:
    counts = [encode.count_tokens(model, word) for word in ("cat", "gun", "weapon", "sword", "cat dog")]
    assert counts == [1, 2, 3, 4, 3]


@pytest.mark.parametrize(("concept", "alternative"), PAIRS)
@pytest.mark.parametrize("before", ["", "a picture of "])
def test_pairs_are_aligned_at_the_last_content_tokens_as_released(
    model: Model, concept: str, alternative: str, before: str
) -> None:
    """The slices of UCE's paper-era release (to_end) and of its current one (concept)."""
    old, new = states(model, before + concept), states(model, before + alternative)
    i, j = last_content(model, before + concept), last_content(model, before + alternative)
    farthest = max(i, j)
    released = {
        "concept": (old[i : i + 1], new[j : j + 1]),
        "to_end": (old[i : len(old) - max(0, farthest - i)], new[j : len(new) - max(0, farthest - j)]),
    }
    description = words(model, concept, templates=(before + "{}",))
    for columns, (c, g) in released.items():
        pairs = edit_pairs(model, [description], {"weapon": alternative}, columns)  # type: ignore[arg-type]
        assert torch.allclose(pairs[0], c, atol=1e-5)
        assert torch.allclose(pairs[1], g, atol=1e-5)


@pytest.mark.parametrize(("concept", "alternative"), PAIRS)
def test_pairs_of_complete_prompts_are_aligned_too(model: Model, concept: str, alternative: str) -> None:
    """RECE's epochs: what precedes the concept stays, all its tokens and what follows get the alternative's values."""
    c, g = edit_pairs(model, [words(model, concept, templates=("a {} of",))], {"weapon": alternative}, "all")
    old, new = states(model, f"a {concept} of"), states(model, f"a {alternative} of")
    n, m = encode.count_tokens(model, concept), encode.count_tokens(model, alternative)
    assert torch.allclose(c, old, atol=1e-5)
    assert torch.allclose(g[:2], new[:2], atol=1e-5), "start token and template"
    assert torch.allclose(g[2 : 2 + n], new[1 + m].expand(n, -1), atol=1e-5)
    after = min(len(old) - 2 - n, len(new) - 2 - m)
    assert torch.allclose(g[2 + n : 2 + n + after], new[2 + m : 2 + m + after], atol=1e-5)


@pytest.mark.parametrize("eraser", [UCE, RECE])
def test_every_token_of_the_alternative_counts(model: Model, eraser: type[UCE | RECE]) -> None:
    """The projections map the concept's last token to the alternative's last; "cat dog" is not "cat"."""
    edit = {"lam": 1e-4, "columns": "concept"}
    targets = {}
    for alternative in ("cat dog", "cat"):
        method = eraser(alternatives={"weapon": alternative}, edit=edit, **({"epochs": 0} if eraser is RECE else {}))  # type: ignore[arg-type]
        edited = edited_weights(model, method.erase(model, [words(model, "sword")], ErasureContext(1)))
        c, g = states(model, "sword")[last_content(model, "sword")], states(model, alternative)
        for name, w in text_projections(model).items():
            before, after = w.double() @ c, edited[name].double() @ c
            target = targets[alternative] = w.double() @ g[last_content(model, alternative)]
            assert (before - target).norm() > 0.1 * target.norm(), "the effect exists before"
            assert (after - target).norm() < 0.01 * target.norm(), "and is gone after"
    assert not torch.allclose(targets["cat dog"], targets["cat"], rtol=0.1)


def test_each_vector_of_a_soft_token_gets_the_alternatives_last_state(model: Model) -> None:
    token = encode.concept_from_token(model, soft_token(model, "gun"), ("a {}",))
    new, end = states(model, "a sword"), last_content(model, "a sword")
    c, g = edit_pairs(model, [token], {"weapon": "sword"}, "to_end")
    assert torch.equal(c[:2], token.states[0, 2:4].double())
    assert torch.allclose(g[:2], new[end].expand(2, -1), atol=1e-5)
    assert torch.allclose(g[2:], new[end + 1 :], atol=1e-5)
    assert len(c) == len(g) == 2 + len(new) - end - 1


def test_a_blank_alternative_is_none(model: Model) -> None:
    gun = words(model, "gun")
    without, blank = (edit_pairs(model, [gun], alternatives, "to_end") for alternatives in ({}, {"weapon": " "}))
    assert all(torch.equal(a, b) for a, b in zip(without, blank, strict=True))
    assert torch.equal(encode.encode_replacement(model, gun, " "), encode.encode_text(model, [""]))


def test_positions_and_states_of_split_words(model: Model) -> None:
    for concept in (words(model, "gun", "sword", templates=("{}", "a {} of")), words(model, "cat dog")):
        assert torch.allclose(concept.states, encode.encode_text(model, concept.prompts), atol=1e-5)
        for prompt, positions in zip(concept.prompts, concept.content_positions, strict=True):
            ids = model.tokenizer(prompt).input_ids
            assert model.tokenizer.decode([ids[p] for p in positions]).strip() in ("gun", "sword", "cat dog")
    token = encode.concept_from_token(model, soft_token(model, "sword"), ("a {} of",))
    assert torch.allclose(token.states, encode.encode_text(model, ["a sword of"]), atol=1e-5)
    assert token.content_positions == ((2, 3, 4, 5),)


def test_an_initializer_of_several_tokens_is_their_mean_and_one_of_none_is_refused(model: Model) -> None:
    rows = soft_token(model, "sword").vectors[0]
    assert torch.allclose(encode.word_embedding(model, "sword"), rows.mean(0))
    for blank in ("", " "):
        with pytest.raises(SettingsError, match="initializer_token: expected a word") as e:
            encode.word_embedding(model, blank)
        assert "object" in e.value.hint


def learned(model: Model, vectors: Tensor, prompt: str) -> LearnedToken:
    z, g = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    latents = torch.randn(2, *model.latent_shape, generator=z)
    target = TokenTarget(latents, torch.full((2,), 0.5), prompt_templates("style", ["", prompt]), g)
    config = TextualInversionConfig(iterations=1, num_vectors=len(vectors), batch_size=4)
    return learn_tokens(model, config, [target], vectors[None])[0]


def test_textual_inversion_learns_vectors_between_split_words(model: Model) -> None:
    rows = soft_token(model, "gun").vectors[0]
    first = learned(model, rows, "cat")
    assert (first.vectors != rows).any(1).all(), "every vector is trained"
    assert first.losses != learned(model, rows.flip(0), "cat").losses, "in their order"


def test_textual_inversion_refuses_prompts_that_are_too_long_before_it_trains(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one image, which the first iterations may not sample."""
    monkeypatch.setattr(model.unet, "forward", lambda *a, **k: pytest.fail("the network was called"))
    with pytest.raises(DataError, match="has 20 tokens; the text encoder takes 14"):
        learned(model, soft_token(model, "sword").vectors[0], "weapon thing")


@pytest.mark.parametrize("order", ["paper", "code", "single"])
def test_sdd_conditions_on_complete_prompts(model: Model, order: str) -> None:
    concept = words(model, "gun", "sword")
    c_p, c_s = SDD(order=order).condition_roles(model, [concept])  # type: ignore[arg-type]
    each, joint = encode.encode_text(model, ["gun", "sword"]), encode.encode_text(model, ["gun, sword"])
    expected = {"paper": (each, joint), "code": (joint, each), "single": (each, each)}[order]
    assert torch.allclose(c_p, expected[0], atol=1e-5)
    assert torch.allclose(c_s, expected[1], atol=1e-5)


def test_all_but_one_trains_towards_the_complete_alternative(model: Model) -> None:
    """A concept that is its own alternative has no loss, however many tokens it has; another has one."""
    losses: list[float] = []
    for alternative in ("sword", "cat dog"):
        training = {"iterations": 1, "sampler_steps": 2, "pool_size": 4, "min_relative_change": 0}
        abo = AllButOne(alternatives={"weapon": alternative}, training=training)  # type: ignore[arg-type]
        context = ErasureContext(0, on_step=lambda p: losses.append(p.loss))
        abo.erase(model, [words(model, "sword", templates=("a {} of",))], context)
    assert losses[0] == 0.0
    assert losses[1] > 1e-6


@pytest.mark.parametrize("guide", [Negative(), SLD(warmup_steps=0), SEGA(edit={"warmup_steps": 0})])
def test_guides_steer_away_from_all_tokens(model: Model, guide: Guide) -> None:
    """The same images for words and for soft tokens with their rows; others for the first of two words alone."""
    c = encode.encode_text(model, ["a picture of cat"])

    def pixels(concept: Concept) -> bytes:
        conditions = guide.conditions(model, [concept])
        [image] = sample(model, c, [1], guide=guide, conditions=conditions, steps=3, batch_size=1)
        return image.tobytes()

    complete = guide.conditions(model, [words(model, "cat dog")])
    token = guide.conditions(model, [encode.concept_from_token(model, soft_token(model, "cat dog"))])
    assert all(torch.allclose(complete[n], token[n], atol=1e-5) for n in complete)
    assert pixels(words(model, "cat dog")) != pixels(words(model, "cat"))
