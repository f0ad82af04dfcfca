"""What a registry holds, as files in a folder, and back: by MLflow's own interface, so from any kind of store into any.

    runs/ID/run.json, artifacts/       every run with evidence
    models/ID/model.json, artifacts/   what versions are made of
    versions.json                      number, run, model, tags, description

In the other store runs and models get new ids; numbers of versions, tags and all bytes of files stay. What is there
already is found by its evidence, so a copy that was killed goes on where it was.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from deleatur.errors import DataError
from deleatur.registry.mlflow_client import EVIDENCE, Registry, answering, files_of, use
from deleatur.storage import files
from deleatur.storage.cache import parts


@dataclass(frozen=True)
class Copy:
    """A registry and the folder with its copy."""

    registry: Registry
    folder: Path

    def save(self) -> None:
        use(self.registry.uri)
        with answering(self.registry.uri):
            found = self.registry.versions()
            for run in self.registry.runs():
                if EVIDENCE in run.data.tags:
                    self._save_run(run)
            for model in dict.fromkeys(map(_model_of, found)):
                self._save_model(model)
            files.write_json(self.folder / "versions.json", [_plain(version) for version in found])

    def load(self) -> None:
        """Raises DataError, before anything is changed, where the registry has versions that the copy lacks."""
        wanted = self.listed
        with answering(self.registry.uri):
            self._demand_part_of(wanted)
            runs = {path.parent.name: self._load_run(path.parent) for path in self._sorted_runs()}
            self._demand_model()
            models: dict[str, str] = {}
            for version in wanted:
                run = runs[version["run_id"]]
                if version["model_id"] not in models:
                    models[version["model_id"]] = self._load_model(version["model_id"], run)
                self._load_version(version, run, models[version["model_id"]])

    @property
    def listed(self) -> list[dict[str, Any]]:
        """The copy's versions, in the order of their numbers."""
        found: list[dict[str, Any]] = files.read_json(self.folder / "versions.json")
        return found

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
        about = {"name": model.name, "type": model.model_type, "tags": model.tags, "params": model.params}
        files.write_json(folder / "model.json", about)
        with files_of(f"models:/{model_id}") as downloaded:
            shutil.copytree(downloaded, folder / "artifacts")

    def _sorted_runs(self) -> list[Path]:
        return sorted(self.folder.glob("runs/*/run.json"), key=lambda path: files.read_json(path)["start"])

    def _load_run(self, folder: Path) -> str:
        """Id of the run in this store."""
        given, client, experiment = (
            files.read_json(folder / "run.json"),
            self.registry.client,
            self.registry.experiment_id,
        )
        evidence = given["tags"][EVIDENCE]
        for run in client.search_runs([experiment], f"tags.`{EVIDENCE}` = '{evidence}'"):
            if run.info.status == given["status"]:
                return str(run.info.run_id)
            client.delete_run(run.info.run_id)  # half of it
        run = client.create_run(experiment, start_time=given["start"], run_name=given["name"])
        run_id = str(run.info.run_id)
        for own in parts([RunTag(k, v) for k, v in given["tags"].items()], 100):
            client.log_batch(run_id, tags=own)
        for some in parts([Param(k, v) for k, v in given["params"].items()], 100):
            client.log_batch(run_id, params=some)
        for many in parts([Metric(*m) for m in given["metrics"]], 1000):
            client.log_batch(run_id, metrics=many)
        if given["inputs"]:
            client.log_inputs(run_id, [_input(i) for i in given["inputs"]])
        if (folder / "artifacts").is_dir():
            client.log_artifacts(run_id, str(folder / "artifacts"))
        client.set_terminated(run_id, given["status"], given["end"])
        return run_id

    def _load_model(self, old: str, run_id: str) -> str:
        """Id of the model in this store."""
        folder, client = self.folder / "models" / old, self.registry.client
        given, experiment = files.read_json(folder / "model.json"), self.registry.experiment_id
        there = client.search_logged_models([experiment], f"tags.`{EVIDENCE}` = '{given['tags'][EVIDENCE]}'")
        for model in (m for m in there if m.source_run_id == run_id):
            if model.status == LoggedModelStatus.READY:
                return str(model.model_id)
            client.delete_logged_model(model.model_id)
        model = client.create_logged_model(
            experiment, given["name"], run_id, tags=given["tags"], params=given["params"], model_type=given["type"]
        )
        client.log_model_artifacts(model.model_id, str(folder / "artifacts"))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return str(model.model_id)

    def _load_version(self, given: dict[str, Any], run_id: str, model_id: str) -> None:
        """As the number that it had: in between are numbers of versions that were deleted."""
        client, name, source = self.registry.client, self.registry.model, f"models:/{model_id}"
        if given["number"] in {int(v.version) for v in self.registry.versions()}:
            return
        while True:
            made = client.create_model_version(
                name, source, run_id, tags=given["tags"], description=given["about"], model_id=model_id
            )
            if int(made.version) == given["number"]:
                return
            client.delete_model_version(name, str(made.version))
            if int(made.version) > given["number"]:
                raise DataError(
                    f"version {given['number']} of {name} was there and was deleted: its number cannot be had again",
                    hint="restore into an empty registry, or under another name (register.model)",
                )

    def _demand_model(self) -> None:
        try:
            self.registry.client.create_registered_model(self.registry.model)
        except MlflowException as e:
            if e.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _demand_part_of(self, wanted: list[dict[str, Any]]) -> None:
        known = {v["number"]: v["tags"].get(EVIDENCE) for v in wanted}
        for version in self.registry.versions():
            if known.get(int(version.version)) != version.tags.get(EVIDENCE):
                raise DataError(
                    f"{self.registry.model} has a version {version.version} here that is not the copy's",
                    hint="restore into an empty registry, or under another name (register.model)",
                )


def _model_of(version: ModelVersion) -> str:
    """Its source is models:/ID."""
    return str(version.source).rpartition("/")[2]


def _plain(version: ModelVersion) -> dict[str, Any]:
    return {
        "number": int(version.version),
        "run_id": version.run_id,
        "model_id": _model_of(version),
        "tags": version.tags,
        "about": version.description,
    }


def _input(given: dict[str, Any]) -> DatasetInput:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DatasetInput(Dataset(**given["dataset"]), [InputTag(k, v) for k, v in given["tags"].items()])
