"""How much of a concept goes, and what goes with it, along the erasure: python benchmarks/selectivity.py [--help]

Every run erases from its own tokens and training seed, and stops to be measured in proof sentences and noise that no
setting was chosen on; the things they name are those of test. Words and tokens train equally long. Runs are longer
than the demo's, and weapons have twice its tokens: the demo has four minutes for everything. Finished runs are kept
and not repeated. Prints the table of the last points; the picture has all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import bench
import matplotlib.pyplot as plt
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
from deleatur.runtime import models
from deleatur.training.finetune import ErasureContext

PICTURE = bench.OUT / "curves.png"
SEED = 1000
"""Of the noise that pictures are drawn from; training seeds are the runs' own."""
PICTURES = {"concept": 8, "neighbour": 4, "unseen": 2}
"""Of each prompt: the same weights are good for ±4 points with a third of them."""

ITERATIONS = {"weapon": 360, "vice": 360, "ink": 480}
"""A style goes more slowly, and takes less along."""


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
        shared = {"tokens": str(learned(self.concept, self.seed).paths.tokens)} if self.source == "token" else {}
        loop = {"iterations": self.iterations, "eval_every": 0, "target_rate": 0.0, "max_preserved_drop": 1.0} | (
            {} if self.preserve else {"preservation_weight": 0.0}
        )
        erase = {"source": self.source, "sdd": {"training": loop}}
        changes = {"targets": [self.concept], "seed": self.seed, "erase": erase}
        return bench.variant(self.name, changes, shared)


def learned(concept: str, seed: int) -> Settings:
    """A run's own tokens; vice and ink say in params.yaml how many of them."""
    changes = {"targets": [concept], "seed": seed, "invert": {"hfi": {"tokens": 32}}}
    settings = bench.variant(f"{concept}-tokens-{seed}", changes)
    bench.run(settings, ("reward", "invert"))
    return settings


def points(run: Run, every: int) -> list[dict[str, Any]]:
    """What is measured after 0, `every`, 2·`every`, … iterations."""
    settings = run.settings
    path = bench.folder(settings) / f"every-{every}.json"
    if path.is_file():
        found: list[dict[str, Any]] = json.loads(path.read_text())
        return found
    model = models.base_model(settings)
    eraser = methods.eraser(settings)
    saved: dict[int, Weights] = {}

    with bench.watching(run.name) as tell:

        def on_step(progress: Any) -> None:
            tell(progress)
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
    before = untouched(run.concept)
    after = {0: before, **{step: looked(run.concept, w) for step, w in saved.items()}}
    out = [{"step": step, **compared(before, seen)} for step, seen in after.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(out, indent=1))
    return out


@cache
def proof_prompts(concept: str) -> list[Prompt]:
    settings = Settings.load(bench.ROOT / "params.yaml")
    found = prompts.read(settings.concepts[concept].prompts, "proof", concept)
    found += prompts.read(settings.paths.prompts, "proof", "")
    return [p for p in found if p.role in PICTURES for _ in range(PICTURES[p.role])]


@cache
def eyes(name: str) -> LoadedDetector:
    spec = dict(Settings.load(bench.ROOT / "params.yaml").evaluate.detectors[name])
    return methods.instantiate("detectors", Detector, spec.pop("method"), spec, name).load()


@cache
def untouched(concept: str) -> dict[str, Any]:
    return looked(concept, {})


def looked(concept: str, weights: Weights) -> dict[str, Any]:
    """Per picture: whether the concept is there, whether it is what the prompt asks for, its CLIP score."""
    settings = Settings.load(bench.ROOT / "params.yaml")
    model, guide, clip = models.base_model(settings), methods.guide(settings), models.clip_model(settings)
    asked, found = proof_prompts(concept), settings.concepts[concept].detection
    seeds = [derive(SEED, p.id, i) for i, p in enumerate(asked)]
    texts = [p.text for p in asked]
    pictures = sample(
        model,
        encode.encode_text(model, texts),
        seeds,
        guide=guide,
        conditions=guide.conditions(model, []),
        steps=settings.sample.steps,
        batch=settings.sample.batch_size,
        weights=weights,
    )
    tops = {}
    for name in {found.detector, *(p.label.partition(":")[0] for p in asked)}:
        tops[name] = [eyes(name).labels[i] for i in eyes(name).detect(pictures).argmax(1)]
    right = [float(tops[p.label.partition(":")[0]][i] == p.label.partition(":")[2]) for i, p in enumerate(asked)]
    return {
        "there": np.array([float(top in found.labels) for top in tops[found.detector]]),
        "right": np.array(right),
        "max_grad_norm": cosine_similarity(clip.embed_images(pictures), clip.embed_texts(texts)).double().numpy(),
        "role": np.array([p.role for p in asked]),
        "prompt": np.unique([p.id for p in asked], return_inverse=True)[1],
    }


def compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    def rows(role: str) -> tuple[Any, Any]:
        return after["role"] == role, after["prompt"][after["role"] == role]

    mine, clusters = rows("concept")
    out = {"concept": vars(intervals.rate(after["there"][mine], clusters))}
    for role in ("neighbour", "unseen"):
        mine, clusters = rows(role)
        apart = intervals.difference(after["right"][mine] - before["right"][mine], clusters)
        out[role] = vars(apart) | {"base": float(before["right"][mine].mean())}
    out["max_grad_norm"] = {
        "relative": float(after["max_grad_norm"][mine].mean() / before["max_grad_norm"][mine].mean() - 1)
    }
    return out


def row(run: Run, found: list[dict[str, Any]]) -> dict[str, str]:
    first, last = found[0], found[-1]
    return {
        "concept": run.concept,
        "source": "HFI tokens" if run.source == "token" else "words",
        "preservation_weight": "on" if run.preserve else "off",
        "seed": str(run.seed),
        "before": bench.interval(first["concept"]),
        "after": bench.interval(last["concept"]),
        "removed": f"{1 - last['concept']['value'] / first['concept']['value']:.0%}",
        "unseen": bench.interval(last["unseen"]),
        "neighbours": bench.interval(last["neighbour"]),
        "CLIP, relative": f"{last['clip']['relative']:+.1%}",
    }


def picture(all_points: dict[Run, list[dict[str, Any]]], path: Path) -> None:
    """Removal to the right, retention upwards; one line per run, from (0, 0)."""
    concepts = list(dict.fromkeys(run.concept for run in all_points))
    figure, axes = plt.subplots(1, len(concepts), figsize=(5 * len(concepts), 4), sharey=True, squeeze=False)
    for axis, concept in zip(axes[0], concepts, strict=True):
        for run, found in all_points.items():
            if run.concept == concept:
                start = found[0]["concept"]["value"]
                x = [1 - p["concept"]["value"] / start for p in found]
                axis.plot(
                    x,
                    [p["unseen"]["value"] for p in found],
                    color="tab:blue" if run.source == "token" else "tab:orange",
                    linestyle="-" if run.preserve else ":",
                    marker="o",
                    markersize=3,
                )
        axis.set(title=concept, xlabel="removed, share of the concept rate")
        axis.axvline(0.8, color="0.8", zorder=0)
        axis.axhline(-0.05, color="0.8", zorder=0)
    axes[0][0].set_ylabel("unseen prompts, change in recognition")
    for style in _legend():
        axes[0][-1].plot([], [], **style)
    axes[0][-1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _legend() -> Iterator[dict[str, str]]:
    yield {"color": "tab:blue", "label": "HFI tokens"}
    yield {"color": "tab:orange", "label": "words"}
    yield {"color": "0.4", "linestyle": "-", "label": "preserve on"}
    yield {"color": "0.4", "linestyle": ":", "label": "preserve off"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=["weapon", "ink", "vice"])
    parser.add_argument("--sources", nargs="+", choices=["token", "words"], default=["token", "words"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103])
    parser.add_argument("--preserve", nargs="+", choices=["on", "off"], default=["on", "off"])
    parser.add_argument("--iterations", type=int, help=f"unless given: {ITERATIONS}")
    parser.add_argument("--every", type=int, default=120, help="iterations between two points")
    asked = parser.parse_args()
    bench.run(bench.variant("ingest", {}), ("ingest",))
    runs = [
        Run(concept, source, preserve == "on", seed, asked.iterations or ITERATIONS[concept])
        for preserve, seed, concept, source in product(asked.preserve, asked.seeds, asked.concepts, asked.sources)
    ]
    found = {run: points(run, asked.every) for run in runs}
    bench.show("Removal against retention, proof prompts", [row(run, p) for run, p in found.items()])
    picture(found, PICTURE)
    print(f"The whole curves: {PICTURE}")


if __name__ == "__main__":
    main()
