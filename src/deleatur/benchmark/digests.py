"""Digests of everything that a trial's stages depend on, to know which results are up to date."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

from deleatur.benchmark import plan
from deleatur.benchmark.plan import NONE, RATINGS, TOKENS, Trial
from deleatur.config.settings import Settings
from deleatur.runtime import provenance
from deleatur.stages import ingest


class TrialDigests:
    """A stage's digest covers its settings, code and files, and the digests of the stages that it reads from."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._inputs = cache(lambda concept, row: plan.stage_inputs(settings, concept, row))
        self._digests: dict[tuple[Trial, str], str] = {}

    def of_trial(self, trial: Trial) -> dict[str, str]:
        """Stage → digest, in the order in which stages run."""
        return {stage: self._of_stage(trial, stage) for stage in self._stages(trial)}

    def refusal(self, trial: Trial) -> str:
        """Why the trial cannot be run; empty: it can."""
        return str(self._inputs(trial.concept, trial.row)["refused"])

    def _stages(self, trial: Trial) -> list[str]:
        return [name for name in self._inputs(trial.concept, trial.row) if name != "refused"]

    def _of_stage(self, trial: Trial, stage: str) -> str:
        if (trial, stage) not in self._digests:
            self._digests[trial, stage] = provenance.sha256(
                [
                    self._inputs(trial.concept, trial.row)[stage],
                    trial.seed,
                    self._feedback if stage == "ingest" else [self._models, self._prompts(trial.concept)],
                    [self._of_stage(*upstream) for upstream in self._upstream(trial, stage)],
                ]
            )
        return self._digests[trial, stage]

    def _upstream(self, trial: Trial, stage: str) -> Iterator[tuple[Trial, str]]:
        """The (trial, stage) pairs whose results a stage reads."""
        ratings = replace(trial, row=RATINGS, seed=self._settings.seed)
        tokens, none = replace(trial, row=TOKENS), replace(trial, row=NONE)
        match stage:
            case "reward":
                yield ratings, "ingest"
            case "invert":
                yield ratings, "reward"
            case "erase":
                yield from ((ratings, "reward"), (tokens, "invert"))
            case "attack":
                yield trial, "erase"
            case "sample":
                # A guide changes no weights, so that its attacks are those on the base model.
                yield (trial if "attack" in self._stages(trial) else none), "attack"
            case "evaluate":
                yield trial, "sample"

    @cached_property
    def _models(self) -> str:
        return provenance.digest_files(
            sorted(path for path in self._settings.paths.models.rglob("*") if path.is_file())
        )

    @cached_property
    def _feedback(self) -> str:
        sources = ingest.find_sources(self._settings, required=False)
        return provenance.digest_files([*sources, *filter(Path.exists, map(ingest.archive_path, sources))])

    def _prompts(self, concept: str) -> str:
        return provenance.digest_files([self._settings.paths.prompts, self._settings.concepts[concept].prompts])
