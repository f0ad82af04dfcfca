"""A merge conflict or a syntax error in params.yaml, dvc.yaml or dvc.lock is named with file, line and next command."""

from __future__ import annotations

import shutil
from pathlib import Path

import finished
import pytest

from deleatur.config.settings import Settings
from deleatur.errors import DataError, SettingsError
from deleatur.storage import dvc, dvc_remote, git
from deleatur.storage.processes import run_captured
from deleatur.storage.yaml_files import read_yaml

ROOT = Path(__file__).parents[2]
CONFLICT = "stages:\n<<<<<<< HEAD\n  a: 1\n=======\n  a: 2\n>>>>>>> theirs\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    return tmp_path


@pytest.mark.parametrize(("name", "hint"), [("dvc.lock", "git checkout HEAD -- dvc.lock"), ("dvc.yaml", "git add dvc")])
def test_a_conflict_in_a_file_of_dvc_is_named(project: Path, name: str, hint: str) -> None:
    (project / name).write_text(CONFLICT)
    for command in (
        lambda: dvc.status(Path()),
        lambda: dvc.reproduce("erase", Path()),
        lambda: dvc.reproduce_all(["erase"], Path()),
    ):
        with pytest.raises(DataError, match=rf"^{name}, line 2: .* unresolved merge conflict of git") as caught:
            command()
        assert hint in caught.value.hint


def test_a_conflict_in_params_is_named(project: Path) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text("utf-8") + CONFLICT)
    line = params.read_text("utf-8").splitlines().index("<<<<<<< HEAD") + 1
    with pytest.raises(SettingsError, match=rf"params\.yaml, line {line}: .* merge conflict") as caught:
        Settings.load()
    assert caught.value.hint.endswith("git add params.yaml, then: deleatur check")


def test_markers_in_a_valid_file_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("guideline: |\n  <<<<<<< HEAD\n  =======\n")
    assert read_yaml(tmp_path / "a.yaml") == {"guideline": "<<<<<<< HEAD\n=======\n"}


def test_a_syntax_error_is_named_with_its_line(project: Path) -> None:
    (project / "dvc.lock").write_text("schema: '2.0'\nstages: [\n")
    with pytest.raises(DataError, match=r"dvc\.lock is not YAML: (.|\n)*line 3") as caught:
        dvc_remote.file_at_last_run("evaluate", Path("out/feedback"), "summary.json", Path())
    assert "correct dvc.lock" in caught.value.hint


@pytest.mark.parametrize(
    ("lock", "message"),
    [(CONFLICT, "line 2: .* merge conflict"), ("stages: [", "is not YAML"), ("null", "expected stages, got none")],
)
def test_a_registered_lock_that_is_damaged_is_named(lock: str, message: str, tmp_path: Path) -> None:
    finished.git(tmp_path, "init", "--quiet")
    finished.dvc(tmp_path, "init", "--quiet")
    with pytest.raises(DataError, match=f"dvc.lock of a registered version.* {message}") as caught:
        dvc_remote.collect_garbage(tmp_path, [lock], dry_run=True, remote=False)
    assert caught.value.hint == "deleatur verify VERSION"


@pytest.mark.parametrize("content", ["", "null\n", "[]\n"])
def test_a_lock_without_stages_is_one_of_a_new_project(content: str, project: Path) -> None:
    (project / "dvc.lock").write_text(content)
    assert dvc_remote.file_at_last_run("evaluate", Path("out/feedback"), "summary.json", Path()) is None


def test_the_hint_for_a_lock_is_what_git_does(tmp_path: Path) -> None:
    """In the middle of a merge, it puts the own version back."""
    lock = tmp_path / "dvc.lock"

    def run(*arguments: str) -> None:
        run_captured(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments], tmp_path)

    run("init", "--initial-branch=main")
    for branch, content in (("main", "a: 0\n"), ("theirs", "a: 1\n")):
        run("checkout", "-b", branch)
        lock.write_text(content)
        run("add", "dvc.lock")
        run("commit", "-m", branch)
    run("checkout", "main")
    lock.write_text("a: 2\n")
    run("commit", "-am", "ours")
    run("merge", "theirs")
    with pytest.raises(DataError, match=r"line 1: .* merge conflict") as caught:
        read_yaml(lock)
    command = caught.value.hint.partition(", then")[0].split()
    run(*command[1:])
    assert read_yaml(lock) == {"a": 2}
    assert git.current_commit(tmp_path).hash
