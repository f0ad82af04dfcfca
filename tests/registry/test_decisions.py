"""kill -9 at every step of every decision: never a half release, and the same command finishes it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import registry
from child_processes import temporary_folder
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


class Killer:
    """Counts the steps that persist something, and can kill the process at one of them: before a commit to the
    registry's database, or in the middle of a line of the ledger.
    """

    def __init__(self, at: int = 0) -> None:
        self.at, self.steps, self._writes = at, 0, False
        self._put = ledger._write_all

    def __enter__(self) -> Self:
        event.listen(Engine, "before_cursor_execute", self._executing)
        event.listen(Engine, "commit", self._committing)
        ledger._write_all = self._writing
        return self

    def __exit__(self, *_: object) -> None:
        event.remove(Engine, "before_cursor_execute", self._executing)
        event.remove(Engine, "commit", self._committing)
        ledger._write_all = self._put

    def _step(self) -> bool:
        self.steps += 1
        return self.steps == self.at

    def _executing(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        self._writes = self._writes or statement.lstrip().split()[0].upper() in ("INSERT", "UPDATE", "DELETE")

    def _committing(self, _: Any) -> None:
        if self._writes and self._step():
            os.kill(os.getpid(), signal.SIGKILL)
        self._writes = False

    def _writing(self, file: ledger.FileIO, data: bytes) -> None:
        if self._step():
            file.write(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        self._put(file, data)


def in_child_process(work: Callable[[], object]) -> Any:
    """The result of `work` in a forked process; None if it was killed."""
    answer = Path("answer.json")
    answer.unlink(missing_ok=True)
    with temporary_folder():
        if (child := os.fork()) == 0:
            try:
                answer.write_text(json.dumps(work()))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return json.loads(answer.read_text()) if code == 0 else None


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


@contextmanager
def snapshot(root: Path) -> Iterator[Callable[[], None]]:
    """Saves registry and ledger; yields a function that restores them."""
    saved = root / "kept"
    saved.mkdir()

    def move(source: Path, target: Path) -> None:
        for name in STORES:
            (target / name).unlink() if (target / name).is_file() else shutil.rmtree(target / name, ignore_errors=True)
            if (source / name).is_dir():
                shutil.copytree(source / name, target / name)
            elif (source / name).is_file():
                shutil.copy(source / name, target / name)

    move(root, saved)
    yield lambda: move(saved, root)


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

    def killed(step: int) -> int:
        with Killer(step) as killer:
            decision.command(settings)
        return killer.steps

    def again() -> tuple[Any, Any]:
        check_champion()
        left = state_of(settings)
        decision.command(settings)
        return left, state_of(settings)

    for step in decision.before:
        step(settings)
    with snapshot(Path.cwd()) as restore:
        old, steps, new = state_of(settings), killed(0), state_of(settings)
        assert (new["aliases"], new["events"], new["problems"]) == (decision.after, decision.events, [])
        for step in range(1, steps + 1):
            restore()
            assert in_child_process(lambda step=step: killed(step)) is None, "it was killed"
            left, end = in_child_process(again)
            live = left["aliases"].get(CHAMPION)
            assert live in (old["aliases"].get(CHAMPION), decision.after[CHAMPION])
            if left["events"] == old["events"]:
                assert left["aliases"] == old["aliases"], "nothing was decided, so nothing moved"
            elif live != old["aliases"].get(CHAMPION):
                assert left["decided"][CHAMPION] == live, "nothing is live that was not decided"
            assert end == new
    return steps


@pytest.fixture(autouse=True)
def no_open_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked processes may then use the registry that this one has used, with all its compiled statements."""
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")


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
