"""`parity` against the presets with a trajectory pool, in quality and seconds: python benchmarks/presets.py [--help]

Every preset erases the same tokens, one at a time, and trains keys and values of cross-attention, as in params.yaml.
Iterations, learning rate and EMA are those of the built-in model; as in PRESETS, a batch of b has 1/√b of the rate.
No preservation loss and no evaluations. Finished runs are cached; seconds are comparable on one machine only.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import bench
from selectivity import compare, learned_tokens, measure, measure_base

from deleatur.artifacts import tokens
from deleatur.config import methods
from deleatur.diffusion.overlay import edited_weights
from deleatur.erasers import Eraser
from deleatur.runtime import models
from deleatur.training.config import PRESETS
from deleatur.training.loop import ErasureContext


@dataclass(frozen=True)
class Run:
    preset: str
    seed: int
    iterations: int
    lr: float

    @property
    def training(self) -> dict[str, Any]:
        rate = self.lr / PRESETS[self.preset].get("batch_size", 1) ** 0.5
        return {
            "preset": self.preset,
            "trainable": "xattn_kv",
            "iterations": self.iterations,
            "lr": rate,
            "ema_decay": 0.97,
        }


def erase(run: Run) -> dict[str, Any]:
    """Scores of the erased model, and seconds."""
    settings = learned_tokens("weapon", run.seed)
    path = bench.folder(settings) / f"{run.preset}-{run.iterations}-{run.lr}.json"
    if path.is_file():
        cached: dict[str, Any] = json.loads(path.read_text())
        return cached
    model = models.base_model(settings)
    eraser = methods.instantiate("erasers", Eraser, "sdd", {"order": "single", "training": run.training}, "erase")
    concept = tokens.load_concept(settings, model, "weapon")
    started = time.perf_counter()
    with bench.progress_bar(f"{run.preset} {run.seed}") as on_step:
        delta = eraser.erase(model, [concept], ErasureContext(run.seed, on_step=on_step))
    seconds = time.perf_counter() - started
    edited = measure("weapon", edited_weights(model, delta))
    scores = compare(measure_base("weapon"), edited) | {"seconds": seconds}
    path.write_text(json.dumps(scores, indent=1))
    return scores


def table_row(run: Run, scores: dict[str, Any], parity: dict[str, Any]) -> dict[str, str]:
    return {
        "preset": run.preset,
        "seed": str(run.seed),
        "concept rate": bench.interval(scores["concept"]),
        "unseen": bench.interval(scores["unseen"]),
        "neighbours": bench.interval(scores["neighbour"]),
        "CLIP, relative": f"{scores['clip']['relative']:+.1%}",
        "seconds": f"{scores['seconds']:.0f}",
        "of parity's": f"{scores['seconds'] / parity['seconds']:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103])
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-4, help="of parity")
    arguments = parser.parse_args()
    bench.run(bench.variant("ingest", {}), ("ingest",))
    runs = [
        Run(p, s, arguments.iterations, arguments.lr)
        for p, s in product(["parity", *arguments.presets], arguments.seeds)
    ]
    results = {run: erase(run) for run in runs}
    parity = {run.seed: scores for run, scores in results.items() if run.preset == "parity"}
    rows = [table_row(run, scores, parity[run.seed]) for run, scores in results.items()]
    bench.print_table("Presets of SDD, proof split", rows)


if __name__ == "__main__":
    main()
