"""A stage empties folders of outputs, never one with tracked files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from deleatur.errors import DataError, SettingsError
from deleatur.storage import files


def test_a_folder_with_tracked_files_is_not_emptied(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("/out\n")
    outputs, docs = tmp_path / "out/report", tmp_path / "docs"
    for folder in (outputs, docs):
        folder.mkdir(parents=True)
        (folder / "page.md").write_text("text")
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    assert list(files.empty_folder(outputs).iterdir()) == []
    with pytest.raises(SettingsError, match=r"git tracks page\.md"):
        files.empty_folder(docs)
    with pytest.raises(SettingsError, match=r"git tracks page\.md"):
        files.keep_only(docs, [])
    assert (docs / "page.md").read_text() == "text"


def test_inside_a_git_hook_the_repository_of_the_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked, plain = tmp_path / "hooked", tmp_path / "plain/out"
    subprocess.run(["git", "init", "--quiet", hooked], check=True)
    (hooked / "page.md").write_text("text")
    subprocess.run(["git", "-C", hooked, "add", "."], check=True)
    plain.mkdir(parents=True)
    monkeypatch.setenv("GIT_DIR", str(hooked / ".git"))
    assert list(files.empty_folder(plain).iterdir()) == []


def test_nothing_is_emptied_when_git_fails(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "page.md").write_text("text")
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    (tmp_path / ".git/index").write_bytes(b"broken")
    with pytest.raises(DataError, match="git cannot list the files it tracks"):
        files.empty_folder(tmp_path)
    assert (tmp_path / "page.md").exists()
