"""The stage runs iterative erasers and closed-form ones, and keeps a refused run for inspection."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import workspace

from deleatur import stages
from deleatur.config.sections import EraseSection
from deleatur.config.settings import Settings, merged
from deleatur.errors import ErasureRefused
from deleatur.records.model import LowRank
from deleatur.stages import erase
from deleatur.storage import files, tensors
from deleatur.training.early_stopping import Evaluation


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


@pytest.mark.parametrize(
    ("dtype", "lam", "noted"),
    [("float32", 1e5, False), ("bfloat16", 0.1, False), ("bfloat16", 1e3, True), ("bfloat16", 1e5, None)],
)
def test_a_difference_that_the_precision_does_not_show_is_noted_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, lam: float, noted: bool | None
) -> None:
    monkeypatch.chdir(tmp_path)
    erase = {"method": "uce", "source": "words", "uce": {"edit": {"lam": lam, "min_relative_change": 0.0}}}
    values = merged(workspace.small_params(tmp_path), {"base": {"dtype": dtype}, "erase": erase})
    settings = workspace.create(tmp_path, **values)
    if noted is None:
        with pytest.raises(ErasureRefused, match=r"less than bfloat16 resolves: \d+% of the difference is lost"):
            stages.run("erase", settings)
        return
    stages.run("erase", settings)
    notes = files.read_json(settings.paths.delta / "record.json")["notes"]
    assert any("is lost to rounding in bfloat16" in note for note in notes) == noted


REFUSED = [Evaluation(0.97, 0.5, 1.0, [0.4, 0.6]), Evaluation(0.125, 0.44, 1.0, [0.34, 0.54])]
"""The preserved score falls by 12 %."""


def refusing(settings: Settings, monkeypatch: pytest.MonkeyPatch, drop: float, *scores: Evaluation) -> Settings:
    """A run of two evaluations with these scores, whatever is sampled."""
    remaining = iter([*scores, scores[-1]])
    monkeypatch.setattr(erase, "validation_probe", lambda *_: lambda weights: next(remaining))
    config = settings.erase.config("sdd")
    config["training"] = {**config["training"], "max_preserved_drop": drop, "iterations": 3}
    section = EraseSection.model_validate({"method": "sdd", "source": "words", "sdd": config})
    return settings.model_copy(update={"erase": section})


def test_a_refusal_reports_evaluations_and_prompts_and_keeps_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = workspace.create(tmp_path)
    for name in ("ingest", "reward"):
        stages.run(name, settings)
    with pytest.raises(ErasureRefused) as raised:
        stages.run("erase", refusing(settings, monkeypatch, 0.1, *REFUSED))
    message = str(raised.value)
    assert "step 0: concept 0.970, preserved 0.500" in message
    assert "step 3: concept 0.125, preserved 0.440" in message
    assert "2 preserved prompts, largest drop first: " in message
    assert "a cat" in message
    assert "0.60 → 0.54" in message.partition("largest drop first: ")[2]
    refused_folder = settings.paths.checkpoints / "refused"
    assert str(refused_folder) in message
    assert tensors.load_delta(refused_folder / tensors.DELTA_FILE).method == "sdd"
    record = files.read_json(refused_folder / "record.json")
    assert [e["concept"] for e in record["evaluations"]] == [0.97, 0.125]
    assert [row["step"] for row in record["curve"]] == [1, 2, 3]
    assert not settings.paths.delta.exists(), "no candidate"

    advised = float(raised.value.hint.partition("training.max_preserved_drop: ")[2].split()[0])
    stages.run("erase", refusing(settings, monkeypatch, advised, *REFUSED))
    assert files.read_json(settings.paths.delta / "evaluations.json")[1]["concept"] == 0.125


@pytest.mark.parametrize("last", [Evaluation(0.1, math.nan), Evaluation(0.1, 0.5, 0.01)])
def test_damage_is_not_advised_to_be_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: Evaluation
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = workspace.create(tmp_path)
    for name in ("ingest", "reward"):
        stages.run(name, settings)
    with pytest.raises(ErasureRefused) as raised:
        stages.run("erase", refusing(settings, monkeypatch, 0.1, Evaluation(0.97, 0.5), last))
    assert "max_preserved_drop" not in raised.value.hint
    assert (settings.paths.checkpoints / "refused" / "record.json").is_file()
