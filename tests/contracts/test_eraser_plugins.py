"""The contract of erasers, inversion methods and attacks: every installed method keeps what its base class promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import network_calls
import pytest
import tiny
import torch
from plugin_examples import FAST, TRAINING, instantiate, random_images

from deleatur import plugins
from deleatur.attacks import Attack, AttackContext, AttackTarget
from deleatur.diffusion import encode
from deleatur.diffusion.model import Model, digest_module
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.predict import Weights
from deleatur.erasers import Eraser
from deleatur.inversion import InversionContext, InversionData, Inverter
from deleatur.records.model import Concept, RatedImages, SoftToken
from deleatur.storage.tensors import load, load_delta, save, save_delta
from deleatur.training.early_stopping import Evaluation
from deleatur.training.loop import ErasureContext, TrainingProgress
from deleatur.training.parameters import select
from deleatur.training.textual_inversion import prompt_templates


def with_images(concept: Concept) -> Concept:
    return replace(concept, images=RatedImages(random_images(4), random_images(3)))


@pytest.mark.parametrize("name", plugins.names("erasers"))
def test_an_eraser_is_deterministic_and_leaves_the_model_unmodified(model: Model, name: str, tmp_path: Path) -> None:
    eraser: Eraser = instantiate("erasers", name, Eraser)
    eraser.check_concepts(["weapon"])
    concepts = [with_images(encode.concept_from_words(model, "weapon", ["gun", "sword"]))]
    context = ErasureContext(seed=1, preserve=encode.encode_text(model, ["", "a cat"]))
    before = digest_module(model.unet)
    first, second = (eraser.erase(model, concepts, context) for _ in range(2))
    assert digest_module(model.unet) == before
    assert set(first.tensors) <= eraser.touched_parameters(model), "only declared parameters are in the delta"
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors), "same seed, same delta"
    save_delta(tmp_path / "first.safetensors", first)
    loaded = load_delta(tmp_path / "first.safetensors")
    assert all(torch.equal(first.tensors[n], loaded.tensors[n]) for n in first.tensors), "round trip through disk"
    assert (loaded.base, loaded.method, loaded.concepts) == (model.unet_digest, name, ("weapon",))
    assert first.one_step == loaded.one_step == eraser.one_step
    save_delta(tmp_path / "second.safetensors", second)
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    edited_weights(model, loaded)


@pytest.mark.parametrize("name", plugins.names("erasers"))
def test_an_eraser_mixes_words_and_tokens_evaluates_and_resumes(model: Model, name: str, tmp_path: Path) -> None:
    """Two concepts, one in words and one in soft tokens; evaluated at every step; resumed from its first checkpoint."""
    vectors = torch.randn(2, 1, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    concepts = [
        with_images(encode.concept_from_words(model, "weapon", ["gun"], ["a {}"])),
        with_images(encode.concept_from_token(model, SoftToken("style", vectors), ["a {}", "{}"])),
    ]
    hyperparameters: dict[str, Any] = dict(FAST.get(name, {}))
    if "training" in hyperparameters:
        hyperparameters["training"] = {**hyperparameters["training"], "eval_every": 1, "max_preserved_drop": 10.0}
    eraser: Eraser = plugins.load("erasers", name, Eraser)(**hyperparameters)
    preserve, path = encode.encode_text(model, ["", "a cat"]), tmp_path / "state.safetensors"
    evaluated: list[int] = []

    def probe(weights: Weights) -> Evaluation:
        evaluated.append(len(weights))
        return Evaluation(1.0, 1.0)

    def on_step(p: TrainingProgress) -> None:
        if p.state and not path.exists():
            save(path, p.state.tensors(), p.state.metadata())

    complete = eraser.erase(model, concepts, ErasureContext(1, preserve, on_step=on_step, probe=probe))
    assert complete.concepts == ("weapon", "style")
    if path.exists():
        trained = len(eraser.touched_parameters(model))
        assert evaluated == [0, *[trained] * TRAINING["iterations"]], "the base model, then the trained weights"
        resumed = eraser.erase(model, concepts, ErasureContext(1, preserve, probe=probe, state=load(path)))
        assert all(torch.equal(complete.tensors[n], resumed.tensors[n]) for n in complete.tensors), "the same bits"
        assert resumed.record["curve"] == complete.record["curve"]
        assert resumed.record["evaluations"] == complete.record["evaluations"]


@pytest.mark.parametrize("name", plugins.names("erasers"))
def test_an_erasers_workload_is_what_it_takes(model: Model, name: str) -> None:
    """Rows with gradient exactly, those without as far as randomness allows; trainable parameters exactly."""
    hyperparameters: dict[str, Any] = dict(FAST.get(name, {}))
    if "training" in hyperparameters:
        hyperparameters["training"] = {**hyperparameters["training"], "iterations": 20}
    eraser: Eraser = plugins.load("erasers", name, Eraser)(**hyperparameters)
    concept = with_images(encode.concept_from_words(model, "weapon", ["gun", "sword"]))
    with network_calls.rows() as counts:
        delta = eraser.erase(model, [concept], ErasureContext(1, encode.encode_text(model, ["", "a cat"])))
    workload = eraser.workload("words")
    assert counts["backward"] == workload.backward
    assert counts["max_backward_batch"] <= workload.max_backward_batch
    assert counts["forward"] == pytest.approx(workload.forward, rel=0.2)
    assert counts["max_forward_batch"] <= workload.max_forward_batch
    trainable = select(model.unet, workload.trainable) if workload.trainable else {}
    assert set(delta.tensors) <= set(trainable)
    assert sum(p.numel() for p in delta.tensors.values()) == sum(trainable[n].numel() for n in delta.tensors)


@pytest.mark.parametrize("name", plugins.names("inversion"))
def test_an_inversion_method_learns_tokens_and_leaves_the_model_unmodified(model: Model, name: str) -> None:
    inverter: Inverter = instantiate("inversion", name, Inverter)
    z = torch.randn(6, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    data = InversionData(
        z,
        torch.linspace(0.5, 1, 6),
        torch.eye(6),
        False,
        torch.zeros(6, dtype=torch.bool),
        prompt_templates("object", [""] * 6),
    )
    before = digest_module(model.text_encoder), digest_module(model.unet)
    start = encode.word_embedding(model, "object")
    evaluated: list[int] = []

    def evaluate(vectors: torch.Tensor) -> list[float]:
        evaluated.append(len(vectors))
        return [0.0] * len(vectors)

    with network_calls.rows() as counts:
        tokens = inverter.invert(model, data, start, InversionContext(0, evaluate))
    workload = inverter.workload()
    assert (counts["forward"], counts["backward"]) == (0, workload.backward)
    assert counts["max_backward_batch"] == workload.max_backward_batch
    assert (sum(evaluated), len(tokens)) == (workload.evaluations * workload.num_tokens, workload.num_tokens)
    assert all(t.vectors.shape[1:] == start.shape for t in tokens)
    assert any(not torch.equal(t.vectors[0], start) for t in tokens)
    assert (digest_module(model.text_encoder), digest_module(model.unet)) == before


@pytest.mark.parametrize("name", plugins.names("attacks"))
def test_an_attack_keeps_to_its_workload_and_reports_every_step(model: Model, name: str) -> None:
    attack: Attack = instantiate("attacks", name, Attack)
    assert attack.access in ("prompts", "text_encoder", "white_box", "original_model")
    z = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    start, templates = encode.word_embedding(model, "object"), prompt_templates("style", ["cat"] * 4)
    steps: list[int] = []
    with network_calls.rows() as counts:
        result = attack.attack(
            AttackTarget(model, {}, "weapon", z, start, templates), AttackContext(0, lambda p: steps.append(p.step))
        )
    workload = attack.workload()
    assert (counts["forward"], counts["backward"]) == (workload.forward, workload.backward)
    assert counts["max_backward_batch"] == workload.max_backward_batch
    assert len(result.vectors) <= workload.num_tokens
    assert result.vectors.ndim == 3
    assert steps == list(range(1, len(steps) + 1))
    assert min(result.budget.values()) > 0
