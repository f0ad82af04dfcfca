"""What is live is drawn again: where a concept is back, it is quarantined, and what was live before it is live."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import canaries
import pytest
from canaries import ALL, change, counting, white
from PIL import Image
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import ModelError
from deleatur.operations import canary
from deleatur.records.report import Canary
from deleatur.registry import ledger
from deleatur.registry.decisions import registry_of
from deleatur.registry.mlflow_client import CHAMPION, LAST, QUARANTINED, local
from deleatur.storage import json_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def twice(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("twice")
    canaries.make(shared, root)
    return root


@pytest.fixture
def released(twice: Path, tmp_path: Path) -> Iterator[Path]:
    canaries.copy(twice, root := tmp_path / "project")
    with chdir(root):
        yield root


def told(*command: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(command))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def aliases() -> dict[str, str]:
    return registry_of(Settings.load()).aliases()


def test_what_is_still_gone_stays_live(released: Path) -> None:
    counting(white())
    code, said = told("canary")
    assert (code, aliases()) == (0, {CHAMPION: "2", LAST: "1"})
    assert "PASS weapon: concept_rate on concept, champion is 0" in said
    found = json_records.read(Path("out/canary/canary.json"), Canary)
    base, champion = found.looks[0].scores
    assert (base.value, champion.value < 0.2, base.n, base.prompts) == (1.0, True, 60, 12)
    with Image.open("out/canary/weapon.png") as sheet:
        assert sheet.size > (96, 96)
    again = json.loads(CliRunner().invoke(app, ["canary", "--json"]).stdout)
    assert again["canary"]["looks"] == json.loads(json_records.encode(found))["looks"], "the same noise"
    assert again["quarantined"] is None


def test_what_is_back_is_quarantined_and_the_one_before_is_live(released: Path) -> None:
    counting(*ALL)
    code, said = told("canary", "--dry-run")
    assert (code, aliases()) == (10, {CHAMPION: "2", LAST: "1"})
    assert "FAIL weapon: concept_rate on concept, champion is 1" in said
    code, said = told("canary")
    assert (code, aliases()) == (10, {CHAMPION: "1", QUARANTINED: "2"})
    assert "Version 2 is quarantined; version 1 is champion" in said
    last = ledger.read(Path("ledger.jsonl")).entries[-1]
    assert (last.event, last.who, last.aliases) == ("quarantine", "canary", {CHAMPION: "1", QUARANTINED: "2"})
    assert last.why.startswith("weapon is back: concept_rate on concept, champion is 1 [")
    assert registry_of(Settings.load()).tags("2")["quarantined_by"] == "canary"
    code, said = told("canary")
    assert (code, aliases()) == (10, {QUARANTINED: "1"})
    assert "none is champion" in said
    assert told("canary") == (0, "Nothing is live that has anything erased")


def test_where_the_detector_sees_nothing_it_says_so(released: Path) -> None:
    counting("axe")
    code, said = told("canary")
    assert (code, aliases()) == (11, {CHAMPION: "2", LAST: "1"})
    assert "NOT ENOUGH EVIDENCE weapon" in said


def test_every_concept_that_was_ever_erased_is_looked_at(released: Path) -> None:
    registry = registry_of(Settings.load())
    registry.tag("1", {"concepts": "weapon+blood"})
    assert canary.live(Settings.load()) == ("2", ["weapon", "blood"])
    counting(white())
    code, said = told("canary")
    assert code == 11
    assert "blood: it was erased once, and params.yaml has no such concept any more; canary.retired" in said
    registry.client.delete_model_version("deleatur", "1")
    assert canary.live(Settings.load()) == ("2", ["weapon", "blood"]), "what it had erased is remembered"
    change(canary={"retired": ["blood"]})
    assert told("canary")[0] == 0


def test_a_version_that_went_while_it_was_drawn_is_left_alone(released: Path) -> None:
    counting(*ALL)
    settings = Settings.load()
    found = canary.look(settings, "2", ["weapon"])
    assert told("rollback", "--as", "Ada", "--reason", "seen")[0] == 0
    assert canary.decide(settings, found) is None
    assert aliases() == {CHAMPION: "1", QUARANTINED: "2"}


def damage(version: str) -> None:
    registry_of(Settings.load()).aliases()  # MLflow looks there from now on
    path = Path(local(f"models:/deleatur/{version}")) / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))


def test_what_cannot_be_trusted_does_not_follow(released: Path) -> None:
    counting(*ALL)
    damage("1")
    code, said = told("canary")
    assert (code, aliases()) == (10, {QUARANTINED: "2"})
    assert "none is champion" in said
    assert "and nothing instead" in ledger.read(Path("ledger.jsonl")).entries[-1].why


def test_files_that_were_changed_are_not_drawn_from(released: Path) -> None:
    damage("2")
    with pytest.raises(ModelError, match="diffusion_pytorch_model"):
        canary.run(Settings.load())
