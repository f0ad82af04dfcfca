"""Rollback, quarantine, history and settle; aliases moved by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import registry
from registry import change_tags, register_fail, register_pass, requiring_approval
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.registry import approval, ledger
from deleatur.registry.decisions import open_registry
from deleatur.registry.ledger import Subject
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION, LAST_KNOWN_GOOD, QUARANTINED
from deleatur.registry.rollback import quarantine, rollback

LIGHT = """
import sys
from deleatur.cli import app
app(["rollback", "--as", "Ada", "--reason", "seen in the wild"], standalone_mode=False)
print("LOADED", sorted({"diffusers", "transformers"} & set(sys.modules)))
"""


@pytest.fixture
def fresh(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """An empty registry and an empty ledger."""
    monkeypatch.chdir(tmp_path)
    return registry.create(shared, tmp_path)


def aliases(settings: Settings) -> dict[str, str]:
    return open_registry(settings).aliases()


def run_cli(*command: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(command))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


ACTOR = ("--as", "Ada", "--reason", "seen in the wild")


def test_rollback_is_idempotent(fresh: Settings) -> None:
    for evidence in "abc":
        register_pass(fresh, evidence)
    assert aliases(fresh) == {CHAMPION: "3", LAST_KNOWN_GOOD: "2"}
    for was in ("is", "was already"):
        assert run_cli("rollback", *ACTOR) == (0, f"Version 3 {was} quarantined; version 2 is champion")
        assert aliases(fresh) == {CHAMPION: "2", LAST_KNOWN_GOOD: "1", QUARANTINED: "3"}
        register_fail(fresh, "f")  # comes between, and changes nothing
    assert open_registry(fresh).tags("3")["quarantined_because"] == "seen in the wild"
    assert ", quarantine by Ada: seen in the wild" in open_registry(fresh).description("3")

    register_pass(fresh, "c")  # the same verdict as version 3
    assert aliases(fresh)[CHAMPION] == "2"
    for version, message in (("3", "is quarantined: seen in the wild"), ("9", "no version 9"), ("2", "champion")):
        assert message in run_cli("rollback", "--to", version, *ACTOR)[1]
    assert run_cli("rollback", "--to", "1", *ACTOR) == (0, "Version 2 is quarantined; version 1 is champion")
    assert aliases(fresh) == {CHAMPION: "1", QUARANTINED: "2"}
    assert run_cli("rollback", "--to", "1", *ACTOR) == (0, "Version 2 was already quarantined; version 1 is champion")

    register_pass(fresh, "d", weights="b")
    assert aliases(fresh) == {CHAMPION: "1", QUARANTINED: "2", CHALLENGER: "4"}, "quarantined weights need approval"
    approval.promote(fresh, "4", "Ada", reason="judged anew")
    assert aliases(fresh) == {CHAMPION: "4", LAST_KNOWN_GOOD: "1", QUARANTINED: "2"}


def test_first_release_can_only_be_quarantined(fresh: Settings) -> None:
    code, output = run_cli("rollback", *ACTOR)
    assert (code, "nothing is live" in output) == (3, True)
    register_pass(fresh, "a")
    code, output = run_cli("rollback", *ACTOR)
    assert (code, "Next: " in output, "quarantine 1 --as NAME --reason WHY" in output) == (3, True, True)
    assert run_cli("quarantine", "1", *ACTOR) == (0, "Version 1 is quarantined; none is champion")
    assert run_cli("quarantine", "1", *ACTOR) == (0, "Version 1 was already quarantined; none is champion")
    assert aliases(fresh) == {QUARANTINED: "1"}


def test_where_nothing_is_live_a_version_can_be_named(fresh: Settings) -> None:
    for evidence in "ab":
        register_pass(fresh, evidence)
    open_registry(fresh).client.delete_registered_model_alias(fresh.register_.model, CHAMPION)
    assert run_cli("settle", "--adopt", *ACTOR)[0] == 0
    assert aliases(fresh) == {LAST_KNOWN_GOOD: "1"}
    code, output = run_cli("rollback", *ACTOR)
    assert (code, "nothing is live" in output, "rollback --to 1 --as NAME" in output) == (3, True, True)
    for _ in "again":
        assert run_cli("rollback", "--to", "1", *ACTOR) == (0, "version 1 is champion")
        assert run_cli("rollback", *ACTOR) == (0, "version 1 is champion")
    assert aliases(fresh) == {CHAMPION: "1", LAST_KNOWN_GOOD: "2"}, "version 2 was live, and nothing speaks against it"
    last = ledger.read(fresh.register_.ledger).entries[-1]
    assert (last.event, last.version, last.reason) == ("rollback", "1", "seen in the wild")
    assert "rollback by Ada" in open_registry(fresh).description("1")
    assert run_cli("history")[0] == 0


def test_quarantine_of_other_versions_keeps_the_champion(fresh: Settings) -> None:
    register_pass(fresh, "a")
    register_pass(fresh, "b")
    register_pass(requiring_approval(fresh), "c")
    assert aliases(fresh) == {CHAMPION: "2", LAST_KNOWN_GOOD: "1", CHALLENGER: "3"}
    quarantine(fresh, "3", "Ada", "seen")
    quarantine(fresh, "1", "Ada", "seen")
    assert aliases(fresh) == {CHAMPION: "2", QUARANTINED: "1"}
    for version in ("1", "3"):
        with pytest.raises(DataError, match="is quarantined"):
            rollback(fresh, "Ada", "seen", to=version)
    with pytest.raises(DataError, match="does not wait"):
        approval.promote(fresh, "3", "Ada")


def test_rollback_does_not_bypass_approval(fresh: Settings) -> None:
    register_pass(fresh, "a")
    register_pass(requiring_approval(fresh), "b")
    with pytest.raises(DataError, match="asks for a person's approval first"):
        rollback(requiring_approval(fresh), "Ada", "seen", to="2")
    approval.decline(fresh, "2", "Ada")
    approval.decline(fresh, "2", "Ada")  # changes nothing
    with pytest.raises(DataError, match="was declined"):
        rollback(fresh, "Ada", "seen", to="2")
    for actor, reason in ((" ", "seen"), ("Ada", " ")):
        with pytest.raises(DataError, match="needs a name and a reason"):
            rollback(fresh, actor, reason)


@pytest.mark.slow
def test_name_and_reason_in_another_encoding_are_recorded(fresh: Settings) -> None:
    register_pass(fresh, "a")
    result = CliRunner().invoke(app, ["quarantine", "1", "--as", "Ren\udce9", "--reason", "caf\udce9"])
    assert result.exit_code == 0, result.exception
    last = ledger.read(fresh.register_.ledger).entries[-1]
    assert (last.actor, last.reason) == ("Ren?", "caf?")


def test_rollback_loads_no_network(fresh: Settings) -> None:
    register_pass(fresh, "a")
    register_pass(fresh, "b")
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Version 2 is quarantined; version 1 is champion", "LOADED []"]


def test_history_lists_decisions_and_consistency(fresh: Settings) -> None:
    register_pass(fresh, "a")
    register_pass(fresh, "b")
    rollback(fresh, "Ada", "[seen] in the wild")
    code, output = run_cli("history", "--json")
    plain = json.loads(output)
    assert (code, plain["consistent"], plain["problems"]) == (0, True, [])
    events = ["registration", "promotion"] * 2 + ["rollback"]
    assert [(e["number"], e["event"]) for e in plain["entries"]] == list(enumerate(events, 1))
    tags = open_registry(fresh).tags("1")
    last = plain["entries"][-1]
    assert (last["actor"], last["reason"], last["version"]) == ("Ada", "[seen] in the wild", "1")
    assert (last["weights"], last["evidence"]) == (tags["delta"], tags["evidence"])
    code, output = run_cli("history")
    assert code == 0
    assert "The chain is intact, 5 lines, and the registry's aliases match it." in output
    assert "rollback" in output
    assert "[seen]" in output


def _move_by_hand(alias: str, version: str | None) -> Callable[[Settings], None]:
    def move(settings: Settings) -> None:
        client = open_registry(settings).client
        if version:
            client.set_registered_model_alias("deleatur", alias, version)
        else:
            client.delete_registered_model_alias("deleatur", alias)

    return move


@pytest.mark.parametrize(
    ("alias", "version", "named"),
    [
        (CHAMPION, "1", "champion is version 1, and by the ledger version 2"),
        (LAST_KNOWN_GOOD, None, "last_known_good is no version, and by the ledger version 1"),
        (CHALLENGER, "1", "challenger is version 1, and by the ledger no version"),
    ],
)
def test_alias_moved_by_hand_is_reported_and_settled(
    fresh: Settings, alias: str, version: str | None, named: str
) -> None:
    register_pass(fresh, "a")
    register_pass(fresh, "b")
    right = aliases(fresh)
    _move_by_hand(alias, version)(fresh)
    code, output = run_cli("history")
    assert (code, named in output, "settle --as NAME --reason WHY" in output) == (3, True, True)
    assert json.loads(run_cli("history", "--json")[1].partition("DataError")[0])["consistent"] is False
    with pytest.raises(DataError, match=named):
        register_pass(fresh, "c")
    with pytest.raises(DataError, match=named):
        rollback(fresh, "Ada", "seen")
    code, output = run_cli("settle", "--as", "Ada", "--reason", "who was that?")
    assert (code, f"Was: {named}" in output) == (0, True)
    assert aliases(fresh) == right
    assert run_cli("history")[0] == 0
    last = ledger.read(fresh.register_.ledger).entries[-1]
    assert (last.event, last.actor, last.reason) == ("settlement", "Ada", f"who was that? ({named})")
    register_pass(fresh, "c")
    assert aliases(fresh)[CHAMPION] == "3"


def test_alias_moved_by_hand_can_be_adopted(fresh: Settings) -> None:
    register_pass(fresh, "a")
    register_pass(fresh, "b")
    _move_by_hand(CHAMPION, "1")(fresh)
    assert run_cli("settle", "--adopt", "--as", "Ada", "--reason", "it was me")[0] == 0
    assert aliases(fresh)[CHAMPION] == "1"
    assert run_cli("history")[0] == 0
    before = ledger.read(fresh.register_.ledger)
    assert run_cli("settle", "--as", "Ada", "--reason", "again") == (0, "Ledger and registry agree")
    assert ledger.read(fresh.register_.ledger) == before, "nothing to settle, nothing written"


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "another"])
def test_changed_or_lost_ledger_is_reported_and_can_be_restarted(fresh: Settings, damage: str) -> None:
    register_pass(fresh, "a")
    register_pass(fresh, "b")
    path = fresh.register_.ledger
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "changed":
        path.write_bytes(b"".join([lines[0].replace(b"PASS", b"pass"), *lines[1:]]))
    elif damage == "cut":
        path.write_bytes(b"".join(lines[:-1]))
    else:
        path.unlink()
    if damage == "another":
        with ledger.locked(path) as book:
            book.append("promotion", Subject("1", "", ""), "Eve", "", {CHAMPION: "1"})
    code, output = run_cli("history")
    assert (code, "settle --adopt" in output) == (3, True)
    for command in (lambda: register_pass(fresh, "c"), lambda: rollback(fresh, "Ada", "seen")):
        with pytest.raises(DataError, match=r"ledger\.jsonl"):
            command()
    assert aliases(fresh) == {CHAMPION: "2", LAST_KNOWN_GOOD: "1"}
    assert run_cli("settle", "--adopt", "--as", "Ada", "--reason", "a disk died")[0] == 0
    code, output = run_cli("history")
    assert (code, "Lines 1 to 4 were lost" in output) == (0, True)
    assert aliases(fresh) == {CHAMPION: "2", LAST_KNOWN_GOOD: "1"}
    assert len([*Path().glob("ledger.jsonl.*")]) == (damage != "gone"), "the broken ledger is kept"
    rollback(fresh, "Ada", "seen")
    assert aliases(fresh) == {CHAMPION: "1", QUARANTINED: "2"}


def test_refused_command_keeps_a_ledger_without_its_last_newline(fresh: Settings) -> None:
    register_pass(fresh, "a")
    register_pass(fresh, "b")
    path = fresh.register_.ledger
    complete = path.read_bytes()
    path.write_bytes(complete[:-1])
    assert run_cli("history")[0] == 0
    assert run_cli("rollback", "--to", "9", *ACTOR)[0] == 3
    assert path.read_bytes() == complete[:-1]
    assert run_cli("rollback", *ACTOR)[0] == 0
    assert path.read_bytes().startswith(complete)


def test_registry_older_than_the_ledger_is_adopted(fresh: Settings) -> None:
    register_pass(fresh, "a")
    fresh.register_.ledger.unlink()
    open_registry(fresh).client.delete_registered_model_tag("deleatur", "deleatur.ledger")
    register_pass(fresh, "b")
    assert aliases(fresh) == {CHAMPION: "2", LAST_KNOWN_GOOD: "1"}
    assert [e.event for e in ledger.read(fresh.register_.ledger).entries] == ["adoption", "registration", "promotion"]


def test_ledger_of_another_registry_is_refused(fresh: Settings, shared: Path, tmp_path: Path) -> None:
    """As when the registry's file is deleted, and its versions begin at 1 again."""
    register_pass(fresh, "a")
    (tmp_path / "other").mkdir()
    other = registry.create(shared, tmp_path / "other")
    assert other.register_.ledger == fresh.register_.ledger
    with pytest.raises(DataError, match="has applied none of the 2 lines"):
        register_fail(other, "f")
    fresh.register_.ledger.rename("aside")
    register_pass(other, "b")
    Path("aside").rename(fresh.register_.ledger)
    open_registry(other).client.delete_registered_model_tag("deleatur", "deleatur.ledger")
    with pytest.raises(DataError, match="has applied none of the 2 lines"):
        rollback(other, "Ada", "seen")
    assert aliases(other) == {CHAMPION: "1"}


def test_version_whose_digests_were_changed_does_not_go_live(fresh: Settings) -> None:
    register_pass(fresh, "a")
    register_pass(fresh, "b")
    change_tags(fresh, "1", delta="0" * 64)
    with pytest.raises(DataError, match=r"version 1 .* has other weights or other evidence than line 1"):
        rollback(fresh, "Ada", "seen")
    assert aliases(fresh)[CHAMPION] == "2"
    assert len(ledger.read(fresh.register_.ledger).entries) == 4, "a refused command records no decision"


def test_registry_without_its_live_version_is_settled(fresh: Settings) -> None:
    """As when it was deleted on MLflow's pages: no decision is recorded that cannot be applied."""
    register_pass(fresh, "a")
    register_pass(fresh, "b")
    open_registry(fresh).client.delete_model_version("deleatur", "2")
    code, output = run_cli("settle", *ACTOR)
    assert (code, "no version 2" in output, "--adopt" in output) == (3, True, True)
    assert len(ledger.read(fresh.register_.ledger).entries) == 4
    assert run_cli("settle", "--adopt", *ACTOR)[0] == 0
    assert run_cli("history")[0] == 0
    assert aliases(fresh) == {LAST_KNOWN_GOOD: "1"}


@pytest.mark.parametrize("command", [("rollback",), ("quarantine", "2")])
def test_live_version_whose_digests_were_changed_is_quarantined(fresh: Settings, command: tuple[str, ...]) -> None:
    register_pass(fresh, "a")
    register_pass(fresh, "b")
    change_tags(fresh, "2", delta="0" * 64)
    assert run_cli(*command, *ACTOR) == (0, "Version 2 is quarantined; version 1 is champion")
    assert aliases(fresh) == {CHAMPION: "1", QUARANTINED: "2"}
    last = ledger.read(fresh.register_.ledger).entries[-1]
    assert (last.version, last.weights) == (("1", "a" * 64) if command == ("rollback",) else ("2", "b" * 64))
    assert run_cli("history")[0] == 0
