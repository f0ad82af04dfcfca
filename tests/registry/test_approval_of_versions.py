"""Approval by a second person, in time, and of the newest candidate."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import registry
from registry import register_fail, register_pass, requiring_approval

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.registry import ledger
from deleatur.registry.approval import decline, promote
from deleatur.registry.decisions import STARTED_BY, open_registry
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION


@pytest.fixture
def fresh(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """An empty registry that requires approval; Ada starts the runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(STARTED_BY, "Ada Lovelace")
    return requiring_approval(registry.create(shared, tmp_path))


def advance_clock(monkeypatch: pytest.MonkeyPatch, **time: int) -> None:
    now = ledger.now() + timedelta(**time)
    monkeypatch.setattr(ledger, "now", lambda: now)


def aliases(settings: Settings) -> dict[str, str]:
    return open_registry(settings).aliases()


def events(settings: Settings) -> list[tuple[str, str | None, str]]:
    return [(e.event, e.version, e.actor) for e in ledger.read(settings.register_.ledger).entries]


@pytest.mark.parametrize("name", ["Ada Lovelace", "ada  lovelace ", "Ada Lovelace <ada@example.org>"])
def test_starter_of_a_run_cannot_approve_but_can_decline(fresh: Settings, name: str) -> None:
    register_pass(fresh, "a")
    assert ", registration by Ada Lovelace: PASS" in open_registry(fresh).description("1")
    with pytest.raises(DataError, match="another person") as refused:
        promote(fresh, "1", name)
    assert "by another person" in refused.value.hint
    assert aliases(fresh) == {CHALLENGER: "1"}
    decline(fresh, "1", name)
    assert aliases(fresh) == {}


def test_second_person_approves_and_ledger_records_name_and_account(fresh: Settings) -> None:
    register_pass(fresh, "a")
    promote(fresh, "1", "Grace")
    assert events(fresh) == [
        ("registration", "1", "Ada Lovelace"),
        ("approval", "1", "Grace"),
        ("promotion", "1", "Grace"),
    ]
    assert all("@" in e.account for e in ledger.read(fresh.register_.ledger).entries)


def test_starter_defaults_to_git_user_then_account(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STARTED_BY)
    for name, value in {"COUNT": "1", "KEY_0": "user.name", "VALUE_0": "Grace"}.items():
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    register_pass(fresh, "a")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "")
    register_pass(fresh, "b")
    assert [actor for event, _, actor in events(fresh) if event == "registration"] == ["Grace", ledger.account()]


def test_expired_challenger_has_to_be_registered_again(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    register_pass(fresh, "a")
    advance_clock(monkeypatch, days=13)
    register_pass(fresh, "a")
    assert [event for event, *_ in events(fresh)] == ["registration"], "still in time"
    advance_clock(monkeypatch, days=2)
    with pytest.raises(
        DataError, match=r"waited since .*, and approvals expire after 14 days: it has to be evaluated again"
    ):
        promote(fresh, "1", "Grace")
    assert aliases(fresh) == {}
    with pytest.raises(DataError, match="does not wait"):
        promote(fresh, "1", "Grace")
    register_pass(fresh, "a")  # as `register` does where everything is up to date
    assert aliases(fresh) == {CHALLENGER: "1"}
    promote(fresh, "1", "Grace")
    assert [event for event, *_ in events(fresh)] == ["registration", "expiry", "registration", "approval", "promotion"]


def test_registering_again_renews_an_expired_challenger(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    register_pass(fresh, "a")
    advance_clock(monkeypatch, days=15)
    register_pass(fresh, "a")
    assert [event for event, *_ in events(fresh)] == ["registration", "expiry", "registration"]
    promote(fresh, "1", "Grace")
    assert aliases(fresh) == {CHAMPION: "1"}


def test_new_candidate_voids_the_previous_challenger(fresh: Settings) -> None:
    register_pass(fresh, "a")
    register_fail(fresh, "f")  # other weights: the challenger stays
    assert aliases(fresh) == {CHALLENGER: "1"}
    register_pass(fresh, "b")
    assert aliases(fresh) == {CHALLENGER: "2"}
    with pytest.raises(DataError, match="version 2 does"):
        promote(fresh, "1", "Grace")
    register_fail(fresh, "9", weights="b")
    assert aliases(fresh) == {}, "the same weights failed the current policy"
    assert events(fresh)[2:] == [
        ("voiding", "1", "Ada Lovelace"),
        ("registration", "2", "Ada Lovelace"),
        ("voiding", "2", "Ada Lovelace"),
        ("registration", None, "Ada Lovelace"),
    ]


def test_challenger_older_than_the_ledger_can_be_approved(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    register_pass(fresh, "a")
    fresh.register_.ledger.unlink()
    open_registry(fresh).client.delete_registered_model_tag("deleatur", "deleatur.ledger")
    promote(fresh, "1", "Grace")
    assert aliases(fresh) == {CHAMPION: "1"}
