"""A person's word: another person's, in time, and on the newest candidate."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import registry
from registry import asking, fails, passes

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.registry import ledger
from deleatur.registry.approval import decline, promote
from deleatur.registry.decisions import STARTED_BY, registry_of
from deleatur.registry.mlflow_client import CHALLENGER, CHAMPION


@pytest.fixture
def fresh(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """An empty registry, a policy that asks a person, and Ada who starts the runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(STARTED_BY, "Ada Lovelace")
    return asking(registry.make(shared, tmp_path))


def later(monkeypatch: pytest.MonkeyPatch, **time: int) -> None:
    now = ledger.now() + timedelta(**time)
    monkeypatch.setattr(ledger, "now", lambda: now)


def aliases(settings: Settings) -> dict[str, str]:
    return registry_of(settings).aliases()


def events(settings: Settings) -> list[tuple[str, str | None, str]]:
    return [(e.event, e.version, e.who) for e in ledger.read(settings.register_.ledger).entries]


@pytest.mark.parametrize("name", ["Ada Lovelace", "ada  lovelace ", "Ada Lovelace <ada@example.org>"])
def test_who_started_the_run_cannot_approve_it_but_decline_it(fresh: Settings, name: str) -> None:
    passes(fresh, "a")
    assert registry_of(fresh).tags("1")["started_by"] == "Ada Lovelace"
    with pytest.raises(DataError, match="another person") as refused:
        promote(fresh, "1", name)
    assert "by somebody else" in refused.value.hint
    assert aliases(fresh) == {CHALLENGER: "1"}
    decline(fresh, "1", name)
    assert aliases(fresh) == {}


def test_another_person_can_and_the_ledger_says_who_and_from_where(fresh: Settings) -> None:
    passes(fresh, "a")
    promote(fresh, "1", "Grace")
    assert events(fresh) == [
        ("registration", "1", "Ada Lovelace"),
        ("approval", "1", "Grace"),
        ("promotion", "1", "Grace"),
    ]
    assert all("@" in e.account for e in ledger.read(fresh.register_.ledger).entries)


def test_who_started_is_gits_user_where_nobody_says_better(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STARTED_BY)
    for name, value in {"COUNT": "1", "KEY_0": "user.name", "VALUE_0": "Grace"}.items():
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    passes(fresh, "a")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "")
    passes(fresh, "b")
    assert [who for event, _, who in events(fresh) if event == "registration"] == ["Grace", ledger.account()]


def test_what_waited_too_long_is_judged_anew(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    passes(fresh, "a")
    later(monkeypatch, days=13)
    passes(fresh, "a")
    assert [event for event, *_ in events(fresh)] == ["registration"], "still in time"
    later(monkeypatch, days=2)
    with pytest.raises(DataError, match=r"waited since .*, and approvals are for 14 days: it has to be judged anew"):
        promote(fresh, "1", "Grace")
    assert aliases(fresh) == {}
    with pytest.raises(DataError, match="does not wait"):
        promote(fresh, "1", "Grace")
    passes(fresh, "a")  # what `register` does where all is up to date
    assert aliases(fresh) == {CHALLENGER: "1"}
    promote(fresh, "1", "Grace")
    assert [event for event, *_ in events(fresh)] == ["registration", "expiry", "registration", "approval", "promotion"]


def test_a_chain_that_runs_again_renews_what_waited_too_long(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    passes(fresh, "a")
    later(monkeypatch, days=15)
    passes(fresh, "a")
    assert [event for event, *_ in events(fresh)] == ["registration", "expiry", "registration"]
    promote(fresh, "1", "Grace")
    assert aliases(fresh) == {CHAMPION: "1"}


def test_a_candidate_that_was_made_again_voids_the_one_that_waits(fresh: Settings) -> None:
    passes(fresh, "a")
    fails(fresh, "f")  # of other weights: says nothing about what waits
    assert aliases(fresh) == {CHALLENGER: "1"}
    passes(fresh, "b")
    assert aliases(fresh) == {CHALLENGER: "2"}
    with pytest.raises(DataError, match="version 2 does"):
        promote(fresh, "1", "Grace")
    fails(fresh, "9", weights="b")
    assert aliases(fresh) == {}, "the same weights failed by what is asked now"
    assert events(fresh)[2:] == [
        ("voiding", "1", "Ada Lovelace"),
        ("registration", "2", "Ada Lovelace"),
        ("voiding", "2", "Ada Lovelace"),
        ("registration", None, "Ada Lovelace"),
    ]


def test_a_challenger_older_than_the_ledger_waits_for_another_person_than_took_it_over(
    fresh: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes(fresh, "a")
    fresh.register_.ledger.unlink()
    registry_of(fresh).client.delete_registered_model_tag("deleatur", "deleatur.ledger")
    promote(fresh, "1", "Grace")
    assert aliases(fresh) == {CHAMPION: "1"}
