from __future__ import annotations

from pathlib import Path

import finished
import pytest

from deleatur.settings import Settings


@pytest.fixture
def done(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A finished project that passes, as the current directory."""
    settings = finished.copy(shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    return settings
