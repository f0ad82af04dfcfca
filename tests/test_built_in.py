"""The weights in the repository are those that were measured, and as small as they have to be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parents[1]


def test_the_built_in_weights_are_the_measured_ones() -> None:
    measured = json.loads((ROOT / "emoji/metrics.json").read_text("utf-8"))["sha256"]
    shipped = sorted((ROOT / "models").rglob("*.safetensors"))
    digests = {str(f.relative_to(ROOT / "models")): hashlib.sha256(f.read_bytes()).hexdigest() for f in shipped}
    assert digests == measured
    assert sum(f.stat().st_size for f in (ROOT / "models").rglob("*") if f.is_file()) <= 20e6


def test_they_are_half_precision() -> None:
    for file in (ROOT / "models").rglob("*.safetensors"):
        with safe_open(file, "pt") as f:
            kinds = {f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, file
