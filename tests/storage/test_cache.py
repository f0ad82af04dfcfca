"""What is kept is never made twice, and however it was come by, the same files are left."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from counting import die, killed

from deleatur.errors import DataError
from deleatur.storage.cache import RowCache, chunked

SCHEMA = pa.schema({"key": pa.string(), "numbers": pa.list_(pa.float32())})
SIZE = 3


def rows(keys: Iterable[str]) -> pd.DataFrame:
    """A row is a function of its key."""
    keys = list(keys)
    return pd.DataFrame({"key": keys, "numbers": [[float(ord(c)) / 7 for c in key] for key in keys]})


def work(folder: Path, *groups: str, make: Callable[[str], Any] = lambda key: None) -> None:
    """What a stage does: groups of keys, a letter each."""
    kept = RowCache(folder, SCHEMA)
    for group in groups:
        for part in chunked(kept.missing(group), SIZE):
            for key in part:
                make(key)
            kept.add(rows(part))
    kept.compact(*groups, size=SIZE)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    work(tmp_path, "abcdefgh")
    found = RowCache(tmp_path, SCHEMA).read("hbbd")
    assert found["key"].tolist() == list("hbbd")
    assert [n.tolist() for n in found["numbers"]] == [pytest.approx(n, rel=1e-6) for n in rows("hbbd")["numbers"]]
    assert len(RowCache(tmp_path, SCHEMA).read("")) == 0


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    made: list[str] = []
    for asked in (("abcdefgh",), ("abXcdefgh",), ("hgfe", "Yab")):
        work(tmp_path, *asked, make=made.append)
    assert "".join(made) == "abcdefghXY"


@pytest.mark.parametrize(
    "before",
    [("abcdefgh",), ("hgfedcba",), ("bdfh", "zy"), ("abc", "fgh"), ("fghij", "abcde"), ("x",), ()],
)
def test_the_folder_does_not_tell_how_it_came_about(before: tuple[str, ...], tmp_path: Path) -> None:
    work(tmp_path / "fresh", "abcde", "fghij")
    work(tmp_path / "grown", *before)
    work(tmp_path / "grown", "abcde", "fghij")
    assert files(tmp_path / "grown") == files(tmp_path / "fresh")


def test_a_group_that_stays_keeps_its_files_untouched(tmp_path: Path) -> None:
    work(tmp_path, "abcd", "efgh")
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    work(tmp_path, "abcd", "ijklm")
    same = [path for path in tmp_path.iterdir() if times.get(path.name) == path.stat().st_mtime_ns]
    assert sorted(RowCache(tmp_path, SCHEMA).missing("abcd")) == []
    assert len(same) == 2, "the shards of abcd"


@pytest.mark.parametrize(("stays", "goes"), [("abc", "cab"), ("cab", "abc")])  # whichever name sorts first
def test_a_row_in_two_shards_is_read_from_the_one_that_stays(stays: str, goes: str, tmp_path: Path) -> None:
    for keys in (stays, goes):
        RowCache(tmp_path, SCHEMA).add(rows(keys))
    kept = RowCache(tmp_path, SCHEMA)
    kept.compact(stays, size=SIZE)
    assert len(files(tmp_path)) == 1
    assert list(kept.read("bca")["key"]) == list("bca")


def test_a_key_in_two_groups_is_kept_once(tmp_path: Path) -> None:
    work(tmp_path, "abc", "cba")
    assert len(files(tmp_path)) == 1


def test_killed_before_any_change_on_disk_it_loses_one_shard_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(tmp_path / "fresh", "abXcdefgh", "Yij")
    for moment in count(1):
        folder = tmp_path / str(moment)
        work(folder, "abcdefgh", "pq")

        def arrange(moment: int = moment) -> None:
            left = iter(range(moment - 1))
            for name in ("replace", "unlink"):
                plain = getattr(Path, name)

                def change(path: Path, *args: Any, plain: Any = plain, **more: Any) -> Any:
                    if path.exists():  # `replacing` also unlinks what has been moved away
                        next(left, None) is not None or die()
                    return plain(path, *args, **more)

                monkeypatch.setattr(Path, name, change)

        died = killed(lambda folder=folder: work(folder, "abXcdefgh", "Yij"), arrange)
        assert not RowCache(folder, SCHEMA).missing("abcdefgh"), (
            "what was there and is asked for is there at any moment"
        )
        made: list[str] = []
        work(folder, "abXcdefgh", "Yij", make=made.append)
        assert set(made) <= set("XYij"), "never made again"
        assert files(folder) == files(tmp_path / "fresh")
        if not died:
            break
    assert moment > 6


def test_what_is_no_shard_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"half a shard")
    with pytest.raises(DataError, match=r"x\.parquet is not a readable shard of the cache") as caught:
        RowCache(tmp_path, SCHEMA)
    assert "rm " in (caught.value.hint or "")


def test_a_row_that_is_missing_is_said(tmp_path: Path) -> None:
    work(tmp_path, "ab")
    with pytest.raises(DataError, match="lacks 1 of the requested rows"):
        RowCache(tmp_path, SCHEMA).read("abc")
