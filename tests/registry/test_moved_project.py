"""A project that was moved goes on as before: MLflow's absolute paths follow it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import finished
import mlflow
import pytest
import registry
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHAMPION, QUARANTINED, Registry
from deleatur.registry.relocation import relocate
from deleatur.stages import gate, register
from deleatur.storage import dvc


def register_with_limit(settings: Settings, limit: float) -> None:
    plain = settings.model_dump(mode="json", by_alias=True) | {"gate": finished.passing_policy(limit=limit)}
    changed = Settings.model_validate(plain)
    gate.run(changed)
    register.run(changed)


def move(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Moves a project and enters its new folder. Its store's address is relative outside of tests."""
    source.rename(target)
    monkeypatch.chdir(target)
    params = target / "params.yaml"
    params.write_text(params.read_text("utf-8").replace(f"sqlite:///{source}/", f"sqlite:///{target}/"), "utf-8")
    return Settings.load()


def run_cli(*command: str) -> int:
    result = CliRunner().invoke(app, list(command))
    assert result.exit_code == 0, result.output
    return result.exit_code


def test_moved_project_verifies_exports_registers_and_rolls_back(
    done: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dvc, "status", lambda root: {})  # takes seconds
    register_with_limit(done, -5.0)
    new = tmp_path.with_name(f"{tmp_path.name}-moved")
    moved = move(tmp_path, new, monkeypatch)
    run_cli("verify", "1")
    run_cli("export", "exported", "--version", "1")
    register_with_limit(moved, -6.0)
    run_cli("verify", "2")
    run_cli("rollback", "--as", "Ada", "--reason", "seen")
    assert open_registry(moved).aliases() == {CHAMPION: "1", QUARANTINED: "2"}
    assert not tmp_path.exists(), "nothing is written to the old place"
    assert len([*new.glob("mlruns/*/models/*/artifacts/MLmodel")]) == 2
    for version in "12":  # other programs load it from the new place, too
        stored = Path(mlflow.artifacts.download_artifacts(f"models:/deleatur/{version}"))
        assert stored.is_relative_to(new)


@pytest.fixture
def store(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A store with an experiment and a run, whose artifact root does not exist yet."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    settings = registry.create(shared, tmp_path / "project")
    store = open_registry(settings)
    store.client.create_run(store.runs.experiment_id)
    return store


def artifact_uris(store: Registry) -> set[Path]:
    return {Path(run.info.artifact_uri) for run in store.client.search_runs([store.runs.experiment_id])}


@pytest.mark.parametrize(
    ("arrange", "relocated"),
    [
        (lambda old, new: (new / "1").mkdir(parents=True), True),
        (lambda old, new: shutil.copytree(Path(), old, dirs_exist_ok=True), False),  # a copy: the original is there
        (lambda old, new: [(root / "1" / "models").mkdir(parents=True) for root in (old, new)], True),
        (
            lambda old, new: [(root / "1" / name).mkdir(parents=True) for root, name in ((old, "models"), (new, "x"))],
            False,
        ),
        (lambda old, new: None, False),  # the files are at neither place
    ],
    ids=["moved", "copied without artifacts", "copied", "two stores", "lost"],
)
def test_paths_follow_files_that_were_moved_or_copied(
    store: Registry, arrange: Callable[[Path, Path], object], relocated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    [uri] = artifact_uris(store)
    old, new = uri.parents[2], Path("../elsewhere/mlruns").resolve()
    new.parent.mkdir()
    Path("mlflow.db").rename(new.parent / "mlflow.db")
    arrange(old, new)
    monkeypatch.chdir(new.parent)
    for _ in range(2):  # the second time changes nothing
        relocate(Path("mlflow.db"))
        [after] = artifact_uris(Registry(f"sqlite:///{new.parent}/mlflow.db", store.experiment, store.model))
        assert after == (new if relocated else old) / uri.relative_to(old)
