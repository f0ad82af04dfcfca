"""The results of trials, pooled over seeds into one table per concept. Nothing is sampled or trained here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from deleatur.benchmark import plan, trial
from deleatur.benchmark.digests import TrialDigests
from deleatur.benchmark.plan import NONE, RATINGS, Trial
from deleatur.benchmark.resources import ResourceUsage
from deleatur.benchmark.table import COLUMNS, BenchmarkTable, ErasureCost, MethodRow, MetricColumn, PooledScore
from deleatur.config.settings import Settings
from deleatur.maths import intervals
from deleatur.maths.intervals import Interval
from deleatur.records.feedback import FeedbackSummary
from deleatur.records.report import Report, Score
from deleatur.records.sampling import Variant
from deleatur.storage import files, json_records

LEARNED_ROLES = ("token", "attack")
"""Roles whose prompts are learned, so that every training seed has prompts of its own."""

Statistic = Callable[[pd.DataFrame, Any, float], Interval]
"""(values with a column per variant, cluster of each row, confidence level) → interval."""


def aggregate_trials(
    settings: Settings, digests: TrialDigests, concept: str, rows: Sequence[str], seeds: Sequence[int]
) -> BenchmarkTable:
    """The table of one concept, from the trials that are up to date. A row that lacks some seeds has the others."""
    results = [MethodResults(settings, digests, concept, name, seeds) for name in rows]
    feedback = plan.trial_settings(settings, Trial(concept, RATINGS, settings.seed)).paths.feedback / "summary.json"
    first = next((row for row in results if row.reports), None)
    return BenchmarkTable(
        concept,
        settings.evaluate.confidence_level,
        plan.section(settings).split,
        files.read_json_as(feedback, FeedbackSummary).simulated if feedback.is_file() else False,
        tuple(seeds),
        first.scores("base") if first else {},
        tuple(row.table_row() for row in results),
        _shared_provenance(next(iter(first.reports.values()))) if first else {},
    )


def _shared_provenance(report: Report) -> dict[str, str]:
    """The inputs that are the same for all rows of a concept."""
    provenance, detectors = report.provenance, {s.detector for s in report.scores if s.detector}
    return {
        "sampler": provenance.sampler,
        "seeds rule": provenance.seeds_rule,
        "pipeline": provenance.pipeline,
        "feedback": provenance.feedback,
        "prompts": provenance.prompts,
        "detectors": ", ".join(sorted({f"{d.name} {d.weights}" for d in detectors})),
    }


class MethodResults:
    """The results of one row's trials on one concept."""

    def __init__(
        self, settings: Settings, digests: TrialDigests, concept: str, name: str, seeds: Sequence[int]
    ) -> None:
        self._settings, self._name = settings, name
        self._refusals = {seed: digests.refusal(Trial(concept, name, seed)) for seed in seeds}
        self._summaries: dict[int, trial.TrialSummary] = {}
        self._usage: list[ResourceUsage] = []
        self.reports: dict[int, Report] = {}
        values = []
        for one in (Trial(concept, name, seed) for seed in seeds if not self._refusals[seed]):
            if not trial.is_done(settings, digests, one):
                continue
            summary = trial.read_summary(settings, one)
            self._refusals[one.seed] = summary.refused
            if summary.refused:
                continue
            paths = plan.trial_settings(settings, one).paths
            self._summaries[one.seed] = summary
            self.reports[one.seed] = json_records.read(paths.report / "report.json", Report)
            values.append(files.read_table(paths.scores / "values.parquet").assign(seed=one.seed))
            if usage := trial.resource_usage(settings, digests, one):
                self._usage.append(usage)
        self._values = pd.concat(values) if values else pd.DataFrame()

    def table_row(self) -> MethodRow:
        reasons = {seed: reason for seed, reason in self._refusals.items() if reason}
        if not self._summaries:
            return MethodRow(self._name, next(iter(reasons.values()), ""))
        notes = dict.fromkeys(note for summary in self._summaries.values() for note in summary.notes)
        notes |= dict.fromkeys(f"With seed {seed} it was refused: {reason}" for seed, reason in reasons.items())
        scores = self.scores("candidate")
        if self._name == NONE:  # the base model's change against itself is 0 by construction
            scores = {c.key: scores[c.key] for c in COLUMNS if c.kind == "share" and c.key in scores}
        return MethodRow(self._name, "", tuple(self._summaries), scores, self._cost(), tuple(notes))

    def _cost(self) -> ErasureCost:
        summary, usage = next(iter(self._summaries.values())), self._usage
        memory = [u.memory for u in usage if u.memory is not None]
        return ErasureCost(
            # The median ignores a machine that was busy or asleep.
            float(np.median([u.seconds for u in usage])) if usage else None,
            all(u.complete for u in usage),
            max(memory, default=None),
            summary.trained,
            summary.bytes,
            summary.predictions,
            tuple(dict.fromkeys(u.device for u in usage)),
        )

    def scores(self, variant: Variant) -> dict[str, PooledScore]:
        """Column → score. Of the base model, its own value even where rows have a change."""
        scores = {}
        for column in COLUMNS:
            if metric := _metric_name(self._settings, column):
                pool = self._pool_set_metric if metric in self._set_metrics else self._pool_values
                if score := pool(column, metric, variant):
                    scores[column.key] = score
        return scores

    @property
    def _set_metrics(self) -> set[str]:
        """Metrics with one value for a set of images, and none for a single image."""
        scored = {score.metric for report in self.reports.values() for score in report.scores}
        return scored - set(self._values["metric"])

    def _pool_values(self, column: MetricColumn, metric: str, variant: Variant) -> PooledScore | None:
        values = self._values[(self._values["metric"] == metric) & (self._values["role"] == column.role)]
        by_variant = values.pivot_table(index=["seed", "id", "index"], columns="variant", values="value")
        if variant not in by_variant or not len(by_variant):
            return None
        by_variant = by_variant.reset_index()
        is_learned = column.role in LEARNED_ROLES
        prompt = by_variant["seed"].astype(str) + "/" + by_variant["id"] if is_learned else by_variant["id"]
        clusters = np.unique(prompt, return_inverse=True)[1]
        statistic, level = _statistic(column, variant), self._settings.evaluate.confidence_level
        pooled = statistic(by_variant, clusters, level)
        if not np.isfinite([pooled.low, pooled.high]).all():
            return None
        masks = {seed: (by_variant["seed"] == seed).to_numpy() for seed in self._summaries}
        by_seed = {seed: statistic(by_variant[mask], clusters[mask], level).value for seed, mask in masks.items()}
        return PooledScore(pooled.value, pooled.low, pooled.high, len(by_variant), int(clusters.max()) + 1, by_seed)

    def _pool_set_metric(self, column: MetricColumn, metric: str, variant: Variant) -> PooledScore | None:
        """The mean over seeds, and of the seeds' intervals: conservative, as if seeds were fully correlated."""
        by_seed = {
            seed: score
            for seed, report in self.reports.items()
            for score in _matching_scores(report, metric, column.role, variant)
        }
        if len(by_seed) < len(self.reports):
            return None
        scores = list(by_seed.values())
        ends = zip(*((s.value, s.low, s.high) for s in scores), strict=True)
        value, low, high = (float(np.mean(end)) for end in ends)
        values = {seed: s.value for seed, s in by_seed.items()}
        return PooledScore(value, low, high, sum(s.n for s in scores), scores[0].prompts, values)


def _metric_name(settings: Settings, column: MetricColumn) -> str | None:
    """The name in params.yaml of the metric that a column shows."""
    metrics = settings.evaluate.metrics.items()
    return next((name for name, config in metrics if config.get("method") == column.metric), None)


def _matching_scores(report: Report, metric: str, role: str, variant: Variant) -> Iterator[Score]:
    wanted = (metric, role, variant, None)
    yield from (s for s in report.scores if (s.metric, s.slice, s.variant, s.versus) == wanted)


def _statistic(column: MetricColumn, variant: Variant) -> Statistic:
    """The estimate that a column shows of values with a column per variant."""

    def absolute(values: pd.DataFrame, clusters: Any, level: float) -> Interval:
        is_rate = column.kind in ("share", "change")
        return (intervals.rate if is_rate else intervals.mean)(values[variant].to_numpy(float), clusters, level)

    def change(values: pd.DataFrame, clusters: Any, level: float) -> Interval:
        return intervals.difference((values["candidate"] - values["base"]).to_numpy(float), clusters, level)

    def relative(values: pd.DataFrame, clusters: Any, level: float) -> Interval:
        difference = intervals.mean((values["candidate"] - values["base"]).to_numpy(float), clusters, level)
        base = float(values["base"].mean())
        ends = sorted((difference.low / base, difference.high / base))
        return Interval(difference.value / base, ends[0], ends[1])

    changes: Mapping[str, Statistic] = {"change": change, "relative": relative}
    return absolute if variant == "base" else changes.get(column.kind, absolute)
