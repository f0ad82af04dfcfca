"""Files are uploaded and downloaded atomically; an unreachable address is a ServiceError."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from deleatur.errors import DataError, ServiceError
from deleatur.storage import remote


@pytest.fixture(params=["folder", "elsewhere"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, and an in-memory store, which fsspec reaches in the same way as S3."""
    if request.param == "folder":
        yield str(tmp_path / "store" / "a")
        return
    yield "memory://store/a"
    fsspec.filesystem("memory").rm("/store", recursive=True)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def files(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_uploads_are_downloaded_and_unchanged_files_are_not_downloaded_again(address: str, tmp_path: Path) -> None:
    remote.upload(write(tmp_path / "one", "1"), f"{address}/one")
    remote.upload(write(tmp_path / "two", "22"), f"{address}/deep/two")
    remote.upload(write(tmp_path / "other", "3"), f"{address}-other/three")
    target = tmp_path / "target"
    remote.fetch(address, target)
    assert files(target) == {"one": "1", "deep/two": "22"}
    before = (target / "one").stat().st_mtime_ns
    for text in ("changed", "another"):  # the second in the size of the first
        remote.upload(write(tmp_path / "two", text), f"{address}/deep/two")
        remote.fetch(address, target)
        assert files(target) == {"one": "1", "deep/two": text}
    assert (target / "one").stat().st_mtime_ns == before
    write(target / "deep" / "two", "further")
    remote.fetch(address, target)
    assert files(target)["deep/two"] == "further", "the local file is newer"
    remote.remove(address)
    remote.remove(address)
    remote.fetch(address, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_a_partial_file_never_has_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"

    def torn(source: Any, target: Any) -> None:
        Path(target).write_text(Path(source).read_text()[:2])
        raise OSError(28, "No space left on device")

    remote.upload(write(tmp_path / "one", "old"), str(store / "one"))
    newer = write(tmp_path / "one", "newer")
    with monkeypatch.context() as full:
        full.setattr("shutil.copyfile", torn)
        with pytest.raises(ServiceError, match="No space left"):
            remote.upload(newer, str(store / "one"))
    assert files(store) == {"one": "old"}
    write(store / ".one.77.partial", "ha")  # of a process that was killed
    remote.fetch(str(store), tmp_path / "target")
    assert files(tmp_path / "target") == {"one": "old"}


def test_old_entries_are_listed(tmp_path: Path) -> None:
    for name, age in (("old/state", 100.0), ("old/deep/state", 90.0), ("young/state", 100.0), ("young/other", 1.0)):
        path = write(tmp_path / name, "x")
        os.utime(path, (time.time() - age, time.time() - age))
    assert remote.list_older(str(tmp_path), time.time() - 50) == [f"{tmp_path}/old"]


def test_an_unreachable_address_is_a_service_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ServiceError, match="could not be reached") as raised:
        remote.upload(tmp_path / "file", str(tmp_path / "file" / "inner"))
    assert raised.value.hint == f"ls {tmp_path}/file/inner"
    with pytest.raises(ServiceError, match="nowhere://"):
        remote.fetch("nowhere://bucket/x", tmp_path / "target")


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A key of a bucket can be any text."""
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/store/a/good", b"1")
    fs.store["/store/a/../../evil"] = fs.store["/store/a/good"]
    try:
        with pytest.raises(DataError, match=r"evil' leads out of the folder"):
            remote.fetch("memory://store/a", tmp_path / "deep" / "target")
    finally:
        fs.store.clear()
    assert not list(tmp_path.rglob("evil"))
