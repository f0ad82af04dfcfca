"""A one-step candidate passes through the pipeline; incompatible settings are refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import workspace

from deleatur import stages
from deleatur.artifacts.export import export
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.errors import SettingsError
from deleatur.operations.preflight import check
from deleatur.storage import files, samples

TRAINING: dict[str, Any] = {"iterations": 2, "lr": 1e-4, "batch_size": 2, "eval_every": 1}
RULES = {"fit": {"metric": "clip_score", "slice": "unseen", "versus": "base", "min": -5.0, "min_n": 2}}


def create(root: Path, **changes: Any) -> Settings:
    erase = {"method": "sfd", "source": "words", "sfd": {"training": TRAINING}}
    defaults: dict[str, Any] = {"erase": erase, "attack": {"methods": {}}, "gate": {"rules": RULES}}
    return workspace.create(root, **defaults | changes)


def test_the_candidate_is_sampled_in_one_step_and_the_base_model_in_all_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = create(tmp_path)
    assert check(settings)
    for name in ("ingest", "reward", "invert", "erase", "attack", "sample", "evaluate", "gate"):
        stages.run(name, settings)
    listing = samples.read_listing(settings.paths.samples)
    by_variant = {variant: rows for variant, rows in listing.groupby("variant")}
    assert set(by_variant["base"]["steps"]) == {settings.sample.steps}
    assert set(by_variant["candidate"]["steps"]) == {1}
    assert set(by_variant["candidate"]["guidance"]) == {'{"from": 625}'}
    evaluations = files.read_json(settings.paths.delta / "evaluations.json")
    assert [evaluation["step"] for evaluation in evaluations][:2] == [0, 1]
    notes = files.read_json(settings.paths.delta / "record.json")["notes"]
    assert any("one step" in note for note in notes)
    assert methods.requires_custom_sampler(settings) == "a sampler of one step"
    with pytest.raises(SettingsError, match="generate an image in one step"):
        export(settings, tmp_path / "erased")
    assert not (tmp_path / "erased").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guide": {"method": "sld", "sld": {"warmup_steps": 0}}}, "guide.method: expected cfg"),
        ({"attack": {"methods": {"concept_inversion": {}}}}, "attack.methods: expected none"),
    ],
)
def test_guides_and_attacks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = create(tmp_path, **changes)
    with pytest.raises(SettingsError, match=message):
        check(settings)
