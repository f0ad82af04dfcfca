"""The optimizer of the fine-tuning erasers: AdamW, written out, on weights in fp32 whatever the network's precision."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights
from deleatur.erasers.sdd import SDD
from deleatur.errors import ErasureRefused
from deleatur.records.model import Delta
from deleatur.training.config import TrajectoryTrainingConfig
from deleatur.training.early_stopping import Evaluation, Probe
from deleatur.training.loop import ErasureContext, TrainingProgress, _check_relative_change
from deleatur.training.parameters import select


def train(model: Model, on_step: Any = lambda progress: None, probe: Probe | None = None, **config: Any) -> Delta:
    config = {"sampler_steps": 4, "batch_size": 2, "min_relative_change": 0.0, **config}
    concept = encode.concept_from_words(model, "weapon", ["gun"])
    return SDD(order="single", training=config).erase(model, [concept], ErasureContext(1, on_step=on_step, probe=probe))  # type: ignore[arg-type]


@pytest.mark.parametrize(("beta1", "weight_decay"), [(0.9, 0.3), (0.0, 0.0)])
def test_every_step_is_adamws_with_the_configured_hyperparameters(
    model: Model, beta1: float, weight_decay: float
) -> None:
    """Loshchilov & Hutter 2019, algorithm 2, in float64, from the gradient of each step."""
    steps: list[dict[str, tuple[Tensor, Tensor]]] = []

    def on_step(p: TrainingProgress) -> None:
        assert p.state
        weights = p.state.student.items()
        steps.append({n: (w.detach().double(), w.grad.double().clone()) for n, w in weights if w.grad is not None})

    lr, beta2 = 1e-2, 0.999
    train(model, on_step, iterations=4, lr=lr, adam_beta1=beta1, weight_decay=weight_decay)
    for name, base in select(model.unet, "xattn").items():
        theta, m, v = base.double(), torch.zeros(()), torch.zeros(())
        for i, step in enumerate(steps, 1):
            weights, g = step[name]
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g.square()
            update = (m / (1 - beta1**i)) / ((v / (1 - beta2**i)).sqrt() + 1e-8)
            theta = theta * (1 - lr * weight_decay) - lr * update
            assert torch.allclose(weights, theta, rtol=0, atol=2e-6), (name, i)


@pytest.mark.parametrize(
    ("factor", "message"), [(1e-6, "by 1.0e-06 of their norm"), (3.0, "by 3.0 times"), (float("nan"), "by nan times")]
)
def test_the_relative_change_is_that_of_the_norms(model: Model, factor: float, message: str) -> None:
    """Weights that became `1 + factor` times as large."""
    parameters = select(model.unet, "xattn").items()
    with pytest.raises(ErasureRefused, match=message):
        _check_relative_change(model, TrajectoryTrainingConfig(), {n: factor * p.detach() for n, p in parameters})


def test_the_drift_is_the_students(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With m = 1 the teacher stays the base model, and the student drifts all the same."""
    monkeypatch.setattr("deleatur.training.loop.DRIFT_INTERVAL", 2)
    rows = train(model, iterations=4, lr=1e-2, ema_decay=1.0).record["curve"]
    assert [row.get("drift", -1) > 0 for row in rows] == [False, False, True, False]
    assert rows[0]["drift"] == 0


def test_updates_below_the_networks_precision_are_not_lost() -> None:
    """Adam's first step moves a weight by the learning rate: 1e-5, where bfloat16 resolves 5e-4 of a weight of 0.1."""
    for ema_decay, moved in ((0.0, 1e-5), (0.5, 0.5e-5)):
        delta = train(tiny.model(dtype=torch.bfloat16), iterations=1, lr=1e-5, weight_decay=0.0, ema_decay=ema_decay)
        largest = max(float(d.abs().max()) for d in delta.tensors.values())
        assert largest == pytest.approx(moved, rel=0.02)


def test_evaluations_are_of_the_teacher_in_the_networks_precision() -> None:
    """What is returned, as it will be sampled; and what an evaluation samples leaves the caller's generator alone."""
    evaluated: list[dict[str, Tensor]] = []
    teachers: list[dict[str, Tensor]] = []

    def probe(weights: Weights) -> Evaluation:
        torch.rand(3)
        evaluated.append(dict(weights))
        return Evaluation(1.0, 1.0)

    def on_step(p: TrainingProgress) -> None:
        assert p.state
        teachers.append({n: w.bfloat16() for n, w in p.state.teacher.items()})

    before = torch.get_rng_state()
    train(tiny.model(dtype=torch.bfloat16), on_step, probe, iterations=2, lr=1e-1, ema_decay=0.5, eval_every=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert evaluated[0] == {}
    for weights, teacher in zip(evaluated[1:], teachers, strict=True):
        assert all(torch.equal(weights[n], teacher[n]) and weights[n].dtype == teacher[n].dtype for n in teacher)
