"""Stages as child processes of DVC: what ran, how far it is, what went wrong, and nobody left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import finished
import pytest
import yaml
from killed import running

from deleatur.errors import ContinueMe, DataError, ErasureRefused, ModelError, ServiceError, SettingsError
from deleatur.io import versions
from deleatur.io.versions import Progress

WORK = """
import json, os, pathlib, sys
for done in (1, 2):
    with open(os.environ["DELEATUR_PROGRESS"], "a") as f:
        f.write(json.dumps({"what": "work", "done": done, "total": 2, "note": ""}) + "\\n")
print("working")
pathlib.Path("made").write_text(pathlib.Path("given").read_text())
"""

SLEEP = """
import pathlib, signal, sys, time, os
def save(*_):
    pathlib.Path("saved").write_text("state")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(120)
"""


def ends(code: int, says: str = "") -> str:
    return f"import sys; sys.stderr.write({says!r}); sys.exit({code})"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project of scripts, in git."""
    root = tmp_path_factory.mktemp("project")
    scripts = {
        "work": WORK,
        "sleep": SLEEP,
        "wrong": ends(2, "SettingsError: params.yaml has 1 problem(s):\n  lr: too large\nNext: deleatur check\n"),
        "missing": ends(3, "DataError: no file\n"),
        "other": ends(4, "ModelError: not this one\n"),
        "refused": ends(5, "ErasureRefused: it did nothing\n"),
        "stopped": ends(75, "ContinueMe: saved at step 3\n"),
        "broken": ends(1, "Traceback\nKeyError: 'x'\n"),
    }
    for name, code in scripts.items():
        (root / f"{name}.py").write_text(code)
    (root / "given").write_text("1")
    stages = {name: {"cmd": f"{sys.executable} {name}.py"} for name in scripts}
    stages["work"] |= {"deps": ["given"], "outs": ["made"]}
    stages["lost"] = {"cmd": "true", "deps": ["nowhere"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    finished.git(root, "init", "--quiet")
    finished.dvc(root, "init", "--quiet")
    return root


@pytest.fixture
def root(project: Path, tmp_path: Path) -> Path:
    return shutil.copytree(project, tmp_path, dirs_exist_ok=True)


def test_a_stage_runs_once_and_tells_how_far_it_is(root: Path) -> None:
    lines: list[str] = []
    progress: list[Progress] = []
    assert versions.lock_digest(root) is None
    assert "work" in versions.status(root)
    assert versions.reproduce("work", root, lines.append, progress.append)
    assert progress == [Progress("work", 1, 2, ""), Progress("work", 2, 2, "")]
    assert "working" in lines
    assert "work" not in versions.status(root)
    first = versions.lock_digest(root)
    assert not versions.reproduce("work", root)
    assert versions.lock_digest(root) == first
    (root / "given").write_text("2")
    assert versions.reproduce("work", root)
    assert versions.lock_digest(root) != first


@pytest.mark.parametrize(
    ("stage", "kind", "says"),
    [
        ("wrong", SettingsError, "lr: too large"),
        ("missing", DataError, "no file"),
        ("other", ModelError, "not this one"),
        ("refused", ErasureRefused, "it did nothing"),
        ("stopped", ContinueMe, "saved at step 3"),
        ("broken", ServiceError, "exit code 1"),
        ("lost", DataError, "nowhere"),
    ],
)
def test_what_a_stage_ends_with_is_what_is_raised(root: Path, stage: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as raised:
        versions.reproduce(stage, root)
    assert type(raised.value) is kind
    assert stage in str(raised.value)
    if stage == "wrong":
        assert raised.value.hint == "deleatur check"  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_whoever_stops_us_stops_the_stage_after_it_has_saved(root: Path, how: signal.Signals) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # ignored in the background
        "from pathlib import Path; from deleatur.io import versions; versions.reproduce('sleep', Path())"
    )
    us = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    stage = int(awaited(root / "pid"))
    us.send_signal(how)
    us.wait(30)
    assert (root / "saved").read_text() == "state"
    with pytest.raises(ProcessLookupError):
        os.kill(stage, 0)


@pytest.mark.slow
def test_a_stage_that_was_stopped_under_dvc_goes_on_where_it_was(shared: Path, tmp_path: Path) -> None:
    """First we are asked to stop, and the stage through us; then the stage alone; then nobody."""
    whole, root = tmp_path / "whole", tmp_path / "stopped"
    for place in (whole, root):
        finished.copy(shared, place)
        params = yaml.safe_load((place / "params.yaml").read_text())
        params["erase"]["sdd"]["loop"] |= {"iterations": 120, "check_every": 0}
        (place / "params.yaml").write_text(yaml.safe_dump(params))
    assert versions.reproduce("erase", whole)

    code = (
        "from pathlib import Path; from deleatur.io import versions;"
        "versions.reproduce('erase', Path(), print, lambda p: Path('at').write_text(str(p.done)))"
    )
    us = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    while not (root / "at").is_file():
        assert us.poll() is None
        time.sleep(0.01)
    us.terminate()
    said, _ = us.communicate(timeout=120)
    assert us.returncode == ContinueMe.exit_code
    assert "saved after step" in said, "the stage's last words are heard"

    done: list[int] = []

    def stop_the_stage(progress: Progress) -> None:
        done.append(progress.done)
        for stage in running("erase", os.getpid()) if len(done) == 1 else ():  # a second one would not wait
            stage.terminate()

    with pytest.raises(ContinueMe, match="saved after step"):
        versions.reproduce("erase", root, on_progress=stop_the_stage)
    first = done[0]
    done.clear()
    assert versions.reproduce("erase", root, on_progress=lambda p: done.append(p.done))
    assert 1 <= first <= done[0] < 120
    assert done[-1] == 120
    for path in (whole / "out/delta").iterdir():
        assert path.read_bytes() == (root / "out/delta" / path.name).read_bytes(), path.name


def awaited(path: Path) -> str:
    for _ in range(600):
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


def test_which_code_it_was(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert versions.commit(tmp_path_factory.mktemp("bare")).hash is None
    assert versions.commit(root).hash is None, "no commit yet"
    finished.git(root, "add", "--all")
    finished.git(root, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", "all")
    clean = versions.commit(root)
    assert clean.hash is not None
    assert not clean.dirty
    (root / "given").write_text("3")
    assert versions.commit(root) == versions.Commit(clean.hash, True)


def test_where_there_is_no_dvc_nothing_is_stale(tmp_path: Path) -> None:
    assert versions.status(tmp_path) == {}
