"""Names that a later stage would refuse are refused by `deleatur check`."""

from __future__ import annotations

from pathlib import Path

import pytest
import workspace
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_metric_name

from deleatur.errors import DataError, SettingsError
from deleatur.operations.preflight import check, rules_without_evidence

REFUSED = ("clip@0.5", "clip:score", "clip/score", "..", "", " clip", "clip\n", "clip%", "x" * 101, "<b>")
ACCEPTED = ("clip_score", "clip-0.5", "nudity b9", "λ", "x" * 100)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("section", ["metrics", "detectors"])
def test_unusable_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    values = workspace.small_params(tmp_path)
    used = {"metrics": "clip_score", "detectors": "judge"}[section]
    values["evaluate"][section][name] = values["evaluate"][section][used]
    with pytest.raises(SettingsError, match=f"evaluate.{section}"):
        check(workspace.create(tmp_path, **values))


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_name_is_a_metric_name_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    values = workspace.small_params(tmp_path)
    values["evaluate"]["metrics"][name] = {"method": "clip_score"}
    check(workspace.create(tmp_path, **values))
    for suffix in ("", ".low", ".high"):
        _validate_metric_name(f"{name}/concept/candidate-base{suffix}")
    with pytest.raises(MlflowException):
        _validate_metric_name("clip@0.5/concept/candidate")


@pytest.mark.parametrize("method", ["uce", "rece", "abo", "sfd"])
def test_an_alternative_to_an_unknown_concept_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    values = workspace.small_params(tmp_path, attack={"methods": {}})
    values["erase"] |= {"method": method, method: {"alternatives": {"weapon": "toy", "waepon": "toy"}}}
    with pytest.raises(SettingsError, match=rf"erase\.{method}\.alternatives: .*\(weapon\), got waepon"):
        check(workspace.create(tmp_path, **values))


@pytest.mark.parametrize(("source", "answers"), [("words", False), ("words", True), ("token", True)])
def test_rules_about_what_nobody_rated_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, answers: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    values = workspace.small_params(tmp_path)
    values["erase"]["source"] = source
    settings = workspace.create(tmp_path, **values)
    if not answers:
        Path("feedback/weapon.jsonl").unlink()
    warnings = list(rules_without_evidence(settings))
    assert [warning.partition(":")[0] for warning in warnings] == [] if answers else ["gate.rules.token_is_gone"]
    assert all("the verdict cannot be a pass" in warning for warning in warnings)


def test_tokens_from_an_empty_source_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = workspace.create(tmp_path)
    Path("feedback/weapon.jsonl").write_text("")
    with pytest.raises(DataError, match="expected usable answers about it at feedback"):
        check(settings)
