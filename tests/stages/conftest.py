from __future__ import annotations

from pathlib import Path

import finished
import pytest

from deleatur.settings import Settings


@pytest.fixture
def done(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A finished project that passes, as the current directory."""
    settings = finished.copy(tmp_path_factory.getbasetemp().parent, tmp_path)
    monkeypatch.chdir(tmp_path)
    return settings
