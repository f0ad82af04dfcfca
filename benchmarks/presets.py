"""`parity` against the staggered pools: same result, at what cost? python benchmarks/presets.py [--seeds …]"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import bench

RATE = 2.0e-4
"""Of `parity` on the built-in model; a batch of b gets 1/√b of it, see PRESETS."""
LOOPS: dict[str, dict[str, Any]] = {
    "parity": {"lr": RATE},
    "fast-safe": {"lr": RATE / 2},
    "fast": {"lr": RATE / 2**0.5},
    "sweep": {"lr": RATE},
}


def one(preset: str, seed: int, iterations: int) -> dict[str, str]:
    tokens = bench.variant(f"weapon-tokens-{seed}", {"seed": seed})
    bench.run(tokens, ("reward", "invert"))
    shared = {"tokens": str(tokens.paths.tokens), "reward": str(tokens.paths.reward)}
    loop = {"preset": preset, **LOOPS[preset], "iterations": iterations, "preserve": 0.0, "check_every": 0}
    settings = bench.variant(f"preset-{preset}-{seed}", {"seed": seed, "erase": {"sdd": {"loop": loop}}}, shared)
    seconds = bench.run(settings, ("erase", "sample", "evaluate"))
    found = bench.scores(settings)
    return {
        "preset": preset,
        "seed": str(seed),
        "before": bench.interval(found["concept_rate", "concept", "base", None]),
        "after": bench.interval(found["concept_rate", "concept", "candidate", None]),
        "unseen": bench.interval(found["recognition", "unseen", "candidate", "base"]),
        "neighbours": bench.interval(found["recognition", "neighbour", "candidate", "base"]),
        "erase s": str(seconds["erase"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=list(LOOPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103])
    parser.add_argument("--iterations", type=int, default=400)
    asked = parser.parse_args()
    bench.run(bench.variant("ingest", {}), ("ingest",))
    bench.show("Presets of SDD", [one(p, s, asked.iterations) for p, s in product(asked.presets, asked.seeds)])


if __name__ == "__main__":
    main()
