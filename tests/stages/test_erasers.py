"""Erasers that need more than words: rated images are passed on, and missing settings are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import workspace

from deleatur import stages
from deleatur.artifacts import rated_images
from deleatur.config.settings import Settings
from deleatur.errors import SettingsError
from deleatur.operations.preflight import check
from deleatur.storage import files, tensors

TRAINING: dict[str, Any] = {"iterations": 4, "lr": 1e-3, "batch_size": 2, "eval_every": 2, "max_preserved_drop": 10.0}


def create(root: Path, method: str, **hyperparameters: Any) -> Settings:
    return workspace.create(root, erase={"method": method, "source": "words", method: hyperparameters})


def test_safegen_learns_from_positive_and_negative_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = create(tmp_path, "safegen", training=TRAINING)
    for name in ("ingest", "reward"):
        stages.run(name, settings)
    pool = rated_images.RatedPool(settings, "weapon")
    rated = pool.labelled()
    prompt_of = dict(zip(map(id, pool.images), pool.prompts, strict=True))
    assert len(rated.positive) + len(rated.negative) == len(pool.images) == 24
    for images, shown in ((rated.positive, {"a gun", "a sword"}), (rated.negative, {"a cat", "a dog"})):
        right = [prompt_of[id(p)] in shown for p in images]
        assert sum(right) > 0.7 * len(right), "raters err now and then"
    stages.run("erase", settings)
    delta = tensors.load_delta(settings.paths.delta / tensors.DELTA_FILE)
    assert delta.method == "safegen"
    assert all(".attn1." in n for n in delta.tensors)
    evaluations = files.read_json(settings.paths.delta / "evaluations.json")
    assert [evaluation["step"] for evaluation in evaluations][:2] == [0, 2]


def test_all_but_one_without_alternative_is_refused_by_check_and_by_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = create(tmp_path, "abo")
    for refused in (lambda: check(settings), lambda: stages.run("erase", settings)):
        with pytest.raises(SettingsError, match="expected an alternative to weapon"):
            refused()


def test_the_record_of_all_but_one_says_that_it_is_a_reconstruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = create(tmp_path, "abo", alternatives={"weapon": "cat"}, training=TRAINING)
    assert check(settings)
    for name in ("ingest", "reward", "erase"):
        stages.run(name, settings)
    notes = files.read_json(settings.paths.delta / "record.json")["notes"]
    assert any("All-but-One is a reconstruction" in note for note in notes)
