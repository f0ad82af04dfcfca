"""base + delta → a full pipeline folder that plain diffusers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from deleatur.diffusion.load import load
from deleatur.diffusion.overlay import applied
from deleatur.io import tensors
from deleatur.settings import Settings
from deleatur.stages import inputs


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
