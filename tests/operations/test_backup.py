"""A backup restores registry, ledger and workspace files into another store, also after interruptions."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import finished
import pytest
from child_processes import temporary_folder
from sqlalchemy import event
from sqlalchemy.engine import Engine

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.operations.backup import backup, restore
from deleatur.registry import ledger, rollback
from deleatur.registry.decisions import open_registry
from deleatur.registry.history import history
from deleatur.registry.ledger import Subject
from deleatur.registry.mlflow_registry import CHAMPION, LAST_KNOWN_GOOD
from deleatur.registry.mlflow_runs import EVIDENCE_TAG
from deleatur.registry.model_files import local_folder
from deleatur.stages import gate, register
from deleatur.storage import dvc, files

pytestmark = pytest.mark.slow


def release_under_limit(settings: Settings, limit: float) -> None:
    """The same evidence under another policy: another verdict, and another version if it passes."""
    policy = {"gate": finished.passing_policy(limit)}
    gate.run(Settings.model_validate(settings.model_dump(mode="json", by_alias=True) | policy))
    register.run(settings)


@pytest.fixture(scope="module")
def backed_up(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with four versions, one deleted and one rolled back, and a failed verdict. Its backup and an empty
    registry are next to it.
    """
    root = tmp_path_factory.mktemp("backed_up") / "project"
    root.mkdir()
    settings = finished.copy(shared, root)
    with pytest.MonkeyPatch.context() as patch, chdir(root):
        patch.setattr(dvc, "status", lambda root: {})
        for limit in (-6.0, -5.0, -4.0, -3.0):
            release_under_limit(settings, limit)
        release_under_limit(settings, 5.0)
        rollback.rollback(settings, "Ada", "it draws swords")
        registry = open_registry(settings)
        registry.client.delete_model_version(registry.model, "1")
        backup(settings, root.parent / "backup")
    shutil.copy(finished.template(shared) / "mlflow.db", root.parent / "empty.db")
    return root


@pytest.fixture
def clone(backed_up: Path, tmp_path: Path) -> Iterator[Settings]:
    """A clone of the project, with an empty registry and no ledger."""
    finished.git(tmp_path, "clone", "--quiet", str(backed_up), "clone")
    root = tmp_path / "clone"
    shutil.copy(backed_up.parent / "empty.db", root / "mlflow.db")
    with chdir(root):
        yield settings_at(root)


def settings_at(root: Path) -> Settings:
    """The settings with the registry in this folder."""
    settings = Settings.load(root / "params.yaml")
    uri = f"sqlite:///{root}/mlflow.db"
    return settings.model_copy(update={"register_": settings.register_.model_copy(update={"tracking_uri": uri})})


def registry_content(settings: Settings) -> dict[str, Any]:
    """Content of a registry, without ids."""
    registry = open_registry(settings)
    runs = registry.client.search_runs([registry.runs.experiment_id])
    return {
        "aliases": registry.aliases(),
        "mark": registry.ledger_position(),
        "versions": [
            (v.version, v.tags, registry.tags(str(v.version)), v.description.replace(v.run_id, "RUN"))
            for v in registry.versions()
        ],
        "model": [m.description for m in registry.client.search_registered_models()],
        "runs": sorted(
            (
                r.data.tags[EVIDENCE_TAG],
                r.info.status,
                r.info.start_time,
                r.info.end_time,
                sorted(r.data.params.items()),
                sorted(r.data.metrics.items()),
                len(registry.client.get_metric_history(r.info.run_id, "erase/loss")),
                sorted(f.path for f in registry.client.list_artifacts(r.info.run_id)),
                [i.dataset.digest for i in r.inputs.dataset_inputs],
            )
            for r in runs
        ),
    }


def file_texts(settings: Settings, version: str) -> dict[str, str]:
    open_registry(settings).client.search_experiments()
    folder = Path(local_folder(f"models:/{settings.register_.model}/{version}", "pipeline")).parent
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_restore_brings_back_registry_ledger_and_workspace(backed_up: Path, clone: Settings) -> None:
    assert registry_content(clone)["runs"] == []
    restored = restore(clone, backed_up.parent / "backup")
    assert (restored.versions, restored.decisions) == (3, len(ledger.read(clone.register_.ledger).entries))
    with chdir(backed_up):
        before, weights = registry_content(settings_at(backed_up)), file_texts(settings_at(backed_up), "3")
    assert len(before["runs"]) == 5
    assert registry_content(clone) == before
    assert before["aliases"][CHAMPION] == "3"
    assert file_texts(clone, "3") == weights
    assert len(weights) > 5
    assert history(clone).problems == []
    for name in ("dvc.lock", "params.yaml", ".dvc/config"):
        assert Path(name).read_bytes() == (backed_up / name).read_bytes()


def exit_code_of_fork(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its exit code."""
    with temporary_folder():
        if (child := os.fork()) == 0:
            try:
                work()
            except BaseException:
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_before_commit(commit: int, work: Callable[[], object]) -> int:
    """Run `work` in a fork that is killed before its n-th commit to the registry's database."""

    def killing() -> None:
        left = commit

        def count(_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        event.listen(Engine, "commit", count)
        work()

    return exit_code_of_fork(killing)


def test_an_interrupted_restore_resumes_to_the_same_result(backed_up: Path, clone: Settings) -> None:
    again = 0
    for commit in (1, 5, 15, 40, 80):
        again += kill_before_commit(commit, lambda: restore(clone, backed_up.parent / "backup")) == -signal.SIGKILL
    assert again >= 3, "some come to an end"
    assert exit_code_of_fork(lambda: restore(clone, backed_up.parent / "backup")) == 0
    with chdir(backed_up):
        before = registry_content(settings_at(backed_up))
    assert registry_content(clone) == before
    assert registry_content(clone) == before, "reading changes nothing"


def test_a_version_that_the_backup_lacks_is_not_overwritten(backed_up: Path, clone: Settings, tmp_path: Path) -> None:
    registry = open_registry(clone)
    registry.client.create_registered_model(registry.model)
    registry.client.create_model_version(registry.model, str(tmp_path), tags={EVIDENCE_TAG: "another"})
    with pytest.raises(DataError, match="has a version 1 that is not the one in the dump"):
        restore(clone, backed_up.parent / "backup")
    assert not clone.register_.ledger.exists()


def test_a_ledger_with_later_decisions_is_not_overwritten(backed_up: Path, clone: Settings) -> None:
    shutil.copy(backed_up / "ledger.jsonl", clone.register_.ledger)
    with ledger.locked(clone.register_.ledger) as book:
        last = book.ledger.entries[-1]
        book.append("decline", Subject(None, "", ""), "Ada", "no", last.aliases)
    before = clone.register_.ledger.read_bytes()
    with pytest.raises(DataError, match="decisions that the backup lacks"):
        restore(clone, backed_up.parent / "backup")
    assert clone.register_.ledger.read_bytes() == before


def test_a_damaged_backup_is_refused(backed_up: Path, clone: Settings, tmp_path: Path) -> None:
    for change, problem in (
        (lambda p: p.write_bytes(p.read_bytes() + b" "), "was changed"),
        (Path.unlink, "is missing"),
    ):
        copy = tmp_path / problem
        shutil.copytree(backed_up.parent / "backup", copy)
        change(next(copy.rglob("*.safetensors")))
        with pytest.raises(DataError, match=problem):
            restore(clone, copy)
    assert registry_content(clone)["runs"] == []


def test_uncommitted_changes_are_not_overwritten(backed_up: Path, clone: Settings) -> None:
    lock = Path("dvc.lock")
    changed = lock.read_text() + "# mine\n"
    lock.write_text(changed)
    with pytest.raises(DataError, match=r"dvc\.lock: uncommitted changes"):
        restore(clone, backed_up.parent / "backup")
    assert lock.read_text() == changed


def test_a_modified_ledger_is_not_backed_up_and_leaves_no_files(backed_up: Path, tmp_path: Path) -> None:
    shutil.copytree(backed_up, tmp_path / "p")
    with chdir(tmp_path / "p"):
        path = Path("ledger.jsonl")
        path.write_text(path.read_text().replace('"actor":"', '"actor":"Not ', 1))
        with pytest.raises(DataError, match="changed"):
            backup(settings_at(tmp_path / "p"), tmp_path / "backup")
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    with pytest.raises(DataError, match="exists already"):
        backup(settings_at(backed_up), backed_up.parent / "backup")
    assert files.read_json(backed_up.parent / "backup" / "manifest.json")["versions"] == 3


def test_aliases_moved_by_hand_are_not_backed_up(backed_up: Path, tmp_path: Path) -> None:
    shutil.copytree(backed_up, tmp_path / "p")
    with chdir(tmp_path / "p"):
        registry = open_registry(settings := settings_at(tmp_path / "p"))
        registry.client.delete_model_version(registry.model, registry.aliases()[LAST_KNOWN_GOOD])
        with pytest.raises(DataError, match="aliases were moved by hand: last_known_good is no version"):
            backup(settings, tmp_path / "backup")
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
