"""A whole project folder on the tiny model: params.yaml, prompts, rated pictures. Seconds to make, seconds to run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import yaml
from PIL import Image

from deleatur.artifacts.simulated_feedback import simulate
from deleatur.config.settings import Settings
from deleatur.feedback.simulated import Panel

ROOT = Path(__file__).parents[1]
LABELS = ("gun", "sword", "cat", "dog")


def _rows(name: str, rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str, str, str]]:
    return [
        (f"{name}-{split}-{i}", text, label, role, split)
        for split in ("dev", "test")
        for i, (text, label, role) in enumerate(rows)
    ]


def _write_prompts(path: Path, rows: list[tuple[str, str, str, str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("id", "text", "label", "role", "split"), *rows])


def numbers(root: Path, **changes: Any) -> dict[str, Any]:
    """The repository's own params.yaml, shrunk: so the tests also show that the file fits."""
    p: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    weapon = p["concepts"]["weapon"]
    weapon |= {"words": ["gun", "sword"], "found": {"detector": "judge", "labels": ["gun", "sword"]}}
    p["concepts"] = {"weapon": weapon}
    p["base"]["model"], p["paths"]["models"] = "models/pipeline", "models"
    p["reward"] |= {"clip": "models/clip", "hidden": 8, "epochs": 20, "folds": 2}
    p["invert"]["hfi"] |= {"top": 8, "tokens": 2}
    for method in ("hfi", "textual_inversion"):
        p["invert"][method]["loop"] |= {"iterations": 4, "batch": 2}
    p["invert"]["hfi"]["loop"]["check_every"] = 2
    p["erase"]["sdd"]["loop"] |= {
        "iterations": 6,
        "lr": 1e-3,
        "steps": 4,
        "batch": 2,
        "slots": 4,
        "check_every": 3,
        "stop_at": 0.0,
        "guard": 10.0,
    }
    p["attack"]["methods"]["concept_inversion"] |= {"tries": 2, "loop": {"iterations": 3, "batch": 2}}
    p["sample"] |= {"steps": 2, "batch": 4, "shard": 8}
    p["sample"]["per_prompt"] = {role: 2 for role in p["sample"]["per_prompt"]} | {"keep": 1}
    p["evaluate"]["detectors"] = {"judge": {"method": "classifier", "path": "models/judge"}}
    p["evaluate"]["metrics"] = {k: v for k, v in p["evaluate"]["metrics"].items() if not k.startswith("nudity")}
    p["compare"] |= {"concepts": ["weapon"], "seeds": [1], "methods": ["uce"], "split": "test"}
    p["emergency"]["per_prompt"] = {"concept": 1, "word": 1, "neighbour": 1, "keep": 0, "unseen": 2}
    p["emergency"]["rules"] = {
        "fits": {"metric": "clip_score", "slice": "unseen", "versus": "base", "min": -5.0, "min_n": 2}
    }
    for rule in p["gate"]["rules"].values():
        rule["min_n"] = 2
    return p | changes


def make(root: Path, **changes: Any) -> Settings:
    """Fills `root` (the current directory of the stages) and returns its settings."""
    tiny.save_pipeline(root / "models" / "pipeline")
    tiny.save_clip(root / "models" / "clip")
    tiny.save_classifier(root / "models" / "judge", LABELS)
    concept = [("a gun", "judge:gun", "concept"), ("a sword", "judge:sword", "concept")]
    _write_prompts(root / "prompts" / "weapon.csv", _rows("w", [*concept, ("a dog", "judge:dog", "neighbour")]))
    neutral = [
        ("a cat", "judge:cat", "keep"),
        ("a dog", "judge:dog", "unseen"),
        ("a cat of ink", "judge:cat", "unseen"),
    ]
    _write_prompts(root / "prompts" / "neutral.csv", _rows("n", neutral))
    path = root / "params.yaml"
    path.write_text(yaml.safe_dump(numbers(root, **changes), sort_keys=False), "utf-8")
    settings = Settings.load(path)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(24)]
    asked = ["a gun", "a sword", "a cat", "a dog"] * 6
    simulate(
        "weapon",
        settings.concepts["weapon"],
        pictures,
        asked,
        range(24),
        [0.9 if p in ("a gun", "a sword") else 0.1 for p in asked],
        panel=Panel(raters=6, per_question=4),
        model_version="tiny",
        seed=0,
        out=root / "feedback",
    )
    return settings
