"""Lines that hang together: what was torn is cut off, what was changed is found, and two writers take turns."""

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
from deleatur.registry.ledger import NONE, Mark, Subject


def write(path: Path, *versions: str) -> None:
    with ledger.opened(path) as book:
        for version in versions:
            about = Subject(version, "d" * 64, "e" * 64)
            book.append("promotion", about, "Ada", "„gut“,\nso far", {"champion": version})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "shared" / "ledger.jsonl"
    write(place, "1", "2")
    write(place, "3")
    return place


def test_every_line_names_the_one_before_by_its_sha256(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    plain = [json.loads(line) for line in lines]
    assert [entry["previous"] for entry in plain] == [NONE.hash, *(hashlib.sha256(x).hexdigest() for x in lines[:-1])]
    known = ledger.read(path)
    assert (known.problem, known.torn) == ("", 0)
    assert [(e.number, e.version, e.why) for e in known.entries] == [(i, str(i), "„gut“,\nso far") for i in (1, 2, 3)]
    assert known.aliases == {"champion": "3"}
    assert known.head == Mark(3, hashlib.sha256(lines[-1]).hexdigest()) == Mark.read(str(known.head))


def _changed(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b"Ada", b"Eve"), *lines[1:]]


@pytest.mark.parametrize(
    ("change", "where"),
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
def test_a_change_is_found_and_nothing_is_written_behind_it(
    path: Path, change: Callable[[list[bytes]], list[bytes]], where: str
) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in change(path.read_bytes().splitlines())))
    before = path.read_bytes()
    assert where in ledger.read(path).problem
    with pytest.raises(DataError, match=where) as refused:
        write(path, "4")
    assert "--adopt" in refused.value.hint
    assert path.read_bytes() == before


def test_what_no_chain_can_show_the_mark_of_the_registry_does(path: Path) -> None:
    mark, lines = ledger.read(path).head, path.read_bytes().splitlines(keepends=True)
    assert ledger.read(path).after(mark) == ()
    assert [e.version for e in ledger.read(path).after(ledger.read(path).marks[0])] == ["2", "3"]
    assert len(ledger.read(path).after(None)) == 3
    for forged in (lines[:2], [*lines[:2], lines[2].replace(b"Ada", b"Eve")], []):
        path.write_bytes(b"".join(forged))
        assert ledger.read(path).problem == ""
        with pytest.raises(DataError, match="removed or changed"):
            ledger.read(path).after(mark)


@pytest.mark.parametrize("left", [1, 40, -1])
def test_killed_in_the_middle_of_a_line_nothing_was_decided(
    path: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = path.read_bytes()
    child = os.fork()
    if child == 0:

        def torn(file: ledger.FileIO, data: bytes) -> None:
            file.write(data[:left])
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(ledger, "_put", torn)
        write(path, "4")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes().startswith(whole)
    assert ledger.read(path).torn == len(path.read_bytes()) - len(whole) > 0
    assert [e.version for e in ledger.read(path).entries] == ["1", "2", "3"]
    write(path, "5")  # whoever had it in hand died, and with him his lock
    assert [e.version for e in ledger.read(path).entries] == ["1", "2", "3", "5"]
    assert (ledger.read(path).torn, ledger.read(path).problem) == (0, "")
    assert path.read_bytes().startswith(whole)


def test_writers_take_turns(path: Path) -> None:
    children = []
    for letter in "abcd":
        if (child := os.fork()) == 0:
            for i in range(10):
                write(path, f"{letter}{i}")
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    known = ledger.read(path)
    assert (known.problem, len(known.entries)) == ("", 43)
    assert len({e.version for e in known.entries}) == 43


def test_one_that_was_lost_is_gone_on_with_behind_what_the_registry_knows(path: Path) -> None:
    lost, mark = path.read_bytes(), ledger.read(path).head
    path.write_bytes(lost.replace(b"Ada", b"Eve", 1))
    with ledger.opened(path) as book:
        book.restart(mark)
        book.append("adoption", Subject("3", "", ""), "Ada", "lost", {"champion": "3"})
    known = ledger.read(path)
    assert (known.problem, known.base, known.head.number) == ("", mark, 4)
    assert [e.event for e in known.after(mark)] == ["adoption"]
    [aside] = path.parent.glob("ledger.jsonl.*")
    assert aside.read_bytes() == lost.replace(b"Ada", b"Eve", 1), "nothing is thrown away"
