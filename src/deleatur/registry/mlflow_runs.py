"""Runs of an MLflow experiment: one run holds all the evidence of one verdict.

A run is identified by the digest of its evidence, in a tag: logged again, the same evidence resumes the same run. A run
is FINISHED only after the last alias has moved.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from deleatur.redaction import redact, redacted_file
from deleatur.registry.mlflow_client import all_pages, connect, translated_errors, use_tracking_uri
from deleatur.storage.cache import chunked

EVIDENCE_TAG = "deleatur.evidence"
DATASET_DIGEST_LENGTH = 36
"""Characters that MLflow keeps of a dataset's digest; the full digest is a tag."""
MAX_TAGS, MAX_PARAMS, MAX_METRICS = 100, 100, 1000
"""MLflow's limits for one request."""


@dataclass(frozen=True)
class Evidence:
    """Everything that is logged about one verdict. `digest` identifies it."""

    digest: str
    name: str
    """Shown in lists of runs."""
    tags: Mapping[str, str]
    settings: Mapping[str, Any]
    """Nested; logged as flat params."""
    summary: str = ""
    """Markdown, shown as the run's description."""
    scores: Mapping[str, float] = field(default_factory=dict)
    curves: Sequence[tuple[str, int, float]] = ()
    """(name, step, value)."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Path among the run's artifacts → local file or folder; missing files are left out."""
    feedback: pd.DataFrame | None = None
    feedback_digest: str = ""
    feedback_source: str = ""

    @property
    def prefixed_tags(self) -> dict[str, str]:
        """The tags with our prefix, the evidence's digest among them."""
        return {EVIDENCE_TAG: self.digest} | {f"deleatur.{k}": v for k, v in self.tags.items()}


@dataclass(frozen=True)
class Runs:
    """The runs of one experiment. Raises ServiceError or SettingsError, see `translated_errors`."""

    uri: str
    experiment: str

    @cached_property
    def client(self) -> mlflow.MlflowClient:
        return connect(self.uri)

    @cached_property
    def experiment_id(self) -> str:
        use_tracking_uri(self.uri)
        return str(mlflow.set_experiment(self.experiment).experiment_id)

    def finished(self, evidence: str) -> bool:
        """Whether the run with this evidence is complete."""
        with translated_errors(self.uri):
            run = self._find(evidence)
        return run is not None and run.info.status == "FINISHED"

    @contextmanager
    def recording(self, evidence: Evidence) -> Iterator[str]:
        """Yields the id of the evidence's run, new or resumed. FINISHED if the block ends well, FAILED if it raises."""
        with translated_errors(self.uri):
            existing = self._find(evidence.digest)
            run = existing or self.client.create_run(
                self.experiment_id, run_name=evidence.name, tags=evidence.prefixed_tags
            )
            run_id = str(run.info.run_id)
            self.client.update_run(run_id, "RUNNING")
            try:
                yield run_id
            except BaseException:
                self.client.set_terminated(run_id, "FAILED")
                raise
            self.client.set_terminated(run_id, "FINISHED")

    def log(self, run_id: str, evidence: Evidence) -> None:
        """Logs settings, lineage, curves, scores and files. What an earlier attempt has logged stays as it is."""
        with translated_errors(self.uri):
            run = self.client.get_run(run_id)
            start = run.info.start_time  # one timestamp for all metrics: logged again, a value is not stored twice
            params = {k: redact(v) for k, v in flatten(evidence.settings).items() if k not in run.data.params}
            metrics = [Metric(k, v, start, 0) for k, v in evidence.scores.items()]
            metrics += [Metric(k, v, start, step) for k, step, v in evidence.curves]
            log_batches(
                self.client, run_id, evidence.prefixed_tags | {MLFLOW_RUN_NOTE: evidence.summary}, params, metrics
            )
            if evidence.feedback is not None:
                self.client.log_inputs(run_id, [_dataset_input(evidence)])
            for name, path in evidence.files.items():
                if path.is_dir():
                    self.client.log_artifacts(run_id, str(path), name)
                elif path.is_file():
                    with redacted_file(path) as redacted:
                        self.client.log_artifact(run_id, str(redacted), name)

    def log_text(self, run_id: str, name: str, text: str) -> None:
        with translated_errors(self.uri):
            self.client.log_text(run_id, text, name)

    def search(self, filter_string: str = "") -> list[Run]:
        """All runs that match a filter of MLflow's."""
        with translated_errors(self.uri):
            return all_pages(self.client.search_runs, [self.experiment_id], filter_string)

    def delete(self, run_id: str) -> None:
        """Marks a run as deleted; it can be restored until `mlflow gc` runs."""
        with translated_errors(self.uri):
            self.client.delete_run(run_id)

    def _find(self, evidence: str) -> Run | None:
        runs = self.client.search_runs([self.experiment_id], f"tags.`{EVIDENCE_TAG}` = '{evidence}'", max_results=1)
        return runs[0] if runs else None


def log_batches(
    client: mlflow.MlflowClient,
    run_id: str,
    tags: Mapping[str, str],
    params: Mapping[str, str],
    metrics: Sequence[Metric],
) -> None:
    """Logs tags, params and metrics in requests of the size that MLflow accepts."""
    for chunk in chunked([RunTag(k, v) for k, v in tags.items()], MAX_TAGS):
        client.log_batch(run_id, tags=chunk)
    for chunk in chunked([Param(k, v) for k, v in params.items()], MAX_PARAMS):
        client.log_batch(run_id, params=chunk)
    for chunk in chunked(metrics, MAX_METRICS):
        client.log_batch(run_id, metrics=chunk)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"erase": {"lr": 1}} → {"erase.lr": "1"}; lists as JSON."""
    result: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            result |= flatten(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return result


def _dataset_input(evidence: Evidence) -> DatasetInput:
    assert evidence.feedback is not None
    with warnings.catch_warnings():
        # MLflow warns that two of its readers match the source, and that integer columns cannot hold missing values.
        warnings.simplefilter("ignore")
        dataset = mlflow.data.from_pandas(
            evidence.feedback,
            name="feedback",
            source=evidence.feedback_source,
            digest=evidence.feedback_digest[:DATASET_DIGEST_LENGTH],
        ).to_dict()
    return DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", "feedback")])
