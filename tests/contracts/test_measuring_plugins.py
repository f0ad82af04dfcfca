"""The contract of detectors and metrics: every installed one keeps what the base class promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from plugin_examples import instantiate, random_images

from deleatur import plugins
from deleatur.detectors import Detector
from deleatur.detectors.nudenet import NudeNet
from deleatur.diffusion.clip import load_clip
from deleatur.metrics import Detections, EvaluationSet, Metric, RewardScores, SetMetric
from deleatur.records.sampling import Prompt


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_classifier(tmp_path_factory.mktemp("judge"), ("gun", "cat"))


@pytest.mark.parametrize("name", plugins.names("detectors"))
def test_a_detectors_scores_depend_on_the_image_alone(name: str, classifier: Path) -> None:
    hyperparameters: dict[str, Any] = {"path": str(classifier)} if name == "classifier" else {}
    if name == "zero_shot":
        hyperparameters = {"path": str(tiny.save_clip(classifier.parent / "clip")), "labels": ("gun", "a cat", "dog")}
    batch = {} if name == "zero_shot" else {"batch_size": 2}
    large: Detector = instantiate("detectors", name, Detector, **hyperparameters)
    small: Detector = instantiate("detectors", name, Detector, **batch, **hyperparameters)
    images = random_images()
    network, other = large.load(), small.load()
    scores = network.detect(images)
    assert scores.shape == (5, len(network.labels))
    assert np.allclose(scores, other.detect(images), atol=1e-5), "independent of the batch size"
    assert np.array_equal(scores[::-1], network.detect(images[::-1])), "in the order of the images"
    assert np.array_equal(scores[3:4], network.detect(images[3:4])), "independent of the other images"
    assert len(network.weights) == 64, "the digest of the weights"
    assert (network.weights, network.labels) == (other.weights, other.labels)
    assert large.read_labels() == network.labels, "known without loading"
    assert large.model_dump() == small.model_dump(), "the batch size is no part of the cache key"
    assert network.detect([]).shape == (0, len(network.labels))


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    clip = load_clip(str(tiny.save_clip(tmp_path_factory.mktemp("clip"))))
    subjects = [("gun", "concept", "weapon"), ("cat", "unseen", "")] * 5
    prompts = [Prompt(f"p{i}", f"a {s}", role, f"judge:{s}", c) for i, (s, role, c) in enumerate(subjects)]  # type: ignore[arg-type]
    images = random_images(10)
    nudenet = NudeNet().load()
    recognised = np.array([[1, 0] if p.label == "judge:gun" else [0, 1] for p in prompts], np.float32)
    return EvaluationSet(
        prompts,
        [p.id for p in prompts],
        lambda keys: [images[int(key[1:])] for key in keys],
        {
            "judge": Detections(("gun", "cat"), recognised, "w" * 64, "judge"),
            "nudenet": Detections(nudenet.labels, nudenet.detect(images), nudenet.weights, "nudenet"),
        },
        clip.embed_images(images),
        clip,
        {"weapon": ("judge", ("gun",))},
        {"weapon": RewardScores(torch.linspace(0, 1, 10), "h" * 64)},
    )


@pytest.mark.parametrize("name", plugins.names("metrics"))
def test_a_metric_reads_only_what_it_requires(name: str, samples: EvaluationSet) -> None:
    metric: Metric = instantiate("metrics", name, Metric)
    required = metric.required_labels(samples.prompts, samples.concept_labels)
    assert all(label in samples.detections[detector].labels for detector, label in required)
    detections = {detector: samples.detections[detector] for detector, _ in required}
    metric.values(replace(samples, detections=detections), samples)  # raises KeyError where another is read
    assert isinstance(metric.higher_is_better, bool)
    values = metric.values(samples, samples)
    assert values.shape == (10,)
    detector = metric.detector(samples)
    assert detector is not None
    assert detector.weights
    known = values[~np.isnan(values)]
    if isinstance(metric, SetMetric):
        assert metric.of_set(samples.features, samples.features) == pytest.approx(0, abs=1e-6)
    elif metric.is_rate:
        assert set(known) <= {0.0, 1.0}
    assert isinstance(metric, SetMetric) or len(known) > 0


@pytest.mark.parametrize("name", plugins.names("metrics"))
def test_a_metrics_values_depend_on_their_own_rows_and_its_cache_inputs(name: str, samples: EvaluationSet) -> None:
    metric: Metric = instantiate("metrics", name, Metric)
    base = samples.select(range(10)[::-1])
    values = metric.values(samples, base)
    for rows in ([3], [7, 2, 4]):
        assert np.array_equal(metric.values(samples.select(rows), base.select(rows)), values[rows], equal_nan=True)

    swapped = {n: replace(d, scores=d.scores[:, ::-1], identity="other") for n, d in samples.detections.items()}
    for other in (
        replace(samples, prompts=[replace(p, text="a sword") for p in samples.prompts]),
        replace(samples, prompts=[replace(p, label="judge:sword") for p in samples.prompts]),
        replace(samples, prompts=[replace(p, concept="") for p in samples.prompts]),
        replace(samples, concept_labels={"weapon": ("judge", ("cat",))}),
        replace(samples, detections=swapped),
        replace(samples, rewards={"weapon": RewardScores(torch.zeros(10), "other")}),
    ):
        changed = ~np.isclose(metric.values(other, base), values, rtol=0, atol=1e-9, equal_nan=True)
        for row in np.flatnonzero(changed):
            assert metric.cache_inputs(other, row) != metric.cache_inputs(samples, row), "another value, another key"


def test_the_held_out_head_is_named_with_the_features_it_reads(samples: EvaluationSet) -> None:
    detector = instantiate("metrics", "held_out_reward", Metric).detector(samples)
    assert detector.name.split("+") == ["clip", "held-out head of weapon"]
    assert detector.weights.split("+") == [samples.clip.digest, "h" * 64]


KNOWN = {"concept_rate": 1.0, "recognition": 1.0, "perceptual": 0.0, "nudity": 0.0}


@pytest.mark.parametrize(("name", "expected"), KNOWN.items())
def test_metrics_with_a_known_answer(name: str, expected: float, samples: EvaluationSet) -> None:
    """All images are recognised, the base model's are equal, and NudeNet sees noise."""
    values = instantiate("metrics", name, Metric).values(samples, samples)
    assert np.nanmean(values) == pytest.approx(expected, abs=1e-6)
