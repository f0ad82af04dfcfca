"""What a stage empties is what stages made, and nothing that people brought."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from deleatur.errors import SettingsError
from deleatur.io import tables


def test_what_git_keeps_is_not_emptied(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("/out\n")
    ours, theirs = tmp_path / "out/report", tmp_path / "docs"
    for folder in (ours, theirs):
        folder.mkdir(parents=True)
        (folder / "page.md").write_text("text")
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    assert list(tables.emptied(ours).iterdir()) == []
    with pytest.raises(SettingsError, match=r"git keeps page\.md there"):
        tables.emptied(theirs)
    with pytest.raises(SettingsError, match=r"git keeps page\.md there"):
        tables.keep_only(theirs, [])
    assert (theirs / "page.md").read_text() == "text"
