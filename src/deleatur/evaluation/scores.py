"""Metric values of every image, cached; and scores with confidence intervals, per variant and slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from deleatur.config.settings import Settings
from deleatur.evaluation import cache
from deleatur.evaluation.cache import METRIC_VALUES, EvaluationCache
from deleatur.maths import intervals
from deleatur.maths.finite import require_finite
from deleatur.maths.intervals import Interval
from deleatur.maths.seeds import derive
from deleatur.metrics import Array, EvaluationSet, Metric, SetMetric
from deleatur.records.report import Score
from deleatur.records.sampling import Prompt, Variant
from deleatur.runtime import provenance
from deleatur.runtime.provenance import sha256
from deleatur.storage.cache import chunked

RESAMPLES = 200
"""Bootstrap resamples behind the interval of a set metric."""


def metric_values(
    evaluation_cache: EvaluationCache,
    metric: Metric,
    sets: Mapping[Variant, EvaluationSet],
    advance: Callable[[int], None],
) -> dict[Variant, Array]:
    """The metric's value of every image of every variant, (n,) each; only those not in the cache are computed."""
    base = sets["base"]
    if isinstance(metric, SetMetric):
        return {variant: metric.values(each, base) for variant, each in sets.items()}
    code = provenance.digest_code(type(metric), libraries=provenance.EVALUATION_LIBRARIES)
    store = evaluation_cache.open(sha256([code, metric.model_dump(mode="json")]), METRIC_VALUES)
    keys = {variant: _value_keys(metric, each, base) for variant, each in sets.items()}
    for variant, each in sets.items():
        missing = set(store.missing(keys[variant]))
        missing_rows = [row for row, key in enumerate(keys[variant]) if key in missing]
        advance(len(keys[variant]) - len(missing_rows))
        for rows in chunked(missing_rows, cache.SHARD_SIZE):
            values = metric.values(each.select(rows), base.select(rows))
            require_finite(values[~np.isnan(values)], f"values of {type(metric).__name__}")  # NaN: it has none
            store.add(pd.DataFrame({"key": [keys[variant][row] for row in rows], "value": values}))
            advance(len(rows))
    store.compact(*keys.values(), size=cache.SHARD_SIZE)
    return {variant: store.read(each)["value"].to_numpy(float) for variant, each in keys.items()}


def _value_keys(metric: Metric, samples: EvaluationSet, base: EvaluationSet) -> list[str]:
    """Digest of everything that determines an image's value: the image, its base image, and the metric's inputs."""
    pairs = zip(samples.image_keys, base.image_keys, strict=True)
    return [sha256([*pair, metric.cache_inputs(samples, row)]) for row, pair in enumerate(pairs)]


def metric_scores(
    settings: Settings,
    name: str,
    metric: Metric,
    sets: Mapping[Variant, EvaluationSet],
    values: Mapping[Variant, Array],
) -> Iterator[Score]:
    """Per variant and slice: the value and, for the candidate, its paired difference from every other variant."""
    for variant, samples in sets.items():
        clusters = np.unique([p.id for p in samples.prompts], return_inverse=True)[1]
        detector = metric.detector(samples)
        for slice_name, mask in report_slices(samples.prompts).items():
            for versus, rows, interval in _intervals(
                settings, metric, variant, sets, values, clusters, slice_name, mask
            ):
                # Too few prompts for an interval: no score is reported without one.
                if np.isfinite([interval.low, interval.high]).all():
                    bounds = (interval.value, interval.low, interval.high)
                    counts = (int(rows.sum()), len(set(clusters[rows])))
                    yield Score(name, slice_name, variant, *bounds, *counts, metric.higher_is_better, versus, detector)


def _intervals(
    settings: Settings,
    metric: Metric,
    variant: Variant,
    sets: Mapping[Variant, EvaluationSet],
    values: Mapping[Variant, Array],
    clusters: Any,
    slice_name: str,
    mask: Any,
) -> Iterator[tuple[Variant | None, Any, Interval]]:
    """(compared variant or None, rows, interval) of one slice. Images of one prompt are one cluster."""
    if isinstance(metric, SetMetric):
        if variant != "base" and mask.sum() >= metric.min_images:
            samples, base = sets[variant], sets["base"]
            yield None, mask, bootstrap_interval(settings, metric, samples, base, clusters, mask, slice_name)
        return
    level = settings.evaluate.confidence_level
    rows = mask & ~np.isnan(values[variant])
    if not rows.any():
        return
    interval = intervals.rate if metric.is_rate else intervals.mean
    yield None, rows, interval(values[variant][rows], clusters[rows], level)
    if variant != "candidate":
        return
    for other in values:
        if other != variant:
            difference = values[variant] - values[other]
            paired = rows & ~np.isnan(difference)
            yield other, paired, intervals.difference(difference[paired], clusters[paired], level)


def report_slices(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Slice name → boolean mask (n,): one slice per role and, if several concepts are erased, one per role and concept,
    since one concept could fail unnoticed among many: "concept", "concept/weapon", "concept/vice", …
    """
    roles, concepts = (np.array([getattr(p, field) for p in prompts]) for field in ("role", "concept"))
    slices = {role: roles == role for role in sorted(set(roles))}
    for role, mask in list(slices.items()):
        if len(named := sorted({*concepts[mask]} - {""})) > 1:
            slices |= {f"{role}/{name}": mask & (concepts == name) for name in named}
    return slices


def bootstrap_interval(
    settings: Settings,
    metric: SetMetric,
    samples: EvaluationSet,
    base: EvaluationSet,
    clusters: Any,
    rows: Any,
    role: str,
) -> Interval:
    """Bootstrap interval over prompts, with the same resamples for both variants.

    The basic interval, 2θ − quantiles of θ* (Davison & Hinkley 1997): such distances are biased upwards in resamples,
    and the percentile interval would exclude the value.
    """
    x, y, prompt_of = samples.features[rows], base.features[rows], clusters[rows]
    value = metric.of_set(x, y)
    members = [np.flatnonzero(prompt_of == c) for c in np.unique(prompt_of)]
    if len(members) < 2:
        return Interval(value, -np.inf, np.inf)  # every resample would be the set itself
    rng = np.random.default_rng(derive(settings.seed, "evaluate", "bootstrap", role))
    resampled = []
    for _ in range(RESAMPLES):
        rows_ = torch.from_numpy(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]))
        resampled.append(metric.of_set(x[rows_], y[rows_]))
    tail = 0.5 - settings.evaluate.confidence_level / 2
    high, low = 2 * value - np.quantile(resampled, [tail, 1 - tail])
    return Interval(value, max(0.0, float(low)), float(max(high, value)))
