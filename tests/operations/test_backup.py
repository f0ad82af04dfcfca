"""A set that was taken brings back registry, ledger and pointers: into another store, also when it is killed."""

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
from sqlalchemy import event
from sqlalchemy.engine import Engine

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.operations.backup import backup, restore
from deleatur.registry import ledger, rollback
from deleatur.registry.decisions import registry_of
from deleatur.registry.history import history
from deleatur.registry.ledger import Subject
from deleatur.registry.mlflow_client import CHAMPION, EVIDENCE, LAST, local
from deleatur.stages import gate, register
from deleatur.storage import dvc, files

pytestmark = pytest.mark.slow


def judged_by(settings: Settings, limit: float) -> None:
    """The same evidence under another policy: another verdict, and another version if it passes."""
    policy = {"gate": finished.passing(limit)}
    gate.run(Settings.model_validate(settings.model_dump(mode="json", by_alias=True) | policy))
    register.run(settings)


@pytest.fixture(scope="module")
def taken(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with four versions, of which one was deleted and one taken back, and a verdict that failed. Beside it
    its set, and a registry with nothing in it.
    """
    root = tmp_path_factory.mktemp("taken") / "project"
    root.mkdir()
    settings = finished.copy(shared, root)
    with pytest.MonkeyPatch.context() as patch, chdir(root):
        patch.setattr(dvc, "status", lambda root: {})
        for limit in (-6.0, -5.0, -4.0, -3.0):
            judged_by(settings, limit)
        judged_by(settings, 5.0)
        rollback.rollback(settings, "Ada", "it draws swords")
        own = registry_of(settings)
        own.client.delete_model_version(own.model, "1")
        backup(settings, root.parent / "set")
    shutil.copy(finished.template(shared) / "mlflow.db", root.parent / "empty.db")
    return root


@pytest.fixture
def fresh(taken: Path, tmp_path: Path) -> Iterator[Settings]:
    """A clone of the project, with an empty registry and no ledger."""
    finished.git(tmp_path, "clone", "--quiet", str(taken), "clone")
    root = tmp_path / "clone"
    shutil.copy(taken.parent / "empty.db", root / "mlflow.db")
    with chdir(root):
        yield at(root)


def at(root: Path) -> Settings:
    """The settings with the registry in this folder."""
    given = Settings.load(root / "params.yaml")
    uri = f"sqlite:///{root}/mlflow.db"
    return given.model_copy(update={"register_": given.register_.model_copy(update={"tracking_uri": uri})})


def held(settings: Settings) -> dict[str, Any]:
    """All that a registry says, ids aside."""
    own = registry_of(settings)
    runs = own.client.search_runs([own.experiment_id])
    return {
        "aliases": own.aliases(),
        "mark": own.mark(),
        "versions": [(v.version, v.tags, v.description) for v in own.versions()],
        "runs": sorted(
            (
                r.data.tags[EVIDENCE],
                r.info.status,
                r.info.start_time,
                r.info.end_time,
                sorted(r.data.params.items()),
                sorted(r.data.metrics.items()),
                len(own.client.get_metric_history(r.info.run_id, "erase/loss")),
                sorted(f.path for f in own.client.list_artifacts(r.info.run_id)),
                [i.dataset.digest for i in r.inputs.dataset_inputs],
            )
            for r in runs
        ),
    }


def file_texts(settings: Settings, version: str) -> dict[str, str]:
    registry_of(settings).client.search_experiments()
    folder = Path(local(f"models:/{settings.register_.model}/{version}", "pipeline")).parent
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_all_is_back(taken: Path, fresh: Settings) -> None:
    assert held(fresh)["runs"] == []
    found = restore(fresh, taken.parent / "set")
    assert (found.versions, found.decisions) == (3, len(ledger.read(fresh.register_.ledger).entries))
    with chdir(taken):
        before, weights = held(at(taken)), file_texts(at(taken), "3")
    assert len(before["runs"]) == 5
    assert held(fresh) == before
    assert before["aliases"][CHAMPION] == "3"
    assert file_texts(fresh, "3") == weights
    assert len(weights) > 5
    assert history(fresh).problems == []
    for name in ("dvc.lock", "params.yaml", ".dvc/config"):
        assert Path(name).read_bytes() == (taken / name).read_bytes()


def apart(work: Callable[[], object]) -> int:
    """The exit code of a process of its own that does it."""
    if (child := os.fork()) == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(commit: int, work: Callable[[], object]) -> int:
    """Ends the process before so many commits to the registry's database."""

    def killing() -> None:
        left = commit

        def count(_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        event.listen(Engine, "commit", count)
        work()

    return apart(killing)


def test_killed_again_and_again_it_ends_the_same(taken: Path, fresh: Settings) -> None:
    again = 0
    for commit in (1, 5, 15, 40, 80):
        again += killed_at(commit, lambda: restore(fresh, taken.parent / "set")) == -signal.SIGKILL
    assert again >= 3, "some come to an end"
    assert apart(lambda: restore(fresh, taken.parent / "set")) == 0
    with chdir(taken):
        before = held(at(taken))
    assert held(fresh) == before
    assert held(fresh) == before, "to be asked again changes nothing"


def test_what_is_not_in_the_set_is_not_lost(taken: Path, fresh: Settings, tmp_path: Path) -> None:
    own = registry_of(fresh)
    own.client.create_registered_model(own.model)
    own.client.create_model_version(own.model, str(tmp_path), tags={EVIDENCE: "another"})
    with pytest.raises(DataError, match="has a version 1 here that is not the copy's"):
        restore(fresh, taken.parent / "set")
    assert not fresh.register_.ledger.exists()


def test_a_ledger_that_goes_on_is_not_overwritten(taken: Path, fresh: Settings) -> None:
    shutil.copy(taken / "ledger.jsonl", fresh.register_.ledger)
    with ledger.opened(fresh.register_.ledger) as book:
        last = book.ledger.entries[-1]
        book.append("decline", Subject(None, "", ""), "Ada", "no", last.aliases)
    before = fresh.register_.ledger.read_bytes()
    with pytest.raises(DataError, match="decisions of its own"):
        restore(fresh, taken.parent / "set")
    assert fresh.register_.ledger.read_bytes() == before


def test_a_set_that_was_changed_is_refused(taken: Path, fresh: Settings, tmp_path: Path) -> None:
    for change, said in (
        (lambda p: p.write_bytes(p.read_bytes() + b" "), "was changed"),
        (Path.unlink, "is missing"),
    ):
        copy = tmp_path / said
        shutil.copytree(taken.parent / "set", copy)
        change(next(copy.rglob("*.safetensors")))
        with pytest.raises(DataError, match=said):
            restore(fresh, copy)
    assert held(fresh)["runs"] == []


def test_what_was_changed_by_hand_in_the_workspace_is_not_overwritten(taken: Path, fresh: Settings) -> None:
    lock = Path("dvc.lock")
    changed = lock.read_text() + "# mine\n"
    lock.write_text(changed)
    with pytest.raises(DataError, match=r"dvc\.lock: changed here and not committed"):
        restore(fresh, taken.parent / "set")
    assert lock.read_text() == changed


def test_a_broken_chain_is_not_backed_up_and_nothing_is_left(taken: Path, tmp_path: Path) -> None:
    shutil.copytree(taken, tmp_path / "p")
    with chdir(tmp_path / "p"):
        path = Path("ledger.jsonl")
        path.write_text(path.read_text().replace('"who":"', '"who":"Not ', 1))
        with pytest.raises(DataError, match="changed"):
            backup(at(tmp_path / "p"), tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    with pytest.raises(DataError, match="exists already"):
        backup(at(taken), taken.parent / "set")
    assert files.read_json(taken.parent / "set" / "manifest.json")["versions"] == 3


def test_what_somebody_moved_by_hand_is_settled_first(taken: Path, tmp_path: Path) -> None:
    shutil.copytree(taken, tmp_path / "p")
    with chdir(tmp_path / "p"):
        own = registry_of(here := at(tmp_path / "p"))
        own.client.delete_model_version(own.model, own.aliases()[LAST])
        with pytest.raises(DataError, match="moved aliases by hand: last_known_good is no version"):
            backup(here, tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
