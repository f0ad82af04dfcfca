"""A disk that is full is an error that names the file, whichever library was writing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import torch
from full_disk import max_file_size

from deleatur.storage import files, tensors


def _copy(path: Path) -> None:
    with files.disk_errors(path):
        shutil.copytree(path.with_name("source"), path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: tensors.save(path, {"w": torch.ones(1000)}, {}),
        lambda path: files.write_json(path, list(range(1000))),
        lambda path: files.write_table(path, pd.DataFrame({"x": range(1000)}), pa.schema({"x": pa.int64()})),
        _copy,
    ],
    ids=["safetensors", "json", "parquet", "copy"],
)
def test_full_disk_is_an_error_that_names_the_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    path, source = tmp_path / "target", tmp_path / "source" / "file"
    source.parent.mkdir()
    source.write_bytes(bytes(1000))
    with max_file_size(100), pytest.raises(OSError, match="File too large") as error:
        write(path)
    assert error.value.filename
    assert str(path) in f"{error.value.filename} {error.value.filename2}"
    assert not path.is_file()
