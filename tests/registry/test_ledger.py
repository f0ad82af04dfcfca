"""The ledger's hash chain: torn lines, changed lines, concurrent writers."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from deleatur.errors import DataError
from deleatur.registry import ledger
from deleatur.registry.ledger import GENESIS, LedgerPosition, Subject


def append_promotions(path: Path, *versions: str) -> None:
    with ledger.locked(path) as writer:
        for version in versions:
            subject = Subject(version, "d" * 64, "e" * 64)
            writer.append("promotion", subject, "Ada", "„gut“,\nso far", {"champion": version})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "shared" / "ledger.jsonl"
    append_promotions(place, "1", "2")
    append_promotions(place, "3")
    return place


def test_each_line_holds_sha256_of_the_previous(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    plain = [json.loads(line) for line in lines]
    assert [entry["previous"] for entry in plain] == [
        GENESIS.hash,
        *(hashlib.sha256(x).hexdigest() for x in lines[:-1]),
    ]
    known = ledger.read(path)
    assert (known.problem, known.torn_bytes) == ("", 0)
    assert [(e.number, e.version, e.reason) for e in known.entries] == [
        (i, str(i), "„gut“,\nso far") for i in (1, 2, 3)
    ]
    assert known.aliases == {"champion": "3"}
    assert (
        known.head == LedgerPosition(3, hashlib.sha256(lines[-1]).hexdigest()) == LedgerPosition.parse(str(known.head))
    )


def _changed(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b"Ada", b"Eve"), *lines[1:]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_changed, "line 2"),
        (lambda lines: lines[1:], "line 1"),
        (lambda lines: [lines[0], lines[2]], "line 2"),
        (lambda lines: [lines[1], lines[0], lines[2]], "line 1"),
        (lambda lines: [lines[0], b"{}", *lines[1:]], "line 2"),
        (lambda lines: [lines[0], lines[1][:-9], lines[2]], "line 2"),
        (lambda lines: [lines[0], b"\xff", lines[2]], "line 2"),
    ],
)
def test_changed_ledger_is_detected_and_not_appended_to(
    path: Path, change: Callable[[list[bytes]], list[bytes]], problem: str
) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in change(path.read_bytes().splitlines())))
    before = path.read_bytes()
    assert problem in ledger.read(path).problem
    with pytest.raises(DataError, match=problem) as refused:
        append_promotions(path, "4")
    assert "--adopt" in refused.value.hint
    assert path.read_bytes() == before


def test_missing_or_changed_last_line_is_detected_by_registry_position(path: Path) -> None:
    mark, lines = ledger.read(path).head, path.read_bytes().splitlines(keepends=True)
    assert ledger.read(path).entries_after(mark) == ()
    assert [e.version for e in ledger.read(path).entries_after(ledger.read(path).positions[0])] == ["2", "3"]
    with pytest.raises(DataError, match="applied none of the 3 lines"):
        ledger.read(path).entries_after(None)
    for forged in (lines[:2], [*lines[:2], lines[2].replace(b"Ada", b"Eve")], []):
        path.write_bytes(b"".join(forged))
        assert ledger.read(path).problem == ""
        with pytest.raises(DataError, match="removed or changed"):
            ledger.read(path).entries_after(mark)


@pytest.mark.parametrize("left", [1, 40, -2])
def test_line_torn_by_a_kill_decides_nothing_and_is_set_aside(
    path: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = path.read_bytes()
    child = os.fork()
    if child == 0:

        def torn(file: ledger.FileIO, data: bytes) -> None:
            file.write(data[:left])
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(ledger, "_write_all", torn)
        append_promotions(path, "4")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    torn = path.read_bytes()
    assert torn.startswith(complete)
    assert ledger.read(path).torn_bytes == len(torn) - len(complete) > 0
    assert [e.version for e in ledger.read(path).entries] == ["1", "2", "3"]
    with ledger.locked(path):
        pass
    assert path.read_bytes() == torn, "a lock alone changes nothing"
    append_promotions(path, "5")  # the lock ended with the process that held it
    assert [e.version for e in ledger.read(path).entries] == ["1", "2", "3", "5"]
    assert (ledger.read(path).torn_bytes, ledger.read(path).problem) == (0, "")
    assert path.read_bytes().startswith(complete)
    [copy] = path.parent.glob("ledger.jsonl.*")
    assert complete + copy.read_bytes() == torn


def test_missing_last_newline_loses_no_decision(path: Path) -> None:
    complete, recorded = path.read_bytes(), ledger.read(path)
    path.write_bytes(complete[:-1])
    assert ledger.read(path).entries == recorded.entries
    assert ledger.read(path).head == recorded.head
    with ledger.locked(path):
        pass
    assert path.read_bytes() == complete[:-1], "a lock alone changes nothing"
    append_promotions(path, "4", "5")
    assert path.read_bytes().startswith(complete)
    assert [e.version for e in ledger.read(path).entries] == ["1", "2", "3", "4", "5"]
    assert (ledger.read(path).problem, list(path.parent.glob("ledger.jsonl.*"))) == ("", [])


def test_restart_that_is_abandoned_keeps_the_ledger(path: Path) -> None:
    broken = path.read_bytes().replace(b"Ada", b"Eve", 1)
    path.write_bytes(broken)
    with ledger.locked(path) as writer:
        writer.restart(GENESIS)
    assert path.read_bytes() == broken


def test_concurrent_writers_are_serialised(path: Path) -> None:
    children = []
    for letter in "abcd":
        if (child := os.fork()) == 0:
            for i in range(10):
                append_promotions(path, f"{letter}{i}")
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    known = ledger.read(path)
    assert (known.problem, len(known.entries)) == ("", 43)
    assert len({e.version for e in known.entries}) == 43


def test_restarted_ledger_continues_behind_the_registry_position(path: Path) -> None:
    lost, mark = path.read_bytes(), ledger.read(path).head
    path.write_bytes(lost.replace(b"Ada", b"Eve", 1))
    with ledger.locked(path) as writer:
        writer.restart(mark)
        writer.append("adoption", Subject("3", "", ""), "Ada", "lost", {"champion": "3"})
    known = ledger.read(path)
    assert (known.problem, known.start, known.head.number) == ("", mark, 4)
    assert [e.event for e in known.entries_after(mark)] == ["adoption"]
    [copy] = path.parent.glob("ledger.jsonl.*")
    assert copy.read_bytes() == lost.replace(b"Ada", b"Eve", 1), "the broken ledger is kept"
