"""Versions and aliases of a registered model in MLflow.

A verdict that passes makes one version. Its source is a logged model, whose tags are the digests of its evidence and
of its files; the version has a copy of those that people filter by. Registered again, the existing version is returned.
Which version an alias names is decided in the ledger; the tag `LEDGER_TAG` holds the last line of the ledger that was
applied here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version as installed
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from deleatur.errors import DataError
from deleatur.redaction import redact
from deleatur.registry import signing
from deleatur.registry.ledger import LedgerPosition
from deleatur.registry.mlflow_client import (
    all_pages,
    connect,
    ignore_existing,
    store_exists,
    tracking_uri,
    translated_errors,
)
from deleatur.registry.mlflow_runs import EVIDENCE_TAG, Evidence, Runs
from deleatur.registry.model_files import model_files

CHAMPION, CHALLENGER, LAST_KNOWN_GOOD, QUARANTINED = "champion", "challenger", "last_known_good", "quarantined"
ALIASES = (QUARANTINED, LAST_KNOWN_GOOD, CHAMPION, CHALLENGER)
"""The aliases that deleatur manages, in the order in which they are set. The champion changes in one call, after the
aliases that name the previous champion."""

LEDGER_TAG = "deleatur.ledger"

SHOWN_TAGS = ("outcome", "concepts", "method", "simulated")
"""Tags that a version has, for people to filter by: a copy of its model's, which commands read."""
QUARANTINE_TAG = "quarantined_because"
"""Tag of a quarantined version: the reason."""

MODEL_CODE = Path(__file__).with_name("pyfunc_model.py")
MODEL_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "prompt"), ColSpec("long", "seed")]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema([ParamSpec("steps", "long", 30), ParamSpec("guidance", "double", 7.5)]),
)
MODEL_REQUIREMENTS = ("mlflow", "torch", "diffusers", "transformers", "accelerate", "safetensors", "pillow", "pandas")
"""Packages that the registered model needs. Listed, because MLflow's inference omits torch and adds unrelated ones."""


@dataclass(frozen=True)
class Registry:
    """One registered model in a tracking store, and the experiment whose runs made its versions.

    The environment variable MLFLOW_TRACKING_URI takes precedence over `uri`. Raises ServiceError or SettingsError, see
    `translated_errors`.
    """

    uri: str
    experiment: str
    model: str

    @cached_property
    def client(self) -> mlflow.MlflowClient:
        return connect(self.uri)

    @cached_property
    def runs(self) -> Runs:
        return Runs(self.uri, self.experiment)

    @property
    def exists(self) -> bool:
        return store_exists(self.uri)

    @property
    def shown_uri(self) -> str:
        """The URI in use, without credentials, for messages."""
        return redact(tracking_uri(self.uri))

    def version(self, evidence: str) -> str | None:
        """The version made from this evidence, if there is one."""
        with translated_errors(self.uri):
            for model in self._logged_models(evidence):
                filter_string = f"name = '{self.model}' and source_path = '{model.model_uri}'"
                for version in self.client.search_model_versions(filter_string):
                    return str(version.version)
        return None

    def versions(self) -> list[ModelVersion]:
        """All versions of the model, by number."""
        with translated_errors(self.uri):
            versions = all_pages(self.client.search_model_versions, f"name = '{self.model}'")
            return sorted(versions, key=lambda v: int(v.version))

    def add_version(
        self, run_id: str, evidence: Evidence, pipeline: Path, delta: Path, description: str, keys: signing.Keys
    ) -> str:
        """Stores a diffusers folder and its delta as a model that plain MLflow loads, attaches a signed statement of
        its files' digests, and registers it as a new version.
        """
        with translated_errors(self.uri):
            uri = self._logged_model(run_id, evidence) or self._log_model(run_id, evidence, pipeline, delta)
            self._attach_statement(uri, evidence, keys)
            self._create_model()
            tags = {name: evidence.tags[name] for name in SHOWN_TAGS if name in evidence.tags}
            created = self.client.create_model_version(
                self.model, uri, run_id, tags=tags, description=description, model_id=uri.rpartition("/")[2]
            )
            return str(created.version)

    def tags(self, version: str) -> dict[str, str]:
        """The tags of a version's model, which identify its evidence, without our prefix; and QUARANTINE_TAG.

        Raises DataError if there is no such version.
        """
        registered = self._version(version)
        quarantined = {k: v for k, v in registered.tags.items() if k == QUARANTINE_TAG}
        with translated_errors(self.uri):
            try:
                tags = self.client.get_logged_model(logged_model_id(registered)).tags
            except MlflowException as e:
                if e.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                tags = {}  # it was deleted, or the version was registered by hand: the ledger has it
        return {k.removeprefix("deleatur."): v for k, v in tags.items()} | quarantined

    def mark_quarantined(self, version: str, reason: str) -> None:
        """Tags a version as quarantined."""
        with translated_errors(self.uri):
            self.client.set_model_version_tag(self.model, version, QUARANTINE_TAG, reason)

    def description(self, version: str) -> str:
        return self._version(version).description or ""

    def describe(self, description: str, version: str | None = None) -> None:
        """Sets the description of a version, or that of the registered model."""
        with translated_errors(self.uri):
            if version:
                self.client.update_model_version(self.model, version, description)
            else:
                self._create_model()
                self.client.update_registered_model(self.model, description)

    def artifact_text(self, version: str, name: str) -> str:
        """An artifact of the run that made a version, as text. Raises DataError if there is no such version."""
        missing = DataError(f"{self.model} has no version {version} with an artifact {name}", hint="mlflow ui")
        run_id = str(self._version(version).run_id)
        with translated_errors(self.uri, missing), TemporaryDirectory(prefix="deleatur-") as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_text("utf-8")

    def disposable_runs(self, before: float) -> dict[str, str]:
        """Runs that ended before a Unix time and that no version was made from: id → name."""
        with translated_errors(self.uri):
            needed = {version.run_id for version in self.versions()}
            ended = self.runs.search(f"attributes.end_time < {int(before * 1000)}")
            return {run.info.run_id: run.info.run_name for run in ended if run.info.run_id not in needed}

    def aliases(self) -> dict[str, str]:
        """Alias → version, for the aliases in ALIASES that are set."""
        registered = self._registered_model()
        return {n: str(registered.aliases[n]) for n in ALIASES if n in registered.aliases} if registered else {}

    def alias(self, name: str) -> str | None:
        """The version with this alias."""
        return self.aliases().get(name)

    def set_aliases(self, aliases: Mapping[str, str]) -> None:
        """Sets the aliases in ALIASES, and deletes those that are not given."""
        current = self.aliases()
        with translated_errors(self.uri):
            for name in (name for name in ALIASES if aliases.get(name) != current.get(name)):
                if name in aliases:
                    self.client.set_registered_model_alias(self.model, name, aliases[name])
                else:
                    self.client.delete_registered_model_alias(self.model, name)

    def ledger_position(self) -> LedgerPosition | None:
        """The last line of the ledger that was applied here; None before the first."""
        registered = self._registered_model()
        tags = registered.tags if registered else {}
        return LedgerPosition.parse(tags[LEDGER_TAG]) if LEDGER_TAG in tags else None

    def set_ledger_position(self, position: LedgerPosition) -> None:
        with translated_errors(self.uri):
            self._create_model()
            self.client.set_registered_model_tag(self.model, LEDGER_TAG, str(position))

    def _create_model(self) -> None:
        """Creates the registered model, unless it exists: a ledger can begin with a verdict that makes no version."""
        with ignore_existing():
            self.client.create_registered_model(self.model)

    def _version(self, version: str) -> ModelVersion:
        with translated_errors(self.uri, DataError(f"{self.model} has no version {version}", hint="mlflow ui")):
            return self.client.get_model_version(self.model, version)

    def _registered_model(self) -> RegisteredModel | None:
        with translated_errors(self.uri):
            try:
                return self.client.get_registered_model(self.model)
            except MlflowException as e:
                if e.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise

    def _logged_model(self, run_id: str, evidence: Evidence) -> str | None:
        """URI of the model that an earlier attempt stored completely; incomplete ones are deleted."""
        models = self._logged_models(evidence.digest)
        for model in (m for m in models if m.status != LoggedModelStatus.READY):
            self.client.delete_logged_model(model.model_id)
        complete = [m for m in models if m.status == LoggedModelStatus.READY and m.source_run_id == run_id]
        return str(complete[0].model_uri) if complete else None

    def _logged_models(self, evidence: str) -> list[LoggedModel]:
        filter_string = f"tags.`{EVIDENCE_TAG}` = '{evidence}'"
        return list(self.client.search_logged_models([self.runs.experiment_id], filter_string))

    def _log_model(self, run_id: str, evidence: Evidence, pipeline: Path, delta: Path) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow wants an input example, for which it would generate an image
            info = Model.log(
                artifact_path=None,
                name=self.model,
                flavor=mlflow.pyfunc,
                run_id=run_id,
                tags=evidence.prefixed_tags,
                metadata=evidence.prefixed_tags,
                python_model=str(MODEL_CODE),
                artifacts={"pipeline": str(pipeline), "delta": str(delta)},
                signature=MODEL_SIGNATURE,
                pip_requirements=[f"{name}=={installed(name).partition('+')[0]}" for name in MODEL_REQUIREMENTS],
            )
        return str(info.model_uri)

    def _attach_statement(self, uri: str, evidence: Evidence, keys: signing.Keys) -> None:
        """Signs the files that the store holds, which need not be those that were sent there, and tags the model with
        the digest of the statement.
        """
        with model_files(uri) as folder, TemporaryDirectory(prefix="deleatur-") as target:
            predicate = {**evidence.tags, "evidence": evidence.digest}
            envelope, statement = signing.create_statement(folder, predicate, keys)
            path = Path(target) / signing.STATEMENT_FILE
            path.write_bytes(envelope)
            model_id = uri.rpartition("/")[2]
            self.client.log_model_artifact(model_id, str(path), signing.STATEMENT_FOLDER)
        tags = {"deleatur.files": statement.digest, "deleatur.signed_by": statement.signed_by}
        self.client.set_logged_model_tags(model_id, tags)


def logged_model_id(version: ModelVersion) -> str:
    """Id of the logged model that a version was made from; the version's source is models:/ID."""
    return str(version.source).rpartition("/")[2]
