"""Simulated feedback: samples images of a base model and has simulated raters answer.

    python emoji/feedback.py [--model models/pipeline] [--out feedback]

The raters' oracle is the classifier `models/rater`, trained on the fold that the judge never sees; for the style, a
rule on pixel colours. The answers are ordinary feedback events, labelled as simulated.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

from deleatur.artifacts.simulated_feedback import simulate
from deleatur.config.settings import Settings
from deleatur.detectors.classifier import Classifier
from deleatur.diffusion import encode
from deleatur.diffusion.model import Model, load
from deleatur.diffusion.sample import sample
from deleatur.feedback.simulated import Panel
from deleatur.guides.cfg import CFG
from deleatur.maths.seeds import derive

HERE = Path(__file__).parent
ROOT = HERE.parent
SEED = 7
PANEL = Panel(raters=12, per_question=3, careless=0.15)
STYLES = ("ink", "noto", "twemoji", "ink", "fluent")


def prompts_of(concept: str) -> list[tuple[str, str, int]]:
    """(prompt, what a ranking screen's images have in common, images per prompt), from the dev split only."""
    with (ROOT / "prompts" / "neutral.csv").open(encoding="utf-8") as f:
        harmless = [r["text"] for r in csv.DictReader(f) if r["split"] == "dev"][::2]  # one wording of each
    if concept == "ink":
        return [(f"{thing} in {style} style", thing, 2) for thing in harmless[::2] for style in STYLES]
    with (ROOT / "prompts" / f"{concept}.csv").open(encoding="utf-8") as f:
        rows = [r["text"] for r in csv.DictReader(f) if (r["split"], r["role"]) == ("dev", "concept")]
    return [(text, text, 140 // len(rows)) for text in rows] + [(text, text, 2) for text in harmless]


def sample_images(model: Model, concept: str) -> tuple[list[Image.Image], list[str], list[int]]:
    """Images, the text shown to raters with each, and the seed of its noise."""
    rows = [
        (prompt, shared, derive(SEED, "feedback", concept, prompt, place, i))
        for place, (prompt, shared, copies) in enumerate(prompts_of(concept))
        for i in range(copies)
    ]
    c = encode.encode_text(model, [r[0] for r in rows])
    seeds = [r[2] for r in rows]
    guide = CFG(scale=4.0)
    images = sample(model, c, seeds, guide=guide, conditions=guide.conditions(model, []), steps=8, batch_size=32)
    return images, [r[1] for r in rows], seeds


def achromatic_share(image: Image.Image) -> float:
    """1 for black on white, 0 for vivid colours, by the mean chroma of the non-white pixels."""
    rgb = np.asarray(image, np.float32) / 255
    non_white = rgb.min(-1) < 0.8
    if not non_white.any():
        return 0.0
    chroma = rgb.max(-1) - rgb.min(-1)
    return float(np.clip(1 - chroma[non_white].mean() / 0.25, 0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "pipeline", help="pipeline that is rated")
    parser.add_argument("--out", type=Path, default=ROOT / "feedback", help="folder of the events and images")
    arguments = parser.parse_args()
    settings = Settings.load(ROOT / "params.yaml")
    model = load(str(arguments.model))
    rater = Classifier(path=str(ROOT / "models" / "rater")).load()
    for concept, spec in settings.concepts.items():
        images, shared, seeds = sample_images(model, concept)
        if spec.kind == "rank":
            oracle = [achromatic_share(p) for p in images]
        else:
            columns = [rater.labels.index(label) for label in spec.detection.labels]
            oracle = rater.detect(images)[:, columns].sum(1).tolist()
        simulate(
            concept,
            spec,
            images,
            shared,
            seeds,
            oracle,
            panel=PANEL,
            model_version=model.unet_digest[:16],
            seed=SEED,
            out=arguments.out,
        )


if __name__ == "__main__":
    main()
