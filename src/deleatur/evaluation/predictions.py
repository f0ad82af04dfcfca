"""Predictions of the frozen networks for every sampled image: detector scores, CLIP embeddings, held-out rewards.

Rows are cached per network, keyed by image: a killed run loses at most one shard of one network, and a new image is
passed through each network on its own.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from deleatur.artifacts import reward_heads
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.detectors import Detector
from deleatur.diffusion.batches import padded_batches
from deleatur.diffusion.clip import Clip
from deleatur.diffusion.model import digest_tensors
from deleatur.errors import ModelError
from deleatur.evaluation import cache
from deleatur.evaluation.cache import PREDICTIONS, EvaluationCache
from deleatur.feedback.reward import RewardHead
from deleatur.maths.finite import require_finite
from deleatur.metrics import Array, ConceptLabels, Detections, EvaluationSet, Metric, RewardScores
from deleatur.records.sampling import Prompt, Variant
from deleatur.runtime import models, provenance
from deleatur.runtime.distributed import dask_client, map_batches, worker_cache
from deleatur.runtime.progress import Bar, bar
from deleatur.runtime.provenance import sha256
from deleatur.storage import images, samples
from deleatur.storage.cache import RowCache, chunked

PROMPT_COLUMNS = ["id", "text", "role", "label", "concept"]  # in the order of the fields of Prompt

CLIP = ""
"""The name of CLIP among networks, which are otherwise detectors; no detector has an empty name."""

Network = Callable[[Sequence[Image.Image]], Any]
"""n images → (n, d) array or tensor."""


def predict(
    settings: Settings,
    evaluation_cache: EvaluationCache,
    samples_of: Mapping[Variant, pd.DataFrame],
    metrics: Collection[Metric],
) -> dict[Variant, EvaluationSet]:
    """CLIP embeddings and rewards of every image, and scores of each detector for the images that a metric requires.

    samples_of: variant → rows of the sample listing.
    """
    detectors, clip = methods.detectors(settings), models.clip_model(settings)
    detections = {n: s.detection for n, s in settings.concepts.items() if n in settings.targets}
    concept_labels = {n: (d.detector, d.labels) for n, d in detections.items()}
    heads = {
        name: reward_heads.load_head(settings, name, "held_out")
        for name in settings.targets
        if reward_heads.is_trained(settings, name)
    }
    prompts = {v: [Prompt(*row) for row in f[PROMPT_COLUMNS].itertuples(index=False)] for v, f in samples_of.items()}
    prompted = [pair for v, f in samples_of.items() for pair in zip(f["key"], prompts[v], strict=True)]
    keys = list(dict.fromkeys(key for key, _ in prompted))
    required = images_to_detect(metrics, prompted, concept_labels)
    image_cache = samples.image_cache(settings.paths.samples)
    total = len(keys) + sum(len(required[name]) for name in detectors)
    with dask_client(settings.workers) as client, bar("predict", total) as advance:
        predictor = _Predictor(settings, evaluation_cache, image_cache, client, advance)
        detected = {name: predictor.detect(name, d, keys, required[name]) for name, d in detectors.items()}
        features = predictor.embed(clip, keys)
    rewards = {n: RewardScores(_rewards(head, features), digest_tensors(head.tensors)) for n, head in heads.items()}
    row_of = {key: row for row, key in enumerate(keys)}
    sets: dict[Variant, EvaluationSet] = {}
    for variant, frame in samples_of.items():
        rows = [row_of[key] for key in frame["key"]]
        sets[variant] = EvaluationSet(
            prompts[variant],
            list(frame["key"]),
            partial(samples.load_images, image_cache),
            {name: replace(each, scores=each.scores[rows]) for name, each in detected.items()},
            features[rows],
            clip,
            concept_labels,
            {name: replace(reward, values=reward.values[rows]) for name, reward in rewards.items()},
        )
    return sets


def images_to_detect(
    metrics: Collection[Metric], prompted: Sequence[tuple[str, Prompt]], concept_labels: ConceptLabels
) -> defaultdict[str, list[str]]:
    """Detector → keys of the images that some metric requires it for, each once. prompted: (image key, prompt)."""
    detectors_of = {
        prompt: {name for metric in metrics for name, _ in metric.required_labels([prompt], concept_labels)}
        for prompt in {prompt for _, prompt in prompted}
    }
    keys: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for key, prompt in prompted:
        for name in detectors_of[prompt]:
            keys[name][key] = None
    return defaultdict(list, {name: list(of_detector) for name, of_detector in keys.items()})


@dataclass(frozen=True)
class _Predictor:
    """Runs networks over images that are not cached yet, in this process or on Dask workers."""

    settings: Settings
    cache: EvaluationCache
    images: RowCache
    client: Any
    """Dask client; None: this process."""
    advance: Bar

    def detect(self, name: str, detector: Detector, keys: Sequence[str], required: Sequence[str]) -> Detections:
        """Scores of one detector, (len(keys), L): nan for images that are not required."""
        network = detector.load()
        code = provenance.digest_code(type(detector), libraries=provenance.EVALUATION_LIBRARIES)
        identity = sha256([code, detector.model_dump(mode="json"), network.weights])
        scores = np.full((len(keys), len(network.labels)), np.nan, np.float32)
        if required:
            row_of = {key: row for row, key in enumerate(keys)}
            rows = [row_of[key] for key in required]
            scores[rows] = self._rows(name, network.detect, network.weights, identity, required, [type(detector)])
        return Detections(network.labels, scores, network.weights, identity)

    def embed(self, clip: Clip, keys: Sequence[str]) -> Tensor:
        """CLIP embeddings, (n, d)."""
        code = provenance.digest_code(Clip, libraries=provenance.EVALUATION_LIBRARIES)
        return torch.from_numpy(
            self._rows(CLIP, clip.embed_images, clip.digest, sha256([code, clip.digest]), keys, [Clip])
        )

    def _rows(
        self, name: str, network: Network, weights: str, identity: str, keys: Sequence[str], plugins: Sequence[type]
    ) -> Any:
        """(n, d) predictions of one network, from the cache or computed. plugins: the classes that compute them."""
        store = self.cache.open(identity, PREDICTIONS)
        missing = store.missing(keys)
        self.advance.reused(len(keys) - len(missing))
        for batch, predictions in self._compute(name, network, weights, chunked(missing, cache.SHARD_SIZE), plugins):
            store.add(pd.DataFrame({"key": batch, "numbers": list(predictions)}))
            self.advance(len(batch))
        store.compact(keys, size=cache.SHARD_SIZE)
        return require_finite(np.stack(list(store.read(keys)["numbers"])), f"predictions of {name or 'CLIP'}")

    def _compute(
        self, name: str, network: Network, weights: str, batches: Sequence[Sequence[str]], plugins: Sequence[type]
    ) -> Iterable[tuple[Sequence[str], Array]]:
        if self.client:
            # Workers are sent the encoded images: they need not share a disk with this process.
            common, read_encoded = (self.settings, name, weights), lambda keys: self.images.read(keys)["image"]
            return map_batches(self.client, predict_on_worker, common, batches, read_encoded, plugins)
        return ((keys, np.asarray(network(samples.load_images(self.images, keys)))) for keys in batches)


def predict_on_worker(common: tuple[Settings, str, str], encoded: Iterable[bytes]) -> Array:
    """Runs in a worker process, which loads the network itself. Raises ModelError if its weights differ."""
    settings, name, expected_weights = common
    network, weights = worker_cache("network", name + expected_weights, lambda: _load_network(settings, name))
    if weights != expected_weights:
        raise ModelError(
            f"{name or 'reward.clip'} is another network on {socket.gethostname()} than here",
            hint="bring that worker's checkout and models to the state of this one, then: the same command",
        )
    return np.asarray(network([images.decode(data) for data in encoded]))


def _load_network(settings: Settings, name: str) -> tuple[Network, str]:
    """A detector or CLIP, and the digest of its weights."""
    if name == CLIP:
        clip = models.clip_model(settings)
        return clip.embed_images, clip.digest
    loaded = methods.detectors(settings)[name].load()
    return loaded.detect, loaded.weights


def _rewards(head: RewardHead, features: Tensor) -> Tensor:
    batches = padded_batches(features.unbind(), cache.SHARD_SIZE)
    return torch.cat([head(torch.stack(batch))[:n] for batch, n in batches])
