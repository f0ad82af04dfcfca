"""samples → report/: frozen networks see every image, metrics read their predictions, scores get intervals.

Predictions and metric values are cached under everything that determines them: a killed run loses one shard at most, a
new image is evaluated on its own, and a new metric leaves the others' values as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pandas as pd
import pyarrow as pa

from deleatur.artifacts.labels import require_labels
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.evaluation.cache import VALUES_FILE, EvaluationCache
from deleatur.evaluation.notes import report_notes
from deleatur.evaluation.predictions import predict
from deleatur.evaluation.scores import metric_scores, metric_values
from deleatur.metrics import Array, SetMetric
from deleatur.records.report import Report, Score
from deleatur.records.sampling import Variant
from deleatur.runtime import provenance
from deleatur.runtime.progress import bar
from deleatur.storage import files, json_records, samples

VARIANTS: tuple[Variant, ...] = ("base", "champion", "candidate")

VALUES = pa.schema(
    {
        "variant": pa.string(),
        "id": pa.string(),
        "role": pa.string(),
        "index": pa.int64(),
        "metric": pa.string(),
        "value": pa.float64(),
    }
)


def run(settings: Settings, notes: Sequence[str] = ()) -> None:
    """notes: put before the notes of the report itself."""
    require_labels(settings)
    metrics = methods.metrics(settings)
    listing = samples.read_listing(settings.paths.samples)
    by_variant = {v: listing[listing["variant"] == v].reset_index(drop=True) for v in VARIANTS}
    by_variant = {v: rows for v, rows in by_variant.items() if len(rows)}
    cache = EvaluationCache(settings.paths.scores)
    sets = predict(settings, cache, by_variant, metrics.values())
    scores: list[Score] = []
    tables: list[pd.DataFrame] = []
    num_metrics = sum(not isinstance(metric, SetMetric) for metric in metrics.values())
    with bar("metrics", num_metrics * sum(map(len, by_variant.values()))) as advance:
        for name, metric in metrics.items():
            values = metric_values(cache, metric, sets, partial(advance, note=name))
            tables += [_value_rows(by_variant[v], v, name, of_variant) for v, of_variant in values.items()]
            scores += metric_scores(settings, name, metric, sets, values)
    files.write_table(settings.paths.scores / VALUES_FILE, pd.concat(tables), VALUES)
    cache.remove_unused()
    report = Report(provenance.collect(settings), tuple(scores), (*notes, *report_notes(settings)))
    with files.replace_folder(settings.paths.report) as folder:
        json_records.write(folder / "report.json", report)
        files.write_json(folder / "metrics.json", _nested_values(scores))
        files.write_csv(folder / "scores.csv", pd.DataFrame([_csv_row(s) for s in scores]))


def _value_rows(samples_: pd.DataFrame, variant: Variant, metric: str, values: Array) -> pd.DataFrame:
    rows = samples_[["id", "role", "index"]].assign(variant=variant, metric=metric, value=values)
    return rows.dropna(subset=["value"])


def _nested_values(scores: Sequence[Score]) -> dict[str, Any]:
    """{metric: {slice: {variant or variant-versus: value}}}, for `dvc metrics diff`."""
    nested: dict[str, Any] = {}
    for s in scores:
        of_slice = nested.setdefault(s.metric, {}).setdefault(s.slice, {})
        of_slice[s.variant if s.versus is None else f"{s.variant}-{s.versus}"] = round(s.value, 6)
    return nested


def _csv_row(score: Score) -> dict[str, Any]:
    return {k: v for k, v in asdict(score).items() if k != "detector"}
