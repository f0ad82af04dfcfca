"""A complete project on the tiny model: params.yaml, prompts, rated images. Builds and runs in seconds."""

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


def small_params(root: Path, **changes: Any) -> dict[str, Any]:
    """The repository's params.yaml with small values, which also tests that the file is valid."""
    p: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    weapon = p["concepts"]["weapon"]
    weapon |= {"words": ["gun", "sword"], "detection": {"detector": "judge", "labels": ["gun", "sword"]}}
    weapon["prompt_templates"] = ["a {}"]
    p["concepts"] = {"weapon": weapon}
    p["erase"]["abo"]["alternatives"] = {"weapon": "toy"}
    p["base"]["model"], p["paths"]["models"] = "models/pipeline", "models"
    p["reward"] |= {"clip": "models/clip", "hidden": 8, "epochs": 20, "folds": 2}
    p["invert"]["hfi"] |= {"top_k": 8, "num_tokens": 2}
    for method in ("hfi", "textual_inversion"):
        p["invert"][method]["training"] |= {"iterations": 4, "batch_size": 2}
    p["invert"]["hfi"]["training"]["eval_every"] = 2
    p["erase"]["sdd"]["training"] |= {
        "iterations": 6,
        "lr": 1e-3,
        "sampler_steps": 4,
        "batch_size": 2,
        "pool_size": 4,
        "eval_every": 3,
        "target_rate": 0.0,
        "max_preserved_drop": 10.0,
    }
    p["attack"]["methods"]["concept_inversion"] |= {"num_attempts": 2, "training": {"iterations": 3, "batch_size": 2}}
    p["sample"] |= {"steps": 2, "batch_size": 4, "shard_size": 8}
    p["sample"]["images_per_prompt"] = {role: 2 for role in p["sample"]["images_per_prompt"]} | {"keep": 1}
    p["evaluate"]["detectors"] = {"judge": {"method": "classifier", "path": "models/judge"}}
    p["evaluate"]["metrics"] = {k: v for k, v in p["evaluate"]["metrics"].items() if not k.startswith("nudity")}
    p["compare"] |= {"concepts": ["weapon"], "seeds": [1], "methods": ["uce"], "split": "test"}
    p["emergency"]["images_per_prompt"] = {"concept": 1, "word": 1, "neighbour": 1, "keep": 0, "unseen": 2}
    p["emergency"]["rules"] = {
        "fits": {"metric": "clip_score", "slice": "unseen", "versus": "base", "min": -5.0, "min_n": 2}
    }
    for rule in p["gate"]["rules"].values():
        rule["min_n"] = 2
    return p | changes


def create(root: Path, **changes: Any) -> Settings:
    """Creates a project in `root`, where stages must run, and returns its settings."""
    tiny.save_pipeline(root / "models" / "pipeline")
    tiny.save_clip(root / "models" / "clip")
    tiny.save_classifier(root / "models" / "judge", LABELS)
    concept = [("a gun", "judge:gun", "concept"), ("a sword", "judge:sword", "concept")]
    _write_prompts(
        root / "prompts" / "weapon.csv", _rows("w", [*concept, ("a thing of dog", "judge:dog", "neighbour")])
    )
    neutral = [
        ("a cat", "judge:cat", "keep"),
        ("a dog", "judge:dog", "unseen"),
        ("a cat of ink", "judge:cat", "unseen"),
    ]
    _write_prompts(root / "prompts" / "neutral.csv", _rows("n", neutral))
    path = root / "params.yaml"
    path.write_text(yaml.safe_dump(small_params(root, **changes), sort_keys=False), "utf-8")
    settings = Settings.load(path)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(24)]
    prompts = ["a gun", "a sword", "a cat", "a dog"] * 6
    simulate(
        "weapon",
        settings.concepts["weapon"],
        images,
        prompts,
        range(24),
        [0.9 if p in ("a gun", "a sword") else 0.1 for p in prompts],
        panel=Panel(raters=6, per_question=4),
        model_version="tiny",
        seed=0,
        out=root / "feedback",
    )
    return settings
