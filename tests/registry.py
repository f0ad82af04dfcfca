"""A registry and its ledger without the chain before them: versions are nothing but what they say of themselves."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock
from mlflow.exceptions import MlflowException

from deleatur.config.settings import Settings
from deleatur.registry.decisions import enter, registry_of
from deleatur.registry.ledger import Subject
from deleatur.registry.mlflow_client import Registry

ROOT = Path(__file__).parents[1]


def tables(shared: Path) -> Path:
    """A store with its tables and nothing in them, made once: it takes seconds."""
    with FileLock(shared / "tables.lock"):
        if not (shared / "tables.db").exists():
            Registry(f"sqlite:///{shared}/tables.partial", "unused", "unused").client.search_experiments()
            shutil.copy(shared / "tables.partial", shared / "tables.db")
    return shared / "tables.db"


def make(shared: Path, root: Path) -> Settings:
    """Empty; `root` has to become the current directory."""
    shutil.copy(tables(shared), root / "mlflow.db")
    params = (ROOT / "params.yaml").read_text("utf-8")
    (root / "params.yaml").write_text(params.replace("sqlite:///mlflow.db", f"sqlite:///{root}/mlflow.db"), "utf-8")
    return Settings.load(root / "params.yaml")


def asking(settings: Settings) -> Settings:
    """A policy that wants a person's approval."""
    return settings.model_copy(update={"register_": settings.register_.model_copy(update={"approval": True})})


def passes(settings: Settings, evidence: str, weights: str = "", **says: str) -> str:
    """A verdict that passes is registered, with a version of its own: what `register` does after all its looking."""
    registry, weights = registry_of(settings), (weights or evidence) * 64
    version = registry.version(evidence * 64)
    if version is None:
        tags = {"deleatur.evidence": evidence * 64, "deleatur.delta": weights, "deleatur.outcome": "pass"}
        tags |= {f"deleatur.{name}": value for name, value in says.items()}
        with suppress(MlflowException):
            registry.client.create_registered_model(registry.model)
        made = registry.client.create_model_version(registry.model, source=str(Path.cwd() / "none"), tags=tags)
        version = str(made.version)
    enter(settings, Subject(version, weights, evidence * 64), "pass", "PASS: 1 rule, 1 passed")
    return version


def fails(settings: Settings, evidence: str, weights: str = "") -> None:
    """One that makes no version."""
    about = Subject(None, (weights or evidence) * 64, evidence * 64)
    enter(settings, about, "fail", "FAIL: 1 rule, 1 failed")
