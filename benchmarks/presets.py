"""`parity` against the staggered pools: same result, at what cost? python benchmarks/presets.py [--help]

Every preset erases the same tokens, one at a time, and keys and values alone train, as in params.yaml; length, rate
and EMA are the built-in model's, a batch of b gets 1/√b of the rate, as in PRESETS. No preserve term, no looks.
Finished runs are kept and not repeated; all seconds of one table should come from one run on one machine.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import bench
from selectivity import compared, learned, looked, untouched

from deleatur.artifacts import tokens
from deleatur.config import methods
from deleatur.diffusion.overlay import edited_weights
from deleatur.erasers import Eraser
from deleatur.runtime import models
from deleatur.training.finetune import PRESETS, ErasureContext


@dataclass(frozen=True)
class Run:
    preset: str
    seed: int
    iterations: int
    lr: float

    @property
    def loop(self) -> dict[str, Any]:
        rate = self.lr / PRESETS[self.preset].get("batch", 1) ** 0.5
        return {
            "preset": self.preset,
            "trainable": "xattn_kv",
            "iterations": self.iterations,
            "lr": rate,
            "ema_decay": 0.97,
        }


def erased(run: Run) -> dict[str, Any]:
    settings = learned("weapon", run.seed)
    path = bench.folder(settings) / f"{run.preset}-{run.iterations}-{run.lr}.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    model = models.base_model(settings)
    eraser = methods.instantiate("erasers", Eraser, "sdd", {"order": "single", "training": run.loop}, "erase")
    concept = tokens.load_concept(settings, model, "weapon")
    began = time.perf_counter()
    with bench.watching(f"{run.preset} {run.seed}") as on_step:
        delta = eraser.erase(model, [concept], ErasureContext(run.seed, on_step=on_step))
    seconds = time.perf_counter() - began
    found = compared(untouched("weapon"), looked("weapon", edited_weights(model, delta))) | {"seconds": seconds}
    path.write_text(json.dumps(found, indent=1))
    return found


def row(run: Run, found: dict[str, Any], parity: dict[str, Any]) -> dict[str, str]:
    return {
        "preset": run.preset,
        "seed": str(run.seed),
        "concept rate": bench.interval(found["concept"]),
        "unseen": bench.interval(found["unseen"]),
        "neighbours": bench.interval(found["neighbour"]),
        "CLIP, relative": f"{found['clip']['relative']:+.1%}",
        "seconds": f"{found['seconds']:.0f}",
        "of parity's": f"{found['seconds'] / parity['seconds']:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103])
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-4, help="of parity")
    asked = parser.parse_args()
    bench.run(bench.variant("ingest", {}), ("ingest",))
    runs = [Run(p, s, asked.iterations, asked.lr) for p, s in product(["parity", *asked.presets], asked.seeds)]
    found = {run: erased(run) for run in runs}
    parity = {run.seed: f for run, f in found.items() if run.preset == "parity"}
    bench.show("Presets of SDD, proof prompts", [row(run, f, parity[run.seed]) for run, f in found.items()])


if __name__ == "__main__":
    main()
