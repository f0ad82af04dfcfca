"""Files of a stage are uploaded completely, whatever happens to the process that runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deleatur.errors import ServiceError
from deleatur.storage import remote
from deleatur.storage import sync as module
from deleatur.storage.sync import synced

STATE = Path("out/checkpoints")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first machine."""
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.01)
    monkeypatch.chdir(tmp_path)
    STATE.mkdir(parents=True)
    return tmp_path


def wait_for(path: Path, text: str) -> None:
    for _ in range(2000):
        if path.is_file() and path.read_text() == text:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} was not uploaded")


def test_files_are_uploaded_and_downloaded_on_the_next_machine(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path_factory.mktemp("store")
    (STATE / "before").write_text("was here")
    with synced([STATE, Path("out/samples")], str(store)):
        (STATE / "erase").write_text("step 1")
        wait_for(store / STATE / "erase", "step 1")
        (STATE / ".erase.1.partial").write_text("half")
        (STATE / "erase").write_text("step 20")
        wait_for(store / STATE / "erase", "step 20")
    assert not (store / STATE / "before").exists(), "files that existed before are not uploaded"
    assert {p.name for p in (store / STATE).iterdir()} == {"erase"}
    monkeypatch.chdir(tmp_path_factory.mktemp("second"))
    with synced([STATE], str(store)):
        assert (STATE / "erase").read_text() == "step 20"


def test_the_newest_files_are_uploaded_when_the_block_raises(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_INTERVAL", 1000.0)

    def interrupted() -> None:
        with synced([STATE], str(tmp_path / "store")):
            (STATE / "erase").write_text("saved on request")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "store" / STATE / "erase").read_text() == "saved on request"


def test_a_failed_upload_stops_nothing_and_is_retried(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: list[str] = []
    plain = remote.upload

    def upload(file: Path, address: str) -> None:
        if len(problems) < 2:
            raise ServiceError("no answer")
        plain(file, address)

    monkeypatch.setattr(remote, "upload", upload)
    with synced([STATE], str(tmp_path / "store"), problems.append):
        (STATE / "erase").write_text("step 1")
        wait_for(tmp_path / "store" / STATE / "erase", "step 1")
    assert problems == ["no answer"] * 2


def test_killed_at_any_moment_it_leaves_complete_files(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code = (
        "from pathlib import Path; from deleatur.storage import files, sync; sync.POLL_INTERVAL = 0\n"
        f"with sync.synced([Path({str(STATE)!r})], {str(store)!r}):\n"
        "    for i in range(100_000):\n"
        f"        files.write_lines(Path({str(STATE)!r}) / 'erase', [f'{{i:09d}}'] * 20_000)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    while not (store / STATE / "erase").is_file():
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # anywhere
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    lines = (store / STATE / "erase").read_text().splitlines()
    assert len(lines) == 20_000
    assert len(set(lines)) == 1
