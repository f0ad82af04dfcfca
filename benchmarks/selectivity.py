"""Removal and retention along an erasure: python benchmarks/selectivity.py [--help]

Every run has its own tokens and training seed, and is evaluated in between on the proof split, whose prompts and noise
no setting was chosen on. Words and tokens train equally long. Runs are longer than the demo's, and `weapon` has twice
as many tokens. Finished runs are cached. Prints a table of the last evaluations; the plot shows all of them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import bench
import numpy as np

from deleatur.artifacts import prompts, tokens
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.detectors import Detector, LoadedDetector
from deleatur.diffusion import encode
from deleatur.diffusion.predict import Weights
from deleatur.diffusion.sample import sample
from deleatur.maths import intervals
from deleatur.maths.distances import cosine_similarity
from deleatur.maths.seeds import derive
from deleatur.records.sampling import Prompt
from deleatur.report import plots
from deleatur.runtime import models
from deleatur.training.loop import ErasureContext

PLOT = bench.OUT / "curves.png"
SEED = 1000
"""Of the sampling noise; every run has its own training seed."""
IMAGES_PER_PROMPT = {"concept": 8, "neighbour": 4, "unseen": 2}
"""By role. With a third of these, scores of the same weights vary by ±4 points."""

ITERATIONS = {"weapon": 360, "vice": 360, "ink": 480}
"""A style needs more iterations, and harms less else."""


@dataclass(frozen=True)
class Run:
    concept: str
    source: str
    preserve: bool
    seed: int
    iterations: int

    @property
    def name(self) -> str:
        return f"{self.concept}-{self.source}-{'keep' if self.preserve else 'plain'}-{self.seed}-{self.iterations}"

    @property
    def settings(self) -> Settings:
        shared = {"tokens": str(learned_tokens(self.concept, self.seed).paths.tokens)} if self.source == "token" else {}
        training: dict[str, float] = {
            "iterations": self.iterations,
            "eval_every": 0,
            "target_rate": 0.0,
            "max_preserved_drop": 1.0,
        } | ({} if self.preserve else {"preservation_weight": 0.0})
        erase = {"source": self.source, "sdd": {"training": training}}
        changes = {"targets": [self.concept], "seed": self.seed, "erase": erase}
        return bench.variant(self.name, changes, shared)


def learned_tokens(concept: str, seed: int) -> Settings:
    """Settings whose soft tokens are learned with this seed."""
    changes = {"targets": [concept], "seed": seed, "invert": {"hfi": {"num_tokens": 32}}}
    settings = bench.variant(f"{concept}-tokens-{seed}", changes)
    bench.run(settings, ("reward", "invert"))
    return settings


def evaluate_run(run: Run, every: int) -> list[dict[str, Any]]:
    """Evaluations after 0, `every`, 2·`every`, … iterations."""
    settings = run.settings
    path = bench.folder(settings) / f"every-{every}.json"
    if path.is_file():
        cached: list[dict[str, Any]] = json.loads(path.read_text())
        return cached
    model = models.base_model(settings)
    eraser = methods.eraser(settings)
    saved: dict[int, Weights] = {}

    with bench.progress_bar(run.name) as show_progress:

        def on_step(progress: Any) -> None:
            show_progress(progress)
            if progress.step % every == 0:
                saved[progress.step] = {n: t.clone() for n, t in progress.state.teacher.items()}

        eraser.erase(
            model,
            [tokens.load_concept(settings, model, run.concept)],
            ErasureContext(
                seed=settings.seed,
                preserve=encode.encode_text(model, ["", *prompts.preserved_prompts(settings)]),
                on_step=on_step,
            ),
        )
    base = measure_base(run.concept)
    measurements = {0: base, **{step: measure(run.concept, weights) for step, weights in saved.items()}}
    evaluations = [{"step": step, **compare(base, edited)} for step, edited in measurements.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(evaluations, indent=1))
    return evaluations


@cache
def proof_prompts(concept: str) -> list[Prompt]:
    settings = Settings.load(bench.ROOT / "params.yaml")
    listed = prompts.read(settings.concepts[concept].prompts, "proof", concept)
    listed += prompts.read(settings.paths.prompts, "proof", "")
    return [p for p in listed if p.role in IMAGES_PER_PROMPT for _ in range(IMAGES_PER_PROMPT[p.role])]


@cache
def detector(name: str) -> LoadedDetector:
    config = dict(Settings.load(bench.ROOT / "params.yaml").evaluate.detectors[name])
    return methods.instantiate("detectors", Detector, config.pop("method"), config, name).load()


@cache
def measure_base(concept: str) -> dict[str, Any]:
    return measure(concept, {})


def measure(concept: str, weights: Weights) -> dict[str, Any]:
    """Arrays over images: whether the concept is detected, whether the prompt's label is, and the CLIP score."""
    settings = Settings.load(bench.ROOT / "params.yaml")
    model, guide, clip = models.base_model(settings), methods.guide(settings), models.clip_model(settings)
    sampled, detection = proof_prompts(concept), settings.concepts[concept].detection
    seeds = [derive(SEED, p.id, i) for i, p in enumerate(sampled)]
    texts = [p.text for p in sampled]
    images = sample(
        model,
        encode.encode_text(model, texts),
        seeds,
        guide=guide,
        conditions=guide.conditions(model, []),
        steps=settings.sample.steps,
        batch_size=settings.sample.batch_size,
        weights=weights,
    )
    labels = [p.label.partition(":") for p in sampled]  # "detector:label"
    top = {}
    for name in {detection.detector, *(name for name, _, _ in labels)}:
        top[name] = [detector(name).labels[i] for i in detector(name).detect(images).argmax(1)]
    return {
        "concept": np.array([float(label in detection.labels) for label in top[detection.detector]]),
        "recognised": np.array([float(top[name][i] == label) for i, (name, _, label) in enumerate(labels)]),
        "clip": cosine_similarity(clip.embed_images(images), clip.embed_texts(texts)).double().numpy(),
        "role": np.array([p.role for p in sampled]),
        "prompt": np.unique([p.id for p in sampled], return_inverse=True)[1],
    }


def compare(base: dict[str, Any], edited: dict[str, Any]) -> dict[str, Any]:
    """Concept rate of the edited model, and its changes from the base model with their intervals."""

    def of_role(role: str) -> tuple[Any, Any]:
        mask = edited["role"] == role
        return mask, edited["prompt"][mask]

    mask, clusters = of_role("concept")
    scores = {"concept": vars(intervals.rate(edited["concept"][mask], clusters))}
    for role in ("neighbour", "unseen"):
        mask, clusters = of_role(role)
        change = intervals.difference(edited["recognised"][mask] - base["recognised"][mask], clusters)
        scores[role] = vars(change) | {"base": float(base["recognised"][mask].mean())}
    scores["clip"] = {"relative": float(edited["clip"][mask].mean() / base["clip"][mask].mean() - 1)}
    return scores


def table_row(run: Run, evaluations: list[dict[str, Any]]) -> dict[str, str]:
    first, last = evaluations[0], evaluations[-1]
    return {
        "concept": run.concept,
        "source": "HFI tokens" if run.source == "token" else "words",
        "preservation": "on" if run.preserve else "off",
        "seed": str(run.seed),
        "before": bench.interval(first["concept"]),
        "after": bench.interval(last["concept"]),
        "removed": f"{1 - last['concept']['value'] / first['concept']['value']:.0%}",
        "unseen": bench.interval(last["unseen"]),
        "neighbours": bench.interval(last["neighbour"]),
        "CLIP, relative": f"{last['clip']['relative']:+.1%}",
    }


def write_plot(evaluations: dict[Run, list[dict[str, Any]]], path: Path) -> None:
    """Removal to the right, retention upwards; one line per run, from (0, 0)."""
    concepts = list(dict.fromkeys(run.concept for run in evaluations))
    with plots.style():
        figure = plots.new_figure(480 * len(concepts), 384)
        panels = figure.subplots(1, len(concepts), sharey=True, squeeze=False)[0]
        for axes, concept in zip(panels, concepts, strict=True):
            plots.style_axes(axes)
            axes.set(title=concept, xlabel="removed, share of the concept rate")
            axes.axvline(0.8, color=plots.SOFT, linewidth=0.8)
            axes.axhline(-0.05, color=plots.SOFT, linewidth=0.8)
            for run, scores in evaluations.items():
                if run.concept == concept:
                    base = scores[0]["concept"]["value"]
                    removed = [1 - s["concept"]["value"] / base for s in scores]
                    axes.plot(removed, [s["unseen"]["value"] for s in scores], marker="o", markersize=3, **_style(run))
        panels[0].set_ylabel("unseen prompts, change in recognition")
        for source, preserve in product(("token", "words"), (True, False)):
            label = f"{'HFI tokens' if source == 'token' else 'words'}, preservation {'on' if preserve else 'off'}"
            panels[-1].plot([], [], label=label, **_style(Run("", source, preserve, 0, 0)))
        panels[-1].legend(frameon=False)
        figure.tight_layout()
        path.write_bytes(plots.to_png(figure))


def _style(run: Run) -> dict[str, Any]:
    colour = plots.COLOURS["--candidate" if run.source == "token" else "--c2"]
    return {"color": colour, "linestyle": "-" if run.preserve else ":"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["weapon", "ink", "vice"])
    parser.add_argument("--sources", nargs="+", choices=["token", "words"], default=["token", "words"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103])
    parser.add_argument("--preserve", nargs="+", choices=["on", "off"], default=["on", "off"])
    parser.add_argument("--iterations", type=int, help=f"default: {ITERATIONS}")
    parser.add_argument("--every", type=int, default=120, help="iterations between evaluations")
    arguments = parser.parse_args()
    bench.run(bench.variant("ingest", {}), ("ingest",))
    runs = [
        Run(concept, source, preserve == "on", seed, arguments.iterations or ITERATIONS[concept])
        for preserve, seed, concept, source in product(
            arguments.preserve, arguments.seeds, arguments.concepts, arguments.sources
        )
    ]
    evaluations = {run: evaluate_run(run, arguments.every) for run in runs}
    bench.print_table("Removal against retention, proof split", [table_row(run, e) for run, e in evaluations.items()])
    write_plot(evaluations, PLOT)
    print(f"All evaluations: {PLOT}")


if __name__ == "__main__":
    main()
