"""The ratings decide the token: weights, coverage, and what changes (one row) and what does not (all else)."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model, digest_module
from deleatur.errors import DataError
from deleatur.inversion import InversionContext, InversionData
from deleatur.inversion.hfi import HFI
from deleatur.inversion.textual_inversion import TextualInversion
from deleatur.storage.tensors import load, save
from deleatur.training.optimizer_state import Saved
from deleatur.training.textual_inversion import Descent, Inversion, Learned, Lesson, Progress, learn, templates_of

rewards = st.lists(st.floats(-3, 3), min_size=2, max_size=20).map(torch.tensor)


@given(rewards, st.floats(-5, 5))
def test_ranking_weights_are_a_distribution_that_ignores_a_constant(r: Tensor, shift: float) -> None:
    w = HFI().weights(r, rank=True)
    assert w.sum() == pytest.approx(1, abs=1e-5)
    assert (w >= 0).all()
    assert torch.allclose(w, HFI().weights(r + shift, rank=True), atol=1e-5)


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=20).map(torch.tensor))
def test_vote_weights_follow_the_clipped_share(r: Tensor) -> None:
    w = HFI().weights(r, rank=False)
    assert w.sum() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(w / w.max(), r.clamp(0, 1) / r.clamp(0, 1).max(), atol=1e-5)


def pool(n: int, r: Tensor, features: Tensor, rank: bool = False) -> InversionData:
    z = torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return InversionData(z, r, features, rank, torch.zeros(n, dtype=torch.bool), templates_of("object", [""] * n))


def test_a_rare_kind_gets_its_token() -> None:
    """20 pictures of one kind with high rewards, 4 of another with lower ones: top-K alone would drop the 4."""
    features = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(20, 1), torch.tensor([[0.0, 1.0]]).repeat(4, 1)])
    r = torch.cat([torch.full((20,), 0.9), torch.full((4,), 0.6)])
    alone, *_ = HFI(top_k=10, num_tokens=1).clusters(pool(24, r, features), seed=0)
    assert (alone < 20).all()
    both = HFI(top_k=10, num_tokens=2).clusters(pool(24, r, features), seed=0)
    assert sorted(len(rows) for rows in both) == [4, 5]
    assert any(set(rows.tolist()) == {20, 21, 22, 23} for rows in both)


def test_pictures_that_raters_refused_are_never_used() -> None:
    r = torch.tensor([0.9, 0.8, 0.1, 0.2])
    [rows] = HFI(top_k=4).clusters(pool(4, r, torch.eye(4)), seed=0)
    assert set(rows.tolist()) == {0, 1}


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_a_reward_never_overrules_the_raters_of_the_picture_itself(tokens: int) -> None:
    rated = pool(4, torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.eye(4))
    rated = replace(rated, rejected=torch.tensor([True, False, False, False]))
    found = HFI(top_k=4, num_tokens=tokens).clusters(rated, seed=0)
    assert {i for rows in found for i in rows.tolist()} == ({1, 2} if tokens == 1 else {1, 2, 3})
    with pytest.raises(DataError, match="refused"):
        HFI().clusters(replace(rated, rejected=torch.ones(4).bool()), seed=0)


@pytest.mark.parametrize("threshold", [0.5, -1.0])
def test_what_the_reward_sees_in_no_picture_is_refused_unless_pictures_were_ranked(threshold: float) -> None:
    rated = pool(4, torch.tensor([-0.2, 0.0, -0.1, -0.4]), torch.eye(4))
    with pytest.raises(DataError, match=r"got 0\.00 at best"):
        HFI(threshold=threshold).clusters(rated, seed=0)
    assert HFI(threshold=threshold).clusters(replace(rated, rank=True), seed=0), "a ranking has no zero"


def lesson(n: int, z: Tensor | None = None, seed: int = 0) -> Lesson:
    """n pictures of equal weight."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(n, 4, 4, 4, generator=g) if z is None else z
    return Lesson(latents, torch.full((n,), 1 / n), templates_of("object", [""] * n), g)


def invert(model: Model, method: HFI | TextualInversion, rated: InversionData) -> list[Learned]:
    initial = encode.word_embedding(model, "object")
    return method.invert(model, rated, initial, InversionContext(1, lambda v: (1 - v.square().mean((1, 2))).tolist()))


def test_inversion_changes_no_network_and_repeats_itself(model: Model) -> None:
    before = [digest_module(m) for m in (model.unet, model.text_encoder, model.vae)]
    rated = pool(6, torch.linspace(0.5, 1, 6), torch.eye(6))
    method = HFI(num_tokens=2, training=Inversion(iterations=4, batch_size=2, num_vectors=2, eval_every=2, lr=1e-2))
    one, same = invert(model, method, rated), invert(model, method, rated)
    assert [t.vectors.shape for t in one] == [(2, 16), (2, 16)]
    assert all(torch.equal(a.vectors, b.vectors) for a, b in zip(one, same, strict=True))
    assert [digest_module(m) for m in (model.unet, model.text_encoder, model.vae)] == before


@pytest.mark.parametrize(("scores", "left"), [([0.9, 0.2, 0.6], [0, 2]), ([0.1, 0.4, 0.3], [1])])
def test_a_token_whose_pictures_raters_would_not_mark_is_left_out_but_never_all(
    model: Model, scores: list[float], left: list[int]
) -> None:
    rated = pool(6, torch.full((6,), 0.8), torch.eye(3).repeat(2, 1))
    seen: list[Tensor] = []

    def look(v: Tensor) -> list[float]:
        seen.extend(v.clone())
        return scores

    method = HFI(num_tokens=3, training=Inversion(iterations=2, batch_size=2, eval_every=2, tokens_per_batch=3))
    initial = encode.word_embedding(model, "object")
    kept = method.invert(model, rated, initial, InversionContext(1, look))
    assert [t.vectors.tolist() for t in kept] == [seen[i].tolist() for i in left]


def test_the_best_look_is_kept_not_the_last(model: Model) -> None:
    scores = iter([0.2, 0.9, 0.1])
    seen: list[Tensor] = []

    def look(v: Tensor) -> list[float]:
        seen.append(v[0].clone())
        return [next(scores)]

    numbers, start = Descent(iterations=6, batch_size=2, lr=1e-2), encode.word_embedding(model, "object")[None, None]
    [learned] = learn(model, numbers, [lesson(2)], start, look=look, check_every=2)
    assert torch.equal(learned.vectors, seen[1])
    assert [row["score"] for row in learned.looks] == [0.2, 0.9, 0.1]
    assert learned.effective == pytest.approx(2), "two pictures of equal weight"


@pytest.mark.parametrize("name", ["weapon", "vice", "ink"])
def test_no_token_is_learned_in_the_words_of_a_reported_prompt(name: str) -> None:
    """What is reported is about wordings that nothing was trained on."""
    root = Path(__file__).parents[2]
    with (root / "prompts" / f"{name}.csv").open() as f:
        rows = [r for r in csv.DictReader(f) if r["split"] in ("test", "proof") and r["role"] == "concept"]
    with (root / "prompts" / "neutral.csv").open() as f:
        things = {r["label"].partition(":")[2] for r in csv.DictReader(f)} | {
            r["label"].partition(":")[2] for r in rows
        }
    for kind, word in (("object", None), ("style", name)):
        for thing in things:
            article = "an" if thing[0] in "aeiou" else "a"
            learned = templates_of(kind, [f"{article} {thing}"])[0]
            said = {t.replace("{}", word or thing) for t in learned if t != "{}"}
            assert not said & {r["text"] for r in rows}


@pytest.mark.parametrize("norm", [None, 0.5, 1.0])
def test_vectors_stay_as_long_as_asked(model: Model, norm: float | None) -> None:
    words = model.text_encoder.get_input_embeddings().weight.norm(dim=-1).mean()
    numbers = Descent(iterations=8, batch_size=2, lr=0.5, max_norm=norm)
    [learned] = learn(model, numbers, [lesson(2)], encode.word_embedding(model, "object").repeat(1, 2, 1))
    length = learned.vectors.norm(dim=-1) / words
    assert (length > 2).all() if norm is None else torch.allclose(length, torch.tensor(norm))


def test_a_loss_that_is_no_number_stops_the_run(model: Model) -> None:
    start = torch.full_like(encode.word_embedding(model, "object")[None, None], torch.nan)
    with pytest.raises(DataError, match="no number at iteration 1"):
        learn(model, Descent(iterations=4, batch_size=2), [lesson(2)], start)


def test_a_token_lowers_the_loss_of_its_pictures(model: Model) -> None:
    """The promise: after inversion the pictures are more likely under the token than under the word it began as."""
    from deleatur.diffusion.predict import predict

    g = torch.Generator().manual_seed(0)
    z0 = torch.full((4, 4, 4, 4), 2.0)
    t, eps = torch.linspace(100, 900, 64).long(), torch.randn(64, 4, 4, 4, generator=g)
    z_t = model.schedule.add_noise(z0[:1].expand(64, -1, -1, -1), eps, t)

    def loss(v: Tensor) -> float:
        with torch.no_grad():
            c = encode.encode(model, [(v,)]).states
            return float((predict(model, {}, z_t, t, c) - eps).square().mean())

    start = encode.word_embedding(model, "object")[None]
    numbers = Descent(iterations=60, batch_size=16, lr=0.05)
    [learned] = learn(model, numbers, [lesson(4, z0)], start[None])
    assert loss(learned.vectors) < loss(start)


def test_tokens_learned_together_are_those_learned_one_by_one(model: Model) -> None:
    start = encode.word_embedding(model, "object").repeat(3, 1, 1)

    def learned(together: int) -> list[Learned]:
        numbers = Descent(iterations=5, batch_size=2, lr=1e-2)
        return learn(model, numbers, [lesson(4, seed=i) for i in range(3)], start, together=together)

    for one, shared in zip(learned(1), learned(2), strict=True):
        assert torch.allclose(one.vectors, shared.vectors, atol=1e-5)
        assert one.losses == pytest.approx(shared.losses, rel=1e-4)
        assert not torch.allclose(one.vectors, start[0], atol=1e-3)


def test_a_run_saved_after_any_step_goes_on_with_the_same_bits(model: Model, tmp_path: Path) -> None:
    """Two groups of tokens, so that one of them is done, half done and not begun; the best look is not the last."""
    first = encode.word_embedding(model, "object").repeat(3, 1, 1)
    numbers = Descent(iterations=4, batch_size=2, lr=1e-2, max_norm=1.0)

    def run(state: Saved | None = None) -> tuple[list[Learned], list[Progress]]:
        told: list[Progress] = []

        def on_step(p: Progress) -> None:
            told.append(p)
            if state is None:
                save(tmp_path / str(p.step), p.state.tensors(), p.state.numbers())

        lessons = [lesson(4, seed=i) for i in range(3)]
        learned = learn(
            model,
            numbers,
            lessons,
            first,
            together=2,
            look=lambda v: v.norm(dim=(1, 2)).tolist(),
            check_every=2,
            on_step=on_step,
            state=state,
        )
        return learned, told

    whole, seen = run()
    for step in range(1, 9):
        again, told = run(load(tmp_path / str(step)))
        assert [(p.step, p.total, p.loss) for p in told] == [(p.step, p.total, p.loss) for p in seen[step - 1 :]]
        for a, b in zip(whole, again, strict=True):
            assert torch.equal(a.vectors, b.vectors)
            assert (a.looks, a.losses, a.effective) == (b.looks, b.losses, b.effective)


def test_the_control_sees_no_rating(model: Model) -> None:
    features, method = torch.eye(4), TextualInversion(training=Inversion(iterations=3, batch_size=2))
    [high] = invert(model, method, pool(4, torch.tensor([1.0, 1.0, 0.0, 0.0]), features))
    [low] = invert(model, method, pool(4, torch.tensor([0.0, 0.0, 1.0, 1.0]), features))
    assert torch.equal(high.vectors, low.vectors)
