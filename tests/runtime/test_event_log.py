"""The event log: entries of runs that succeeded, were interrupted, failed or were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deleatur.errors import DataError, Interrupted
from deleatur.runtime import event_log


def test_a_run_has_its_outcome(tmp_path: Path) -> None:
    with event_log.recorded(tmp_path / "state", "gate"):
        pass
    for error in (Interrupted("SIGTERM"), DataError("missing")):
        with pytest.raises(type(error)), event_log.recorded(tmp_path / "state", "gate"):
            raise error
    lines = event_log.read(tmp_path / "state")
    assert [line.kind for line in lines] == ["started", "done", "started", "interrupted", "started", "failed"]
    assert all(line.stage == "gate" and line.seconds >= 0 for line in lines)
    assert lines == sorted(lines, key=lambda line: line.time)


def test_a_killed_run_has_a_start_and_no_end(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from deleatur.runtime import event_log\n"
        f"with event_log.recorded(Path({str(tmp_path)!r}), 'erase'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == -signal.SIGKILL
    assert [line.kind for line in event_log.read(tmp_path)] == ["started"]


def test_unreadable_lines_are_skipped(tmp_path: Path) -> None:
    event_log.append(tmp_path, "erase", "started")
    with (tmp_path / event_log.FILE).open("a") as file:
        file.write('{"time": 1.0, "sta\n{"time": 2.0, "another": "version"}\n')
    event_log.append(tmp_path, "erase", "resumed", lost=7)
    assert [(line.kind, line.lost) for line in event_log.read(tmp_path)] == [("started", 0), ("resumed", 7)]


def test_before_the_first_run_it_is_empty(tmp_path: Path) -> None:
    assert event_log.read(tmp_path) == []


def test_events_of_another_workspace_are_added_once(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    event_log.append(first, "gate", "started")
    with event_log.recorded(second, "erase"):
        pass
    for _ in range(2):
        event_log.merge(first, event_log.text(second))
    assert [(line.stage, line.kind) for line in event_log.read(first)] == [
        ("gate", "started"),
        ("erase", "started"),
        ("erase", "done"),
    ]
    assert event_log.read(first)[1:] == event_log.read(second)


def test_an_incomplete_line_loses_no_other(tmp_path: Path) -> None:
    event_log.append(tmp_path, "erase", "started")
    with (tmp_path / event_log.FILE).open("a") as file:
        file.write('{"time": 1.0, "stage": "er')
    event_log.append(tmp_path, "erase", "done")
    assert [line.kind for line in event_log.read(tmp_path)] == ["started", "done"]
