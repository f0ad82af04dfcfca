"""The stage runs iterative erasers and closed-form ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import workspace

from deleatur import stages
from deleatur.config.sections import EraseSection
from deleatur.records.model import LowRank
from deleatur.storage import files, tensors


def test_closed_forms_erase_with_their_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = workspace.create(tmp_path)
    for name in ("ingest", "reward"):
        stages.run(name, settings)
    for method in ("uce", "rece"):
        stages.run("erase", settings.model_copy(update={"erase": EraseSection(method=method, source="words")}))
        delta = tensors.load_delta(settings.paths.delta / tensors.DELTA_FILE)
        assert isinstance(delta.tensors, LowRank)
        assert (delta.method, delta.concepts) == (method, ("weapon",))
        curve = files.read_json(settings.paths.delta / "curve.json")
        assert [row["step"] for row in curve] == list(range(1, len(curve) + 1))
        assert files.read_json(settings.paths.delta / "record.json")["steps"] == len(curve)
