"""shots → report/: frozen networks look at every picture, metrics read what they saw, intervals come last.

What a network said of a picture, and what a metric made of it, is kept under all that decides it: a killed run loses
one part of one network at most, a new picture is looked at by itself, and a new metric leaves the others alone.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from deleatur.artifacts import reward_heads
from deleatur.artifacts.labels import demand_labels
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion.batches import full
from deleatur.diffusion.clip import Clip
from deleatur.diffusion.encode import BARE
from deleatur.diffusion.model import digest
from deleatur.errors import ModelError
from deleatur.feedback.reward import Head
from deleatur.maths import intervals
from deleatur.maths.intervals import Interval
from deleatur.maths.seeds import derive
from deleatur.metrics import Array, Counts, Gallery, Metric, Reward, Seen, SetMetric
from deleatur.records.report import Report, Score
from deleatur.records.sampling import Prompt, Side
from deleatur.runtime import models, provenance
from deleatur.runtime.distributed import hands, own, spread
from deleatur.runtime.progress import Bar, bar
from deleatur.runtime.provenance import sha256
from deleatur.storage import files, images, json_records, samples
from deleatur.storage.cache import Kept, parts

SIDES: tuple[Side, ...] = ("base", "champion", "candidate")
PROMPT = ["id", "text", "role", "label", "concept"]  # in the order of the record's fields

CLIP = ""
"""In place of a detector's name."""

PART = 128
"""Pictures between two savings: what a killed run may have to look at again."""
RESAMPLES = 200
"""Bootstrap draws behind the interval of a number that belongs to a whole set."""

SAID = pa.schema({"key": pa.string(), "numbers": pa.list_(pa.float32())})
VALUE = pa.schema({"key": pa.string(), "value": pa.float64()})
Pictures = Sequence[Image.Image]
Ask = Callable[[Sequence[Sequence[str]]], Iterable[tuple[Sequence[str], Array]]]
"""Pictures by key, part by part → each part, and what a network says of it."""

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


class Scores:
    """The folder of what is kept: one store for each network and each metric, named by all that decides its rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._asked = {folder / "values.parquet"}

    def of(self, name: str, schema: pa.Schema) -> Kept:
        place = self.folder / name[:24]
        self._asked.add(place)
        return Kept(place, schema)

    def tidy(self) -> None:
        """Deletes the stores that nobody has asked for."""
        files.keep_only(self.folder, self._asked)


def run(settings: Settings, notes: Sequence[str] = ()) -> None:
    """notes: what a reader of the report must know besides."""
    demand_labels(settings)
    metrics = methods.metrics(settings)
    listed = samples.listed(settings.paths.shots)
    drawn = {side: own for side in SIDES if len(own := listed[listed["side"] == side].reset_index(drop=True))}
    kept = Scores(settings.paths.scores)
    galleries = look(settings, kept, drawn, metrics.values())
    scores, values = [], []
    per_picture = sum(not isinstance(metric, SetMetric) for metric in metrics.values())
    with bar("metrics", per_picture * sum(map(len, drawn.values()))) as advance:
        for name, metric in metrics.items():
            of_side = _values(kept, metric, galleries, partial(advance, note=name))
            values += [_long(drawn[side], side, name, found) for side, found in of_side.items()]
            for side in galleries:
                scores += _scores(settings, name, metric, side, galleries, of_side)
    files.write_table(settings.paths.scores / "values.parquet", pd.concat(values), VALUES)
    kept.tidy()
    report = Report(provenance.identify(settings), tuple(scores), (*notes, *_notes(settings)))
    folder = files.emptied(settings.paths.report)
    json_records.write(folder / "report.json", report)
    files.write_json(folder / "metrics.json", _flat(scores))
    files.write_csv(folder / "scores.csv", pd.DataFrame([_plain(s) for s in scores]))


def look(
    settings: Settings, kept: Scores, drawn: Mapping[Side, pd.DataFrame], metrics: Collection[Metric]
) -> dict[Side, Gallery]:
    """What CLIP says of every picture of every side, and each detector of those that a metric wants it to look at."""
    detectors = methods.detectors(settings)
    clip = models.clip_model(settings)
    counts = {n: (s.found.detector, s.found.labels) for n, s in settings.concepts.items() if n in settings.targets}
    heads = {name: reward_heads.load_head(settings, name, "held_out") for name in settings.targets}
    prompts = {side: [Prompt(*row) for row in f[PROMPT].itertuples(index=False)] for side, f in drawn.items()}
    asked = [
        (key, prompt) for side, frame in drawn.items() for key, prompt in zip(frame["key"], prompts[side], strict=True)
    ]
    keys = list(dict.fromkeys(key for key, _ in asked))
    wanted = _wanted(metrics, asked, counts)
    at = {key: row for row, key in enumerate(keys)}
    pictures = samples.pictures(settings.paths.shots)
    fetch = partial(samples.decoded, pictures)
    seen: dict[str, Seen] = {}
    total = len(keys) + sum(len(wanted[name]) for name in detectors)
    with hands(settings.workers) as others, bar("look", total) as advance:

        def asking(name: str, net: Callable[[Pictures], Any], weights: str) -> Ask:
            if others:
                common = (settings, name, weights)
                return lambda todo: spread(others, _look_there, common, todo, lambda part: pictures.read(part)["image"])
            return lambda todo: ((part, np.asarray(net(fetch(part)))) for part in todo)

        for name, detector in detectors.items():
            net = detector.load()
            how = provenance.code_digest(type(detector), libraries=provenance.LOOKING)
            what = sha256([how, detector.model_dump(mode="json"), net.weights])
            scores = np.full((len(keys), len(net.labels)), np.nan, np.float32)
            if mine := wanted[name]:
                ask = asking(name, net.detect, net.weights)
                scores[[at[key] for key in mine]] = _said(kept.of(what, SAID), mine, ask, advance)
            seen[name] = Seen(net.labels, scores, net.weights, what)
        how = provenance.code_digest(Clip, libraries=provenance.LOOKING)
        store = kept.of(sha256([how, clip.digest]), SAID)
        embedded = torch.from_numpy(_said(store, keys, asking(CLIP, clip.pictures, clip.digest), advance))
    rewards = {name: Reward(_rated(head, embedded), digest(head.tensors)) for name, head in heads.items()}
    out: dict[Side, Gallery] = {}
    for side, frame in drawn.items():
        rows = [at[key] for key in frame["key"]]
        out[side] = Gallery(
            prompts[side],
            list(frame["key"]),
            fetch,
            {name: replace(found, scores=found.scores[rows]) for name, found in seen.items()},
            embedded[rows],
            clip,
            counts,
            {name: replace(reward, values=reward.values[rows]) for name, reward in rewards.items()},
        )
    return out


def _wanted(
    metrics: Collection[Metric], asked: Sequence[tuple[str, Prompt]], counts: Counts
) -> defaultdict[str, list[str]]:
    """Detector → the pictures that a metric wants it to look at, each once."""
    of_prompt = {
        prompt: {name for metric in metrics for name, _ in metric.needs([prompt], counts)}
        for prompt in {prompt for _, prompt in asked}
    }
    out: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for key, prompt in asked:
        for name in of_prompt[prompt]:
            out[name][key] = None
    return defaultdict(list, {name: list(keys) for name, keys in out.items()})


def _said(store: Kept, keys: Sequence[str], ask: Ask, advance: Bar) -> Any:
    """A network's numbers, a row for each picture; it is asked for those that it has not seen."""
    missing = store.missing(keys)
    advance.reused(len(keys) - len(missing))
    for part, numbers in ask(parts(missing, PART)):
        store.add(pd.DataFrame({"key": part, "numbers": list(numbers)}))
        advance(len(part))
    store.settle(keys, size=PART)
    return np.stack(list(store.read(keys)["numbers"]))


def _look_there(common: tuple[Settings, str, str], encoded: Iterable[bytes]) -> Array:
    """In another process, with the network as it lies there."""
    settings, name, weights = common
    net, found = own("network", name + weights, lambda: _network(settings, name))
    if found != weights:
        raise ModelError(f"{name or 'reward.clip'} is another network on {socket.gethostname()} than here")
    return np.asarray(net([images.decode(data) for data in encoded]))


def _network(settings: Settings, name: str) -> tuple[Callable[[Pictures], Any], str]:
    """A detector, or CLIP, and the digest of its weights."""
    if name == CLIP:
        clip = models.clip_model(settings)
        return clip.pictures, clip.digest
    loaded = methods.detectors(settings)[name].load()
    return loaded.detect, loaded.weights


def _rated(head: Head, embedded: Tensor) -> Tensor:
    return torch.cat([head(torch.stack(batch))[:n] for batch, n in full(embedded.unbind(), PART)])


def _values(
    kept: Scores, metric: Metric, galleries: Mapping[Side, Gallery], advance: Callable[[int], None]
) -> dict[Side, Array]:
    """Of every picture of every side: what is kept is read, only what is missing is made."""
    base = galleries["base"]
    if isinstance(metric, SetMetric):
        return {side: metric.values(gallery, base) for side, gallery in galleries.items()}
    how = provenance.code_digest(type(metric), libraries=provenance.LOOKING)
    store = kept.of(sha256([how, metric.model_dump(mode="json")]), VALUE)
    names = {side: _names(metric, gallery, base) for side, gallery in galleries.items()}
    for side, gallery in galleries.items():
        missing = set(store.missing(names[side]))
        todo = [row for row, name in enumerate(names[side]) if name in missing]
        advance(len(names[side]) - len(todo))
        for rows in parts(todo, PART):
            values = metric.values(gallery.take(rows), base.take(rows))
            store.add(pd.DataFrame({"key": [names[side][row] for row in rows], "value": values}))
            advance(len(rows))
    store.settle(*names.values(), size=PART)
    return {side: store.read(own)["value"].to_numpy(float) for side, own in names.items()}


def _names(metric: Metric, ours: Gallery, base: Gallery) -> list[str]:
    pairs = zip(ours.keys, base.keys, strict=True)
    return [sha256([*pair, metric.reads(ours, row)]) for row, pair in enumerate(pairs)]


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
    """Per slice: the number, and its paired difference from the sides that came before (base, champion)."""
    gallery, values = galleries[side], of_side[side]
    clusters = np.unique([p.id for p in gallery.prompts], return_inverse=True)[1]
    level, out = settings.evaluate.level, []
    made_by = metric.detector(gallery)
    plain = Score(name, "", side, 0.0, 0.0, 0.0, 0, 0, metric.higher_is_better, None, made_by)

    def add(name: str, rows: Any, interval: Interval, versus: Side | None) -> None:
        if not np.isfinite([interval.low, interval.high]).all():
            return  # too few prompts for an interval, and no number leaves without one
        n, prompts = int(rows.sum()), len(set(clusters[rows]))
        out.append(
            replace(
                plain,
                slice=name,
                value=interval.value,
                low=interval.low,
                high=interval.high,
                n=n,
                prompts=prompts,
                versus=versus,
            )
        )

    for part, mine in _slices(gallery.prompts).items():
        if isinstance(metric, SetMetric):
            if side != "base" and mine.sum() >= metric.least:
                add(part, mine, _set_interval(settings, metric, gallery, galleries["base"], clusters, mine, part), None)
        elif (rows := mine & ~np.isnan(values)).any():
            of = intervals.rate if metric.rate else intervals.mean
            add(part, rows, of(values[rows], clusters[rows], level), None)
            for other in of_side:
                if side == "candidate" and other != side:
                    apart = values - of_side[other]
                    both = rows & ~np.isnan(apart)
                    add(part, both, intervals.difference(apart[both], clusters[both], level), other)
    return out


def _slices(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Rows of each role and, where several concepts are erased, of each of them: one could come back unseen among many.

    "concept", "concept/weapon", "concept/vice", …
    """
    roles, concepts = (np.array([getattr(p, what) for p in prompts]) for what in ("role", "concept"))
    found = {role: roles == role for role in sorted(set(roles))}
    for role, mine in list(found.items()):
        if len(named := sorted({*concepts[mine]} - {""})) > 1:
            found |= {f"{role}/{name}": mine & (concepts == name) for name in named}
    return found


def _set_interval(
    settings: Settings, metric: SetMetric, ours: Gallery, base: Gallery, clusters: Any, rows: Any, role: str
) -> Interval:
    """Bootstrap over prompts, the same draws on both sides; basic form (2θ − θ*), since such distances are biased
    upwards in resamples and percentiles would lie above the number itself.
    """
    x, y, of = ours.features[rows], base.features[rows], clusters[rows]
    value = metric.of_set(x, y)
    members = [np.flatnonzero(of == c) for c in np.unique(of)]
    if len(members) < 2:
        return Interval(value, -np.inf, np.inf)  # every draw would be the set itself
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
    notes += files.read_json(settings.paths.delta / "record.json")["notes"]
    for name in settings.targets:
        if settings.concepts[name].sentences == BARE:
            continue
        sentences = ", ".join(f"“{s}”" for s in settings.concepts[name].sentences)
        notes.append(f"Words and tokens of {name} were erased in {sentences}; the papers erase them alone: “{{}}”.")
    summary = files.read_json(settings.paths.feedback / "summary.json")
    for name in settings.targets:
        notes.append(f"What raters of {name} were asked: {settings.concepts[name].guideline}")
    if aside := summary["quarantined"]["rows"]:
        notes.append(f"{aside} rows of feedback could not be used; quarantine.csv beside it says why.")
    if settings.guide.method != methods.PLAIN_GUIDE:
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
