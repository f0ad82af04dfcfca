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
import psutil
import pytest
import yaml
from killed import running

from deleatur.errors import DataError, ErasureRefused, Interrupted, ModelError, ServiceError, SettingsError
from deleatur.storage import dvc, dvc_remote, git, processes
from deleatur.storage.processes import StageProgress

WORK = """
import json, os, pathlib, sys
for done in (1, 2):
    with open(os.environ["DELEATUR_PROGRESS"], "a") as f:
        f.write(json.dumps({"task": "work", "done": done, "total": 2, "note": ""}) + "\\n")
print("working")
pathlib.Path("made").write_text(pathlib.Path("given").read_text())
"""

WATCHED = """
import pathlib, os, time, types
from deleatur import stages
def run(settings):
    pathlib.Path("pid").write_text(str(os.getpid()))
    try:
        time.sleep(120)
    finally:
        pathlib.Path("saved").write_text("state")
stages.import_module = lambda name: types.SimpleNamespace(run=run)
stages.run("erase", types.SimpleNamespace(paths=types.SimpleNamespace(checkpoints=pathlib.Path("state"))))
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
        "watched": WATCHED,
        "wrong": ends(2, "SettingsError: params.yaml has 1 problem(s):\n  lr: too large\nNext: deleatur check\n"),
        "missing": ends(3, "DataError: no file\n"),
        "other": ends(4, "ModelError: not this one\n"),
        "refused": ends(5, "ErasureRefused: it did nothing\n"),
        "stopped": ends(75, "Interrupted: saved at step 3\n"),
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
    progress: list[StageProgress] = []
    assert dvc.lock_digest(root) is None
    assert "work" in dvc.status(root)
    assert dvc.reproduce("work", root, lines.append, progress.append)
    assert progress == [StageProgress("work", 1, 2, ""), StageProgress("work", 2, 2, "")]
    assert "working" in lines
    assert "work" not in dvc.status(root)
    first = dvc.lock_digest(root)
    assert not dvc.reproduce("work", root)
    assert dvc.lock_digest(root) == first
    (root / "given").write_text("2")
    assert dvc.reproduce("work", root)
    assert dvc.lock_digest(root) != first


@pytest.mark.parametrize(
    ("stage", "kind", "says"),
    [
        ("wrong", SettingsError, "lr: too large"),
        ("missing", DataError, "no file"),
        ("other", ModelError, "not this one"),
        ("refused", ErasureRefused, "it did nothing"),
        ("stopped", Interrupted, "saved at step 3"),
        ("broken", ServiceError, "exit code 1"),
        ("lost", DataError, "nowhere"),
    ],
)
def test_what_a_stage_ends_with_is_what_is_raised(root: Path, stage: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as raised:
        dvc.reproduce(stage, root)
    assert type(raised.value) is kind
    assert stage in str(raised.value)
    if stage == "wrong":
        assert raised.value.hint == "deleatur check"  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_whoever_stops_us_stops_the_stage_after_it_has_saved(root: Path, how: signal.Signals) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # ignored in the background
        "from pathlib import Path; from deleatur.storage import dvc; dvc.reproduce('sleep', Path())"
    )
    us = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    stage = int(awaited(root / "pid"))
    us.send_signal(how)
    us.wait(30)
    assert (root / "saved").read_text() == "state"
    with pytest.raises(ProcessLookupError):
        os.kill(stage, 0)


def test_a_stage_whose_follower_is_killed_saves_and_ends(root: Path) -> None:
    """Nobody would stop it, and it would hold the GPU that another one is started on."""
    code = "from pathlib import Path; from deleatur.storage import dvc; dvc.reproduce('watched', Path())"
    us = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    stage = int(awaited(root / "pid"))
    assert not (root / "saved").exists()
    us.kill()
    us.wait(30)
    assert awaited(root / "saved") == "state"
    for _ in range(600):
        if not psutil.pid_exists(stage) or psutil.Process(stage).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError("it still runs")


@pytest.mark.slow
def test_a_stage_that_was_stopped_under_dvc_goes_on_where_it_was(shared: Path, tmp_path: Path) -> None:
    """First we are asked to stop, and the stage through us; then the stage alone; then nobody."""
    whole, root = tmp_path / "whole", tmp_path / "stopped"
    for place in (whole, root):
        finished.copy(shared, place)
        params = yaml.safe_load((place / "params.yaml").read_text())
        params["erase"]["sdd"]["training"] |= {"iterations": 60, "eval_every": 0}
        (place / "params.yaml").write_text(yaml.safe_dump(params))
    assert dvc.reproduce("erase", whole)

    code = (
        "from pathlib import Path; from deleatur.storage import dvc;"
        "dvc.reproduce('erase', Path(), print, lambda p: Path('at').write_text(str(p.done)))"
    )
    us = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    while not (root / "at").is_file():
        assert us.poll() is None
        time.sleep(0.01)
    us.terminate()
    said, _ = us.communicate(timeout=120)
    assert us.returncode == Interrupted.exit_code
    assert "saved after step" in said, "the stage's last words are heard"

    done: list[int] = []

    def stop_the_stage(progress: StageProgress) -> None:
        done.append(progress.done)
        for stage in running("erase", os.getpid()) if len(done) == 1 else ():  # a second one would not wait
            stage.terminate()

    with pytest.raises(Interrupted, match="saved after step"):
        dvc.reproduce("erase", root, on_progress=stop_the_stage)
    first = done[0]
    done.clear()
    assert dvc.reproduce("erase", root, on_progress=lambda p: done.append(p.done))
    assert 1 <= first <= done[0] < 60
    assert done[-1] == 60
    for path in (whole / "out/delta").iterdir():
        assert path.read_bytes() == (root / "out/delta" / path.name).read_bytes(), path.name


def awaited(path: Path) -> str:
    for _ in range(600):
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


def test_which_code_it_was(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert git.current_commit(tmp_path_factory.mktemp("bare")).hash is None
    assert git.current_commit(root).hash is None, "no commit yet"
    finished.git(root, "add", "--all")
    finished.git(root, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", "all")
    clean = git.current_commit(root)
    assert clean.hash is not None
    assert not clean.dirty
    (root / "given").write_text("3")
    assert git.current_commit(root) == git.Commit(clean.hash, True)


def test_where_there_is_no_dvc_nothing_is_stale(tmp_path: Path) -> None:
    assert dvc.status(tmp_path) == {}


@pytest.fixture
def two(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A project whose stage `work` has run, and a clone of it; a store that both reach."""
    place = tmp_path_factory.mktemp("two")
    finished.dvc(root, "remote", "add", "--quiet", "--default", "store", str(place / "store"))
    (root / ".gitignore").write_text("/made\n")
    finished.git(root, "add", "--all")
    finished.git(root, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", "all")
    assert git.is_pushed(root), "nobody clones it"
    commit = git.current_commit(root).hash
    assert commit
    git.clone_at_commit(root, commit, place / "clone")
    return root, place / "clone"


def test_a_stage_that_was_done_here_is_done_there(two: tuple[Path, Path]) -> None:
    here, there = two
    assert dvc.reproduce("work", here)
    dvc_remote.push(here, "work")
    with pytest.raises(DataError, match="no entry for the stage other"):
        dvc_remote.lock_entry("other", here)
    assert dvc.status(there, "work")
    dvc_remote.set_lock_entry("work", dvc_remote.lock_entry("work", here), there)
    assert dvc.status(there, "work"), "its product is not there yet"
    dvc_remote.pull(there, "work")
    assert dvc.status(there, "work") == {}
    assert (there / "made").read_text() == "1"
    assert (here / "dvc.lock").read_bytes() == (there / "dvc.lock").read_bytes()

    (there / "dvc.lock").unlink()
    (there / "made").unlink()
    assert not dvc.reproduce("work", there, options=dvc.PULL), "the memory of what it was made from came along"
    assert (there / "made").read_text() == "1"

    (here / "given").write_text("2")
    assert dvc.reproduce("work", here)
    text = (there / "dvc.lock").read_text() + '  zebra:\n    cmd: "true"\n'
    (there / "dvc.lock").write_text(text)
    dvc_remote.set_lock_entry("work", dvc_remote.lock_entry("work", here), there)
    assert (there / "dvc.lock").read_text().endswith('  zebra:\n    cmd: "true"\n'), "other stages stay as they are"
    assert dvc_remote.lock_entry("work", there) == dvc_remote.lock_entry("work", here)


def test_another_machine_takes_what_lies_at_another_place(two: tuple[Path, Path], tmp_path: Path) -> None:
    here, there = two
    dvc_remote.use_remote(there, str(tmp_path / "other"))
    assert dvc_remote.remote_url(there) == str(tmp_path / "other")
    assert git.current_commit(there) == git.current_commit(here), "the commit has not changed"
    finished.dvc(here, "remote", "remove", "store")
    with pytest.raises(SettingsError, match="expected a DVC remote"):
        dvc_remote.remote_url(here)
    with pytest.raises(ServiceError, match="dvc push failed"):
        dvc_remote.push(here, "work")


def test_what_others_would_not_get_is_known(two: tuple[Path, Path]) -> None:
    here, there = two
    assert git.origin_url(here) == str(here)
    assert git.origin_url(there) == str(here)
    assert git.is_pushed(there)
    (there / "work.py").write_text("changed")
    (there / "new.py").write_text("new")
    assert git.uncommitted_files(there, "work.py", "new.py", "given") == ["work.py", "new.py"]
    finished.git(there, "add", "--all")
    finished.git(there, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", "mine")
    assert not git.is_pushed(there)
    with pytest.raises(DataError, match="cannot be checked out"):
        git.clone_at_commit(here, "0" * 40, there / "deeper")


def test_what_no_commit_and_no_lock_needs_is_cleared_away(two: tuple[Path, Path]) -> None:
    root, _ = two
    assert dvc.reproduce("work", root)
    first = (root / "dvc.lock").read_text()
    (root / "given").write_text("2")
    assert dvc.reproduce("work", root)
    dvc_remote.push(root, "work")
    for dry in (True, False):
        assert "Removed 1 objects from repo cache." not in dvc_remote.collect_garbage(
            root, [first], dry_run=dry, remote=False
        )
    assert "Removed 1 objects from repo cache." in dvc_remote.collect_garbage(root, [], dry_run=True, remote=False)
    assert "Removed 1 objects from repo cache." in dvc_remote.collect_garbage(root, [], dry_run=False, remote=True)
    assert "Removed 1 objects from repo cache." not in dvc_remote.collect_garbage(root, [], dry_run=True, remote=True)
    assert dvc.status(root, "work") == {}


def test_a_folder_is_known_as_a_stage_last_read_it(root: Path) -> None:
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    stages["work"]["deps"] = ["given", "read"]
    stages["writes"] = {"cmd": "mkdir -p read && cp given read/file", "deps": ["given"], "outs": ["read"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    assert dvc_remote.file_at_last_run("work", Path("read"), "file", root) is None
    dvc.reproduce("writes", root)
    dvc.reproduce("work", root)
    (root / "given").write_text("2")
    dvc.reproduce("writes", root)
    assert (root / "read/file").read_text() == "2"
    assert dvc_remote.file_at_last_run("work", Path("read"), "file", root) == b"1"
    assert dvc_remote.file_at_last_run("work", Path("read"), "nothing", root) is None


def test_the_code_that_lies_there_is_the_code_that_runs(tmp_path: Path) -> None:
    (tmp_path / "src" / "deleatur").mkdir(parents=True)
    assert processes.environment(tmp_path)["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "src")
    assert processes.environment(tmp_path / "src").get("PYTHONPATH") == os.environ.get("PYTHONPATH")
