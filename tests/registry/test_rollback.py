"""Back to what was good, without a GPU and without weights; what was taken back stays out; hands off the aliases."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import registry
from registry import asking, fails, passes
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.registry import approval, ledger
from deleatur.registry.decisions import registry_of
from deleatur.registry.ledger import Subject
from deleatur.registry.mlflow_client import CHALLENGER, CHAMPION, LAST, QUARANTINED
from deleatur.registry.rollback import quarantine, rollback

LIGHT = """
import sys
from deleatur.cli import app
app(["rollback", "--as", "Ada", "--reason", "seen in the wild"], standalone_mode=False)
print("LOADED", sorted({"torch", "diffusers", "transformers"} & set(sys.modules)))
"""


@pytest.fixture
def fresh(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A registry and a ledger with nothing in them."""
    monkeypatch.chdir(tmp_path)
    return registry.make(shared, tmp_path)


def aliases(settings: Settings) -> dict[str, str]:
    return registry_of(settings).aliases()


def told(*command: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(command))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


BY = ("--as", "Ada", "--reason", "seen in the wild")


def test_a_release_is_taken_back_once_however_often_it_is_said(fresh: Settings) -> None:
    for evidence in "abc":
        passes(fresh, evidence)
    assert aliases(fresh) == {CHAMPION: "3", LAST: "2"}
    for was in ("is", "was already"):
        assert told("rollback", *BY) == (0, f"Version 3 {was} quarantined; version 2 is champion")
        assert aliases(fresh) == {CHAMPION: "2", LAST: "1", QUARANTINED: "3"}
        fails(fresh, "f")  # comes between, and changes nothing
    tags = registry_of(fresh).tags("3")
    assert (tags["quarantined_by"], tags["quarantined_because"]) == ("Ada", "seen in the wild")

    passes(fresh, "c")  # the same verdict as version 3
    assert aliases(fresh)[CHAMPION] == "2"
    for version, said in (("3", "is quarantined: seen in the wild"), ("9", "no version 9"), ("2", "champion")):
        assert said in told("rollback", "--to", version, *BY)[1]
    assert told("rollback", "--to", "1", *BY) == (0, "Version 2 is quarantined; version 1 is champion")
    assert aliases(fresh) == {CHAMPION: "1", QUARANTINED: "2"}
    assert told("rollback", "--to", "1", *BY) == (0, "Version 2 was already quarantined; version 1 is champion")

    passes(fresh, "d", weights="b")
    assert aliases(fresh) == {CHAMPION: "1", QUARANTINED: "2", CHALLENGER: "4"}, "weights that were taken back wait"
    approval.promote(fresh, "4", "Ada", reason="judged anew")
    assert aliases(fresh) == {CHAMPION: "4", LAST: "1", QUARANTINED: "2"}


def test_the_first_release_can_only_be_quarantined(fresh: Settings) -> None:
    code, said = told("rollback", *BY)
    assert (code, "nothing is live" in said) == (3, True)
    passes(fresh, "a")
    code, said = told("rollback", *BY)
    assert (code, "Next: " in said, "quarantine 1 --as NAME --reason WHY" in said) == (3, True, True)
    assert told("quarantine", "1", *BY) == (0, "Version 1 is quarantined; none is champion")
    assert told("quarantine", "1", *BY) == (0, "Version 1 was already quarantined; none is champion")
    assert aliases(fresh) == {QUARANTINED: "1"}


def test_what_waits_or_was_is_quarantined_and_what_is_live_stays(fresh: Settings) -> None:
    passes(fresh, "a")
    passes(fresh, "b")
    passes(asking(fresh), "c")
    assert aliases(fresh) == {CHAMPION: "2", LAST: "1", CHALLENGER: "3"}
    quarantine(fresh, "3", "Ada", "seen")
    quarantine(fresh, "1", "Ada", "seen")
    assert aliases(fresh) == {CHAMPION: "2", QUARANTINED: "1"}
    for version in ("1", "3"):
        with pytest.raises(DataError, match="is quarantined"):
            rollback(fresh, "Ada", "seen", to=version)
    with pytest.raises(DataError, match="does not wait"):
        approval.promote(fresh, "3", "Ada")


def test_nothing_goes_live_past_a_person(fresh: Settings) -> None:
    passes(fresh, "a")
    passes(asking(fresh), "b")
    with pytest.raises(DataError, match="asks a person first"):
        rollback(asking(fresh), "Ada", "seen", to="2")
    approval.decline(fresh, "2", "Ada")
    approval.decline(fresh, "2", "Ada")  # changes nothing
    with pytest.raises(DataError, match="was declined"):
        rollback(fresh, "Ada", "seen", to="2")
    for who, why in ((" ", "seen"), ("Ada", " ")):
        with pytest.raises(DataError, match="says who it is, and why"):
            rollback(fresh, who, why)


@pytest.mark.slow
def test_no_network_is_loaded(fresh: Settings) -> None:
    passes(fresh, "a")
    passes(fresh, "b")
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Version 2 is quarantined; version 1 is champion", "LOADED []"]


def test_history_tells_who_did_what_and_that_all_is_in_order(fresh: Settings) -> None:
    passes(fresh, "a")
    passes(fresh, "b")
    rollback(fresh, "Ada", "[seen] in the wild")
    code, said = told("history", "--json")
    plain = json.loads(said)
    assert (code, plain["whole"], plain["problems"]) == (0, True, [])
    events = ["registration", "promotion"] * 2 + ["rollback"]
    assert [(e["number"], e["event"]) for e in plain["lines"]] == list(enumerate(events, 1))
    tags = registry_of(fresh).tags("1")
    last = plain["lines"][-1]
    assert (last["who"], last["why"], last["version"]) == ("Ada", "[seen] in the wild", "1")
    assert (last["weights"], last["evidence"]) == (tags["delta"], tags["evidence"])
    code, said = told("history")
    assert code == 0
    assert "The chain is whole, 5 lines, and the registry's aliases are what it says." in said
    assert "rollback" in said
    assert "[seen]" in said


def _hand(alias: str, version: str | None) -> Callable[[Settings], None]:
    def move(settings: Settings) -> None:
        client = registry_of(settings).client
        if version:
            client.set_registered_model_alias("deleatur", alias, version)
        else:
            client.delete_registered_model_alias("deleatur", alias)

    return move


@pytest.mark.parametrize(
    ("alias", "version", "named"),
    [
        (CHAMPION, "1", "champion is version 1, and by the ledger version 2"),
        (LAST, None, "last_known_good is no version, and by the ledger version 1"),
        (CHALLENGER, "1", "challenger is version 1, and by the ledger no version"),
    ],
)
def test_an_alias_that_was_moved_by_hand_is_named_and_put_right(
    fresh: Settings, alias: str, version: str | None, named: str
) -> None:
    passes(fresh, "a")
    passes(fresh, "b")
    right = aliases(fresh)
    _hand(alias, version)(fresh)
    code, said = told("history")
    assert (code, named in said, "settle --as NAME --reason WHY" in said) == (3, True, True)
    assert json.loads(told("history", "--json")[1].partition("DataError")[0])["whole"] is False
    with pytest.raises(DataError, match=named):
        passes(fresh, "c")
    with pytest.raises(DataError, match=named):
        rollback(fresh, "Ada", "seen")
    code, said = told("settle", "--as", "Ada", "--reason", "who was that?")
    assert (code, f"Was: {named}" in said) == (0, True)
    assert aliases(fresh) == right
    assert told("history")[0] == 0
    last = ledger.read(fresh.register_.ledger).entries[-1]
    assert (last.event, last.who, last.why) == ("settlement", "Ada", f"who was that? ({named})")
    passes(fresh, "c")
    assert aliases(fresh)[CHAMPION] == "3"


def test_what_a_hand_has_done_can_be_adopted(fresh: Settings) -> None:
    passes(fresh, "a")
    passes(fresh, "b")
    _hand(CHAMPION, "1")(fresh)
    assert told("settle", "--adopt", "--as", "Ada", "--reason", "it was me")[0] == 0
    assert aliases(fresh)[CHAMPION] == "1"
    assert told("history")[0] == 0
    before = ledger.read(fresh.register_.ledger)
    assert told("settle", "--as", "Ada", "--reason", "again") == (0, "Ledger and registry say the same")
    assert ledger.read(fresh.register_.ledger) == before, "nothing to settle, nothing to write"


@pytest.mark.parametrize("how", ["changed", "cut", "gone", "another"])
def test_a_ledger_that_was_changed_or_lost_is_noticed_and_can_be_begun_anew(fresh: Settings, how: str) -> None:
    passes(fresh, "a")
    passes(fresh, "b")
    path = fresh.register_.ledger
    lines = path.read_bytes().splitlines(keepends=True)
    if how == "changed":
        path.write_bytes(b"".join([lines[0].replace(b"PASS", b"pass"), *lines[1:]]))
    elif how == "cut":
        path.write_bytes(b"".join(lines[:-1]))
    else:
        path.unlink()
    if how == "another":
        with ledger.opened(path) as book:
            book.append("promotion", Subject("1", "", ""), "Eve", "", {CHAMPION: "1"})
    code, said = told("history")
    assert (code, "settle --adopt" in said) == (3, True)
    for command in (lambda: passes(fresh, "c"), lambda: rollback(fresh, "Ada", "seen")):
        with pytest.raises(DataError, match=r"ledger\.jsonl"):
            command()
    assert aliases(fresh) == {CHAMPION: "2", LAST: "1"}
    assert told("settle", "--adopt", "--as", "Ada", "--reason", "a disk died")[0] == 0
    code, said = told("history")
    assert (code, "Lines 1 to 4 were lost" in said) == (0, True)
    assert aliases(fresh) == {CHAMPION: "2", LAST: "1"}
    assert len([*Path().glob("ledger.jsonl.*")]) == (how != "gone"), "what was there is kept"
    rollback(fresh, "Ada", "seen")
    assert aliases(fresh) == {CHAMPION: "1", QUARANTINED: "2"}


def test_a_registry_older_than_the_ledger_is_taken_over(fresh: Settings) -> None:
    passes(fresh, "a")
    fresh.register_.ledger.unlink()
    registry_of(fresh).client.delete_registered_model_tag("deleatur", "deleatur.ledger")
    passes(fresh, "b")
    assert aliases(fresh) == {CHAMPION: "2", LAST: "1"}
    assert [e.event for e in ledger.read(fresh.register_.ledger).entries] == ["adoption", "registration", "promotion"]


def test_the_ledger_of_another_registry_moves_nothing(fresh: Settings, shared: Path, tmp_path: Path) -> None:
    """As when the registry's file is deleted, and its versions begin at 1 again."""
    passes(fresh, "a")
    (tmp_path / "other").mkdir()
    other = registry.make(shared, tmp_path / "other")
    assert other.register_.ledger == fresh.register_.ledger
    with pytest.raises(DataError, match="has no version 1"):
        fails(other, "f")
    fresh.register_.ledger.rename("aside")
    passes(other, "b")
    Path("aside").rename(fresh.register_.ledger)
    registry_of(other).client.delete_registered_model_tag("deleatur", "deleatur.ledger")
    with pytest.raises(DataError, match="has other weights or other evidence"):
        rollback(other, "Ada", "seen")
    assert aliases(other) == {CHAMPION: "1"}
