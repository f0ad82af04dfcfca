"""kill -9 at every step of every decision: never a half release, and the same command finishes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import registry
from registry import asking, fails, passes
from sqlalchemy import event
from sqlalchemy.engine import Engine

from deleatur.artifacts.export import export
from deleatur.config.settings import Settings
from deleatur.registry import approval, history, ledger, mlflow_client, rollback
from deleatur.registry.decisions import registry_of
from deleatur.registry.mlflow_client import CHALLENGER, CHAMPION, LAST, QUARANTINED
from deleatur.stages import register
from deleatur.storage import dvc

Record = Callable[[str, object], None]
STORES = ("mlflow.db", "mlflow.db-journal", "mlruns", "ledger.jsonl")


class Killer:
    """Counts the steps that leave something behind: commits to the registry's database, before each of which, and lines
    of the ledger, in the middle of each of which, it can end the process.
    """

    def __init__(self, at: int = 0) -> None:
        self.at, self.steps, self._writes = at, 0, False
        self._put = ledger._put
        event.listen(Engine, "before_cursor_execute", self._executing)
        event.listen(Engine, "commit", self._committing)
        ledger._put = self._writing

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


def apart(work: Callable[[], object]) -> Any:
    """What it returns, done in a process of its own, so that ours never opens the registry; None if that was killed."""
    answer = Path("answer.json")
    answer.unlink(missing_ok=True)
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
    """A command, what comes before it, and what it leads to."""

    before: tuple[Callable[[Settings], object], ...]
    command: Callable[[Settings], object]
    after: dict[str, str]
    events: str
    """Initials of the ledger's lines, when it is done."""


def by_hand(settings: Settings) -> None:
    registry_of(settings).client.set_registered_model_alias("deleatur", CHAMPION, "1")


def released(*evidence: str) -> tuple[Callable[[Settings], object], ...]:
    return tuple(lambda s, e=e: passes(s, e) for e in evidence)


DECISIONS = {
    "pass": Decision(released("a"), lambda s: passes(s, "b"), {CHAMPION: "2", LAST: "1"}, "rprp"),
    "wait": Decision(released("a"), lambda s: passes(asking(s), "b"), {CHAMPION: "1", CHALLENGER: "2"}, "rpr"),
    "void": Decision(
        (*released("a"), lambda s: passes(asking(s), "b")),
        lambda s: passes(asking(s), "c"),
        {CHAMPION: "1", CHALLENGER: "3"},
        "rprvr",
    ),
    "renew": Decision(
        (*released("a"), lambda s: passes(asking(s), "b"), lambda s: passes(asking(s), "c")),
        lambda s: passes(asking(s), "b"),
        {CHAMPION: "1", CHALLENGER: "2"},
        "rprvrvr",
    ),
    "fail": Decision(released("a"), lambda s: fails(s, "b"), {CHAMPION: "1"}, "rpr"),
    "approve": Decision(
        (*released("a"), lambda s: passes(asking(s), "b")),
        lambda s: approval.promote(s, "2", "Ada", reason="seen"),
        {CHAMPION: "2", LAST: "1"},
        "rprap",
    ),
    "decline": Decision(
        (*released("a"), lambda s: passes(asking(s), "b")),
        lambda s: approval.decline(s, "2", "Ada"),
        {CHAMPION: "1"},
        "rprd",
    ),
    "rollback": Decision(
        released("a", "b", "c"),
        lambda s: rollback.rollback(s, "Ada", "seen in the wild"),
        {CHAMPION: "2", LAST: "1", QUARANTINED: "3"},
        "rprprpr",
    ),
    "quarantine": Decision(
        released("a", "b"),
        lambda s: rollback.quarantine(s, "2", "Ada", "seen in the wild"),
        {CHAMPION: "1", QUARANTINED: "2"},
        "rprpq",
    ),
    "settle": Decision(
        (*released("a", "b"), by_hand),
        lambda s: history.settle(s, "Ada", "who was that?"),
        {CHAMPION: "2", LAST: "1"},
        "rprps",
    ),
    "adopt": Decision(
        (*released("a", "b"), by_hand),
        lambda s: history.settle(s, "Ada", "it was me", adopt=True),
        {CHAMPION: "1", LAST: "1"},
        "rprpa",
    ),
}


@contextmanager
def restoring(root: Path) -> Iterator[Callable[[], None]]:
    """Registry and ledger as they are now, as often as wanted."""
    kept = root / "kept"
    kept.mkdir()

    def move(source: Path, target: Path) -> None:
        for name in STORES:
            (target / name).unlink() if (target / name).is_file() else shutil.rmtree(target / name, ignore_errors=True)
            if (source / name).is_dir():
                shutil.copytree(source / name, target / name)
            elif (source / name).is_file():
                shutil.copy(source / name, target / name)

    move(root, kept)
    yield lambda: move(kept, root)


def look(settings: Settings) -> dict[str, Any]:
    """What there is in the end."""
    registry, known = registry_of(settings), ledger.read(settings.register_.ledger)
    assert known.problem == ""
    runs = registry.client.search_runs([registry.experiment_id])
    return {
        "aliases": registry.aliases(),
        "events": "".join(e.event[0] for e in known.entries),
        "decided": dict(known.aliases),
        "problems": [str(p) for p in history.history(settings).problems],
        "runs": [run.info.status for run in runs],
        "versions": len(registry.client.search_model_versions("name = 'deleatur'")),
    }


def kill_at_every_step(settings: Settings, decision: Decision, whole: Callable[[], None] = lambda: None) -> int:
    """How many steps there are; `whole` looks whether what is live is."""

    def killed(at: int) -> int:
        killer = Killer(at)
        decision.command(settings)
        return killer.steps

    def again() -> tuple[Any, Any]:
        whole()
        left = look(settings)
        decision.command(settings)
        return left, look(settings)

    for step in decision.before:
        apart(lambda step=step: step(settings) and None)
    with restoring(Path.cwd()) as restore:
        old = apart(lambda: look(settings))
        steps = int(apart(lambda: killed(0)))
        new = apart(lambda: look(settings))
        assert (new["aliases"], new["events"], new["problems"]) == (decision.after, decision.events, [])
        for step in range(1, steps + 1):
            restore()
            assert apart(lambda step=step: killed(step)) is None, "it was killed"
            left, end = apart(again)
            live = left["aliases"].get(CHAMPION)
            assert live in (old["aliases"].get(CHAMPION), decision.after[CHAMPION])
            if left["events"] == old["events"]:
                assert left["aliases"] == old["aliases"], "nothing was decided, so nothing moved"
            elif live != old["aliases"].get(CHAMPION):
                assert left["decided"][CHAMPION] == live, "nothing is live that was not decided"
            assert end == new
    return steps


@pytest.fixture
def warm(shared: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow imports most of itself when it is first asked for something: our children need not, each anew."""
    elsewhere = tmp_path_factory.mktemp("warm")
    monkeypatch.chdir(elsewhere)
    passes(registry.make(shared, elsewhere), "a")


@pytest.mark.slow
@pytest.mark.parametrize("name", DECISIONS)
def test_killed_at_any_step_nothing_is_half_decided_and_the_same_command_finishes(
    warm: None, name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = kill_at_every_step(registry.make(shared, tmp_path), DECISIONS[name])
    assert steps > 2
    record_property("steps", steps)


@pytest.mark.slow
def test_killed_at_any_step_of_registering_nothing_is_half_released(
    warm: None, done: Settings, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """From the first run in an empty store to the model that is live."""
    monkeypatch.setattr(dvc, "status", lambda root: {})  # it takes seconds to ask DVC
    export(done, Path("exported"))
    monkeypatch.setattr(register, "export", lambda _, folder: shutil.copytree("exported", folder))

    def whole() -> None:
        if live := registry_of(done).alias(CHAMPION):
            assert registry_of(done).tags(live)["outcome"] == "pass"
            for part, source in (("delta", done.paths.delta), ("pipeline", Path("exported"))):
                stored = Path(mlflow_client.local(f"models:/deleatur/{live}", part))
                names = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
                assert {p.relative_to(stored) for p in stored.rglob("*") if p.is_file()} == names
                assert all((stored / name).read_bytes() == (source / name).read_bytes() for name in names)

    steps = kill_at_every_step(done, Decision((), register.run, {CHAMPION: "1"}, "rp"), whole)
    assert steps > 15
    record_property("steps", steps)
