"""How much of the concept goes, and what goes with it: python benchmarks/selectivity.py [--concepts …] [--seeds …]"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import bench

CHAIN = ("erase", "sample", "evaluate")


def one(concept: str, source: str, seed: int, preserve: bool) -> dict[str, str]:
    tokens = bench.variant(f"{concept}-tokens-{seed}", {"targets": [concept], "seed": seed})
    bench.run(tokens, ("reward", "invert"))
    shared = {"tokens": str(tokens.paths.tokens), "reward": str(tokens.paths.reward)}
    changes: dict[str, Any] = {"targets": [concept], "seed": seed, "erase": {"source": source}}
    if not preserve:
        changes["erase"]["loop"] = {"preserve": 0.0}
    name = f"{concept}-{source}-{'keep' if preserve else 'plain'}-{seed}"
    settings = bench.variant(name, changes, shared)
    seconds = bench.run(settings, CHAIN)
    found = bench.scores(settings)

    def paired(metric: str, where: str) -> str:
        return bench.interval(found[metric, where, "candidate", "base"])

    rate = {side: found["concept_rate", "concept", side, None] for side in ("base", "candidate")}
    clip = (
        found["clip_score", "unseen", "candidate", "base"]["value"]
        / found["clip_score", "unseen", "base", None]["value"]
    )
    return {
        "concept": concept,
        "source": "HFI token" if source == "token" else "words",
        "preserve": "on" if preserve else "off",
        "seed": str(seed),
        "before": bench.interval(rate["base"]),
        "after": bench.interval(rate["candidate"]),
        "removed": f"{1 - rate['candidate']['value'] / rate['base']['value']:.0%}",
        "unseen": paired("recognition", "unseen"),
        "neighbours": paired("recognition", "neighbour"),
        "CLIP, relative": f"{clip:+.1%}",
        "erase s": str(seconds["erase"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=["weapon", "ink", "vice"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103])
    parser.add_argument("--preserve", nargs="+", choices=["on", "off"], default=["on", "off"])
    asked = parser.parse_args()
    bench.run(bench.variant("ingest", {}), ("ingest",))
    runs = product(asked.concepts, ("token", "words"), [p == "on" for p in asked.preserve], asked.seeds)
    rows = [one(concept, source, seed, preserve) for concept, source, preserve, seed in runs]
    bench.show("Removal against retention, test prompts", rows)


if __name__ == "__main__":
    main()
