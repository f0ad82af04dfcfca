"""Cached rows are never computed twice, and the final files do not depend on the history."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from child_processes import die, killed

from deleatur.errors import DataError
from deleatur.storage.cache import RowCache, chunked

SCHEMA = pa.schema({"key": pa.string(), "numbers": pa.list_(pa.float32())})
SIZE = 3


def rows(keys: Iterable[str]) -> pd.DataFrame:
    """A row is a function of its key."""
    keys = list(keys)
    return pd.DataFrame({"key": keys, "numbers": [[float(ord(c)) / 7 for c in key] for key in keys]})


def run(folder: Path, *groups: str, compute: Callable[[str], Any] = lambda key: None) -> None:
    """What a stage does with the cache: groups of keys, a letter each."""
    cache = RowCache(folder, SCHEMA)
    for group in groups:
        for chunk in chunked(cache.missing(group), SIZE):
            for key in chunk:
                compute(key)
            cache.add(rows(chunk))
    cache.compact(*groups, size=SIZE)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_returned_in_the_requested_order(tmp_path: Path) -> None:
    run(tmp_path, "abcdefgh")
    result = RowCache(tmp_path, SCHEMA).read("hbbd")
    assert result["key"].tolist() == list("hbbd")
    assert [n.tolist() for n in result["numbers"]] == [pytest.approx(n, rel=1e-6) for n in rows("hbbd")["numbers"]]
    assert len(RowCache(tmp_path, SCHEMA).read("")) == 0


def test_only_missing_rows_are_computed(tmp_path: Path) -> None:
    computed: list[str] = []
    for groups in (("abcdefgh",), ("abXcdefgh",), ("hgfe", "Yab")):
        run(tmp_path, *groups, compute=computed.append)
    assert "".join(computed) == "abcdefghXY"


@pytest.mark.parametrize(
    "before",
    [("abcdefgh",), ("hgfedcba",), ("bdfh", "zy"), ("abc", "fgh"), ("fghij", "abcde"), ("x",), ()],
)
def test_the_final_files_do_not_depend_on_the_history(before: tuple[str, ...], tmp_path: Path) -> None:
    run(tmp_path / "fresh", "abcde", "fghij")
    run(tmp_path / "grown", *before)
    run(tmp_path / "grown", "abcde", "fghij")
    assert files(tmp_path / "grown") == files(tmp_path / "fresh")


def test_an_unchanged_group_keeps_its_files(tmp_path: Path) -> None:
    run(tmp_path, "abcd", "efgh")
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    run(tmp_path, "abcd", "ijklm")
    same = [path for path in tmp_path.iterdir() if times.get(path.name) == path.stat().st_mtime_ns]
    assert sorted(RowCache(tmp_path, SCHEMA).missing("abcd")) == []
    assert len(same) == 2, "the shards of abcd"


@pytest.mark.parametrize(("remaining", "deleted"), [("abc", "cab"), ("cab", "abc")])  # whichever name sorts first
def test_a_row_in_two_shards_is_read_from_the_remaining_one(remaining: str, deleted: str, tmp_path: Path) -> None:
    for keys in (remaining, deleted):
        RowCache(tmp_path, SCHEMA).add(rows(keys))
    cache = RowCache(tmp_path, SCHEMA)
    cache.compact(remaining, size=SIZE)
    assert len(files(tmp_path)) == 1
    assert list(cache.read("bca")["key"]) == list("bca")


def test_a_key_in_two_groups_is_kept_once(tmp_path: Path) -> None:
    run(tmp_path, "abc", "cba")
    assert len(files(tmp_path)) == 1


def test_killed_before_any_write_it_loses_one_shard_and_ends_with_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "fresh", "abXcdefgh", "Yij")
    for moment in count(1):
        folder = tmp_path / str(moment)
        run(folder, "abcdefgh", "pq")

        def arrange(moment: int = moment) -> None:
            left = iter(range(moment - 1))
            for name in ("replace", "unlink"):
                plain = getattr(Path, name)

                def change(path: Path, *args: Any, plain: Any = plain, **more: Any) -> Any:
                    if path.exists():  # `replacing` also unlinks what has been moved away
                        next(left, None) is not None or die()
                    return plain(path, *args, **more)

                monkeypatch.setattr(Path, name, change)

        died = killed(lambda folder=folder: run(folder, "abXcdefgh", "Yij"), arrange)
        assert not RowCache(folder, SCHEMA).missing("abcdefgh"), "rows that are still requested exist at every moment"
        computed: list[str] = []
        run(folder, "abXcdefgh", "Yij", compute=computed.append)
        assert set(computed) <= set("XYij"), "never computed again"
        assert files(folder) == files(tmp_path / "fresh")
        if not died:
            break
    assert moment > 6


def test_an_unreadable_shard_is_refused_with_the_next_command(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"half a shard")
    with pytest.raises(DataError, match=r"x\.parquet is not a readable shard of the cache") as caught:
        RowCache(tmp_path, SCHEMA)
    assert "rm " in (caught.value.hint or "")


def test_missing_rows_are_refused(tmp_path: Path) -> None:
    run(tmp_path, "ab")
    with pytest.raises(DataError, match="lacks 1 of the requested rows"):
        RowCache(tmp_path, SCHEMA).read("abc")
