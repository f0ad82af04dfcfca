"""Stages as child processes of DVC: whether they ran, progress, errors, and no process left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import finished
import psutil
import pytest
import yaml
from child_processes import stage_processes

from deleatur import stages
from deleatur.config.settings import Settings
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


def exit_script(code: int, message: str = "") -> str:
    return f"import sys; sys.stderr.write({message!r}); sys.exit({code})"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project of scripts, in git."""
    root = tmp_path_factory.mktemp("project")
    scripts = {
        "work": WORK,
        "sleep": SLEEP,
        "watched": WATCHED,
        "wrong": exit_script(
            2, "SettingsError: params.yaml has 1 problem(s):\n  lr: too large\nNext: deleatur check\n"
        ),
        "missing": exit_script(3, "DataError: no file\n"),
        "other": exit_script(4, "ModelError: not this one\n"),
        "refused": exit_script(5, "ErasureRefused: it did nothing\n"),
        "stopped": exit_script(75, "Interrupted: saved at step 3\n"),
        "broken": exit_script(1, "Traceback\nKeyError: 'x'\n"),
    }
    for name, code in scripts.items():
        (root / f"{name}.py").write_text(code)
    (root / "given").write_text("1")
    stages = {name: {"cmd": f"{sys.executable} {name}.py"} for name in scripts}
    stages["work"] |= {"deps": ["given"], "outs": ["made"]}
    stages["ingest"] = {"cmd": "true", "deps": ["feedback"]}
    stages["lost"] = {"cmd": "true", "deps": ["nowhere"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    finished.git(root, "init", "--quiet")
    finished.dvc(root, "init", "--quiet")
    return root


@pytest.fixture
def root(project: Path, tmp_path: Path) -> Path:
    return shutil.copytree(project, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("reproduce", [dvc.reproduce, lambda stage, root: dvc.reproduce_all([stage], root)])
def test_feedback_that_nobody_gave_is_an_empty_folder(root: Path, reproduce: Callable[[str, Path], object]) -> None:
    assert not (root / "feedback").exists()
    reproduce("ingest", root)
    assert list((root / "feedback").iterdir()) == []
    assert "ingest" not in dvc.status(root, "ingest")


def test_a_stage_runs_once_and_reports_its_progress(root: Path) -> None:
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
    ("stage", "error_type", "message"),
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
def test_the_exit_code_of_a_stage_becomes_its_error(
    root: Path, stage: str, error_type: type[Exception], message: str
) -> None:
    with pytest.raises(error_type, match=message) as raised:
        dvc.reproduce(stage, root)
    assert type(raised.value) is error_type
    assert stage in str(raised.value)
    if stage == "wrong":
        assert raised.value.hint == "deleatur check"  # type: ignore[attr-defined]


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_parent_ends_the_stage_after_it_has_saved(root: Path, signum: signal.Signals) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # ignored in the background
        "from pathlib import Path; from deleatur.storage import dvc; dvc.reproduce('sleep', Path())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    stage = int(wait_for(root / "pid"))
    parent.send_signal(signum)
    parent.wait(30)
    assert (root / "saved").read_text() == "state"
    with pytest.raises(ProcessLookupError):
        os.kill(stage, 0)


@pytest.mark.usefixtures("cold")
def test_a_stage_whose_parent_is_killed_saves_and_ends(root: Path) -> None:
    """An orphaned stage would occupy the GPU that its successor is started on."""
    code = "from pathlib import Path; from deleatur.storage import dvc; dvc.reproduce('watched', Path())"
    env = {**os.environ, "TMPDIR": str(root)}  # the killed process leaves its temporary files
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL, env=env)
    stage = int(wait_for(root / "pid"))
    assert not (root / "saved").exists()
    parent.kill()
    parent.wait(30)
    assert wait_for(root / "saved") == "state"
    for _ in range(600):
        if not psutil.pid_exists(stage) or psutil.Process(stage).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError("still running")


@pytest.mark.usefixtures("cold")
@pytest.mark.slow
def test_a_stage_interrupted_under_dvc_resumes(shared: Path, tmp_path: Path) -> None:
    """First the parent gets the signal and passes it on; then the stage alone; then it runs to its end."""
    uninterrupted, root = tmp_path / "uninterrupted", tmp_path / "interrupted"
    for project in (uninterrupted, root):
        finished.copy(shared, project)
        params = yaml.safe_load((project / "params.yaml").read_text())
        params["erase"]["sdd"]["training"] |= {"iterations": 60, "eval_every": 0}
        (project / "params.yaml").write_text(yaml.safe_dump(params))
    with chdir(uninterrupted):
        stages.run("erase", Settings.load())

    code = (
        "from pathlib import Path; from deleatur.storage import dvc;"
        "dvc.reproduce('erase', Path(), print, lambda p: Path('at').write_text(str(p.done)))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    while not (root / "at").is_file():
        assert parent.poll() is None
        time.sleep(0.01)
    parent.terminate()
    output, _ = parent.communicate(timeout=600)
    assert parent.returncode == Interrupted.exit_code
    assert "saved a checkpoint after step" in output, "the last lines of the stage are forwarded"

    done: list[int] = []

    def stop_the_stage(progress: StageProgress) -> None:
        done.append(progress.done)
        for stage in stage_processes("erase", os.getpid()) if len(done) == 1 else ():  # a second one would not wait
            stage.terminate()

    with pytest.raises(Interrupted, match="saved a checkpoint after step"):
        dvc.reproduce("erase", root, on_progress=stop_the_stage)
    first = done[0]
    done.clear()
    assert dvc.reproduce("erase", root, on_progress=lambda p: done.append(p.done))
    assert 1 <= first <= done[0] < 60
    assert done[-1] == 60
    for path in (uninterrupted / "out/delta").iterdir():
        assert path.read_bytes() == (root / "out/delta" / path.name).read_bytes(), path.name


def test_a_failed_stage_leaves_the_outputs_of_its_last_success(root: Path) -> None:
    assert dvc.reproduce("work", root)
    (root / "given").unlink()
    (root / "given").mkdir()  # which the script cannot read
    with pytest.raises(ServiceError, match="exit code 1"):
        dvc.reproduce("work", root)
    assert (root / "made").read_text() == "1"
    assert "work" in dvc.status(root), "it is still out of date"


def wait_for(path: Path) -> str:
    for _ in range(600):
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


def test_the_current_commit_and_whether_it_is_dirty(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert git.current_commit(tmp_path_factory.mktemp("bare")).hash is None
    assert git.current_commit(root).hash is None, "no commit yet"
    finished.git(root, "add", "--all")
    finished.git(root, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", "all")
    clean = git.current_commit(root)
    assert clean.hash is not None
    assert not clean.dirty
    (root / "given").write_text("3")
    assert git.current_commit(root) == git.Commit(clean.hash, True)


def test_without_a_dvc_repository_nothing_is_stale(tmp_path: Path) -> None:
    assert dvc.status(tmp_path) == {}


@pytest.fixture
def clones(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A project and its clone, with a DVC remote that both reach."""
    place = tmp_path_factory.mktemp("two")
    finished.dvc(root, "remote", "add", "--quiet", "--default", "store", str(place / "store"))
    (root / ".gitignore").write_text("/made\n")
    finished.git(root, "add", "--all")
    finished.git(root, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", "all")
    assert git.is_pushed(root), "without a remote there is nothing to push"
    commit = git.current_commit(root).hash
    assert commit
    git.clone_at_commit(root, commit, place / "clone")
    return root, place / "clone"


def test_a_stage_reproduced_in_one_checkout_is_reproduced_in_its_clone(clones: tuple[Path, Path]) -> None:
    original, copy = clones
    assert dvc.reproduce("work", original)
    dvc_remote.push(original, "work")
    with pytest.raises(DataError, match="no entry for the stage other"):
        dvc_remote.lock_entry("other", original)
    assert dvc.status(copy, "work")
    dvc_remote.set_lock_entry("work", dvc_remote.lock_entry("work", original), copy)
    assert dvc.status(copy, "work"), "its output is not downloaded yet"
    dvc_remote.pull(copy, "work")
    assert dvc.status(copy, "work") == {}
    assert (copy / "made").read_text() == "1"
    assert (original / "dvc.lock").read_bytes() == (copy / "dvc.lock").read_bytes()

    (copy / "dvc.lock").unlink()
    (copy / "made").unlink()
    assert not dvc.reproduce("work", copy, options=dvc.PULL), "the run cache was shared"
    assert (copy / "made").read_text() == "1"

    (original / "given").write_text("2")
    assert dvc.reproduce("work", original)
    text = (copy / "dvc.lock").read_text() + '  zebra:\n    cmd: "true"\n'
    (copy / "dvc.lock").write_text(text)
    dvc_remote.set_lock_entry("work", dvc_remote.lock_entry("work", original), copy)
    assert (copy / "dvc.lock").read_text().endswith('  zebra:\n    cmd: "true"\n'), "other stages stay as they are"
    assert dvc_remote.lock_entry("work", copy) == dvc_remote.lock_entry("work", original)


def test_another_checkout_can_use_another_remote(clones: tuple[Path, Path], tmp_path: Path) -> None:
    original, copy = clones
    dvc_remote.use_remote(copy, str(tmp_path / "other"))
    assert dvc_remote.remote_url(copy) == str(tmp_path / "other")
    assert git.current_commit(copy) == git.current_commit(original), "the commit has not changed"
    finished.dvc(original, "remote", "remove", "store")
    with pytest.raises(SettingsError, match="expected a DVC remote"):
        dvc_remote.remote_url(original)
    with pytest.raises(ServiceError, match="dvc push failed"):
        dvc_remote.push(original, "work")


def test_uncommitted_and_unpushed_changes_are_detected(clones: tuple[Path, Path]) -> None:
    original, copy = clones
    assert git.origin_url(original) == str(original)
    assert git.origin_url(copy) == str(original)
    assert git.is_pushed(copy)
    (copy / "work.py").write_text("changed")
    (copy / "new.py").write_text("new")
    assert git.uncommitted_files(copy, "work.py", "new.py", "given") == ["work.py", "new.py"]
    finished.git(copy, "add", "--all")
    finished.git(copy, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", "mine")
    assert not git.is_pushed(copy)
    with pytest.raises(DataError, match="cannot be checked out"):
        git.clone_at_commit(original, "0" * 40, copy / "deeper")


def test_garbage_collection_keeps_what_a_commit_or_a_lock_needs(clones: tuple[Path, Path]) -> None:
    root, _ = clones
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


def test_a_file_can_be_read_as_of_the_last_run_of_a_stage(root: Path) -> None:
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


def test_a_child_runs_the_code_of_its_checkout(tmp_path: Path) -> None:
    (tmp_path / "src" / "deleatur").mkdir(parents=True)
    assert processes.environment(tmp_path)["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "src")
    assert processes.environment(tmp_path / "src").get("PYTHONPATH") == os.environ.get("PYTHONPATH")
