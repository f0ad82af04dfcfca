"""Released within minutes beside the chain, said to be so everywhere, and replaced by the chain's next release."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import finished
import pytest
import yaml
from registry import asking
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.operations import emergency
from deleatur.registry import approval, ledger
from deleatur.registry.decisions import STARTED_BY, registry_of
from deleatur.registry.mlflow_client import CHALLENGER, CHAMPION, LAST, local
from deleatur.registry.verify import verify
from deleatur.stages import gate, register
from deleatur.storage import dvc

pytestmark = pytest.mark.slow

WHY = "reported by many"


@pytest.fixture
def project(done: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The chain has run; nothing is released yet."""
    monkeypatch.setattr(dvc, "status", lambda root: {})
    monkeypatch.setitem(os.environ, STARTED_BY, "chain")  # put back afterwards
    return done


def told(*command: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(command))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def chain_releases(settings: Settings, limit: float) -> None:
    os.environ[STARTED_BY] = "chain"
    gate.run(changed := Settings.model_validate(settings.model_dump(by_alias=True) | {"gate": finished.passing(limit)}))
    register.run(changed)


def change(**sections: object) -> None:
    path = Path("params.yaml")
    params = yaml.safe_load(path.read_text("utf-8"))
    path.write_text(yaml.safe_dump(params | sections, sort_keys=False), "utf-8")


def results() -> dict[str, str]:
    """Of the chain, byte by byte."""
    files = (p for name in ("tokens", "delta", "shots", "report", "verdict") for p in Path("out", name).rglob("*"))
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}


def test_it_goes_live_says_what_it_is_and_is_replaced(project: Settings) -> None:
    chain_releases(project, -5.0)
    before, own = results(), registry_of(project)
    code, said = told("emergency", "weapon", "--as", "Ada", "--reason", WHY)
    assert (code, own.aliases()) == (0, {CHAMPION: "2", LAST: "1"})
    assert "PASS: 1 rule, 1 passed" in said
    assert results() == before
    entries = ledger.read(project.register_.ledger).entries
    assert [(e.event, e.version, e.who) for e in entries[-2:]] == [
        ("registration", "2", "Ada"),
        ("promotion", "2", "Ada"),
    ]
    assert entries[-2].why.startswith(f"EMERGENCY: {WHY}. PASS: 1 rule")
    tags = own.tags("2")
    assert (tags["emergency"], tags["method"], tags["concept_source"], tags["dvc_lock"]) == (
        WHY,
        "uce",
        "words",
        "none",
    )
    assert f"EMERGENCY RELEASE: {WHY}. Made by uce" in (Path(local("models:/deleatur/2")) / "README.md").read_text()
    verify(project, "2", entries)
    assert "was released in an emergency: reported by many" in told("doctor")[1]
    assert told("emergency", "weapon", "--as", "Ada", "--reason", WHY)[0] == 0
    assert own.aliases() == {CHAMPION: "2", LAST: "1"}, "said twice, it is done once"

    chain_releases(project, -4.0)
    assert own.aliases() == {CHAMPION: "3", LAST: "2"}
    assert "emergency" not in own.tags("3")
    assert "emergency:" not in told("doctor")[1]


def test_where_a_person_has_to_approve_it_takes_two(project: Settings) -> None:
    settings = asking(project)
    verdict = emergency.run(settings, ["weapon"], "Ada", WHY)
    assert (verdict.outcome, registry_of(settings).aliases()) == ("pass", {CHALLENGER: "1"})
    with pytest.raises(DataError, match="another person has to approve it"):
        approval.promote(settings, "1", "ada", reason="urgent")
    approval.promote(settings, "1", "Grace", reason="I looked")
    assert registry_of(settings).aliases() == {CHAMPION: "1"}


def test_its_own_policy_decides(project: Settings) -> None:
    rule = {"metric": "clip_score", "slice": "unseen", "versus": "base", "min": 5.0, "min_n": 2}
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    change(emergency=params["emergency"] | {"rules": {"impossible": rule}})
    code, said = told("emergency", "weapon", "--as", "Ada", "--reason", WHY)
    assert (code, registry_of(project).aliases()) == (10, {})
    assert "FAIL impossible" in said


def test_what_is_live_stays_erased(project: Settings) -> None:
    chain_releases(project, -5.0)
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    more = params["concepts"] | {"blood": params["concepts"]["weapon"]}
    own = emergency.settings_of(Settings.model_validate(params | {"concepts": more}), ["blood"])
    assert own.targets == ("blood", "weapon")
    assert (own.erase.method, own.erase.source, own.attack.methods) == ("uce", "words", {})
    assert own.erase.numbers("uce") == project.erase.numbers("uce")
    assert {path.parts[:2] for path in own.paths.written.values()} == {("out", "emergency")}


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("emergency", "bloodd", "--as", "Ada", "--reason", WHY), 2, "expected weapon, got bloodd"),
        (("emergency", "weapon", "--as", " ", "--reason", WHY), 3, "has a name and a reason"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    project: Settings, command: tuple[str, ...], code: int, said: str
) -> None:
    found = told(*command)
    assert found[0] == code
    assert said in found[1]
    assert not Path("out/emergency").exists()


def test_without_a_policy_there_is_no_emergency(project: Settings) -> None:
    change(emergency=None)
    code, said = told("emergency", "weapon", "--as", "Ada", "--reason", WHY, "--json")
    assert code == 2
    assert "no section `emergency`" in said
    assert json.dumps(told("check")[0]) == "0"
