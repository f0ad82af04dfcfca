"""base + delta → a complete pipeline folder that plain diffusers loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deleatur.config.settings import Settings
from deleatur.diffusion import folders
from deleatur.diffusion.model import digest_tensors, load, load_errors
from deleatur.diffusion.overlay import applied
from deleatur.errors import SettingsError
from deleatur.records.report import Report, Verdict
from deleatur.report import bom, model_card
from deleatur.report.latest import stale_reason
from deleatur.runtime import models
from deleatur.storage import files, json_records, tensors


def export(settings: Settings, folder: Path) -> None:
    """Writes the erased model in fp32, atomically, with model card and bill of materials if these weights were judged.

    Tokenizer and text encoder are the base model's: the soft token, which could be used to probe for the concept, is
    never included. Raises SettingsError for the delta of a one-step sampler.
    """
    delta = tensors.load_delta(settings.paths.delta / tensors.DELTA_FILE)
    if delta.one_step is not None:
        raise SettingsError(
            f"{delta.method} replaces the sampler: its weights generate an image in one step, and the multi-step "
            "sampling of diffusers would give other images",
            hint="another erase.method, then: deleatur demo",
        )
    path = folders.download(models.local_path(settings, settings.base.model), "model_index.json")
    model = load(str(path), device="cpu")
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    with _new_folder(folder) as partial, applied(model, delta):
        with load_errors(str(path), "a Stable Diffusion pipeline"):
            # All other components are the base model's, its safety checker among them.
            pipeline = StableDiffusionPipeline.from_pretrained(path, unet=model.unet, use_safetensors=True)
        if not isinstance(pipeline.scheduler, DDIMScheduler):
            # The sampler of the images that were judged, with the base model's noise schedule.
            config = pipeline.scheduler.config
            pipeline.scheduler = DDIMScheduler.from_config(config, steps_offset=1, clip_sample=False)
        pipeline.save_pretrained(partial, safe_serialization=True)
        _write_model_card(settings, partial)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yields a path beside `folder` to write to; if the block fails, as on a full disk, nothing is left of it."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with files.disk_errors(folder):
            yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_model_card(settings: Settings, folder: Path) -> None:
    """Writes model card and bill of materials if there is a verdict about these weights."""
    if judged := current_verdict(settings):
        report, verdict = judged
        name, base = settings.register_.model, settings.base.model
        text = model_card.render(name, base, settings.evaluate.confidence_level, report, verdict)
        (folder / model_card.FILE_NAME).write_text(text, "utf-8")
        files.write_json(folder / bom.FILE_NAME, bom.build(name, base, json_records.digest(verdict), report, verdict))


def export_version(settings: Settings, version: str, folder: Path) -> None:
    """Writes a registered version, atomically, after verifying that its files are those judged and signed."""
    source = models.local_path(settings, f"models:/{settings.register_.model}/{version}")
    with _new_folder(folder) as partial:
        shutil.copytree(source, partial)


def current_verdict(settings: Settings) -> tuple[Report, Verdict] | None:
    """Report and verdict, if they are about the current delta."""
    folder, delta = settings.paths.verdict, settings.paths.delta / tensors.DELTA_FILE
    if not (folder / "verdict.json").is_file():
        return None
    report = json_records.read(settings.paths.report / "report.json", Report)
    verdict = json_records.read(folder / "verdict.json", Verdict)
    same = report.provenance.delta == digest_tensors(dict(tensors.load_delta(delta).tensors))
    return (report, verdict) if same else None


def verdict_status(settings: Settings) -> str:
    """One line: the gate's outcome for the current delta and, if it is out of date, why."""
    if (judged := current_verdict(settings)) is None:
        return "none: these weights were not judged"
    report, verdict = judged
    changed = stale_reason(settings, report, verdict)
    return f"{verdict.outcome}, but {changed}" if changed else verdict.outcome
