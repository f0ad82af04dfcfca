"""A pass needs approval where it could bring an erased concept back."""

from __future__ import annotations

from pathlib import Path

import pytest
import registry
from registry import register_pass

from deleatur.config.settings import Settings
from deleatur.registry import approval
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION

VERSUS = {"metric": "concept_rate", "slice": "concept", "versus": "champion", "max": 0.05, "min_n": 60}


@pytest.fixture
def settings(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    created = registry.create(shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    return created


def champion_and_challenger(settings: Settings) -> tuple[str | None, str | None]:
    return open_registry(settings).alias(CHAMPION), open_registry(settings).alias(CHALLENGER)


@pytest.mark.parametrize(("erased", "after"), [("vice", ("1", "2")), ("vice+weapon", ("2", None))])
def test_dropping_an_erased_concept_needs_approval(
    settings: Settings, erased: str, after: tuple[str, str | None]
) -> None:
    register_pass(settings, "a", concepts="weapon")
    register_pass(settings, "b", concepts=erased)
    assert champion_and_challenger(settings) == after
    if after[1]:
        approval.promote(settings, "2", "Grace", reason="another model handles weapons now")
        assert champion_and_challenger(settings) == ("2", None)


@pytest.mark.parametrize(
    ("compared", "after"),
    [("none", ("1", "2")), ("models:/deleatur/7", ("1", "2")), ("models:/deleatur/1", ("2", None))],
)
def test_comparison_with_another_champion_needs_approval(
    settings: Settings, compared: str, after: tuple[str, str | None]
) -> None:
    changed = settings.model_dump(mode="json", by_alias=True) | {"gate": {"rules": {"no_worse": VERSUS}}}
    strict = Settings.model_validate(changed)
    register_pass(strict, "a", concepts="weapon", champion="none")
    register_pass(strict, "b", concepts="weapon", champion=compared)
    assert champion_and_challenger(strict) == after
