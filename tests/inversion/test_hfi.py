"""HFI: weights, selection and clustering of the rated images, and the tokens learned from them."""

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
from deleatur.training.optimizer_state import SavedState
from deleatur.training.textual_inversion import (
    EvaluatedInversionConfig,
    InversionProgress,
    LearnedToken,
    TextualInversionConfig,
    TokenTarget,
    _sample_batch,
    learn_tokens,
    prompt_templates,
)

rewards = st.lists(st.floats(-3, 3), min_size=2, max_size=20).map(torch.tensor)


@given(rewards, st.floats(-5, 5))
def test_ranking_weights_are_a_distribution_invariant_to_a_constant(r: Tensor, shift: float) -> None:
    w = HFI().weights(r, rank=True)
    assert w.sum() == pytest.approx(1, abs=1e-5)
    assert (w >= 0).all()
    assert torch.allclose(w, HFI().weights(r + shift, rank=True), atol=1e-5)


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=20).map(torch.tensor))
def test_vote_weights_are_proportional_to_the_clipped_share(r: Tensor) -> None:
    w = HFI().weights(r, rank=False)
    assert w.sum() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(w / w.max(), r.clamp(0, 1) / r.clamp(0, 1).max(), atol=1e-5)


def inversion_data(n: int, r: Tensor, features: Tensor, rank: bool = False) -> InversionData:
    z = torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return InversionData(z, r, features, rank, torch.zeros(n, dtype=torch.bool), prompt_templates("object", [""] * n))


def test_rare_cluster_gets_its_own_token() -> None:
    """20 images of one kind with high rewards, 4 of another with lower ones: plain top-K would drop the 4."""
    features = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(20, 1), torch.tensor([[0.0, 1.0]]).repeat(4, 1)])
    r = torch.cat([torch.full((20,), 0.9), torch.full((4,), 0.6)])
    single, *_ = HFI(top_k=10, num_tokens=1).clusters(inversion_data(24, r, features), seed=0)
    assert (single < 20).all()
    both = HFI(top_k=10, num_tokens=2).clusters(inversion_data(24, r, features), seed=0)
    assert sorted(len(rows) for rows in both) == [4, 5]
    assert any(set(rows.tolist()) == {20, 21, 22, 23} for rows in both)


def test_images_with_low_rewards_are_not_selected() -> None:
    r = torch.tensor([0.9, 0.8, 0.1, 0.2])
    [rows] = HFI(top_k=4).clusters(inversion_data(4, r, torch.eye(4)), seed=0)
    assert set(rows.tolist()) == {0, 1}


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_images_rejected_by_their_raters_are_never_selected(tokens: int) -> None:
    data = inversion_data(4, torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.eye(4))
    data = replace(data, rejected=torch.tensor([True, False, False, False]))
    selected = HFI(top_k=4, num_tokens=tokens).clusters(data, seed=0)
    assert {i for rows in selected for i in rows.tolist()} == ({1, 2} if tokens == 1 else {1, 2, 3})
    with pytest.raises(DataError, match="majority of no"):
        HFI().clusters(replace(data, rejected=torch.ones(4).bool()), seed=0)


@pytest.mark.parametrize("threshold", [0.5, -1.0])
def test_no_positive_reward_raises_except_for_rankings(threshold: float) -> None:
    data = inversion_data(4, torch.tensor([-0.2, 0.0, -0.1, -0.4]), torch.eye(4))
    with pytest.raises(DataError, match=r"got 0\.00 at most"):
        HFI(threshold=threshold).clusters(data, seed=0)
    assert HFI(threshold=threshold).clusters(replace(data, rank=True), seed=0), "ranking scores have no zero"


def token_target(n: int, z: Tensor | None = None, seed: int = 0) -> TokenTarget:
    """n images of equal weight."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(n, 4, 4, 4, generator=g) if z is None else z
    return TokenTarget(latents, torch.full((n,), 1 / n), prompt_templates("object", [""] * n), g)


def invert(model: Model, method: HFI | TextualInversion, data: InversionData) -> list[LearnedToken]:
    initial = encode.word_embedding(model, "object")
    return method.invert(model, data, initial, InversionContext(1, lambda v: (1 - v.square().mean((1, 2))).tolist()))


def test_inversion_is_deterministic_and_changes_no_network(model: Model) -> None:
    before = [digest_module(m) for m in (model.unet, model.text_encoder, model.vae)]
    data = inversion_data(6, torch.linspace(0.5, 1, 6), torch.eye(6))
    method = HFI(
        num_tokens=2,
        training=EvaluatedInversionConfig(iterations=4, batch_size=2, num_vectors=2, eval_every=2, lr=1e-2),
    )
    first, second = invert(model, method, data), invert(model, method, data)
    assert [t.vectors.shape for t in first] == [(2, 16), (2, 16)]
    assert all(torch.equal(a.vectors, b.vectors) for a, b in zip(first, second, strict=True))
    assert [digest_module(m) for m in (model.unet, model.text_encoder, model.vae)] == before


@pytest.mark.parametrize(
    ("reward", "scores", "remaining"),
    [(0.8, [0.9, 0.39, 0.41], [0, 2]), (0.6, [0.29, 0.31, 0.9], [1, 2]), (0.8, [0.1, 0.39, 0.3], [1])],
)
def test_tokens_that_lost_half_of_their_images_reward_are_dropped_except_the_best(
    model: Model, reward: float, scores: list[float], remaining: list[int]
) -> None:
    data = inversion_data(6, torch.full((6,), reward), torch.eye(3).repeat(2, 1))
    seen: list[Tensor] = []

    def evaluate(v: Tensor) -> list[float]:
        seen.extend(v.clone())
        return scores

    method = HFI(
        num_tokens=3, training=EvaluatedInversionConfig(iterations=2, batch_size=2, eval_every=2, tokens_per_batch=3)
    )
    initial = encode.word_embedding(model, "object")
    learned = method.invert(model, data, initial, InversionContext(1, evaluate))
    assert [t.vectors.tolist() for t in learned] == [seen[i].tolist() for i in remaining]


@pytest.mark.parametrize(("of_evaluations", "best"), [((0.2, 0.9, 0.1), 1), ((0.9, 0.9, 0.9), 0)])
def test_vectors_of_the_first_best_evaluation_are_returned(
    model: Model, of_evaluations: tuple[float, ...], best: int
) -> None:
    scores = iter(of_evaluations)
    seen: list[Tensor] = []

    def evaluate(v: Tensor) -> list[float]:
        seen.append(v[0].clone())
        return [next(scores)]

    config, start = (
        TextualInversionConfig(iterations=6, batch_size=2, lr=1e-2),
        encode.word_embedding(model, "object")[None, None],
    )
    [learned] = learn_tokens(model, config, [token_target(2)], start, evaluate=evaluate, eval_every=2)
    assert torch.equal(learned.vectors, seen[best])
    assert [row["score"] for row in learned.evaluations] == [*of_evaluations]
    assert learned.effective_images == pytest.approx(2), "two images of equal weight"


@pytest.mark.parametrize("name", ["weapon", "vice", "ink"])
def test_training_prompts_are_disjoint_from_the_reported_prompts(name: str) -> None:
    """Reported results are about prompts that no token was trained on."""
    root = Path(__file__).parents[2]
    with (root / "prompts" / f"{name}.csv").open() as f:
        rows = [r for r in csv.DictReader(f) if r["split"] in ("test", "proof") and r["role"] == "concept"]
    with (root / "prompts" / "neutral.csv").open() as f:
        subjects = {r["label"].partition(":")[2] for r in csv.DictReader(f)} | {
            r["label"].partition(":")[2] for r in rows
        }
    for kind, word in (("object", None), ("style", name)):
        for subject in subjects:
            article = "an" if subject[0] in "aeiou" else "a"
            learned = prompt_templates(kind, [f"{article} {subject}"])[0]
            prompts = {t.replace("{}", word or subject) for t in learned if t != "{}"}
            assert not prompts & {r["text"] for r in rows}


def test_a_third_of_the_prompts_is_the_token_alone(model: Model) -> None:
    config, vectors = TextualInversionConfig(batch_size=3000), torch.zeros(1, 16)
    batch = _sample_batch(model, config, token_target(2), vectors)
    assert sum(len(prompt) == 1 for prompt in batch.prompts) / 3000 == pytest.approx(1 / 3, abs=0.03)


def test_the_first_step_is_adams_without_weight_decay(model: Model) -> None:
    """No element moves further than the learning rate, most of them as far; decay would move large ones further."""
    start = torch.linspace(-9, 9, 16)[None, None]
    [learned] = learn_tokens(model, TextualInversionConfig(iterations=1, lr=1e-2), [token_target(2)], start)
    moved = (learned.vectors - start[0]).abs()
    assert [float(moved.max()), float(moved.median())] == pytest.approx([1e-2, 1e-2], rel=1e-3)


@pytest.mark.parametrize("norm", [None, 0.5, 1.0])
def test_max_norm_limits_the_length_of_vectors(model: Model, norm: float | None) -> None:
    words = model.text_encoder.get_input_embeddings().weight.norm(dim=-1).mean()
    config = TextualInversionConfig(iterations=8, batch_size=2, lr=0.5, max_norm=norm)
    [learned] = learn_tokens(model, config, [token_target(2)], encode.word_embedding(model, "object").repeat(1, 2, 1))
    length = learned.vectors.norm(dim=-1) / words
    assert (length > 2).all() if norm is None else torch.allclose(length, torch.tensor(norm))


def test_inversion_lowers_the_loss_of_its_images(model: Model) -> None:
    """After inversion the denoising loss of the images is lower with the token than with the initializer word."""
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
    config = TextualInversionConfig(iterations=60, batch_size=16, lr=0.05)
    [learned] = learn_tokens(model, config, [token_target(4, z0)], start[None])
    assert loss(learned.vectors) < loss(start)


def test_batched_tokens_equal_tokens_learned_alone(model: Model) -> None:
    start = encode.word_embedding(model, "object").repeat(3, 1, 1)

    def learn_in_batches(tokens_per_batch: int) -> list[LearnedToken]:
        config = TextualInversionConfig(iterations=5, batch_size=2, lr=1e-2)
        return learn_tokens(
            model, config, [token_target(4, seed=i) for i in range(3)], start, tokens_per_batch=tokens_per_batch
        )

    for alone, batched in zip(learn_in_batches(1), learn_in_batches(2), strict=True):
        assert torch.allclose(alone.vectors, batched.vectors, atol=1e-5)
        assert alone.losses == pytest.approx(batched.losses, rel=1e-4)
        assert not torch.allclose(alone.vectors, start[0], atol=1e-3)


def test_run_resumes_bit_for_bit_from_any_step(model: Model, tmp_path: Path) -> None:
    """Two groups of tokens: finished, half finished or not started. The best evaluation is not the last."""
    first = encode.word_embedding(model, "object").repeat(3, 1, 1)
    config = TextualInversionConfig(iterations=4, batch_size=2, lr=1e-2, max_norm=1.0)

    def run(state: SavedState | None = None) -> tuple[list[LearnedToken], list[InversionProgress]]:
        reported: list[InversionProgress] = []

        def on_step(p: InversionProgress) -> None:
            reported.append(p)
            if state is None:
                save(tmp_path / str(p.step), p.state.tensors(), p.state.metadata())

        targets = [token_target(4, seed=i) for i in range(3)]
        learned = learn_tokens(
            model,
            config,
            targets,
            first,
            tokens_per_batch=2,
            evaluate=lambda v: v.norm(dim=(1, 2)).tolist(),
            eval_every=2,
            on_step=on_step,
            state=state,
        )
        return learned, reported

    full, progress = run()
    for step in range(1, 9):
        resumed, reported = run(load(tmp_path / str(step)))
        assert [(p.step, p.total, p.loss) for p in reported] == [
            (p.step, p.total, p.loss) for p in progress[step - 1 :]
        ]
        for a, b in zip(full, resumed, strict=True):
            assert torch.equal(a.vectors, b.vectors)
            assert (a.evaluations, a.losses, a.effective_images) == (b.evaluations, b.losses, b.effective_images)


def test_textual_inversion_ignores_ratings(model: Model) -> None:
    features, method = torch.eye(4), TextualInversion(training=EvaluatedInversionConfig(iterations=3, batch_size=2))
    [high] = invert(model, method, inversion_data(4, torch.tensor([1.0, 1.0, 0.0, 0.0]), features))
    [low] = invert(model, method, inversion_data(4, torch.tensor([0.0, 0.0, 1.0, 1.0]), features))
    assert torch.equal(high.vectors, low.vectors)


def test_notes_name_every_deviation() -> None:
    plain = HFI(num_tokens=1, training=EvaluatedInversionConfig(max_norm=None)).notes()
    assert len(plain) == 1
    assert "not flipped" in plain[0]
    assert len(HFI(num_tokens=2, training=EvaluatedInversionConfig(max_norm=1.0)).notes()) == 3
