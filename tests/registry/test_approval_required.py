"""A pass does not replace what is live by itself where that could bring something back."""

from __future__ import annotations

from pathlib import Path

import pytest
import registry
from registry import passes

from deleatur.config.settings import Settings
from deleatur.registry import approval
from deleatur.registry.decisions import registry_of
from deleatur.registry.mlflow_client import CHALLENGER, CHAMPION

VERSUS = {"metric": "concept_rate", "slice": "concept", "versus": "champion", "max": 0.05, "min_n": 60}


@pytest.fixture
def settings(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    made = registry.make(shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    return made


def live(settings: Settings) -> tuple[str | None, str | None]:
    return registry_of(settings).alias(CHAMPION), registry_of(settings).alias(CHALLENGER)


@pytest.mark.parametrize(("erased", "after"), [("vice", ("1", "2")), ("vice+weapon", ("2", None))])
def test_what_was_erased_before_is_erased_still_or_a_person_has_wanted_that(
    settings: Settings, erased: str, after: tuple[str, str | None]
) -> None:
    passes(settings, "a", concepts="weapon")
    passes(settings, "b", concepts=erased)
    assert live(settings) == after
    if after[1]:
        approval.promote(settings, "2", "somebody", reason="weapons are drawn by another model now")
        assert live(settings) == ("2", None)


@pytest.mark.parametrize(
    ("compared", "after"),
    [("none", ("1", "2")), ("models:/deleatur/7", ("1", "2")), ("models:/deleatur/1", ("2", None))],
)
def test_a_policy_that_compares_with_the_champion_means_the_one_that_is_live(
    settings: Settings, compared: str, after: tuple[str, str | None]
) -> None:
    given = settings.model_dump(mode="json", by_alias=True) | {"gate": {"rules": {"no_worse": VERSUS}}}
    strict = Settings.model_validate(given)
    passes(strict, "a", concepts="weapon", champion="none")
    passes(strict, "b", concepts="weapon", champion=compared)
    assert live(strict) == after
