"""tokens or words → delta/: any eraser, SDD by default. Checkpointed: a killed run resumes where it was saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deleatur import dependencies
from deleatur.artifacts import prompts, rated_images, reward_heads, tokens
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion import encode
from deleatur.diffusion.clip import Clip
from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import rounding_loss
from deleatur.erasers import Eraser
from deleatur.errors import ErasureRefused
from deleatur.evaluation.probe import EVAL_PROMPTS, validation_probe
from deleatur.records.feedback import FeedbackSummary
from deleatur.records.model import Delta
from deleatur.runtime import models, provenance
from deleatur.runtime.checkpoint import Checkpoint, run_identity
from deleatur.runtime.progress import bar
from deleatur.storage import files, tensors
from deleatur.training.loop import ErasureContext, TrainingProgress


def run(settings: Settings) -> None:
    model, clip = models.base_model(settings), models.clip_model(settings)
    eraser = methods.eraser(settings)
    concepts = [tokens.load_concept(settings, model, name) for name in settings.targets]
    if eraser.learns_from_images:
        concepts = [replace(c, images=rated_images.RatedPool(settings, c.name).labelled()) for c in concepts]
    preserved = prompts.preserved_prompts(settings)
    encoded = encode.encode_texts(model, ["", *preserved])
    checkpoint = Checkpoint(settings, "erase", "erase", _run_identity(settings, eraser, model, clip))
    with checkpoint, bar(f"erase {'+'.join(settings.targets)}", 1) as advance:

        def on_step(p: TrainingProgress) -> None:
            note = f"loss {p.loss:.4f}"
            if p.state:
                checkpoint(p.state)
            if p.state and p.state.evaluations:
                newest = p.state.evaluations[-1]
                note += f"  concept {newest['concept']:.2f}  preserved {newest['preserved']:.3f}"
            advance.set(p.step, p.total, note)

        context = ErasureContext(
            seed=settings.seed,
            preserve=encoded.states,
            preserve_ends=encoded.end_positions,
            on_step=on_step,
            probe=validation_probe(settings, model, clip, concepts, eraser.one_step),
            state=checkpoint.state,
        )
        try:
            delta = eraser.erase(model, concepts, context)
            precision_notes = _precision_notes(settings, rounding_loss(model, delta))
        except ErasureRefused as refused:
            raise _kept_for_inspection(settings, model, eraser, refused) from refused
    with files.replace_folder(settings.paths.delta) as folder:
        tensors.save_delta(folder / tensors.DELTA_FILE, delta)
        record = {"method": delta.method, "concepts": list(delta.concepts), **delta.record}
        record["notes"] = [*_token_notes(settings), *precision_notes, *eraser.notes()]
        for name in ("curve", "evaluations"):
            files.write_json(folder / f"{name}.json", record.pop(name, []))
        files.write_json(folder / "record.json", record)
    checkpoint.remove()


def _kept_for_inspection(settings: Settings, model: Model, eraser: Eraser, refused: ErasureRefused) -> ErasureRefused:
    """Writes the curves and the weights of a refused run beside the checkpoints, and names them and the prompts."""
    if not refused.weights:
        return refused
    preserved = prompts.preserved_validation_prompts(settings, EVAL_PROMPTS)
    delta = Delta(
        refused.weights, model.unet_digest, settings.erase.method, eraser.model_dump(), tuple(settings.targets)
    )
    with files.replace_folder(settings.paths.checkpoints / "refused") as folder:
        tensors.save_delta(folder / tensors.DELTA_FILE, delta)
        record = {**refused.record, "preserved_prompts": preserved}
        # A score of a run that went wrong may be NaN, which JSON does not have: as text.
        files.write_json(folder / "record.json", json.loads(json.dumps(record), parse_constant=str))
    return ErasureRefused(
        f"{refused}\nEvaluated on {len(preserved)} preserved prompts{_drops(preserved, refused.record)}\n"
        f"Evaluations, curve and weights are kept in {settings.paths.checkpoints / 'refused'}",
        hint=refused.hint,
    )


def _drops(preserved: Sequence[str], record: Mapping[str, Any]) -> str:
    """The preserved prompts with their scores of the base model and of the last evaluation, largest drop first."""
    before, after = (record["evaluations"][i]["preserved_by_prompt"] for i in (0, -1))
    if not len(before) == len(after) == len(preserved):
        return f": {', '.join(preserved)}"
    rows = sorted(zip(preserved, before, after, strict=True), key=lambda row: row[2] - row[1])
    return ", largest drop first: " + ", ".join(f"{prompt} {a:.2f} → {b:.2f}" for prompt, a, b in rows)


NOTED_LOSS, MAX_LOSS = 0.05, 0.5
"""Shares of a delta's norm lost to rounding from which it is noted, and refused."""


def _precision_notes(settings: Settings, loss: float) -> list[str]:
    """For the report. Raises ErasureRefused where images would be sampled and judged without most of the difference,
    which an export, in float32, has.
    """
    dtype = settings.base.dtype
    if loss > MAX_LOSS:
        raise ErasureRefused(
            f"the weights changed by less than {dtype} resolves: {loss:.0%} of the difference is lost to rounding",
            hint="base.dtype: float32, or a method or learning rate that changes them more; then: deleatur stage erase",
        )
    if loss > NOTED_LOSS:
        return [f"{loss:.0%} of the weights' difference is lost to rounding in {dtype}; an export has all of it."]
    return []


def _token_notes(settings: Settings) -> list[str]:
    """Notes of the inversion method, for the report."""
    if settings.erase.source == "words":
        return []
    provenances = (tokens.load_token(settings, name).provenance for name in settings.targets)
    return list(dict.fromkeys(note for each in provenances for note in each.get("notes", [])))


def _run_identity(settings: Settings, eraser: Eraser, model: Model, clip: Clip) -> dict[str, Any]:
    """Everything that can change the result: a checkpoint of another identity is not resumed."""
    paths, specs = settings.paths, [settings.concepts[name] for name in settings.targets]
    rated = [name for name in settings.targets if reward_heads.is_trained(settings, name)]
    content = {
        "reward": provenance.digest_files([paths.reward / f"{name}.safetensors" for name in rated]),
        "prompts": provenance.digest_files([paths.prompts, *(spec.prompts for spec in specs)]),
    }
    if settings.erase.source == "token":
        content["tokens"] = provenance.digest_files(
            [p for n in settings.targets for p in sorted((paths.tokens / n).iterdir())]
        )
    if eraser.learns_from_images:
        content["feedback"] = files.read_json_as(paths.feedback / "summary.json", FeedbackSummary).feedback
    used = {settings.concepts[name].detection.detector for name in settings.targets if name not in rated}
    detectors = {name: detector for name, detector in methods.detectors(settings).items() if name in used}
    content |= {f"detector {name}": detector.load().weights for name, detector in detectors.items()}
    sections = ["base", "seed", "targets", *(f"concepts.{name}" for name in settings.targets), "guide", "erase"]
    return run_identity(
        settings,
        sections=[*sections, "reward.clip", "sample.steps", "evaluate.detectors"],
        code=dependencies.stage_digests(
            "erase",
            {
                "erase": {"method": settings.erase.method},
                "guide": {"method": settings.guide.method},
                "evaluate": {"detectors": settings.evaluate.detectors},
            },
        ),
        model=model,
        clip=clip,
        content=content,
    )
