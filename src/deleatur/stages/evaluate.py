"""shots → report/: frozen networks look at every picture, metrics read what they saw, intervals come last.

What a network said of a shard is kept under the shard's name: a killed run loses one shard of one network at most,
and a new metric draws and looks at nothing again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from deleatur.detectors import Detector
from deleatur.diffusion.features import Clip
from deleatur.io import documents, images, shots, tables, tensors
from deleatur.maths import agreement
from deleatur.maths.agreement import Interval
from deleatur.maths.seeds import derive
from deleatur.metrics import Array, Gallery, Metric, Seen, SetMetric
from deleatur.records import Prompt, Report, Score, Side
from deleatur.settings import Settings
from deleatur.stages import identity, inputs
from deleatur.stages.check import demand_labels
from deleatur.stages.progress import Bar, bar

SIDES: tuple[Side, ...] = ("base", "champion", "candidate")
PROMPT = ["id", "text", "role", "label", "concept"]  # in the order of the record's fields

RESAMPLES = 200
"""Bootstrap draws behind the interval of a number that belongs to a whole set."""

VALUES = pa.schema(
    {
        "side": pa.string(),
        "id": pa.string(),
        "role": pa.string(),
        "index": pa.int64(),
        "metric": pa.string(),
        "value": pa.float64(),
    }
)


def run(settings: Settings) -> None:
    demand_labels(settings)
    metrics = inputs.metrics(settings)
    drawn = {side: found for side in SIDES if len(found := shots.read(settings.paths.shots, side))}
    galleries = look(settings, drawn)
    scores, values = [], []
    with bar("metrics", len(metrics) * len(galleries)) as advance:
        for name, metric in metrics.items():
            of_side: dict[Side, Array] = {}
            for side, gallery in galleries.items():
                of_side[side] = metric.values(gallery, galleries["base"])
                values.append(_long(drawn[side], side, name, of_side[side]))
                scores += _scores(settings, name, metric, side, galleries, of_side)
                advance(note=name)
    tables.write_table(settings.paths.scores / "values.parquet", pd.concat(values), VALUES)
    report = Report(identity.of(settings), tuple(scores), tuple(_notes(settings)))
    folder = tables.emptied(settings.paths.report)
    documents.write(folder / "report.json", report)
    tables.write_json(folder / "metrics.json", _flat(scores))
    tables.write_csv(folder / "scores.csv", pd.DataFrame([_plain(s) for s in scores]))


def look(settings: Settings, drawn: Mapping[Side, pd.DataFrame]) -> dict[Side, Gallery]:
    """What every detector and CLIP say of every picture of every side."""
    detectors = inputs.detectors(settings)
    clip = inputs.clip(settings)
    counts = {n: (s.found.detector, s.found.labels) for n, s in settings.concepts.items() if n in settings.targets}
    heads = {name: inputs.head(settings, name, "held_out") for name in settings.targets}
    wanted: set[Path] = set()
    out: dict[Side, Gallery] = {}
    with bar("look", sum(map(len, drawn.values())) * (len(detectors) + 1)) as advance:
        for side, frame in drawn.items():
            prompts = [Prompt(*row) for row in frame[PROMPT].itertuples(index=False)]
            pictures = [images.decode(b) for b in frame["image"]]
            seen = {}
            for name, detector in detectors.items():
                path = _kept(settings, f"{name}-{detector.model_dump_json()}", frame, wanted)
                seen[name] = _seen(path, detector, pictures, advance)
            path = _kept(settings, f"clip-{clip.digest}", frame, wanted)
            features = _features(path, clip, pictures)
            advance(len(frame))
            rewards = {name: head(features) for name, head in heads.items()}
            out[side] = Gallery(prompts, pictures, seen, features, clip, counts, rewards)
    for stale in set(settings.paths.scores.glob("*.safetensors")) - wanted:
        stale.unlink()
    return out


def _kept(settings: Settings, what: str, frame: pd.DataFrame, wanted: set[Path]) -> Path:
    name = hashlib.sha256("".join([what, *frame["key"]]).encode()).hexdigest()[:24]
    path = settings.paths.scores / f"{name}.safetensors"
    wanted.add(path)
    return path


def _seen(path: Path, detector: Detector, pictures: list[Image.Image], advance: Bar) -> Seen:
    if path.is_file():
        advance(len(pictures), note="reused")
    else:
        found = detector.detect(pictures, advance)
        facts = {"labels": list(found.labels), "weights": found.weights}
        tensors.save(path, {"scores": torch.from_numpy(np.ascontiguousarray(found.scores))}, facts)
    kept, told = tensors.load(path)
    return Seen(tuple(told["labels"]), kept["scores"].numpy(), told["weights"])


def _features(path: Path, clip: Clip, pictures: list[Image.Image]) -> Tensor:
    if not path.is_file():
        tensors.save(path, {"features": clip.pictures(pictures)}, {})
    return tensors.load(path)[0]["features"]


def _long(frame: pd.DataFrame, side: Side, metric: str, values: Any) -> pd.DataFrame:
    out = frame[["id", "role", "index"]].assign(side=side, metric=metric, value=values)
    return out.dropna(subset=["value"])


def _scores(
    settings: Settings,
    name: str,
    metric: Metric,
    side: Side,
    galleries: Mapping[Side, Gallery],
    of_side: Mapping[Side, Array],
) -> list[Score]:
    """Per role: the number, and its paired difference from the sides that came before (base, champion)."""
    gallery, values = galleries[side], of_side[side]
    roles = np.array([p.role for p in gallery.prompts])
    clusters = np.unique([p.id for p in gallery.prompts], return_inverse=True)[1]
    level, out = settings.evaluate.level, []
    made_by = metric.detector(gallery)
    plain = Score(name, "", side, 0.0, 0.0, 0.0, 0, 0, metric.higher_is_better, None, made_by)

    def add(role: str, rows: Any, interval: Interval, versus: Side | None) -> None:
        if not np.isfinite([interval.low, interval.high]).all():
            return  # too few prompts for an interval, and no number leaves without one
        n, prompts = int(rows.sum()), len(set(clusters[rows]))
        out.append(
            replace(
                plain,
                slice=role,
                value=interval.value,
                low=interval.low,
                high=interval.high,
                n=n,
                prompts=prompts,
                versus=versus,
            )
        )

    for role in sorted(set(roles)):
        rows = (roles == role) & ~np.isnan(values)
        if isinstance(metric, SetMetric):
            rows = roles == role
            if side != "base" and rows.sum() >= metric.least:
                add(role, rows, _set_interval(settings, metric, gallery, galleries["base"], clusters, rows, role), None)
        elif rows.any():
            of = agreement.rate if metric.rate else agreement.mean
            add(role, rows, of(values[rows], clusters[rows], level), None)
            for other in of_side:
                if side == "candidate" and other != side:
                    apart = values - of_side[other]
                    both = rows & ~np.isnan(apart)
                    add(role, both, agreement.difference(apart[both], clusters[both], level), other)
    return out


def _set_interval(
    settings: Settings, metric: SetMetric, ours: Gallery, base: Gallery, clusters: Any, rows: Any, role: str
) -> Interval:
    """Bootstrap over prompts, the same draws on both sides; basic form (2θ − θ*), since such distances are biased
    upwards in resamples and percentiles would lie above the number itself.
    """
    x, y, of = ours.features[rows], base.features[rows], clusters[rows]
    value = metric.of_set(x, y)
    members = [np.flatnonzero(of == c) for c in np.unique(of)]
    rng = np.random.default_rng(derive(settings.seed, "evaluate", "bootstrap", role))
    found = []
    for _ in range(RESAMPLES):
        draw = torch.from_numpy(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]))
        found.append(metric.of_set(x[draw], y[draw]))
    tail = 0.5 - settings.evaluate.level / 2
    high, low = 2 * value - np.quantile(found, [tail, 1 - tail])
    return Interval(value, max(0.0, float(low)), float(max(high, value)))


def _notes(settings: Settings) -> list[str]:
    notes = [
        f"Intervals ({settings.evaluate.level:.0%}): Wilson for shares, Bonett–Price for paired yes/no differences, "
        "t for means; pictures of one prompt count as one cluster, and few prompts widen every interval.",
        f"Tokens stand for {'the learned soft tokens' if settings.erase.source == 'token' else 'the words given'}.",
    ]
    for name in settings.targets:
        sentences = ", ".join(f"“{s}”" for s in settings.concepts[name].sentences)
        notes.append(f"Words and tokens of {name} were erased in {sentences}; the papers erase them alone: “{{}}”.")
    if settings.guide.method != inputs.PLAIN:
        notes.append(
            f"The candidate is drawn with the guide {settings.guide.method}; base and champion are drawn plainly. "
            "Its numbers hold where pictures are drawn with this guide: an exported model does not bring it along."
        )
    if "nudenet" in settings.evaluate.detectors:
        notes.append("NudeNet's network is for photographs: on drawings its rates are near zero and say little.")
    return notes


def _flat(scores: list[Score]) -> dict[str, Any]:
    """{metric: {slice: {side or side−versus: value}}}: what `dvc metrics diff` compares."""
    out: dict[str, Any] = {}
    for s in scores:
        place = out.setdefault(s.metric, {}).setdefault(s.slice, {})
        place[s.side if s.versus is None else f"{s.side}-{s.versus}"] = round(s.value, 6)
    return out


def _plain(score: Score) -> dict[str, Any]:
    return {k: v for k, v in asdict(score).items() if k != "detector"}
