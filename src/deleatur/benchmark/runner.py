"""A selection of the trials in params.yaml: which are refused or missing, running them, and the resulting table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deleatur.benchmark import aggregate, log, plan, publish, schedule, trial
from deleatur.benchmark.digests import TrialDigests
from deleatur.benchmark.plan import Trial
from deleatur.benchmark.publish import BenchmarkFiles
from deleatur.config.settings import Settings
from deleatur.errors import Interrupted


@dataclass(frozen=True)
class Benchmark:
    """Trials of some rows, concepts and training seeds of params.yaml."""

    settings: Settings
    digests: TrialDigests
    rows: Sequence[str]
    concepts: Sequence[str]
    seeds: Sequence[int]

    @classmethod
    def select(
        cls, settings: Settings, methods: Sequence[str], concepts: Sequence[str], seeds: Sequence[str]
    ) -> Benchmark:
        """An empty list selects everything; the untouched model is always selected.

        Raises SettingsError for a name that the section `compare` does not have.
        """
        compare = plan.section(settings)
        numbers = [int(seed) if seed.isdecimal() else seed for seed in seeds]
        return cls(
            settings,
            TrialDigests(settings),
            plan.select([plan.NONE, *methods] if methods else [], plan.row_names(settings), "methods"),
            plan.select(concepts, compare.concepts, "concepts"),
            plan.select(numbers, compare.seeds, "seeds"),
        )

    def refused(self) -> Iterator[tuple[str, str, str]]:
        """(row, concept, reason) of what cannot be run."""
        for concept in self.concepts:
            for row in self.rows:
                if reason := self.digests.refusal(Trial(concept, row, self.seeds[0])):
                    yield row, concept, reason

    def missing(self) -> list[Trial]:
        """Trials whose results are missing or out of date."""
        trials = schedule.trials_of(self.concepts, self.rows, self.seeds)
        return schedule.missing(self.settings, self.digests, trials)

    def run(self, trials: Sequence[Trial]) -> None:
        """Raises what a stage raises, and Interrupted when interrupted. Completed trials are kept."""
        try:
            schedule.run(self.settings, self.digests, trials)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; completed trials are kept", hint="deleatur compare (resumes)") from None

    def write(self, *, log_to_mlflow: bool) -> BenchmarkFiles:
        """Aggregates the results that are up to date, and writes table and HTML report."""
        tables = [
            aggregate.aggregate_trials(self.settings, self.digests, concept, self.rows, self.seeds)
            for concept in self.concepts
        ]
        written = publish.write(self.settings, tables)
        if log_to_mlflow:
            log.run(self.settings, tables, written.files)
        return written


def run_trial(settings: Settings, concept: str, row: str, seed: int | None = None) -> None:
    """Runs one trial, or what trials share: ratings, tokens and the plan. Without a seed, with that of params.yaml."""
    plan.select([concept], plan.section(settings).concepts, "concepts")
    plan.select([row], [plan.PLAN, *plan.SHARED, *plan.row_names(settings)], "methods")
    if row == plan.PLAN:
        plan.write_plan(settings, concept)
    else:
        trial.run_trial(settings, TrialDigests(settings), Trial(concept, row, settings.seed if seed is None else seed))
