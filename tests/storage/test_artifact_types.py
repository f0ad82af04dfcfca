"""A file of another type than its stage writes is an error that names the file, the value and the next command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from workspace import ROOT

from deleatur.artifacts import rated_images, reward_heads
from deleatur.benchmark import plan, resources, trial
from deleatur.benchmark.plan import Trial
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.evaluation.notes import report_notes
from deleatur.operations.backup import restore
from deleatur.report.curves import training_curves
from deleatur.storage import files, tensors

SUMMARY = {
    "feedback": "0" * 64,
    "simulated": False,
    "events": 3,
    "quarantined": {"rows": 0},
    "concepts": {"weapon": {"events": 3, "voted_images": 1, "pairs": 0, "agreement": {"value": None}}},
}
EVALUATIONS = [{"step": step, "concept": 0.5, "preserved": 0.3, "preserved_by_prompt": [0.3]} for step in (0, 5)]
ARTIFACTS: dict[str, Any] = {
    "out/feedback/summary.json": SUMMARY,
    "out/reward/curves.json": {"weapon": {"training raters": [1.0, 0.5]}},
    "out/reward/metrics.json": {"weapon": "skipped: one rater"},
    "out/tokens/metrics.json": {"weapon": [{"losses": [1, 0.5]}]},
    "out/delta/curve.json": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "drift": 0.0}],
    "out/delta/evaluations.json": EVALUATIONS,
    "out/delta/record.json": {"notes": ["A note."], "selected": 0, "stop": "guard"},
    "out/attacks/curves.json": {"weapon-concept_inversion": [0.5]},
}


@pytest.fixture(scope="module")
def loaded() -> Settings:
    return Settings.load(ROOT / "params.yaml").model_copy(update={"targets": ("weapon",)})


@pytest.fixture
def settings(loaded: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    for name, value in ARTIFACTS.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json.dumps(value))
    return loaded


def read_all(settings: Settings) -> list[object]:
    return [list(training_curves(settings)), report_notes(settings), rated_images.is_rated(settings, "weapon")]


def test_what_stages_write_is_read(settings: Settings) -> None:
    curves, notes, rated = read_all(settings)
    points = {curve.key + curve.title: [s.points for s in curve.series] for curve in curves}  # type: ignore[attr-defined]
    assert [(1, 0.5), (2, 0.25)] in points["eraseErasure: loss"]
    assert points["erase/evaluationErasure: evaluations on sampled images"] == [
        [(0, 0.5), (5, 0.5)],
        [(0, 0.3), (5, 0.3)],
    ]
    assert "A note." in notes  # type: ignore[operator]
    assert rated


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.parametrize("content", ["null", "3", '[{"step": null}]', '{"weapon": null}', "{"])
def test_another_type_is_refused(settings: Settings, name: str, content: str) -> None:
    Path(name).write_text(content)
    if (name, content) == ("out/reward/metrics.json", '{"weapon": null}'):
        return  # a reason that is not read
    with pytest.raises(DataError, match=name) as raised:
        read_all(settings)
    assert raised.value.hint.startswith("dvc repro")


def test_place_and_type_are_named(settings: Settings) -> None:
    files.write_json(Path("out/delta/evaluations.json"), [EVALUATIONS[0], {**EVALUATIONS[1], "step": "5"}])
    with pytest.raises(DataError, match=r"evaluations\.json: 1\.step: Input should be a valid integer, got str"):
        read_all(settings)


def of_weights(settings: Settings) -> list[Callable[[], object]]:
    paths = settings.paths
    return [
        lambda: tensors.load_delta(paths.delta / tensors.DELTA_FILE),
        lambda: tensors.load_token(paths.tokens / "weapon"),
        lambda: reward_heads.load_head(settings, "weapon", "train"),
    ]


@pytest.mark.parametrize("metadata", [None, [], {}, {"concept": None, "rank": "no", "base": 3}])
def test_metadata_of_weights_of_another_type_are_refused(settings: Settings, metadata: Any) -> None:
    names = (settings.paths.delta / tensors.DELTA_FILE, settings.paths.tokens / "weapon/01.safetensors")
    for path in (*names, settings.paths.reward / "weapon.safetensors"):
        tensors.save(path, {"x": torch.zeros(1)}, metadata)
    for read in of_weights(settings):
        with pytest.raises(DataError) as raised:
            read()
        assert raised.value.hint.startswith("dvc repro")


@pytest.mark.parametrize("content", ["null", "[]", '{"subject": 1}', '{"refused": null}'])
def test_files_of_a_trial_are_refused(settings: Settings, content: str) -> None:
    one = Trial("weapon", "uce", 1)
    summary = plan.trial_folder(settings, one) / trial.SUMMARY_FILE
    for path, read, remedy in (
        (Path("usage.json"), lambda: resources.read(Path("usage.json"), "digest"), "rm usage.json"),
        (summary, lambda: trial.read_summary(settings, one), f"rm -r {summary.parent}"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        with pytest.raises(DataError, match=path.name) as raised:
            read()
        assert raised.value.hint == f"{remedy}, then: deleatur compare"


@pytest.mark.parametrize("content", ["null", "[]", '{"digests": {"ledger.jsonl": null}}'])
def test_a_manifest_of_another_type_is_refused(settings: Settings, content: str) -> None:
    Path("manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"^manifest\.json") as raised:
        restore(settings, Path())
    assert raised.value.hint == "restore an older backup"
