"""Sampled pictures + an oracle's scores → a source of feedback like any other, labelled as simulated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image

from deleatur.config.settings import ConceptSpec
from deleatur.feedback import events
from deleatur.feedback.simulated import Panel, Shown, rate, recruit
from deleatur.maths import seeds
from deleatur.storage import files, images


def simulate(
    concept: str,
    spec: ConceptSpec,
    pictures: Sequence[Image],
    prompts: Sequence[str],
    picture_seeds: Sequence[int],
    oracle: Sequence[float],
    *,
    panel: Panel,
    model_version: str,
    seed: int,
    out: Path,
) -> Path:
    """Writes `<out>/<concept>.jsonl` and `<out>/<concept>.images.parquet`, and returns the first.

    oracle: per picture the probability that it shows the concept. Depends on the arguments and on nothing else.
    """
    encoded = [images.picture(image) for image in pictures]
    recipes = zip(encoded, prompts, picture_seeds, oracle, strict=True)
    # Two seeds can give the same picture, of a collapsed model for example: it is rated once.
    shown = {p.sha256: Shown(p.sha256, prompt, int(s), float(o)) for p, prompt, s, o in recipes}
    rng = np.random.default_rng(seeds.derive(seed, "simulate", concept))
    answers = rate(
        concept, spec.kind, list(shown.values()), recruit(panel, rng), panel, rng, model_version=model_version
    )
    path = out / f"{concept}.jsonl"
    images.write(out / f"{concept}.images.parquet", {p.sha256: p for p in encoded}.values())
    files.write_lines(path, map(events.to_json, answers))
    return path
