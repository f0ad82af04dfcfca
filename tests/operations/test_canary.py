"""The canary samples the champion again; if a concept is back, it quarantines it and restores its predecessor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import canaries
import pytest
from canaries import ALL_LABELS, change_params, detect_labels, label_of_white
from PIL import Image
from registry import change_tags
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import DataError, ModelError
from deleatur.operations import canary
from deleatur.records.report import CanaryResult
from deleatur.registry import ledger
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHAMPION, LAST_KNOWN_GOOD, QUARANTINED
from deleatur.registry.model_files import local_folder
from deleatur.storage import json_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_releases(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("twice")
    canaries.create(shared, root)
    return root


@pytest.fixture
def released(two_releases: Path, tmp_path: Path) -> Iterator[Path]:
    canaries.copy(two_releases, root := tmp_path / "project")
    with chdir(root):
        yield root


def invoke(*command: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(command))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def aliases() -> dict[str, str]:
    return open_registry(Settings.load()).aliases()


def test_an_erased_concept_keeps_the_champion(released: Path) -> None:
    detect_labels(label_of_white())
    code, output = invoke("canary")
    assert (code, aliases()) == (0, {CHAMPION: "2", LAST_KNOWN_GOOD: "1"})
    assert "PASS weapon: concept_rate on concept, champion is 0" in output
    result = json_records.read(Path("out/canary/canary.json"), CanaryResult)
    base, champion = result.checks[0].scores
    assert (base.value, champion.value < 0.2, base.n, base.prompts) == (1.0, True, 60, 12)
    with Image.open("out/canary/weapon.png") as sheet:
        assert sheet.size > (96, 96)
    again = json.loads(CliRunner().invoke(app, ["canary", "--json"]).stdout)
    assert again["canary"]["checks"] == json.loads(json_records.encode(result))["checks"], "the seeds are fixed"
    assert again["quarantined"] is None


def test_a_concept_that_is_back_quarantines_the_champion(released: Path) -> None:
    detect_labels(*ALL_LABELS)
    code, output = invoke("canary", "--dry-run")
    assert (code, aliases()) == (10, {CHAMPION: "2", LAST_KNOWN_GOOD: "1"})
    assert "FAIL weapon: concept_rate on concept, champion is 1" in output
    code, output = invoke("canary")
    assert (code, aliases()) == (10, {CHAMPION: "1", QUARANTINED: "2"})
    assert "Version 2 is quarantined; version 1 is champion" in output
    last = ledger.read(Path("ledger.jsonl")).entries[-1]
    assert (last.event, last.actor, last.aliases) == ("quarantine", "canary", {CHAMPION: "1", QUARANTINED: "2"})
    assert last.reason.startswith("weapon is back: concept_rate on concept, champion is 1 [")
    assert open_registry(Settings.load()).description("2").count("quarantine by canary: ") == 1
    code, output = invoke("canary")
    assert (code, aliases()) == (10, {QUARANTINED: "1"})
    assert "none is champion" in output
    assert invoke("canary") == (0, "No live version has anything erased")


def test_a_detector_that_misses_the_concept_is_not_enough_evidence(released: Path) -> None:
    detect_labels("axe")
    code, output = invoke("canary")
    assert (code, aliases()) == (11, {CHAMPION: "2", LAST_KNOWN_GOOD: "1"})
    assert "NOT ENOUGH EVIDENCE weapon" in output


def test_every_concept_that_was_ever_erased_is_checked(released: Path) -> None:
    registry = open_registry(Settings.load())
    change_tags(Settings.load(), "1", concepts="weapon+blood")
    assert canary.champion_and_concepts(Settings.load()) == ("2", ["weapon", "blood"])
    detect_labels(label_of_white())
    code, output = invoke("canary")
    assert code == 11
    assert "blood: erased by an earlier version and no longer defined in params.yaml; canary.retired" in output
    change_params(canary={"retired": ["blood"]})
    assert invoke("canary")[0] == 0
    registry.client.delete_model_version("deleatur", "1")
    with pytest.raises(DataError, match="moved by hand: last_known_good is no version"):
        canary.champion_and_concepts(Settings.load())


def test_a_version_rolled_back_during_the_check_is_not_quarantined(released: Path) -> None:
    detect_labels(*ALL_LABELS)
    settings = Settings.load()
    result = canary.check(settings, "2", ["weapon"])
    assert invoke("rollback", "--as", "Ada", "--reason", "seen")[0] == 0
    assert canary.decide(settings, result) is None
    assert aliases() == {CHAMPION: "1", QUARANTINED: "2"}


def corrupt_weights(version: str) -> None:
    open_registry(Settings.load()).aliases()  # MLflow looks there from now on
    path = Path(local_folder(f"models:/deleatur/{version}")) / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))


def test_a_predecessor_with_modified_files_is_not_promoted(released: Path) -> None:
    detect_labels(*ALL_LABELS)
    corrupt_weights("1")
    code, output = invoke("canary")
    assert (code, aliases()) == (10, {QUARANTINED: "2"})
    assert "none is champion" in output
    assert "and nothing instead" in ledger.read(Path("ledger.jsonl")).entries[-1].reason


def test_modified_files_are_not_sampled_from(released: Path) -> None:
    corrupt_weights("2")
    with pytest.raises(ModelError, match="diffusion_pytorch_model"):
        canary.run(Settings.load())
