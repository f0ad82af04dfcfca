"""Runs all missing trials, one after the other: through DVC in a DVC repository, otherwise in this process."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from deleatur.benchmark.digests import TrialDigests
from deleatur.benchmark.plan import NONE, RATINGS, TOKENS, Trial
from deleatur.benchmark.trial import is_done, run_trial
from deleatur.config.settings import Settings
from deleatur.runtime.progress import Bar, bar, outer_bar
from deleatur.storage import dvc, files, processes

TEMPLATE, DVC_FILE = Path("compare/stages.yaml"), "compare/dvc.yaml"
"""The stages as Git has them, and the copy that DVC reads once the benchmark is used."""


def trials_of(concepts: Sequence[str], rows: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """Seed by seed, so that the table of the first seed is complete before the second begins."""
    return [Trial(concept, row, seed) for seed in seeds for concept in concepts for row in rows]


def missing(settings: Settings, digests: TrialDigests, trials: Sequence[Trial]) -> list[Trial]:
    """Trials whose results are missing or out of date; refused ones are skipped."""
    possible = [trial for trial in trials if not digests.refusal(trial)]
    return [trial for trial in possible if not is_done(settings, digests, trial)]


def run(settings: Settings, digests: TrialDigests, trials: Sequence[Trial]) -> None:
    """Raises what a stage raises. Completed trials are kept, and the same call resumes."""
    if not trials:
        return
    with outer_bar("compare", len(trials)) as progress:
        if Path(".dvc").is_dir() and TEMPLATE.is_file():
            with files.atomic_write(Path(DVC_FILE)) as partial:
                shutil.copyfile(TEMPLATE, partial)
            for _, of_seed in groupby(trials, lambda trial: trial.seed):
                _reproduce([stage_address(trial) for trial in of_seed], progress)
        else:
            for trial in trials:
                progress.describe(f"{trial.concept} {trial.row} {trial.seed}")
                _run_with_upstream(settings, digests, trial)
                progress(1)


def stage_address(trial: Trial) -> str:
    """DVC's name of the trial's stage."""
    if trial.row == NONE:
        return f"{DVC_FILE}:none@{trial.concept}-{trial.seed}"
    return f"{DVC_FILE}:row@{trial.concept}-{trial.row}-{trial.seed}"


def _run_with_upstream(settings: Settings, digests: TrialDigests, trial: Trial) -> None:
    ratings, tokens = replace(trial, row=RATINGS, seed=settings.seed), replace(trial, row=TOKENS)
    for part in (ratings, tokens, replace(trial, row=NONE), trial):
        if not is_done(settings, digests, part):
            run_trial(settings, digests, part)


def _reproduce(targets: Sequence[str], progress: Bar) -> None:
    """Runs the stages through DVC. The outer bar counts targets, an inner bar shows the progress of each stage."""
    stage, task, inner = "", "", progress
    with ExitStack() as inner_bar:

        def on_line(line: str) -> None:
            nonlocal stage, task
            if match := re.match(r"(?:Running stage|Stage) '([^']+)'", line):
                progress(stage in targets)
                stage, task = match[1], ""
                inner_bar.close()
                progress.describe(stage.rpartition(":")[2])

        def on_progress(update: processes.StageProgress) -> None:
            nonlocal inner, task
            if update.task != task:
                inner_bar.close()
                inner, task = inner_bar.enter_context(bar(update.task, update.total)), update.task
            inner.set(update.done, update.total, update.note)

        dvc.reproduce_all(targets, Path(), on_line, on_progress)
        progress(stage in targets)
