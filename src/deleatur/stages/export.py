"""base + delta → a full pipeline folder that plain diffusers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from deleatur.diffusion.load import digest, load
from deleatur.diffusion.overlay import applied
from deleatur.io import documents, tensors
from deleatur.records import Report, Verdict
from deleatur.settings import Settings
from deleatur.stages import inputs
from deleatur.stages.gate import stale


def export(settings: Settings, folder: Path) -> None:
    """Writes the erased model in fp32, whole or not at all. Tokenizer and text encoder are the base model's own: the
    soft token, which could be used to probe for the concept, is never part of it.
    """
    path = inputs.local(settings, settings.base.model)
    model = load(path, device="cpu")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with applied(model, tensors.load_delta(settings.paths.delta / inputs.DELTA)):
        pipeline = StableDiffusionPipeline.from_pretrained(
            path, unet=model.unet, safety_checker=None, requires_safety_checker=False
        )
        pipeline.save_pretrained(partial, safe_serialization=True)
    partial.rename(folder)


def standing(settings: Settings) -> str:
    """What the gate says of the weights that `erase` last made."""
    folder, delta = settings.paths.verdict, settings.paths.delta / inputs.DELTA
    if not (folder / "verdict.json").is_file():
        return "none: these weights were not judged"
    report = documents.read(settings.paths.report / "report.json", Report)
    verdict = documents.read(folder / "verdict.json", Verdict)
    if report.identity.delta != digest(dict(tensors.load_delta(delta).tensors)):
        return "none: the last one is about other weights"
    changed = stale(settings, report, verdict)
    return f"{verdict.outcome}, but {changed}" if changed else verdict.outcome
