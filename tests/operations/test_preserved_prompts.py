"""`deleatur check` warns of preserved prompts that name a target or are close to one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import workspace
import yaml
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.diffusion.clip import load_clip
from deleatur.operations.preserved_prompts import naming_targets, similar_to_targets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    return workspace.create(tmp_path)


def preserve(*texts: str) -> None:
    with Path("prompts/neutral.csv").open("a", encoding="utf-8") as file:
        file.writelines(f"extra-{i},{text},judge:cat,keep,dev\n" for i, text in enumerate(texts))


@pytest.mark.parametrize("text", ["the Sword", "two swords", "a cat with a gun", "GUNS"])
def test_prompt_that_names_a_target_is_reported(settings: Settings, text: str) -> None:
    assert list(naming_targets(settings)) == []
    preserve(text, "a gunner", "a swordfish")
    [warning] = naming_targets(settings)
    assert repr(text) in warning
    assert "weapon" in warning


def test_labels_of_several_words_count_as_a_whole(settings: Settings) -> None:
    spec = settings.concepts["weapon"]
    detection = spec.detection.model_copy(update={"labels": ("kitchen knife",)})
    changed = {"weapon": spec.model_copy(update={"detection": detection})}
    named = ["a kitchen knife", "two kitchen knives", "two kitchen knifes"]
    preserve("a kitchen", "a knife", *named)
    warnings = naming_targets(settings.model_copy(update={"concepts": changed}))
    assert list(warnings) == [
        f"the preserved prompt {text!r} names the target weapon (kitchen knife)" for text in named
    ]


def planted_clip(closest: str) -> Any:
    """Embeddings with cosines of about 0 between prompts and concept, and of 0.9 for one prompt."""

    def embed_texts(texts: list[str]) -> torch.Tensor:
        rows = torch.stack([torch.randn(64, generator=torch.Generator().manual_seed(hash_of(t))) for t in texts])
        concept = torch.nn.functional.one_hot(torch.tensor(0), 64).float()
        rows[[i for i, t in enumerate(texts) if t in ("gun", "sword")]] = concept
        rows[[i for i, t in enumerate(texts) if t == closest]] = 20 * concept
        return torch.nn.functional.normalize(rows, dim=1)

    return SimpleNamespace(embed_texts=embed_texts)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "big") % 2**62


def test_prompt_much_closer_than_the_others_is_reported(settings: Settings) -> None:
    preserve(*(f"a cat {i}" for i in range(20)), "a pistol")
    [warning] = similar_to_targets(settings, planted_clip("a pistol"))
    assert "'a pistol' is close to the target weapon" in warning
    assert list(similar_to_targets(settings, planted_clip(""))) == []


def test_few_prompts_have_no_outlier(settings: Settings) -> None:
    preserve("a pistol")
    assert list(similar_to_targets(settings, planted_clip("a pistol"))) == []


def test_built_in_prompts_are_far_from_their_targets_and_a_car_is_close_to_vehicles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Preserved while vehicles are erased, cars keep a quarter of the vehicles."""
    monkeypatch.chdir(ROOT)
    clip, values = load_clip("models/clip", "cpu"), yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    for name in values["concepts"]:
        settings = Settings.of(values | {"targets": [name]}, "test")
        named = list(naming_targets(settings))
        assert all("fork and knife" in warning for warning in named), "cutlery is preserved on purpose"
        assert list(similar_to_targets(settings, clip)) == []
    values["concepts"]["weapon"]["words"] = ["vehicle"]
    values["concepts"]["weapon"]["detection"]["labels"] = ["bus"]
    warnings = list(similar_to_targets(Settings.of(values | {"targets": ["weapon"]}, "test"), clip))
    assert any("'a car'" in warning for warning in warnings)
    assert len(warnings) < 6


def test_check_prints_the_warnings_and_succeeds(settings: Settings) -> None:
    preserve("two guns")
    done = CliRunner().invoke(app, ["check"])
    assert (done.exit_code, "warning  the preserved prompt 'two guns' names the target weapon" in done.output) == (
        0,
        True,
    )
    [warning] = json.loads(CliRunner().invoke(app, ["check", "--json"]).stdout)["warnings"]
    assert "'two guns'" in warning
