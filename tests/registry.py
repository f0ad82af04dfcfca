"""A registry and its ledger without the pipeline: versions have tags and no files."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from mlflow.exceptions import MlflowException

from deleatur.config.settings import Settings
from deleatur.registry.decisions import open_registry, record_verdict
from deleatur.registry.ledger import Subject
from deleatur.registry.mlflow_registry import Registry, logged_model_id

ROOT = Path(__file__).parents[1]


def empty_store(shared: Path) -> Path:
    """An MLflow database with empty tables, created once per session because that takes seconds."""
    with FileLock(shared / "tables.lock"):
        if not (shared / "tables.db").exists():
            Registry(f"sqlite:///{shared}/tables.partial", "unused", "unused").client.search_experiments()
            shutil.copy(shared / "tables.partial", shared / "tables.db")
    return shared / "tables.db"


def create(shared: Path, root: Path) -> Settings:
    """Settings with an empty registry; `root` has to become the current directory."""
    shutil.copy(empty_store(shared), root / "mlflow.db")
    params = (ROOT / "params.yaml").read_text("utf-8")
    (root / "params.yaml").write_text(params.replace("sqlite:///mlflow.db", f"sqlite:///{root}/mlflow.db"), "utf-8")
    return Settings.load(root / "params.yaml")


def requiring_approval(settings: Settings) -> Settings:
    """The same settings with `register.approval`."""
    return settings.model_copy(update={"register_": settings.register_.model_copy(update={"approval": True})})


def register_pass(settings: Settings, evidence: str, weights: str = "", **extra_tags: str) -> str:
    """Records a verdict that passes, with a version, as the stage `register` does; returns the version."""
    registry, weights = open_registry(settings), (weights or evidence) * 64
    version = registry.version(evidence * 64)
    if version is None:
        tags = {"deleatur.evidence": evidence * 64, "deleatur.delta": weights, "deleatur.outcome": "pass"}
        tags |= {f"deleatur.{name}": value for name, value in extra_tags.items()}
        with suppress(MlflowException):
            registry.client.create_registered_model(registry.model)
        model = registry.client.create_logged_model(registry.runs.experiment_id, "model", tags=tags)
        version = str(registry.client.create_model_version(registry.model, model.model_uri).version)
    record_verdict(settings, Subject(version, weights, evidence * 64), "pass", "PASS: 1 rule, 1 passed")
    return version


def change_tags(settings: Settings, version: str, **tags: str) -> None:
    """Changes tags of a version's model, as someone with access to MLflow can."""
    registry = open_registry(settings)
    registered = registry.client.get_model_version(registry.model, version)
    tags = {f"deleatur.{name}": value for name, value in tags.items()}
    registry.client.set_logged_model_tags(logged_model_id(registered), tags)


def register_fail(settings: Settings, evidence: str, weights: str = "") -> None:
    """Records a verdict that fails."""
    subject = Subject(None, (weights or evidence) * 64, evidence * 64)
    record_verdict(settings, subject, "fail", "FAIL: 1 rule, 1 failed")
