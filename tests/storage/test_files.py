"""A stage empties folders of outputs, never one with tracked files; damaged tables are named."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from deleatur.errors import DataError, SettingsError
from deleatur.records.report import Report
from deleatur.storage import files, json_records
from deleatur.storage.cache import RowCache


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


def test_a_folder_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    folder = tmp_path / "report"

    def write(text: str, *, fails: bool = False) -> None:
        with files.replace_folder(folder) as new:
            assert not list(new.iterdir())
            (new / text).write_text(text)
            if fails:
                raise OSError("no space left")

    write("first")
    with pytest.raises(OSError, match="no space"):
        write("second", fails=True)
    assert [path.name for path in folder.iterdir()] == ["first"]
    killed = tmp_path / ".report.123.new.partial"
    killed.mkdir()
    write("third")
    assert [path.name for path in folder.iterdir()] == ["third"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_tracked_files_is_not_replaced(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("text")
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    with pytest.raises(SettingsError, match=r"git tracks page\.md"), files.replace_folder(tmp_path / "docs"):
        pass
    assert (tmp_path / "docs" / "page.md").read_text() == "text"


def test_a_mount_point_is_emptied_but_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "old").write_text("text")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == folder)
    inode = folder.stat().st_ino
    with pytest.raises(SettingsError, match="is a mount point") as refusal, files.replace_folder(folder):
        pass
    assert f"mount the disk at {tmp_path}" in refusal.value.hint
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert (list(files.empty_folder(folder).iterdir()), folder.stat().st_ino) == ([], inode)


def test_the_literal_part_of_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out[1]").mkdir()
    for pattern, expected in {
        "out[1]/a.jsonl": "out[1]/a.jsonl",
        "out[1]/*.jsonl": "out[1]",
        "out[2]/a.jsonl": ".",
        "feed*/a.jsonl": ".",
        "new/a*/b.jsonl": "new",
        f"{tmp_path}/**/a.jsonl": str(tmp_path),
    }.items():
        assert files.literal_path(pattern) == Path(expected), pattern


def test_a_table_of_another_version_is_refused(tmp_path: Path) -> None:
    schema = pa.schema({"key": pa.string(), "value": pa.float64()})
    files.write_table(path := tmp_path / "table.parquet", pd.DataFrame({"key": ["a"], "value": [1.0]}), schema)
    assert len(files.read_table(path, schema)) == 1
    with pytest.raises(DataError, match="lacks the columns variant") as raised:
        files.read_table(path, pa.schema([*schema, ("variant", pa.string())]))
    assert raised.value.hint.startswith("dvc repro")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "should be an object, got list"),
        ("null", "should be an object, got NoneType"),
        ('{"other": 1}', "lacks feedback"),
        ("{", "is not JSON"),
    ],
)
def test_json_of_another_shape_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (path := tmp_path / "summary.json").write_text(content)
    with pytest.raises(DataError, match=message):
        files.read_object(path, "feedback")


def test_the_hint_for_a_missing_file_is_the_command_that_writes_it(tmp_path: Path) -> None:
    for read, hint in (
        (files.read_json, "dvc repro"),
        (files.read_table, "dvc repro"),
        (lambda path: json_records.read(path, Report), "dvc repro"),
        (files.read_csv, "put it there"),
    ):
        with pytest.raises(DataError, match="no file") as raised:
            read(tmp_path / "none")
        assert raised.value.hint.startswith(hint)


def damage(path: Path) -> None:
    """Zeroes within a page, and the footer intact, as after a bad copy."""
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    schema = pa.schema({"key": pa.string(), "value": pa.float64()})
    rows = pd.DataFrame({"key": [f"{i:064d}" for i in range(2000)], "value": [i / 7 for i in range(2000)]})
    files.write_table(tmp_path / "table.parquet", rows, schema)
    damage(tmp_path / "table.parquet")
    with pytest.raises(DataError, match=r"table\.parquet is not an intact Parquet table"):
        files.read_table(tmp_path / "table.parquet")
    cache = RowCache(tmp_path / "cache", schema)
    shard = cache.add(rows)
    damage(shard)
    with pytest.raises(DataError, match="not a readable shard of the cache") as raised:
        cache.read(list(rows["key"]))
    assert f"rm {shard}" in raised.value.hint
