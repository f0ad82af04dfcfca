"""SDD: the concept's prediction becomes the empty prompt's; early stopping; checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model, digest_module
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.predict import predict
from deleatur.erasers.keep import Keep
from deleatur.erasers.sdd import SDD
from deleatur.errors import ErasureRefused
from deleatur.records.model import Concept, Delta, SoftToken
from deleatur.storage.tensors import load, save
from deleatur.training.config import TrajectoryTrainingConfig
from deleatur.training.early_stopping import Evaluation
from deleatur.training.loop import ErasureContext, TrainingProgress
from deleatur.training.optimizer_state import SavedState

QUICK = {"iterations": 35, "lr": 3e-3, "ema_decay": 0.8, "sampler_steps": 4, "batch_size": 4}


def words(model: Model, *names: str) -> Concept:
    return encode.concept_from_words(model, "weapon", names)


def erase(model: Model, concept: Concept, order: str = "single", seed: int = 1, **config: Any) -> Delta:
    preserved = encode.encode_text(model, ["", "a cat", "a dog"])
    return SDD(order=order, training={**QUICK, **config}).erase(model, [concept], ErasureContext(seed, preserved))  # type: ignore[arg-type]


def gap(model: Model, weights: dict[str, Tensor], prompt: str, versus: str = "", base: bool = False) -> float:
    """Mean squared difference between predictions for two prompts, over noise levels."""
    g = torch.Generator().manual_seed(5)
    z, t = torch.randn(16, 4, 4, 4, generator=g), torch.linspace(50, 950, 16).long()
    with torch.no_grad():
        prediction = predict(model, weights, z, t, encode.encode_text(model, [prompt]))
        other = predict(model, {} if base else weights, z, t, encode.encode_text(model, [versus]))
    return float((prediction - other).square().mean())


@pytest.mark.parametrize("trajectories", ["fresh", "pool"])
def test_the_concept_is_predicted_as_the_empty_prompt(model: Model, trajectories: str) -> None:
    before = gap(model, {}, "gun")
    delta = erase(model, words(model, "gun"), trajectories=trajectories, pool_size=16)
    after = gap(model, edited_weights(model, delta), "gun")
    assert before > 1e-5, "the effect exists before"
    assert after < 0.5 * before, "and mostly gone after"


def test_parity_is_the_published_method_and_refuses_deviations() -> None:
    config = TrajectoryTrainingConfig(preset="parity")
    assert (
        config.trajectories,
        config.batch_size,
        config.sampler_steps,
        config.iterations,
        config.lr,
        config.ema_decay,
        config.guidance_scale,
    ) == (
        "fresh",
        1,
        50,
        1500,
        1e-5,
        0.999,
        3.0,
    )
    assert not config.notes(), "no deviation, no note"
    assert TrajectoryTrainingConfig(preset="parity", lr=1e-4, sampler_steps=8).sampler_steps == 8, (
        "lengths and rates may fit the model"
    )
    refused: list[dict[str, Any]] = [
        {"preservation_weight": 0.1},
        {"trajectories": "pool"},
        {"batch_size": 4},
        {"train_timesteps": 2},
        {"trajectory_model": "base"},
        {"timestep_distribution": "uniform"},
        {"eval_every": 100},
    ]
    for change in refused:
        with pytest.raises(ValidationError, match=f"parity is the method as published, without {next(iter(change))};"):
            TrajectoryTrainingConfig(preset="parity", **change)


@pytest.mark.parametrize(
    ("config", "words_of_notes"),
    [
        ({}, []),
        ({"order": "single"}, ["erased by itself"]),
        ({"training": {"preservation_weight": 0.5}}, ["weight 0.5", "base model's unconditional"]),
    ],
)
def test_notes_name_every_deviation(config: dict[str, Any], words_of_notes: list[str]) -> None:
    for note, part in zip(SDD(**config).notes(), words_of_notes, strict=True):
        assert part in note


@pytest.mark.parametrize(
    ("sources", "distribution"), [("words", "uniform"), ("token", "beta33"), ("words and token", "uniform")]
)
def test_the_default_timestep_distribution_is_that_of_the_concepts_paper(
    model: Model, sources: str, distribution: str
) -> None:
    token = encode.concept_from_token(model, SoftToken("gun", encode.word_embedding(model, "gun")[None, None]))
    concepts = [words(model, "gun")] * ("words" in sources) + [token] * ("token" in sources)

    def erased(**config: Any) -> Delta:
        sdd = SDD(order="single", training={**QUICK, "iterations": 4, **config})  # type: ignore[arg-type]
        return sdd.erase(model, concepts, ErasureContext(1))

    opposite = "beta33" if distribution == "uniform" else "uniform"
    explicit, other = (erased(timestep_distribution=d) for d in (distribution, opposite))
    assert [same(erased(), d) for d in (explicit, other)] == [True, False]


def test_preservation_holds_other_prompts(model: Model) -> None:
    off, on = (
        edited_weights(model, erase(model, words(model, "gun"), preservation_weight=w, iterations=15))
        for w in (0.0, 4.0)
    )
    moved_off, moved_on = (gap(model, w, "a cat", "a cat", base=True) for w in (off, on))
    assert moved_on < 0.003 * moved_off


def test_the_model_is_unmodified_and_only_attn2_is_in_the_delta(model: Model) -> None:
    before = digest_module(model.unet)
    delta = erase(model, words(model, "gun"), iterations=3)
    assert digest_module(model.unet) == before
    assert all(p.grad is None and not p.requires_grad for p in model.unet.parameters())
    assert set(delta.tensors) == SDD().touched_parameters(model)
    assert all(".attn2." in n for n in delta.tensors)
    assert all(d.abs().sum() > 0 for n, d in delta.tensors.items() if n.endswith(("to_v.weight", "to_out.0.weight")))


def test_the_seed_decides_every_bit(model: Model) -> None:
    one, same, other = (erase(model, words(model, "gun"), seed=s, iterations=4) for s in (1, 1, 2))
    assert all(torch.equal(one.tensors[n], same.tensors[n]) for n in one.tensors)
    assert any(not torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


def test_nothing_to_erase_has_no_loss_and_is_refused(model: Model) -> None:
    """c_s = c₀: the loss is 0 from the first step, so the weights do not move."""
    empty = encode.encode_text(model, [""])
    empty_concept = Concept("nothing", "words", ("",), (("",),), empty, ((),), (1,))
    losses: list[float] = []
    sdd = SDD(order="single", training={**QUICK, "iterations": 3, "weight_decay": 0.0})
    with pytest.raises(ErasureRefused, match="nothing was erased"):
        sdd.erase(model, [empty_concept], ErasureContext(0, on_step=lambda p: losses.append(p.loss)))
    assert losses == [0.0, 0.0, 0.0]


def test_the_teacher_is_the_average_of_the_student(model: Model) -> None:
    """θ*_n = m θ*_{n−1} + (1−m) θ_n from the very first step, and it is returned."""
    students: list[dict[str, Tensor]] = []

    def on_step(p: TrainingProgress) -> None:
        students.append({n: w.detach().clone() for n, w in p.state.student.items()})

    config = {**QUICK, "iterations": 5, "ema_decay": 0.7}
    sdd = SDD(order="single", training=config)  # type: ignore[arg-type]
    delta = sdd.erase(model, [words(model, "gun")], ErasureContext(0, on_step=on_step))
    for name, difference in delta.tensors.items():
        base = model.unet.get_parameter(name)
        average = base.clone()
        for student in students:
            average = 0.7 * average + 0.3 * student[name]
        assert torch.allclose(base + difference, average, atol=1e-6)


def test_condition_roles(model: Model) -> None:
    both = words(model, "gun", "sword")
    each, joint = both.states, encode.encode_joint_prompt(model, [both])
    for order, c_p, c_s in (("paper", each, joint), ("code", joint, each), ("single", each, each)):
        roles = SDD(order=order).condition_roles(model, [both])  # type: ignore[arg-type]
        assert torch.equal(roles[0], c_p)
        assert torch.equal(roles[1], c_s)


@pytest.mark.parametrize("order", ["paper", "code"])
def test_every_order_of_roles_runs(model: Model, order: str) -> None:
    assert erase(model, words(model, "gun", "sword"), order=order, iterations=3).record["steps"] == 3


def evaluated(
    model: Model, *evaluations: Evaluation, progress: list[TrainingProgress] | None = None, **config: Any
) -> Delta:
    """A run with these evaluations, the first of them of the base model."""
    remaining = iter(evaluations)
    config = {**QUICK, "iterations": 40, "eval_every": 2, "max_preserved_drop": 0.1, **config}
    return SDD(order="single", training=config).erase(  # type: ignore[arg-type]
        model,
        [words(model, "gun")],
        ErasureContext(
            0, probe=lambda w: next(remaining), on_step=lambda p: progress.append(p) if progress is not None else None
        ),
    )


def same(one: Delta, other: Delta) -> bool:
    return all(torch.equal(one.tensors[n], other.tensors[n]) for n in other.tensors)


def test_stops_at_the_target_rate(model: Model) -> None:
    progress: list[TrainingProgress] = []
    reached = evaluated(
        model,
        Evaluation(1.0, 1.0),
        Evaluation(0.5, 0.97),
        Evaluation(0.1, 0.96),
        Evaluation(0.0, 0.95),
        progress=progress,
        target_rate=0.2,
    )
    assert (reached.record["stop"], reached.record["steps"]) == ("target", 4)
    assert [(p.step, p.total) for p in progress] == [(1, 40), (2, 40), (3, 40), (4, 4)], (
        "the total shrinks to the last step"
    )
    assert same(reached, erase(model, words(model, "gun"), seed=0, iterations=4))


@pytest.mark.parametrize(
    ("evaluations", "best"),
    [
        ([(0.6, 0.95), (0.3, 0.5)], 2),
        ([(0.2, 0.95), (0.4, 0.95), (0.3, 0.5)], 2),  # the fewest images of the concept, not the newest
        ([(0.4, 0.95), (0.2, 0.95), (0.3, 0.5)], 4),
        ([(0.2, 0.92), (0.2, 0.95), (0.1, 0.5)], 4),  # of two equal ones, the higher preserved score
        ([(0.2, 0.95), (0.1, 0.95, 0.2)], 2),  # preserved images are aligned, but blank or noise
    ],
)
def test_degraded_preserved_prompts_return_the_best_earlier_weights(
    model: Model, evaluations: list[tuple[float, ...]], best: int
) -> None:
    stopped = evaluated(model, Evaluation(1.0, 1.0), *(Evaluation(*r) for r in evaluations))
    assert (stopped.record["stop"], stopped.record["steps"]) == ("guard", 2 * len(evaluations))
    assert same(stopped, erase(model, words(model, "gun"), seed=0, iterations=best))


def test_the_last_step_is_evaluated_too(model: Model) -> None:
    evaluations = [Evaluation(1.0, 1.0), Evaluation(0.5, 0.95), Evaluation(0.4, 0.95)]
    good = evaluated(model, *evaluations, Evaluation(0.3, 0.95), iterations=5)
    assert [e["step"] for e in good.record["evaluations"]] == [0, 2, 4, 5]
    assert good.record["stop"] == "end"
    degraded = evaluated(model, *evaluations, Evaluation(0.0, 0.1), iterations=5)
    assert (degraded.record["stop"], degraded.record["steps"]) == ("guard", 5)
    assert same(degraded, erase(model, words(model, "gun"), seed=0, iterations=4))


def test_a_run_that_destroys_the_model_at_once_is_refused(model: Model) -> None:
    with pytest.raises(ErasureRefused, match=r"preserved 0.200 \(-80.0 ± 0.0 %\), contrast 1.000"):
        evaluated(model, Evaluation(1.0, 1.0), Evaluation(0.9, 0.2))
    with pytest.raises(ErasureRefused, match=r"contrast 2.000$"):
        evaluated(model, Evaluation(1.0, 1.0, 30.0), Evaluation(0.9, 1.0, 2.0))


@pytest.mark.parametrize(
    ("lr", "iterations", "message"), [(5.0, 1, "times their norm"), (1e30, 1, "by inf times"), (1e30, 3, "became")]
)
def test_without_evaluations_a_run_that_destroys_the_model_is_refused(
    model: Model, lr: float, iterations: int, message: str
) -> None:
    with pytest.raises(ErasureRefused, match=message):
        erase(model, words(model, "gun"), lr=lr, iterations=iterations)


@pytest.mark.parametrize("trajectories", ["fresh", "pool"])
def test_a_run_resumed_after_any_step_has_the_same_bits(model: Model, trajectories: str, tmp_path: Path) -> None:
    """Including convolutions, whose memory layout a file does not have, and the best weights."""
    concept, preserved = words(model, "gun", "sword"), encode.encode_text(model, ["", "a cat"])
    config = {
        **QUICK,
        "iterations": 6,
        "preservation_weight": 1.0,
        "trajectories": trajectories,
        "pool_size": 6,
        "timestep_distribution": "beta33",
    }
    config |= {"trainable": "full", "eval_every": 2, "max_preserved_drop": 0.1}
    sdd = SDD(order="single", training=config)  # type: ignore[arg-type]
    evaluations = {0: Evaluation(1.0, 1.0), 2: Evaluation(0.2, 0.95), 4: Evaluation(0.3, 0.95), 6: Evaluation(0.1, 0.5)}

    def run(state: SavedState | None = None) -> tuple[Delta, list[int]]:
        steps = [-1] if state is None else []

        def on_step(p: TrainingProgress) -> None:
            steps.append(p.step)
            if state is None:
                save(tmp_path / str(p.step), p.state.tensors(), p.state.metadata())

        delta = sdd.erase(
            model,
            [concept],
            ErasureContext(3, preserved, on_step=on_step, state=state, probe=lambda w: evaluations[steps[-1] + 1]),
        )
        return delta, steps

    complete, _ = run()
    assert complete.record["stop"] == "guard"
    for step in range(1, 7):
        resumed, steps = run(load(tmp_path / str(step)))
        assert steps == list(range(step, 7)), "it resumes after that step"
        assert all(torch.equal(complete.tensors[n], resumed.tensors[n]) for n in complete.tensors)
        assert complete.record == resumed.record


def test_selectors_match_the_published_numbers_of_parameters() -> None:
    from diffusers import UNet2DConditionModel

    from deleatur.training.parameters import select

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    counts = {rule: sum(p.numel() for p in select(unet, rule).values()) for rule in ("xattn", "xattn_kv", "full")}  # type: ignore[arg-type]
    assert counts == {"xattn": 43_962_560, "xattn_kv": 19_169_280, "full": 859_520_964}


def test_keep_is_the_unmodified_model(model: Model) -> None:
    delta = Keep().erase(model, [words(model, "gun")], ErasureContext(0))
    assert delta.tensors == {}
    assert edited_weights(model, delta) == {}
