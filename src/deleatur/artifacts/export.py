"""base + delta → a full pipeline folder that plain diffusers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from deleatur.config.settings import Settings
from deleatur.diffusion.model import digest, load
from deleatur.diffusion.overlay import applied
from deleatur.errors import SettingsError
from deleatur.records.report import Report, Verdict
from deleatur.report import bom, model_card
from deleatur.report.latest import stale
from deleatur.runtime import models
from deleatur.storage import files, json_records, tensors


def export(settings: Settings, folder: Path) -> None:
    """Writes the erased model in fp32, whole or not at all. Tokenizer and text encoder are the base model's own: the
    soft token, which could be used to probe for the concept, is never part of it. A model card and a bill of materials
    lie beside it, where it was judged.
    """
    delta = tensors.load_delta(settings.paths.delta / tensors.DELTA_FILE)
    if delta.one_step is not None:
        raise SettingsError(
            f"what {delta.method} made draws each picture in one call of its own: a folder that plain diffusers draws "
            "from step by step would show something else",
            hint="another erase.method, then: deleatur demo",
        )
    path = models.local_path(settings, settings.base.model)
    model = load(path, device="cpu")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with applied(model, delta):
        pipeline = StableDiffusionPipeline.from_pretrained(
            path, unet=model.unet, safety_checker=None, requires_safety_checker=False
        )
        pipeline.save_pretrained(partial, safe_serialization=True)
    _papers(settings, partial)
    partial.rename(folder)


def _papers(settings: Settings, folder: Path) -> None:
    """Model card and bill of materials, where these weights were judged."""
    if found := judged(settings):
        report, verdict = found
        name, base = settings.register_.model, settings.base.model
        text = model_card.render(name, base, settings.evaluate.level, report, verdict)
        (folder / model_card.NAME).write_text(text, "utf-8")
        files.write_json(folder / bom.NAME, bom.of(name, base, json_records.digest(verdict), report, verdict))


def export_version(settings: Settings, version: str, folder: Path) -> None:
    """Writes a registered version, whole or not at all, after it was compared with what was judged and signed."""
    found = models.local_path(settings, f"models:/{settings.register_.model}/{version}")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(found, partial)
    partial.rename(folder)


def judged(settings: Settings) -> tuple[Report, Verdict] | None:
    """Report and verdict, if they are about the weights that `erase` last made."""
    folder, delta = settings.paths.verdict, settings.paths.delta / tensors.DELTA_FILE
    if not (folder / "verdict.json").is_file():
        return None
    report = json_records.read(settings.paths.report / "report.json", Report)
    verdict = json_records.read(folder / "verdict.json", Verdict)
    same = report.identity.delta == digest(dict(tensors.load_delta(delta).tensors))
    return (report, verdict) if same else None


def standing(settings: Settings) -> str:
    """What the gate says of the weights that `erase` last made."""
    if (found := judged(settings)) is None:
        return "none: these weights were not judged"
    changed = stale(settings, *found)
    return f"{found[1].outcome}, but {changed}" if changed else found[1].outcome
