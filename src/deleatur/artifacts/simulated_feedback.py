"""Sampled images + oracle scores → a feedback source in the usual format, labelled as simulated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image

from deleatur.config.sections import ConceptSpec
from deleatur.feedback import events
from deleatur.feedback.simulated import OracleImage, Panel, sample_raters, simulate_answers
from deleatur.maths import seeds
from deleatur.storage import files, images


def simulate(
    concept: str,
    spec: ConceptSpec,
    sampled_images: Sequence[Image],
    prompts: Sequence[str],
    image_seeds: Sequence[int],
    oracle_scores: Sequence[float],
    *,
    panel: Panel,
    model_version: str,
    seed: int,
    out: Path,
) -> Path:
    """Writes `<out>/<concept>.jsonl` and `<out>/<concept>.images.parquet`; returns the path of the former.

    oracle_scores: per image, the probability that it shows the concept. Deterministic in its arguments.
    """
    encoded = [images.encode_image(image) for image in sampled_images]
    recipes = zip(encoded, prompts, image_seeds, oracle_scores, strict=True)
    # Two seeds can give the same image (a collapsed model): it is rated once.
    unique = {p.sha256: OracleImage(p.sha256, prompt, int(s), float(o)) for p, prompt, s, o in recipes}
    rng = np.random.default_rng(seeds.derive(seed, "simulate", concept))
    answers = simulate_answers(
        concept, spec.kind, list(unique.values()), sample_raters(panel, rng), panel, rng, model_version=model_version
    )
    path = out / f"{concept}.jsonl"
    images.write_archive(out / f"{concept}.images.parquet", {p.sha256: p for p in encoded}.values())
    files.write_lines(path, map(events.to_json, answers))
    return path
