"""kill -9 at every step of every decision: never a half release, and the same command finishes it.

A command runs once, and is copied from disk at each step: as a kill runs nothing, that is what it would leave there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import registry
from child_processes import die, killed
from registry import register_fail, register_pass, requiring_approval
from sqlalchemy import event
from sqlalchemy.engine import Engine

from deleatur.artifacts.export import export
from deleatur.config.settings import Settings
from deleatur.registry import approval, history, ledger, model_files, rollback
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION, LAST_KNOWN_GOOD, QUARANTINED
from deleatur.stages import register
from deleatur.storage import dvc

Record = Callable[[str, object], None]
STORES = ("mlflow.db", "mlflow.db-journal", "mlruns", "ledger.jsonl")


class Interruptions:
    """The steps of a command that persist something. At each of them, before a commit to the registry's database and in
    the middle of a line of the ledger, `at_step` is called: what is on disk then is what a kill leaves.
    """

    def __init__(self, at_step: Callable[[], None]) -> None:
        self._at_step, self._writes, self._put = at_step, False, ledger._write_all

    def __enter__(self) -> Self:
        event.listen(Engine, "before_cursor_execute", self._executing)
        event.listen(Engine, "commit", self._committing)
        ledger._write_all = self._writing
        return self

    def __exit__(self, *_: object) -> None:
        event.remove(Engine, "before_cursor_execute", self._executing)
        event.remove(Engine, "commit", self._committing)
        ledger._write_all = self._put

    def _executing(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        self._writes = self._writes or statement.lstrip().split()[0].upper() in ("INSERT", "UPDATE", "DELETE")

    def _committing(self, _: Any) -> None:
        if self._writes:
            self._at_step()
        self._writes = False

    def _writing(self, file: ledger.FileIO, data: bytes) -> None:
        half = len(data) // 2
        file.write(data[:half])
        self._at_step()
        self._put(file, data[half:])


@dataclass(frozen=True)
class Decision:
    """A command, the steps before it, and its result."""

    before: tuple[Callable[[Settings], object], ...]
    command: Callable[[Settings], object]
    after: dict[str, str]
    events: str
    """Initials of the ledger's events afterwards."""


def move_alias_by_hand(settings: Settings) -> None:
    open_registry(settings).client.set_registered_model_alias("deleatur", CHAMPION, "1")


def release_all(*evidence: str) -> tuple[Callable[[Settings], object], ...]:
    return tuple(lambda s, e=e: register_pass(s, e) for e in evidence)


DECISIONS = {
    "pass": Decision(release_all("a"), lambda s: register_pass(s, "b"), {CHAMPION: "2", LAST_KNOWN_GOOD: "1"}, "rprp"),
    "wait": Decision(
        release_all("a"), lambda s: register_pass(requiring_approval(s), "b"), {CHAMPION: "1", CHALLENGER: "2"}, "rpr"
    ),
    "void": Decision(
        (*release_all("a"), lambda s: register_pass(requiring_approval(s), "b")),
        lambda s: register_pass(requiring_approval(s), "c"),
        {CHAMPION: "1", CHALLENGER: "3"},
        "rprvr",
    ),
    "renew": Decision(
        (
            *release_all("a"),
            lambda s: register_pass(requiring_approval(s), "b"),
            lambda s: register_pass(requiring_approval(s), "c"),
        ),
        lambda s: register_pass(requiring_approval(s), "b"),
        {CHAMPION: "1", CHALLENGER: "2"},
        "rprvrvr",
    ),
    "fail": Decision(release_all("a"), lambda s: register_fail(s, "b"), {CHAMPION: "1"}, "rpr"),
    "approve": Decision(
        (*release_all("a"), lambda s: register_pass(requiring_approval(s), "b")),
        lambda s: approval.promote(s, "2", "Ada", reason="seen"),
        {CHAMPION: "2", LAST_KNOWN_GOOD: "1"},
        "rprap",
    ),
    "decline": Decision(
        (*release_all("a"), lambda s: register_pass(requiring_approval(s), "b")),
        lambda s: approval.decline(s, "2", "Ada"),
        {CHAMPION: "1"},
        "rprd",
    ),
    "rollback": Decision(
        release_all("a", "b", "c"),
        lambda s: rollback.rollback(s, "Ada", "seen in the wild"),
        {CHAMPION: "2", LAST_KNOWN_GOOD: "1", QUARANTINED: "3"},
        "rprprpr",
    ),
    "quarantine": Decision(
        release_all("a", "b"),
        lambda s: rollback.quarantine(s, "2", "Ada", "seen in the wild"),
        {CHAMPION: "1", QUARANTINED: "2"},
        "rprpq",
    ),
    "settle": Decision(
        (*release_all("a", "b"), move_alias_by_hand),
        lambda s: history.settle(s, "Ada", "who was that?"),
        {CHAMPION: "2", LAST_KNOWN_GOOD: "1"},
        "rprps",
    ),
    "adopt": Decision(
        (*release_all("a", "b"), move_alias_by_hand),
        lambda s: history.settle(s, "Ada", "it was me", adopt=True),
        {CHAMPION: "1", LAST_KNOWN_GOOD: "1"},
        "rprpa",
    ),
}


def copy_stores(source: Path, target: Path) -> None:
    """Copies registry and ledger, as they are on disk; what `target` has of them is replaced."""
    target.mkdir(exist_ok=True)
    for name in STORES:
        (target / name).unlink() if (target / name).is_file() else shutil.rmtree(target / name, ignore_errors=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copy(source / name, target / name)


def state_of(settings: Settings) -> dict[str, Any]:
    """The state of registry and ledger, comparable with ==."""
    registry, recorded = open_registry(settings), ledger.read(settings.register_.ledger)
    assert recorded.problem == ""
    runs = registry.client.search_runs([registry.runs.experiment_id])
    return {
        "aliases": registry.aliases(),
        "events": "".join(e.event[0] for e in recorded.entries),
        "decided": dict(recorded.aliases),
        "problems": [str(p) for p in history.history(settings).problems],
        "runs": [run.info.status for run in runs],
        "descriptions": [_without_times(v.description) for v in registry.versions()],
        "model": [_without_times(m.description) for m in registry.client.search_registered_models()],
    }


def _without_times(description: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC|runs/\w+", "", description or "")


def kill_at_every_step(
    settings: Settings, decision: Decision, check_champion: Callable[[], None] = lambda: None
) -> int:
    """Returns the number of steps. check_champion: raises where the champion is not complete."""
    root, snapshots = Path.cwd(), list[Path]()

    def save() -> None:
        snapshots.append(root / f"killed-{len(snapshots) + 1}")
        copy_stores(root, snapshots[-1])

    for step in decision.before:
        step(settings)
    old = state_of(settings)
    with Interruptions(save):
        decision.command(settings)
    new = state_of(settings)
    assert (new["aliases"], new["events"], new["problems"]) == (decision.after, decision.events, [])
    for snapshot in snapshots:
        copy_stores(snapshot, root)
        check_champion()
        left = state_of(settings)
        live = left["aliases"].get(CHAMPION)
        assert live in (old["aliases"].get(CHAMPION), decision.after[CHAMPION])
        if left["events"] == old["events"]:
            assert left["aliases"] == old["aliases"], "nothing was decided, so nothing moved"
        elif live != old["aliases"].get(CHAMPION):
            assert left["decided"][CHAMPION] == live, "nothing is live that was not decided"
        decision.command(settings)
        assert state_of(settings) == new
    return len(snapshots)


@pytest.fixture(autouse=True)
def no_open_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry's database may then be replaced."""
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True], ids=["before a commit", "in a line of the ledger"])
def test_kill_leaves_what_is_on_disk(torn: bool, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests copy that instead of killing."""
    monkeypatch.chdir(tmp_path)
    settings = registry.create(shared, tmp_path)
    register_pass(settings, "a")

    def save_and_die() -> None:
        if Path("ledger.jsonl").read_bytes().endswith(b"\n") != torn:
            copy_stores(tmp_path, tmp_path / "copied")
            die()

    with Interruptions(save_and_die):
        assert killed(lambda: register_pass(settings, "b"))
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copied").iterdir()}
    left = {name: (tmp_path / name).read_bytes() for name in STORES if (tmp_path / name).exists()}
    assert copied == left


@pytest.mark.slow
@pytest.mark.parametrize("name", DECISIONS)
def test_kill_at_any_step_of_a_decision_leaves_no_half_and_rerun_finishes(
    name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = kill_at_every_step(registry.create(shared, tmp_path), DECISIONS[name])
    assert steps > 2
    record_property("steps", steps)


@pytest.mark.slow
def test_kill_at_any_step_of_registering_leaves_no_half_release(
    done: Settings, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """From the first run in an empty store to the champion."""
    monkeypatch.setattr(dvc, "status", lambda root: {})  # takes seconds
    export(done, Path("exported"))
    monkeypatch.setattr(register, "export", lambda _, folder: shutil.copytree("exported", folder))

    def unaided() -> None:
        if live := open_registry(done).alias(CHAMPION):
            assert open_registry(done).tags(live)["outcome"] == "pass"
            for part, source in (("delta", done.paths.delta), ("pipeline", Path("exported"))):
                stored = Path(model_files.local_folder(f"models:/deleatur/{live}", part))
                names = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
                assert {p.relative_to(stored) for p in stored.rglob("*") if p.is_file()} == names
                assert all((stored / name).read_bytes() == (source / name).read_bytes() for name in names)

    steps = kill_at_every_step(done, Decision((), register.run, {CHAMPION: "1"}, "rp"), unaided)
    assert steps > 15
    record_property("steps", steps)
