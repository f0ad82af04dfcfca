"""UCE and RECE: projections map the concept to the values of its alternative, and little else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.predict import predict
from deleatur.erasers import Eraser
from deleatur.erasers.rece import RECE
from deleatur.erasers.uce import UCE
from deleatur.errors import ErasureRefused, SettingsError
from deleatur.maths import closed_form
from deleatur.records.model import Concept, Delta, LowRank, SoftToken
from deleatur.storage.tensors import load_delta, save_delta
from deleatur.training.closed_form_editor import edit_pairs
from deleatur.training.early_stopping import Evaluation
from deleatur.training.loop import ErasureContext, TrainingProgress

EXACT = {"lam": 1e-4, "preserve": 1.0}


@pytest.fixture(scope="module")
def model() -> Model:
    """A tiny pipeline with wider states: in 16 dimensions, 16 preserved states would fix every direction."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WIDTH", 64)
        return tiny.model()


def words(model: Model, *names: str, concept: str = "weapon", templates: tuple[str, ...] = ("{}",)) -> Concept:
    return encode.concept_from_words(model, concept, names, templates)


def erase(
    model: Model, eraser: Eraser, *concepts: Concept, keep: tuple[str, ...] = ("", "a cat"), **more: Any
) -> Delta:
    return eraser.erase(model, concepts, ErasureContext(1, encode.encode_text(model, list(keep)), **more))


def values(weights: dict[str, Tensor], states: Tensor) -> Tensor:
    """The outputs of every key and value projection for states (n, d)."""
    return torch.cat([states @ w.T for w in weights.values()], -1)


def base_and_edited(model: Model, delta: Delta) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    edited = edited_weights(model, delta)
    return {n: model.unet.get_parameter(n) for n in edited}, edited


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("eraser", [UCE(edit=EXACT), RECE(edit=EXACT, hold=True)])
def test_the_concept_becomes_the_empty_prompt_and_preserved_prompts_stay(model: Model, eraser: Eraser) -> None:
    gun = words(model, "gun")
    base, edited = base_and_edited(model, erase(model, eraser, gun))
    empty, cat = encode.encode_text(model, ["", "a cat"])
    assert distance(values(base, gun.states[0]), values(base, empty)) > 0.25, "the effect exists before"
    assert distance(values(edited, gun.states[0]), values(base, empty)) < 0.02, "and is gone after"
    for preserved in (empty, cat):
        assert distance(values(edited, preserved), values(base, preserved)) < 0.02


def test_the_networks_prediction_follows(model: Model) -> None:
    weights = edited_weights(model, erase(model, UCE(edit=EXACT), words(model, "gun")))
    g = torch.Generator().manual_seed(5)
    z, t = torch.randn(16, 4, 4, 4, generator=g), torch.linspace(50, 950, 16).long()

    def gap(weights: dict[str, Tensor], prompt: str, versus: str) -> float:
        states = encode.encode_text(model, [prompt, versus])
        prediction, other = predict(model, weights, z, t, states[:1]), predict(model, {}, z, t, states[1:])
        return float((prediction - other).square().mean())

    before = gap({}, "gun", "")
    assert before > 1e-5
    assert gap(weights, "gun", "") < 0.01 * before
    assert gap(weights, "a cat", "a cat") < 0.01 * before


def test_the_concept_becomes_its_alternative(model: Model) -> None:
    gun, sword = words(model, "gun", templates=("a {} of",)), words(model, "sword", concept="blade")
    delta = erase(model, UCE(edit=EXACT, alternatives={"weapon": "dog"}), gun, sword)
    base, edited = base_and_edited(model, delta)
    dog, empty = encode.encode_text(model, ["a dog of", ""])
    assert distance(values(base, gun.states[0, 2:]), values(base, dog[2:])) > 0.25
    assert distance(values(edited, gun.states[0, 2:]), values(base, dog[2:])) < 0.05
    assert distance(values(edited, sword.states[0, 1:]), values(base, empty[1:])) < 0.05, "the other has none"


def test_preserved_prompts_change_less_the_higher_their_weight(model: Model) -> None:
    cat = encode.encode_text(model, ["a cat"])[0]

    def drift(eta_p: float) -> float:
        base, edited = base_and_edited(model, erase(model, UCE(edit={"preserve": eta_p}), words(model, "gun")))
        return distance(values(edited, cat), values(base, cat))

    free, light, heavy = (drift(p) for p in (0.0, 0.1, 1e4))
    assert free > 0.1, "the effect exists before"
    assert heavy < 1e-3 < light < free


def test_the_empty_prompt_is_preserved_by_default(model: Model) -> None:
    gun, c_0 = words(model, "gun"), encode.encode_text(model, [""])
    without, with_empty = (UCE().erase(model, [gun], ErasureContext(0, k)) for k in (None, c_0))
    assert all(torch.equal(without.tensors[n], with_empty.tensors[n]) for n in without.tensors)


def test_the_default_weight_of_preserved_prompts_is_the_releases(model: Model) -> None:
    few_prompts, many_prompts = ("", "a cat", "a dog"), ("a cat",) * 20
    for keep, eta_p in ((few_prompts, 1 / 3), (many_prompts, 0.1)):
        default, explicit = (
            erase(model, UCE(edit={"preserve": p}), words(model, "gun"), keep=keep) for p in (None, eta_p)
        )
        assert all(torch.equal(default.tensors[n], explicit.tensors[n]) for n in explicit.tensors)


def test_preserve_columns_select_the_states_to_preserve(model: Model) -> None:
    """all: every state of the prompts (first release); last: the last token's (current release), by its own formula."""
    gun, texts = words(model, "gun"), ["", "a cat", "a picture of dog"]
    encoded = encode.encode_texts(model, texts)
    last = [int(model.tokenizer(t, return_tensors="pt").attention_mask.sum()) - 2 for t in texts]
    assert last == [0, 2, 4], "of the empty prompt, the start token"
    c, g = edit_pairs(model, [gun], {}, "concept")
    for columns, k in (
        ("all", encoded.states.double().flatten(0, 1)),
        ("last", torch.stack([encoded.states[i, p].double() for i, p in enumerate(last)])),
    ):
        uce = UCE(edit={"columns": "concept", "preserve_columns": columns, "preserve": 1.0, "lam": 0.5})
        delta = uce.erase(model, [gun], ErasureContext(0, encoded.states, encoded.end_positions))
        a = 0.5 * torch.eye(64, dtype=torch.float64) + c.T @ c + k.T @ k  # λI + Σcc' + Σkk'
        for name, d in delta.tensors.items():
            w = model.unet.get_parameter(name).double()
            released = torch.linalg.solve(a, (0.5 * w + w @ g.T @ c + w @ k.T @ k).T).T
            assert torch.allclose(d.double(), released - w, atol=1e-5)


def test_preserving_last_tokens_needs_their_positions(model: Model) -> None:
    gun, preserve = words(model, "gun"), encode.encode_text(model, ["a cat"])
    last_tokens = UCE(edit={"preserve_columns": "last"})
    with pytest.raises(SettingsError, match="end position of each of 1 preserved prompts, got 0"):
        last_tokens.erase(model, [gun], ErasureContext(0, preserve))
    last_tokens.erase(model, [gun], ErasureContext(0))  # the empty prompt's is known


def test_columns_select_the_states_to_erase(model: Model) -> None:
    """concept: the last token of a word, all vectors of a soft token; to_end: from there to the end."""
    red_cat = words(model, "red cat", templates=("a {} of",))
    rows = torch.stack([torch.stack([encode.word_embedding(model, w) for w in ("gun", "cat")])])
    token = encode.concept_from_token(model, SoftToken("weapon", rows, {}), ("a {} of",))
    last = red_cat.content_positions[0][-1]
    c_0 = encode.encode_text(model, [""])[0].double()
    for concept, start, end in ((red_cat, last, last + 1), (token, 2, 4)):
        slices = {"concept": slice(start, end), "to_end": slice(start, None), "all": slice(None)}
        for columns, positions in slices.items():
            c, g = edit_pairs(model, [concept], {}, columns)  # type: ignore[arg-type]
            assert torch.equal(c, concept.states[0, positions].double())
            assert torch.equal(g, c_0[positions])


def test_a_soft_token_equal_to_a_word_is_erased_as_the_word(model: Model) -> None:
    rows = encode.word_embedding(model, "gun")[None, None]
    token = encode.concept_from_token(model, SoftToken("weapon", rows, {}), ("a {}",))
    one, other = (erase(model, RECE(), c) for c in (token, words(model, "gun", templates=("a {}",))))
    assert all(torch.allclose(one.tensors[n], other.tensors[n], atol=1e-4) for n in one.tensors)


def test_only_text_projections_change_and_they_are_stored_as_factors(model: Model, tmp_path: Path) -> None:
    delta = erase(model, UCE(edit={"columns": "concept"}), words(model, "gun", "sword"))
    assert set(delta.tensors) == UCE().touched_parameters(model)
    assert all("attn2.to_k" in n or "attn2.to_v" in n for n in delta.tensors)
    save_delta(tmp_path / "d.safetensors", delta)
    loaded = load_delta(tmp_path / "d.safetensors").tensors
    for tensors in (delta.tensors, loaded):
        assert isinstance(tensors, LowRank)
        assert tensors.down.shape == (2, 64), "two states, rank two"
    assert all(torch.linalg.matrix_rank(d) <= 2 for d in loaded.values())


@pytest.mark.parametrize("eraser", [UCE(), RECE(epochs=1)])
def test_the_order_of_concepts_does_not_matter(model: Model, eraser: Eraser) -> None:
    gun, ink = words(model, "gun", "sword"), words(model, "ink", concept="style")
    one, other = (erase(model, eraser, *order).tensors for order in ((gun, ink), (ink, gun)))
    assert all(torch.allclose(one[n], other[n], atol=1e-5) for n in one)
    alone = erase(model, eraser, gun).tensors
    assert not all(torch.allclose(one[n], alone[n], atol=1e-5) for n in one), "both are erased"


def test_regenerating_states_are_those_of_complete_prompts(model: Model) -> None:
    """(L, d) for each; the curve has their length relative to the concept's."""
    gun = words(model, "gun")
    c, g = edit_pairs(model, [gun], {}, "all")
    assert c.shape == g.shape == (model.max_tokens, 64)
    lengths = [row["length"] for row in erase(model, RECE(epochs=2), gun).record["curve"][1:]]
    assert len(lengths) == 2
    assert all(0 < length < 100 for length in lengths)


def test_zero_epochs_is_uce(model: Model) -> None:
    uce, rece = (erase(model, e, words(model, "gun")) for e in (UCE(), RECE(epochs=0)))
    assert all(torch.equal(uce.tensors[n], rece.tensors[n]) for n in uce.tensors)


def test_each_epoch_leaves_less_to_regenerate(model: Model) -> None:
    """Measured on the returned weights, with the attack that the next epoch would erase."""
    gun = words(model, "gun")
    c, g = edit_pairs(model, [gun], {}, "all")

    def regenerated(delta: Delta) -> float:
        base, edited = ([w.double() for w in weights.values()] for weights in base_and_edited(model, delta))
        rows = torch.cat([*edited, 0.1**0.5 * torch.eye(64, dtype=torch.float64)])
        y = torch.cat([*(w @ c.T for w in base), torch.zeros(64, len(c), dtype=torch.float64)])
        x = torch.linalg.lstsq(rows, y).solution.T
        residual = sum(float((x @ e.T - c @ w.T).square().sum()) for e, w in zip(edited, base, strict=True))
        return 1 - residual / closed_form.projected_distance(closed_form.gram(base), c, g)

    edit = {"preserve": 0.01, "columns": "concept"}
    after = [regenerated(erase(model, RECE(edit=edit, epochs=n), gun)) for n in range(4)]
    assert after[0] > 0.3, "UCE alone leaves the concept regenerable"
    assert sorted(after, reverse=True) == after
    curve = erase(model, RECE(edit=edit), gun).record["curve"]
    assert [row["back"] for row in curve[1:]] == pytest.approx(after[:3], abs=1e-4), "the curve reports the same"
    stopped = erase(model, RECE(edit=edit, target_rate=(after[1] + after[2]) / 2), gun)
    assert (stopped.record["stop"], stopped.record["steps"]) == ("target", 3)


def test_lam_r_keeps_the_regenerated_states_short(model: Model) -> None:
    """As a ridge does: the longer they are, the less of the concept remains unexplained."""
    edit = {"preserve": 0.01, "columns": "concept"}
    regenerating = [RECE(epochs=1, lam_r=lam_r, edit=edit) for lam_r in (1e-4, 1e-2, 1e-1)]  # type: ignore[arg-type]
    rows = [erase(model, rece, words(model, "gun")).record["curve"][1] for rece in regenerating]
    for column in ("length", "back"):
        column_values = [row[column] for row in rows]
        assert sorted(set(column_values), reverse=True) == column_values
    assert rows[0]["length"] > 1.1 * rows[-1]["length"]


def test_an_epoch_releases_earlier_states_unless_hold_is_set(model: Model) -> None:
    gun = words(model, "gun")
    empty = encode.encode_text(model, [""])[0]

    def remaining(eraser: Eraser) -> float:
        base, edited = base_and_edited(model, erase(model, eraser, gun))
        return distance(values(edited, gun.states[0]), values(base, empty))

    uce, published, with_hold = (remaining(e) for e in (UCE(edit=EXACT), RECE(edit=EXACT), RECE(edit=EXACT, hold=True)))
    assert published > 10 * uce
    assert with_hold < 0.1 * published


def test_every_step_is_reported(model: Model) -> None:
    progress: list[TrainingProgress] = []
    delta = erase(model, RECE(epochs=2), words(model, "gun"), on_step=progress.append)
    assert [(p.step, p.total) for p in progress] == [(1, 3), (2, 3), (3, 3)]
    assert [row["loss"] for row in delta.record["curve"]] == [p.loss for p in progress]
    assert all(0 <= p.loss < 1 for p in progress), "the remaining share of the distance"


def test_images_are_evaluated_only_with_max_preserved_drop(model: Model) -> None:
    gun = words(model, "gun")
    evaluations = iter([Evaluation(1.0, 1.0), Evaluation(0.4, 0.95), Evaluation(0.3, 0.94), Evaluation(0.2, 0.5)])
    rece = RECE(epochs=3, edit={"max_preserved_drop": 0.1})
    undone = erase(model, rece, gun, probe=lambda w: next(evaluations))
    assert undone.record["stop"] == "guard"
    assert [e["preserved"] for e in undone.record["evaluations"]] == [1.0, 0.95, 0.94, 0.5]
    one = erase(model, RECE(epochs=1), gun)
    assert all(torch.equal(undone.tensors[n], one.tensors[n]) for n in one.tensors), "the degrading step is undone"

    def never(weights: Any) -> Evaluation:
        raise AssertionError

    assert erase(model, RECE(epochs=1), gun, probe=never).record["evaluations"] == []


def test_an_edit_that_destroys_the_model_is_refused(model: Model) -> None:
    evaluations = iter([Evaluation(1.0, 1.0), Evaluation(0.0, 0.2)])
    with pytest.raises(ErasureRefused, match="preserved prompts degraded"):
        erase(model, UCE(edit={"max_preserved_drop": 0.1}), words(model, "gun"), probe=lambda w: next(evaluations))
    with pytest.raises(ErasureRefused, match="times their norm"):
        erase(model, UCE(edit={"max_relative_change": 0.01}), words(model, "gun"))


@pytest.mark.parametrize("eraser", [UCE(), RECE()])
def test_an_edit_that_does_nothing_is_refused(model: Model, eraser: Eraser) -> None:
    empty = encode.encode_text(model, [""])
    empty_concept = Concept("weapon", "words", ("",), (("",),), empty, ((),), (1,))
    with pytest.raises(ErasureRefused, match="nothing was erased"):
        erase(model, eraser, empty_concept)
    same = type(eraser)(alternatives={"weapon": "gun"})
    with pytest.raises(ErasureRefused, match="nothing was erased"):
        erase(model, same, words(model, "gun"))
