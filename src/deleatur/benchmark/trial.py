"""One trial of the benchmark: the stages of the ordinary pipeline, in a folder of its own.

A trial records the digest of every stage that has run. Killed at any point and run again, it keeps completed stages
and resumes the one that was interrupted; sampled images and detections are reused. A new metric causes neither
training nor sampling.

    digests.json            stage → digest of all inputs of its results
    summary.json            what the table shows beside the scores; or why the trial was refused
    ../SEED.resources.json  seconds and memory, which differ between runs
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from deleatur import stages
from deleatur.artifacts import tokens
from deleatur.benchmark import plan, resources
from deleatur.benchmark.digests import TrialDigests
from deleatur.benchmark.plan import KEEP, NONE, SHARED, Trial
from deleatur.benchmark.resources import ResourceUsage
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.errors import ErasureRefused
from deleatur.records.model import ErasureRecord
from deleatur.runtime import models
from deleatur.storage import files, tensors

DIGESTS_FILE, SUMMARY_FILE = "digests.json", "summary.json"
RUNNING = "running"
"""Key in digests.json of the digest of the stage that is running, or was interrupted."""


@dataclass(frozen=True)
class TrialSummary:
    """What the table shows beside the scores."""

    refused: str
    """Why there are none; empty: there are."""
    trained: int = 0
    """Number of values that differ from the base model."""
    bytes: int = 0
    """Size of the file of these differences."""
    predictions: int = 0
    """Network evaluations at each sampler step."""
    notes: Sequence[str] = ()


def is_done(settings: Settings, digests: TrialDigests, trial: Trial) -> bool:
    """Whether the trial's results exist and are up to date."""
    folder = plan.trial_folder(settings, trial)
    return (folder / SUMMARY_FILE).is_file() and _recorded_digests(folder) == digests.of_trial(trial)


def resource_usage(settings: Settings, digests: TrialDigests, trial: Trial) -> ResourceUsage | None:
    """Cost of the trial's erasure; None where nothing is trained, or where the erasure ran on another machine."""
    digest = digests.of_trial(trial).get("erase", "")
    return resources.read(_usage_file(settings, trial), digest) if trial.row != NONE else None


def read_summary(settings: Settings, trial: Trial) -> TrialSummary:
    path = plan.trial_folder(settings, trial) / SUMMARY_FILE
    return files.read_json_as(path, TrialSummary, _recompute(path.parent))


def run_trial(settings: Settings, digests: TrialDigests, trial: Trial) -> None:
    """Brings one trial up to date. The trials that it reads from have to be: ratings, tokens and `none`."""
    folder = plan.trial_folder(settings, trial)
    if reason := digests.refusal(trial):
        files.write_json(files.empty_folder(folder) / SUMMARY_FILE, {"refused": reason})
        return
    trial_settings = plan.trial_settings(settings, trial)
    if reason := _missing_token(trial_settings, trial):
        files.write_json(files.empty_folder(folder) / SUMMARY_FILE, {"refused": reason})
        files.write_json(folder / DIGESTS_FILE, digests.of_trial(trial))
        return
    recorded, wanted = _recorded_digests(folder), digests.of_trial(trial)
    # Counted before anything is measured: it loads libraries, whose memory is not the method's.
    predictions = 0 if trial.row in SHARED else _predictions_per_step(trial_settings)
    for stage, digest in wanted.items():
        if recorded.get(stage) == digest:
            continue
        if recorded.get(RUNNING) != digest:
            # Checkpoints of another configuration must not be resumed.
            shutil.rmtree(trial_settings.paths.checkpoints, ignore_errors=True)
        recorded = {name: recorded[name] for name in wanted if recorded.get(name) == wanted[name]} | {RUNNING: digest}
        files.write_json(folder / DIGESTS_FILE, recorded)
        try:
            _run_stage(settings, trial_settings, trial, stage, digest)
        except ErasureRefused as e:
            files.write_json(files.empty_folder(folder) / SUMMARY_FILE, {"refused": str(e).splitlines()[0]})
            break
        recorded = {name: value for name, value in recorded.items() if name != RUNNING} | {stage: digest}
    else:
        summary = {"refused": "", "predictions": predictions, **_summary(trial_settings, trial)}
        files.write_json(folder / SUMMARY_FILE, summary)
    files.write_json(folder / DIGESTS_FILE, wanted)


def _missing_token(trial_settings: Settings, trial: Trial) -> str:
    """Why a trial that needs a soft token has none: too few ratings, or all alike; empty: it has, or needs none."""
    needs_token = trial.row not in SHARED and methods.requires_ratings(trial_settings)
    if not needs_token or tokens.is_learned(trial_settings, trial.concept):
        return ""
    folder = trial_settings.paths.reward
    reasons = files.read_object(folder / "metrics.json", trial.concept, hint=_recompute(folder))
    return f"no token was learned: {reasons[trial.concept]}"


def _recorded_digests(folder: Path) -> dict[str, str]:
    path = folder / DIGESTS_FILE
    return files.read_json_as(path, dict[str, str], _recompute(folder)) if path.is_file() else {}


def _recompute(folder: Path) -> str:
    return f"rm -r {folder}, then: deleatur compare"


def _usage_file(settings: Settings, trial: Trial) -> Path:
    return plan.trial_folder(settings, trial).with_suffix(".resources.json")


def _run_stage(settings: Settings, trial_settings: Settings, trial: Trial, stage: str, digest: str) -> None:
    if stage == "erase":
        resumed = trial_settings.paths.checkpoints.is_dir()
        path, device = _usage_file(settings, trial), trial_settings.base.device
        with resources.measure(path, digest, device, resumed=resumed):
            stages.run(stage, trial_settings)
        return
    if stage == "sample" and trial.row != NONE:
        _copy_base_results(plan.trial_settings(settings, replace(trial, row=NONE)), trial_settings)
    stages.run(stage, trial_settings)


def _copy_base_results(none: Settings, trial_settings: Settings) -> None:
    """Copies cached images of the base model and their detections, which every row shares."""
    paths = trial_settings.paths
    for source, target in ((none.paths.samples, paths.samples), (none.paths.scores, paths.scores)):
        for shard in source.glob("*/*.parquet"):
            if not (copy := target / shard.relative_to(source)).exists():
                with files.atomic_write(copy) as partial:
                    shutil.copyfile(shard, partial)


def _predictions_per_step(trial_settings: Settings) -> int:
    """Network evaluations at each sampler step: the cost of a guide for every image."""
    if methods.eraser(trial_settings).one_step is not None:
        return 1
    model, guide = models.base_model(trial_settings), methods.guide(trial_settings)
    concepts = [tokens.load_concept(trial_settings, model, name) for name in trial_settings.targets]
    return 1 + sum(len(rows) for rows in guide.conditions(model, concepts).values())


def _summary(trial_settings: Settings, trial: Trial) -> dict[str, Any]:
    if trial.row in SHARED:
        return {}
    folder, method = trial_settings.paths.delta, trial_settings.erase.method
    delta = tensors.load_delta(folder / tensors.DELTA_FILE)
    record = files.read_json_as(folder / "record.json", ErasureRecord)
    is_erased = method != KEEP
    return {
        "method": method,
        "source": trial_settings.erase.source,
        "guide": trial_settings.guide.method,
        "trained": sum(prod(t.shape) for t in delta.tensors.values()),
        "bytes": (folder / tensors.DELTA_FILE).stat().st_size if is_erased else 0,
        "steps": record.selected,
        "notes": list(record.notes) if is_erased else [],
    }
