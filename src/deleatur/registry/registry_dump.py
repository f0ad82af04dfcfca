"""Dumps a registry into a folder, and loads it back, through MLflow's API: from any kind of store into any other.

    runs/ID/run.json, artifacts/       every run with evidence
    models/ID/model.json, artifacts/   the model of each version
    versions.json                      number, run, model, tags, description

In the target store runs and models get new ids; version numbers, tags and the bytes of files are preserved. Runs and
models that exist already are recognised by their evidence, so an interrupted load resumes.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Run
from mlflow.entities.model_registry import ModelVersion

from deleatur.errors import DataError
from deleatur.registry.descriptions import run_link
from deleatur.registry.mlflow_client import ignore_existing, translated_errors, use_tracking_uri
from deleatur.registry.mlflow_registry import Registry, logged_model_id
from deleatur.registry.mlflow_runs import EVIDENCE_TAG, log_batches
from deleatur.registry.model_files import model_files
from deleatur.storage import files


@dataclass(frozen=True)
class RegistryDump:
    """A registry and the folder with its dump."""

    registry: Registry
    folder: Path

    def save(self) -> None:
        """Writes all versions of the registry, with their runs and models, to the folder."""
        use_tracking_uri(self.registry.uri)
        with translated_errors(self.registry.uri, target=self.folder):
            versions = self.registry.versions()
            for run in self.registry.runs.search():
                if EVIDENCE_TAG in run.data.tags:
                    self._save_run(run)
            for model in dict.fromkeys(map(logged_model_id, versions)):
                self._save_model(model)
            files.write_json(self.folder / "versions.json", [self._version_record(version) for version in versions])

    def load(self) -> None:
        """Loads the dump into the registry.

        Raises DataError, before anything is changed, if the registry has versions that the dump lacks.
        """
        records = self.version_records
        with translated_errors(self.registry.uri):
            self._require_known_versions(records)
            run_ids = {path.parent.name: self._load_run(path.parent) for path in self._run_files()}
            with ignore_existing():
                self.registry.client.create_registered_model(self.registry.model)
            model_ids: dict[str, str] = {}
            for version in records:
                run_id = run_ids[version["run_id"]]
                if version["model_id"] not in model_ids:
                    model_ids[version["model_id"]] = self._load_model(version["model_id"], run_id)
                self._load_version(version, run_id, model_ids[version["model_id"]])

    @property
    def version_records(self) -> list[dict[str, Any]]:
        """The dumped versions, by number."""
        records: list[dict[str, Any]] = files.read_json(self.folder / "versions.json")
        return records

    def _save_run(self, run: Run) -> None:
        folder, client = self.folder / "runs" / run.info.run_id, self.registry.client
        history = [m for key in run.data.metrics for m in client.get_metric_history(run.info.run_id, key)]
        files.write_json(
            folder / "run.json",
            {
                "name": run.info.run_name,
                "start": run.info.start_time,
                "end": run.info.end_time,
                "status": run.info.status,
                "tags": run.data.tags,
                "params": run.data.params,
                "metrics": [[m.key, m.value, m.timestamp, m.step] for m in history],
                "inputs": [i.to_dictionary() for i in (run.inputs.dataset_inputs if run.inputs else [])],
            },
        )
        if client.list_artifacts(run.info.run_id):
            (folder / "artifacts").mkdir()
            client.download_artifacts(run.info.run_id, "", str(folder / "artifacts"))

    def _save_model(self, model_id: str) -> None:
        folder, model = self.folder / "models" / model_id, self.registry.client.get_logged_model(model_id)
        record = {"name": model.name, "type": model.model_type, "tags": model.tags, "params": model.params}
        files.write_json(folder / "model.json", record)
        with model_files(f"models:/{model_id}") as downloaded:
            shutil.copytree(downloaded, folder / "artifacts")

    def _run_files(self) -> list[Path]:
        return sorted(self.folder.glob("runs/*/run.json"), key=lambda path: files.read_json(path)["start"])

    def _load_run(self, folder: Path) -> str:
        """Returns the run's id in this store."""
        record, client = files.read_json(folder / "run.json"), self.registry.client
        experiment, evidence = self.registry.runs.experiment_id, record["tags"][EVIDENCE_TAG]
        for run in client.search_runs([experiment], f"tags.`{EVIDENCE_TAG}` = '{evidence}'"):
            if run.info.status == record["status"]:
                return str(run.info.run_id)
            client.delete_run(run.info.run_id)  # incomplete: an earlier load was interrupted
        run = client.create_run(experiment, start_time=record["start"], run_name=record["name"])
        run_id = str(run.info.run_id)
        log_batches(client, run_id, record["tags"], record["params"], [Metric(*m) for m in record["metrics"]])
        if record["inputs"]:
            client.log_inputs(run_id, [_dataset_input(i) for i in record["inputs"]])
        if (folder / "artifacts").is_dir():
            client.log_artifacts(run_id, str(folder / "artifacts"))
        client.set_terminated(run_id, record["status"], record["end"])
        return run_id

    def _load_model(self, dumped_id: str, run_id: str) -> str:
        """Returns the model's id in this store."""
        folder, client = self.folder / "models" / dumped_id, self.registry.client
        record, experiment = self._model_record(dumped_id), self.registry.runs.experiment_id
        evidence = record["tags"][EVIDENCE_TAG]
        existing = client.search_logged_models([experiment], f"tags.`{EVIDENCE_TAG}` = '{evidence}'")
        for model in (m for m in existing if m.source_run_id == run_id):
            if model.status == LoggedModelStatus.READY:
                return str(model.model_id)
            client.delete_logged_model(model.model_id)
        model = client.create_logged_model(
            experiment, record["name"], run_id, tags=record["tags"], params=record["params"], model_type=record["type"]
        )
        client.log_model_artifacts(model.model_id, str(folder / "artifacts"))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return str(model.model_id)

    def _model_record(self, dumped_id: str) -> dict[str, Any]:
        record: dict[str, Any] = files.read_json(self.folder / "models" / dumped_id / "model.json")
        return record

    def _version_record(self, version: ModelVersion) -> dict[str, Any]:
        return {
            "number": int(version.version),
            "run_id": version.run_id,
            "run_link": run_link(self.registry.runs.experiment_id, version.run_id),
            "model_id": logged_model_id(version),
            "tags": version.tags,
            "description": version.description or "",
        }

    def _load_version(self, record: dict[str, Any], run_id: str, model_id: str) -> None:
        """Creates the version under its old number, by creating and deleting versions for the numbers in between."""
        client, name, source = self.registry.client, self.registry.model, f"models:/{model_id}"
        link = run_link(self.registry.runs.experiment_id, run_id)
        description = record["description"].replace(record["run_link"], link)
        if record["number"] in {int(v.version) for v in self.registry.versions()}:
            return
        while True:
            created = client.create_model_version(
                name, source, run_id, tags=record["tags"], description=description, model_id=model_id
            )
            if int(created.version) == record["number"]:
                return
            client.delete_model_version(name, str(created.version))
            if int(created.version) > record["number"]:
                raise DataError(
                    f"version {record['number']} of {name} existed and was deleted: MLflow never reuses a number",
                    hint="restore into an empty registry, or under another name (register.model)",
                )

    def _require_known_versions(self, records: list[dict[str, Any]]) -> None:
        dumped = {v["number"]: self._model_record(v["model_id"])["tags"][EVIDENCE_TAG] for v in records}
        for version in self.registry.versions():
            evidence = self.registry.tags(str(version.version)).get("evidence")
            if evidence is None or dumped.get(int(version.version)) != evidence:
                raise DataError(
                    f"{self.registry.model} has a version {version.version} that is not the one in the dump",
                    hint="restore into an empty registry, or under another name (register.model)",
                )


def _dataset_input(record: dict[str, Any]) -> DatasetInput:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DatasetInput(Dataset(**record["dataset"]), [InputTag(k, v) for k, v in record["tags"].items()])
